"""The record of a folder: one JSON file with the format version and the hash of every other file."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.errors import PromptfoldError, UsageError
from train.common.limits import MAX_RECORD_BYTES, check_entries, check_file


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(paths: Iterable[Path]) -> str:
    """One SHA-256 for a set of files: a single file's own, else that of the ``sha256  name`` lines."""
    hashes = {path.name: sha256_of_file(path) for path in paths}
    if len(hashes) == 1:
        return hashes.popitem()[1]
    return hashlib.sha256("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()).hexdigest()


def read_json_object(path: Path, error: type[PromptfoldError], remedy: str) -> dict[str, Any]:
    """Read a JSON object, or raise ``error`` with a sentence that ends in ``remedy``."""
    check_file(path, MAX_RECORD_BYTES, error, remedy)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    # ValueError: no UTF-8, no JSON, or a number of thousands of digits; RecursionError: brackets a thousand deep
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path} cannot be read ({cause}). {remedy}") from cause
    if not isinstance(value, dict):
        raise error(f"{path} holds no JSON object. {remedy}")
    return value


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that passes between the stages: an adapter or a bundle."""

    name: str
    record: str
    """The JSON file that describes the other files and holds the SHA-256 of each."""
    needed: tuple[str, ...]
    """The other files that must be there."""
    format_version: int
    error: type[PromptfoldError]
    command: str
    """What writes such a folder, for messages, as is the ``remedy`` for a broken one."""
    remedy: str
    sealed: Callable[[Mapping[str, Any]], object] = lambda record: record
    """The parts of a record that its own hash covers."""


_VERSION, _HASHES, _SEAL = "format_version", "sha256", "record_sha256"


def content_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the entries that `write_record` adds."""
    return {name: value for name, value in record.items() if name not in {_VERSION, _HASHES, _SEAL}}


def seal(record: Mapping[str, Any], kind: FolderKind) -> dict[str, Any]:
    """A record with a SHA-256 of itself, as one flipped bit may leave it valid JSON with another text limit."""
    return {**record, _SEAL: _sha256_of_sealed(record, kind)}


def check_seal(folder: Path, record: Mapping[str, Any], kind: FolderKind) -> None:
    """Compare a record that has all its entries with its own SHA-256."""
    if record.get(_SEAL) != _sha256_of_sealed(record, kind):
        raise kind.error(f"{folder / kind.record} is damaged: its SHA-256 is not the recorded one. {kind.remedy}")


def _sha256_of_sealed(record: Mapping[str, Any], kind: FolderKind) -> str:
    sealed = kind.sealed({name: value for name, value in record.items() if name != _SEAL})
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def write_record(folder: Path, kind: FolderKind, content: Mapping[str, Any], *, unhashed: Sequence[str] = ()) -> None:
    """Write the record of a folder whose other files are complete. ``unhashed`` names files that a person may edit."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in unhashed]
    hashes = {path.name: sha256_of_file(path) for path in files}
    value = seal({_VERSION: kind.format_version, **content, _HASHES: hashes}, kind)
    (folder / kind.record).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(folder: Path, kind: FolderKind) -> dict[str, Any]:
    """Read the record of a folder, and compare every file in it with its recorded SHA-256.

    This comes before any file is loaded: an ONNX file with a flipped bit usually loads, and predicts something else.
    A folder of another kind or format, and a file that is missing, unreadable or changed, is a ``kind.error``.
    """

    def refused(what: str, remedy: str = kind.remedy) -> PromptfoldError:
        return kind.error(f"{what} {remedy}")

    try:
        if not folder.is_dir():
            raise refused(f"There is no {kind.name} folder {folder}.", f"Give one that `{kind.command}` wrote.")
        missing = [name for name in (kind.record, *kind.needed) if not (folder / name).is_file()]
        if missing:
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise refused(
                f"{folder} is no {kind.name} of promptfold: it lacks {', '.join(missing)} (it holds {found}).",
                f"Give a folder that `{kind.command}` wrote.",
            )
        check_entries(folder, kind.error, kind.remedy)
        path = folder / kind.record
        record = read_json_object(path, kind.error, kind.remedy)
        version, hashes = record.get(_VERSION), record.get(_HASHES)
        if version != kind.format_version:
            raise refused(f"{path} has format version {version!r}; this promptfold reads {kind.format_version}.")
        if not isinstance(hashes, dict):
            raise refused(f"{path} holds no hashes.")
        for name in (*kind.needed, *hashes):
            if name not in hashes:
                raise refused(f"{path} has no SHA-256 of {name}.")
            if Path(name).name != name:
                raise refused(f"{path} lists a file outside its folder ({name!r}).")
            if not (folder / name).is_file():
                raise refused(f"{folder} lacks {name}.")
        for name, expected in hashes.items():
            if sha256_of_file(folder / name) != expected:
                raise refused(f"{folder / name} is damaged: its SHA-256 is not the recorded one.")
        return record
    except OSError as cause:
        raise refused(f"{cause.filename or folder} cannot be read ({cause.strerror or cause}).") from cause


@contextmanager
def reading(folder: Path, kind: FolderKind) -> Iterator[None]:
    """Turn a record's missing or malformed entry into an error of its kind."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as cause:
        raise kind.error(f"{folder / kind.record} lacks {cause} or holds it in a wrong form. {kind.remedy}") from cause


def refuse_another_run(folder: object, before: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Refuse to resume an interrupted run with other settings or data than it had, naming the first difference.

    A fingerprint is everything that determines the result, as plain JSON, by names for people.
    """

    def short(value: Any) -> str:
        text = str(value)
        return text if len(text) <= 40 else text[:12] + "…"

    for name, now in fingerprint.items():
        if before.get(name) != now:
            raise UsageError(
                f"--resume: the interrupted run in {folder} had {name} {short(before.get(name))}, now it is "
                f"{short(now)}. Give the same as then, or start anew with --overwrite and without --resume."
            )
