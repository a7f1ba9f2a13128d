"""A data set of many Parquet files, in folders or on S3: listed, cut into blocks, read block by block."""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from train.common.errors import DataError, UsageError, first_line
from train.data.read_rows import ArrowChunk, open_parquet, parquet_batches, unreadable_parquet

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import fs, parquet


S3 = "s3://"


SUFFIX = ".parquet"


_LISTING_THREADS = 16
"""How many files' footers are read at a time: on S3 most of that is waiting."""


_CONNECT_SECONDS = 5.0


_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Place:
    """A file, a folder or a pattern.

    Attributes:
        filesystem: where it lies.
        path: there; without a slash at its end.
        scheme: what stands before a path so that people know the file system; "s3://" or nothing.
    """

    filesystem: "fs.FileSystem"
    path: str
    scheme: str

    def __str__(self) -> str:
        return self.name(self.path)

    @property
    def is_local(self) -> bool:
        """Whether it is a path of this machine, which a shared folder is too."""
        return not self.scheme

    def name(self, path: str) -> str:
        """A path there, for people."""
        return f"{self.scheme}{path}"


def parse_place(text: str, flag: str) -> Place:
    """What ``--in`` or ``--out`` names: a path, or ``s3://BUCKET/KEY`` at AWS_ENDPOINT_URL where that is set.

    Args:
        flag: its name, for a complaint.

    Raises:
        UsageError: it is neither.
    """
    from pyarrow import fs

    if not text.startswith(S3):
        if "://" in text:
            raise UsageError(f"{flag} {text}: give a path, or {S3}BUCKET/KEY.")
        return Place(fs.LocalFileSystem(), Path(text).absolute().as_posix(), "")
    path = text.removeprefix(S3).rstrip("/")
    if not path or path.startswith("/") or _WILDCARD.search(path.partition("/")[0]):
        raise UsageError(f"{flag} {text}: give {S3}BUCKET/KEY.")
    # Workers on other machines get the endpoint with the file system; keys they find as every AWS program does.
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    filesystem = fs.S3FileSystem(
        endpoint_override=endpoint.netloc or None,
        scheme=endpoint.scheme or None,
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        connect_timeout=_CONNECT_SECONDS,
    )
    return Place(filesystem, path, S3)


# In.


@dataclass(frozen=True)
class SourceFile:
    """A Parquet file.

    Attributes:
        path: in its file system.
        size: in bytes.
        version: what changes when it is written anew: its ETag on S3, else the time in nanoseconds.
        rows: how many.
        group_starts: of each row group, how many rows of the file come before it.
    """

    path: str
    size: int
    version: str
    rows: int
    group_starts: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """Rows of one file that follow one another: what is labelled, written and, after a crash, done again as a whole.

    Attributes:
        number: its place in the data set.
        file: index of the file.
        start: how many rows of the file come before it.
        rows: how many.
    """

    number: int
    file: int
    start: int
    rows: int


@dataclass(frozen=True)
class DataSet:
    """Files with the same columns, in the order of their names.

    Attributes:
        place: as the user named them.
        files: at least one with rows.
        schema: of each.
    """

    place: Place
    files: tuple[SourceFile, ...]
    schema: "pyarrow.Schema"

    @property
    def rows(self) -> int:
        """Of all files."""
        return sum(file.rows for file in self.files)

    @property
    def fingerprint(self) -> str:
        """A SHA-256 over every file's name, size and version."""
        lines = json.dumps([[file.path, file.size, file.version] for file in self.files])
        return hashlib.sha256(lines.encode()).hexdigest()

    def name(self, index: int) -> str:
        """Of a file, for people."""
        return self.place.name(self.files[index].path)

    def blocks(self, block_rows: int) -> list[Block]:
        """All rows, cut into blocks of at most so many."""
        cuts = [
            (index, start, min(block_rows, file.rows - start))
            for index, file in enumerate(self.files)
            for start in range(0, file.rows, block_rows)
        ]
        return [Block(number, *cut) for number, cut in enumerate(cuts)]


