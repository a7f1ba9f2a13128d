"""Files and folders that appear complete or not at all."""

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from train.common.errors import PromptfoldError, UsageError
from train.common.folder_record import FolderKind

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]


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
