"""Folders that appear complete or not at all, and the hashes that prove what is in them."""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import PromptfoldError, UsageError
from train.limits import MAX_RECORD_BYTES, check_entries, check_file

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]


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


def check_target(target: Path, kind: FolderKind, *, overwrite: bool) -> None:
    """Refuse an output folder that would cost the user something, before any work is done.

    Args:
        target: where the folder shall appear.
        kind: what it shall be; only an older folder of this kind is ever replaced.
        overwrite: whether the user allowed an older folder to be replaced.

    Raises:
        UsageError: the place is taken, is not a folder, or cannot be written.
    """
    try:
        _check_place(target, kind, overwrite=overwrite)
    except OSError as cause:
        raise UsageError(f"--out {target} cannot be used ({cause.strerror or cause}). Choose another.") from cause
    # Try it in the deepest folder that exists: permission bits alone do not tell (read-only disks, /proc).
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=_PARTIAL, dir=parent):
            pass
    except OSError as cause:
        raise UsageError(f"--out {target}: {parent} cannot be written ({cause.strerror}). Choose another.") from cause


def _check_place(target: Path, kind: FolderKind, *, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UsageError(f"--out {target} is not a folder. Choose another name.")
    if any(target.iterdir()):
        if not (target / kind.record).is_file():
            raise UsageError(f"--out {target} holds something that is no {kind.name}. Choose a new or an empty folder.")
        if not overwrite:
            raise UsageError(
                f"--out {target} holds an older {kind.name}. Add --overwrite to replace it, or choose another folder."
            )


def write_trouble(cause: BaseException) -> str | None:
    """Why something could not be written, where an exception says that; None where it says something else.

    Not every library raises an `OSError` for a full disk: of those in Rust (safetensors, tokenizers) the number stands in
    the message, and PyTorch's says nothing but that its file has not the length that it should have.
    """
    if isinstance(cause, OSError):
        return cause.strerror or str(cause)
    if found := re.search(r"\(os error (\d+)\)", str(cause)):
        return os.strerror(int(found[1]))
    if isinstance(cause, RuntimeError) and any(word in str(cause) for word in _OF_PYTORCH):
        return "a file could not be written to its end"
    return None


_OF_PYTORCH = ("inline_container", "iostream error", "PytorchStreamWriter")
"""Words in what `torch.save` says of a file that it cannot write."""


_PARTIAL, _ASIDE = ".partial", ".old"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears by one rename, once its bytes are on the disk.

    Raises:
        OSError: it could not be written; an older one is untouched then, and nothing is left.
    """
    new = path.with_name(f"{path.name}{_PARTIAL}")
    try:
        new.write_bytes(content)
        sync_path(new)
        put(new, path)
    finally:
        with suppress(OSError):
            new.unlink()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``target`` that becomes ``target`` when the block succeeds.

    The name appears by one rename, so a reader sees the whole folder or none. When the block raises,
    nothing is left. An older folder stays where it is until the new one takes its place.

    Raises:
        UsageError: the disk is full, or the place cannot be written.
    """
    target = target.absolute()
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            partial = stack.enter_context(_partial_folder(target))
        except OSError as cause:
            raise UsageError(f"{target} cannot be written ({cause.strerror}). Choose another folder.") from cause
        try:
            yield partial
            _open_to_readers(partial)
            _sync(partial)
            put(partial, target)
        except PromptfoldError:
            raise
        except Exception as cause:
            trouble = write_trouble(cause)
            if trouble is None:
                raise
            raise UsageError(
                f"{target} could not be written ({trouble}). Nothing was left there; "
                "free some space or choose another folder."
            ) from cause


def put(new: Path, target: Path) -> None:
    """Let a file or a folder take a name that another one may have, which is then gone; ``new`` may be left as a name for it.

    Raises:
        OSError: all is as it was.
    """
    aside: Path | None = None
    lock: int | None = None
    with ExitStack() as undo:
        if not os.path.lexists(target):
            new.rename(target)
            undo.callback(target.rename, new)
        elif exchange(new, target):
            undo.callback(exchange, new, target)
        elif not new.is_dir():
            new.replace(target)
        else:
            # Between the two renames the name is nobody's. Who is killed there has moved the older one aside, no more.
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_ASIDE, dir=target.parent))
            undo.callback(aside.rmdir)
            lock = _lock(aside, wait=True)
            undo.callback(_unlock, lock)
            older = target.rename(aside / target.name)
            undo.callback(older.rename, target)
            new.rename(target)
            undo.callback(target.rename, new)
        sync_folder(target.parent)
        undo.pop_all()
    if aside is not None:
        _remove(aside)
        _unlock(lock)


def exchange(first: Path, second: Path) -> bool:
    """Let two files or folders change places in one step, so that neither name is ever without one.

    Returns:
        False where the system or the disk knows no such step; nothing was done then

    Raises:
        OSError: it failed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    # linux/fs.h and fcntl.h: relative to the current folder, RENAME_EXCHANGE
    if rename(-100, os.fsencode(first), -100, os.fsencode(second), 2) == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


@contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside a target, and removed at the end if it is still there.

    It is locked: that tells what somebody is writing from what a killed process left.
    """
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent))
        descriptor = _lock(partial, wait=True)
        # Between its making and its lock, another process may have taken it for a leftover.
        if partial.exists():
            break
        _unlock(descriptor)
    try:
        yield partial
    finally:
        _unlock(descriptor)
        _remove(partial)


def _remove_leftovers(target: Path) -> None:
    """Remove what runs left beside a target that were killed while they wrote it; put back what one had moved aside."""
    ours = re.compile(re.escape(f".{target.name}.") + rf"[a-z0-9_]{{8}}({re.escape(_PARTIAL)}|{re.escape(_ASIDE)})")
    for path in target.parent.iterdir():
        if not ours.fullmatch(path.name) or (descriptor := _lock(path, wait=False)) is None:
            continue
        try:
            older = path / target.name
            if path.suffix == _ASIDE and older.exists() and not os.path.lexists(target):
                older.rename(target)
            _remove(path)
        finally:
            _unlock(descriptor)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Lock a folder until `_unlock`, or the end of this process; None where another one holds it, or there are no locks."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        _unlock(descriptor)
        return None
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove a folder, or a link to one, if it can be: what stays does not matter to anybody."""
    if folder.is_symlink():
        with suppress(OSError):
            folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush every file of a folder to the disk, so that the rename cannot outrun the bytes."""
    for path in [*folder.rglob("*"), folder]:
        (sync_folder if path.is_dir() else sync_path)(path)


def sync_path(path: Path) -> None:
    """Flush one file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries to the disk, without which a rename in it may be undone by a power cut."""
    if os.name == "posix":  # only there a folder can be opened
        sync_path(folder)


def _open_to_readers(folder: Path) -> None:
    """Give a folder and its files the usual modes: temporary ones were made for the owner alone."""
    mask = os.umask(0)  # can only be read by setting it
    os.umask(mask)
    for path in [*folder.rglob("*"), folder]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