def find_data_set(place: Place, out: Place) -> DataSet:
    """List the files that ``--in`` names and read their footers.

    Args:
        out: where the output shall lie.

    Raises:
        DataError: there are none, one cannot be read or has other columns than the first, or none has rows.
        UsageError: the output would lie among them.
    """
    import pyarrow

    try:
        found = _list(place)
    except (OSError, pyarrow.ArrowException) as cause:
        raise DataError(f"--in {place} cannot be read ({first_line(cause)}).") from cause
    if out.scheme == place.scheme and _lists(place, f"{out.path}/{part_name(0)}"):
        raise UsageError(f"--out {out} lies where --in {place} is read. Choose another folder.")
    with ThreadPoolExecutor(_LISTING_THREADS) as threads:
        # In order, so that of several broken files always the first is named.
        opened = list(threads.map(lambda info: _read_footer(place, info), found))
    schema = opened[0].schema
    for footer in opened[1:]:
        if not footer.schema.equals(schema):
            raise DataError(
                f"{place.name(footer.file.path)} has other columns than {place.name(opened[0].file.path)} "
                f"({_difference(schema, footer.schema)}). Label them one by one, or give them the same."
            )
    data_set = DataSet(place, tuple(footer.file for footer in opened), schema)
    if not data_set.rows:
        raise DataError(f"--in {place} has no rows. Give files with at least one text.")
    return data_set


def _lists(place: Place, path: str) -> bool:
    """Whether a file would be among those that a folder or a pattern stands for."""
    # From the root on, so that a pattern stands for whole paths.
    is_match = PurePosixPath("/", path).match(f"/{place.path.lstrip('/')}")
    return path.startswith(f"{place.path}/") or (_WILDCARD.search(place.path) is not None and is_match)


def _list(place: Place) -> "list[fs.FileInfo]":
    from pyarrow import fs

    exact = place.filesystem.get_file_info(place.path)
    if exact.type == fs.FileType.File:
        if not exact.path.endswith(SUFFIX):
            raise DataError(_no_parquet(place))
        return [exact]
    base = place.path
    wildcard = None if exact.type == fs.FileType.Directory else _WILDCARD.search(place.path)
    if wildcard is not None:
        base = place.path[: wildcard.start()].rpartition("/")[0]
    elif exact.type != fs.FileType.Directory:
        raise DataError(f"--in {place}: there is no such file or folder.")
    infos = place.filesystem.get_file_info(fs.FileSelector(base or "/", recursive=True, allow_not_found=True))
    found = []
    for info in infos:
        below = PurePosixPath(info.path).relative_to(base or "/").parts
        is_hidden = any(part.startswith(("_", ".")) for part in below)
        if info.type == fs.FileType.File and _lists(place, info.path) and not is_hidden:
            found.append(info)
    data = sorted((info for info in found if info.path.endswith(SUFFIX)), key=lambda info: str(info.path))
    if not data:
        raise DataError(_no_parquet(place) if found else f"--in {place}: there is no such file.")
    return data


def _no_parquet(place: Place) -> str:
    return (
        f"--in {place}: no file there ends in {SUFFIX}, which --engine ray reads alone. --engine local labels a .csv or "
        ".jsonl file of any size."
    )


@dataclass(frozen=True)
class _Footer:
    file: SourceFile
    schema: "pyarrow.Schema"


def _read_footer(place: Place, info: "fs.FileInfo") -> _Footer:
    import pyarrow

    name = place.name(info.path)
    try:
        version = _version(place.filesystem, info)
        with place.filesystem.open_input_file(info.path) as stream, open_parquet(stream, name) as opened:
            metadata = opened.metadata
            sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
            starts = tuple(accumulate(sizes[:-1], initial=0)) if sizes else ()
            schema = opened.schema_arrow
    except (pyarrow.ArrowException, OSError) as cause:
        raise unreadable_parquet(name, 0, cause) from cause
    return _Footer(SourceFile(info.path, info.size, version, sum(sizes), starts), schema)


