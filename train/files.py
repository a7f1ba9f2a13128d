"""Folders that appear complete or not at all, and the hashes that prove what is in them."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object that a person can read and a diff can show."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json_object(path: Path, error: type[PromptfoldError], remedy: str) -> dict[str, Any]:
    """Read a JSON object, or raise ``error`` with a sentence that ends in ``remedy``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as cause:
        raise error(f"{path} cannot be read ({cause}). {remedy}") from cause
    if not isinstance(value, dict):
        raise error(f"{path} holds no JSON object. {remedy}")
    return value


def check_hashes(folder: Path, hashes: Mapping[str, str], error: type[PromptfoldError], remedy: str) -> None:
    """Compare every named file of ``folder`` with its recorded SHA-256.

    Raises:
        error: a file is missing or its bytes changed. One flipped bit in an ONNX file usually loads
            and silently changes the answers, so this comes before anything is loaded.
    """
    for name, expected in hashes.items():
        if Path(name).name != name:
            raise error(f"{folder} lists a file outside itself ({name!r}). {remedy}")
        path = folder / name
        if not path.is_file():
            raise error(f"{folder} lacks {name}. {remedy}")
        if sha256_of_file(path) != expected:
            raise error(f"{path} is damaged: its SHA-256 is not the recorded one. {remedy}")


def check_target(target: Path, *, marker: str, kind: str, overwrite: bool) -> None:
    """Refuse an output folder that would cost the user something, before any work is done.

    Args:
        target: where the folder shall appear.
        marker: a file that every folder of this kind holds; only such a folder is ever replaced.
        kind: the word for the message, "adapter" or "bundle".
        overwrite: whether the user allowed an older folder to be replaced.

    Raises:
        UsageError: the place is taken, is not a folder, or cannot be written.
    """
    if os.path.lexists(target):
        if not target.is_dir():
            raise UsageError(f"--out {target} is not a folder. Choose another name.")
        if any(target.iterdir()):
            if not (target / marker).is_file():
                raise UsageError(f"--out {target} holds something that is no {kind}. Choose a new or an empty folder.")
            if not overwrite:
                raise UsageError(
                    f"--out {target} holds an older {kind}. Add --overwrite to replace it, or choose another folder."
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
