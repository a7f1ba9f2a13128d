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
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(paths: Iterable[Path]) -> str:
    """One SHA-256 for a set of files: of the file itself if there is one, else of ``sha256  name`` lines."""
    ordered = sorted(paths, key=lambda path: path.name)
    if len(ordered) == 1:
        return sha256_of_file(ordered[0])
    lines = "".join(f"{sha256_of_file(path)}  {path.name}\n" for path in ordered)
    return hashlib.sha256(lines.encode()).hexdigest()


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
    """What is common to the folders that pass between the stages: files, and one record of them all.

    Attributes:
        name: for messages, "adapter" or "bundle".
        record: the JSON file that describes the others and holds the SHA-256 of each.
        needed: the other files without which it is no such folder.
        format_version: of the record; another one is refused.
        error: what is raised.
        command: what writes such a folder.
        remedy: what to do when one is broken.
        sealed: what of a record is hashed in it; by default everything.
    """

    name: str
    record: str
    needed: tuple[str, ...]
    format_version: int
    error: type[PromptfoldError]
    command: str
    remedy: str
    sealed: Callable[[Mapping[str, Any]], object] = lambda record: record


_VERSION, _HASHES, _SEAL = "format_version", "sha256", "record_sha256"


def content_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what `write_record` adds."""
    return {name: value for name, value in record.items() if name not in {_VERSION, _HASHES, _SEAL}}


def seal(record: Mapping[str, Any], kind: FolderKind) -> dict[str, Any]:
    """A record with a SHA-256 of its own: a bit that flips in it may leave it JSON and change, say, the longest text."""
    return {**record, _SEAL: _sha256_of_sealed(record, kind)}


def check_seal(folder: Path, record: Mapping[str, Any], kind: FolderKind) -> None:
    """Compare a record, once it is known to be whole, with its own SHA-256.

    Raises:
        kind.error: it changed.
    """
    if record.get(_SEAL) != _sha256_of_sealed(record, kind):
        raise kind.error(f"{folder / kind.record} is damaged: its SHA-256 is not the recorded one. {kind.remedy}")


def _sha256_of_sealed(record: Mapping[str, Any], kind: FolderKind) -> str:
    sealed = kind.sealed({name: value for name, value in record.items() if name != _SEAL})
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def write_record(folder: Path, kind: FolderKind, content: Mapping[str, Any], *, unhashed: Sequence[str] = ()) -> None:
    """Write the record of a folder whose other files are complete.

    Args:
        content: what it shall hold besides the format version and the hashes.
        unhashed: files that a person may edit.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in unhashed]
    hashes = {path.name: sha256_of_file(path) for path in files}
    value = seal({_VERSION: kind.format_version, **content, _HASHES: hashes}, kind)
    (folder / kind.record).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(folder: Path, kind: FolderKind) -> dict[str, Any]:
    """Read the record of a folder, and compare every file in it with its recorded SHA-256.

    Raises:
        kind.error: the folder is not there or no such folder, its format is another, or a file is
            missing, cannot be read or its bytes changed. One flipped bit in an ONNX file usually loads and
            silently changes the answers, so this comes before anything is loaded.
    """
    try:
        return _read_record(folder, kind)
    except OSError as cause:
        raise kind.error(
            f"{cause.filename or folder} cannot be read ({cause.strerror or cause}). {kind.remedy}"
        ) from cause


def _read_record(folder: Path, kind: FolderKind) -> dict[str, Any]:
    if not folder.is_dir():
        raise kind.error(f"There is no {kind.name} folder {folder}. Give one that `{kind.command}` wrote.")
    missing = [name for name in (kind.record, *kind.needed) if not (folder / name).is_file()]
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise kind.error(
            f"{folder} is no {kind.name} of promptfold: it lacks {', '.join(missing)} (it holds {found}). "
            f"Give a folder that `{kind.command}` wrote."
        )
    check_entries(folder, kind.error, kind.remedy)
    path = folder / kind.record
    record = read_json_object(path, kind.error, kind.remedy)
    version = record.get("format_version")
    if version != kind.format_version:
        raise kind.error(
            f"{path} has format version {version!r}; this promptfold reads {kind.format_version}. {kind.remedy}"
        )
    hashes = record.get("sha256")
    if not isinstance(hashes, dict):
        raise kind.error(f"{path} holds no hashes. {kind.remedy}")
    for name in kind.needed:
        if name not in hashes:
            raise kind.error(f"{path} has no SHA-256 of {name}. {kind.remedy}")
    for name, expected in hashes.items():
        if Path(name).name != name:
            raise kind.error(f"{path} lists a file outside its folder ({name!r}). {kind.remedy}")
        if not (folder / name).is_file():
            raise kind.error(f"{folder} lacks {name}. {kind.remedy}")
        if sha256_of_file(folder / name) != expected:
            raise kind.error(f"{folder / name} is damaged: its SHA-256 is not the recorded one. {kind.remedy}")
    return record


@contextmanager
def reading(folder: Path, kind: FolderKind) -> Iterator[None]:
    """Turn a record's missing or malformed entry into an error of its kind."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as cause:
        raise kind.error(f"{folder / kind.record} lacks {cause} or holds it in a wrong form. {kind.remedy}") from cause


def refuse_another_run(folder: object, before: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Refuse to go on with an interrupted run that was not this very one.

    Args:
        folder: where it lies, for the complaint.
        before: its fingerprint.
        fingerprint: what decides the result now, under names that a message can show. Plain JSON.

    Raises:
        UsageError: the two differ; it names the first difference.
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