def _version(filesystem: "fs.FileSystem", info: "fs.FileInfo") -> str:
    from pyarrow import fs

    if isinstance(filesystem, fs.S3FileSystem):
        with filesystem.open_input_stream(info.path, compression=None) as stream:
            tag = stream.metadata().get(b"ETag")
        if tag is not None:
            return str(tag.decode())
    return str(info.mtime_ns)


def _difference(first: "pyarrow.Schema", second: "pyarrow.Schema") -> str:
    """The first column in which two schemas differ."""
    for name in dict.fromkeys([*first.names, *second.names]):
        kinds = [str(schema.field(name).type) if name in schema.names else "missing" for schema in (first, second)]
        if kinds[0] != kinds[1]:
            return f"{name!r}: {kinds[1]} instead of {kinds[0]}"
    return "in another order, or with other nulls"


class BlockReader:
    """Reads blocks. Of one file after the other and forwards every row is decoded once at most; others cost a new start."""

    def __init__(self, data_set: DataSet) -> None:
        self._data_set = data_set
        self._stream: Any = None
        self._index = -1
        self._position = 0
        self._batches: Iterator[pyarrow.RecordBatch] = iter(())
        self._rest: pyarrow.RecordBatch | None = None

    def read(self, block: Block) -> ArrowChunk:
        """The rows of a block.

        Raises:
            DataError: the file cannot be read, or is not the one that was listed.
        """
        import pyarrow

        name = self._data_set.name(block.file)
        try:
            self._go_to(block)
            for _ in self._take(block.start - self._position):
                pass
            return ArrowChunk(block.start, pyarrow.Table.from_batches(list(self._take(block.rows))))
        except (pyarrow.ArrowException, OSError) as cause:
            raise unreadable_parquet(name, max(0, self._position), cause) from cause

    def _go_to(self, block: Block) -> None:
        """Be at the block's first row, or before it in the same row group."""
        file = self._data_set.files[block.file]
        if self._index != block.file:
            self._open(block.file)
        elif self._position == block.start:
            return
        wanted = bisect_right(file.group_starts, block.start) - 1
        is_behind = self._position > block.start
        if self._position < 0 or is_behind or bisect_right(file.group_starts, self._position) - 1 < wanted:
            groups = range(wanted, len(file.group_starts))
            self._batches, self._rest = parquet_batches(self._opened, _BATCH_ROWS, list(groups)), None
            self._position = file.group_starts[wanted]

    def _open(self, index: int) -> None:
        self.close()
        place, file = self._data_set.place, self._data_set.files[index]
        info = place.filesystem.get_file_info(file.path)
        if (info.size, _version(place.filesystem, info) if info.is_file else "") != (file.size, file.version):
            raise _changed(place.name(file.path))
        self._stream = place.filesystem.open_input_file(file.path)
        self._opened: parquet.ParquetFile = open_parquet(self._stream, place.name(file.path))
        self._index, self._position = index, -1

    def close(self) -> None:
        """Let go of the file."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._index = None, -1

    def _take(self, rows: int) -> "Iterator[pyarrow.RecordBatch]":
        while rows > 0:
            if not self._rest:
                batch = next(self._batches, None)
                if batch is None:
                    raise _changed(self._data_set.name(self._index))
                self._rest = batch
            piece = self._rest.slice(0, rows)
            self._rest = self._rest.slice(len(piece))
            self._position += len(piece)
            rows -= len(piece)
            yield piece


_BATCH_ROWS = 4096
"""Decoded at a time."""


def _changed(name: str) -> DataError:
    return DataError(
        f"{name} changed while it was read, or is another file on this machine. Start anew with --overwrite."
    )


def part_name(number: int) -> str:
    """The name of a block's part. Sorted, the names have the order of the blocks."""
    return f"part-{number:08d}{SUFFIX}"
