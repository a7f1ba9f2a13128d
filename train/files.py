"""Folders that appear complete or not at all, and the hashes that prove what is in them."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import PromptfoldError, UsageError


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
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as cause:
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
    """

    name: str
    record: str
    needed: tuple[str, ...]
    format_version: int
    error: type[PromptfoldError]
    command: str
    remedy: str


def write_record(folder: Path, kind: FolderKind, content: Mapping[str, Any], *, unhashed: Sequence[str] = ()) -> None:
    """Write the record of a folder whose other files are complete.

    Args:
        content: what it shall hold besides the format version and the hashes.
        unhashed: files that a person may edit.
    """
    hashes = {path.name: sha256_of_file(path) for path in sorted(folder.iterdir()) if path.name not in unhashed}
    value = {"format_version": kind.format_version, **content, "sha256": hashes}
    (folder / kind.record).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(folder: Path, kind: FolderKind) -> dict[str, Any]:
    """Read the record of a folder, and compare every file in it with its recorded SHA-256.

    Raises:
        kind.error: the folder is not there or no such folder, its format is another, or a file is
            missing or its bytes changed. One flipped bit in an ONNX file usually loads and silently
            changes the answers, so this comes before anything is loaded.
    """
    if not folder.is_dir():
        raise kind.error(f"There is no {kind.name} folder {folder}. Give one that `{kind.command}` wrote.")
    missing = [name for name in (kind.record, *kind.needed) if not (folder / name).is_file()]
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise kind.error(
            f"{folder} is no {kind.name} of promptfold: it lacks {', '.join(missing)} (it holds {found}). "
            f"Give a folder that `{kind.command}` wrote."
        )
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
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise kind.error(f"{folder / kind.record} lacks {cause} or holds it in a wrong form. {kind.remedy}") from cause


def refuse_another_run(folder: Path, before: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Refuse to go on with an interrupted run that was not this very one.

    Args:
        folder: where it lies.
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


def check_target(target: Path, kind: FolderKind, *, overwrite: bool) -> None:
    """Refuse an output folder that would cost the user something, before any work is done.

    Args:
        target: where the folder shall appear.
        kind: what it shall be; only an older folder of this kind is ever replaced.
        overwrite: whether the user allowed an older folder to be replaced.

    Raises:
        UsageError: the place is taken, is not a folder, or cannot be written.
    """
    if os.path.lexists(target):
        if not target.is_dir():
            raise UsageError(f"--out {target} is not a folder. Choose another name.")
        if any(target.iterdir()):
            if not (target / kind.record).is_file():
                raise UsageError(
                    f"--out {target} holds something that is no {kind.name}. Choose a new or an empty folder."
                )
            if not overwrite:
                raise UsageError(
                    f"--out {target} holds an older {kind.name}. Add --overwrite to replace it, or choose another folder."
                )
    # Try it in the deepest folder that exists: permission bits alone do not tell (read-only disks, /proc).
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=parent):
            pass
    except OSError as cause:
        raise UsageError(f"--out {target}: {parent} cannot be written ({cause.strerror}). Choose another.") from cause


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``target`` that becomes ``target`` when the block succeeds.

    The name appears by one rename, so a reader sees the whole folder or none. When the block raises,
    nothing is left. An older folder is moved aside only once the new one is complete.

    Raises:
        UsageError: the disk is full, or the place cannot be written.
    """
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as cause:
        raise UsageError(f"{target} cannot be written ({cause.strerror}). Choose another folder.") from cause
    try:
        yield partial
        _open_to_readers(partial)
        _sync(partial)
        if target.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            older = target.rename(aside / target.name)
            try:
                partial.rename(target)
            except OSError:
                older.rename(target)
                aside.rmdir()
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            partial.rename(target)
    except OSError as cause:
        raise UsageError(
            f"{target} could not be written ({cause.strerror or cause}). Nothing was left there; "
            "free some space or choose another folder."
        ) from cause
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush every file of a folder to the disk, so that the rename cannot outrun the bytes."""
    for path in [*folder.rglob("*"), folder]:
        if os.name != "posix" and path.is_dir():
            continue  # only POSIX can open a folder
        sync_path(path)


def sync_path(path: Path) -> None:
    """Flush one file, or a folder's own entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_to_readers(folder: Path) -> None:
    """Give a folder and its files the usual modes: temporary ones were made for the owner alone."""
    mask = os.umask(0)  # can only be read by setting it
    os.umask(mask)
    for path in [*folder.rglob("*"), folder]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
