"""Where a data set is read or written: a path, or a place on S3."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from train.common.errors import UsageError

if TYPE_CHECKING:
    from pyarrow import fs

S3 = "s3://"
WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Place:
    """A file, a folder, or a pattern of files' paths."""

    filesystem: "fs.FileSystem"
    path: str
    """In the file system; without a slash at its end."""
    scheme: str = ""
    """The prefix of paths in messages: "s3://", or nothing for paths of this machine."""

    def __str__(self) -> str:
        return self.name(self.path)

    def name(self, path: str) -> str:
        """Another path of the file system, for messages."""
        return f"{self.scheme}{path}"


def local_place(path: Path) -> Place:
    from pyarrow import fs

    return Place(fs.LocalFileSystem(), path.absolute().as_posix())


def parse_place(text: str, flag: str) -> Place:
    """What a flag names: a path, or ``s3://BUCKET/KEY``, at AWS_ENDPOINT_URL where that is set."""
    from pyarrow import fs

    if not text.startswith(S3):
        if "://" in text:
            raise UsageError(f"{flag} {text}: give a path, or {S3}BUCKET/KEY.")
        return local_place(Path(text))
    path = text.removeprefix(S3).rstrip("/")
    if not path or path.startswith("/") or WILDCARD.search(path.partition("/")[0]):
        raise UsageError(f"{flag} {text}: give {S3}BUCKET/KEY.")
    # Workers on other machines get the endpoint with the file system; they find keys as every AWS program does.
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    filesystem = fs.S3FileSystem(
        endpoint_override=endpoint.netloc or None,
        scheme=endpoint.scheme or None,
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        connect_timeout=5.0,
    )
    return Place(filesystem, path, S3)
