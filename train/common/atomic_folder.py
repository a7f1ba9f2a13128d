"""Files and folders that appear complete or not at all."""

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from train.common.errors import PromptfoldError, UsageError
from train.common.folder_record import FolderKind

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

_PARTIAL, _ASIDE = ".partial", ".old"


def check_target(target: Path, kind: FolderKind, *, overwrite: bool) -> None:
    """Refuse an output folder that is taken or cannot be written, before any work. Only its own kind is replaced."""
    place = target
    try:
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
                        f"--out {target} holds an older {kind.name}. Add --overwrite to replace it, or choose another "
                        "folder."
                    )
        place = next(folder for folder in target.absolute().parents if folder.exists())
        # Permission bits alone do not tell (read-only disks, /proc).
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=_PARTIAL, dir=place).cleanup()
    except OSError as cause:
        raise UsageError(
            f"--out {target}: {place} cannot be written ({write_trouble(cause)}). Choose another."
        ) from cause


def write_trouble(cause: BaseException) -> str | None:
    """Why a file could not be written, or None where an exception is about something else."""
    if isinstance(cause, OSError):
        return cause.strerror or str(cause)
    # For a full disk, safetensors and tokenizers put the number into the message of an error of their own.
    if found := re.search(r"\(os error (\d+)\)", str(cause)):
        return os.strerror(int(found[1]))
    # torch.save complains of the length of its file.
    if isinstance(cause, RuntimeError) and re.search("inline_container|iostream error|PytorchStreamWriter", str(cause)):
        return "a file could not be written to its end"
    return None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears by one rename, once its bytes are on the disk; after an OSError it is as before."""
    path = path.absolute()
    _remove_leftovers(path)
    with _partial(path, _make_file) as new:
        new.write_bytes(content)
        new.chmod(0o666 & ~_umask())
        sync_path(new)
        put(new, path)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``target`` that becomes ``target`` by one rename when the block succeeds.

    When the block raises, it is removed and an older ``target`` stays. A disk that cannot be written is a UsageError.
    """
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        with _partial(target, tempfile.mkdtemp) as partial:
            yield partial
            mask = _umask()
            for path in [*partial.rglob("*"), partial]:
                # Temporary folders are readable by their owner alone.
                path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
                (sync_folder if path.is_dir() else sync_path)(path)
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


@contextmanager
def held_folder(folder: Path, owner: str) -> Iterator[None]:
    """Keep other runs out of a folder within the block; it is made, and removed again where nothing was put into it.

    Where the system or the disk has no locks nothing is kept out.

    Raises:
        UsageError: another run is within such a block; ``owner``, the flag that names the place, begins the message.
        OSError: the folder cannot be made.
    """
    folder = folder.absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = None
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = _lock(folder, wait=False)
            except BlockingIOError as cause:
                raise UsageError(
                    f"{owner}: another run is writing there (it holds {folder}). Wait until it has ended, or choose another "
                    "--out."
                ) from cause
            # Before it was locked, the other run may have ended and removed it.
            if _is_at(descriptor, folder):
                break
            _unlock(descriptor)
        yield
    finally:
        # Before it is unlocked, or it might be another run's by then.
        with suppress(OSError):
            for path in made:
                path.rmdir()
        _unlock(descriptor)


def put(new: Path, target: Path) -> None:
    """Rename a file or folder to a name that may be taken; the older one is removed, or is named ``new`` afterwards.

    After an OSError everything is as before.
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
            # A process killed between the two renames leaves the older one aside: `_remove_leftovers` puts it back.
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
    """Swap the names of two files or folders in one step; False where the system or the disk cannot do that."""
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
def _partial(target: Path, make: Callable[..., str]) -> Iterator[Path]:
    """A hidden folder or file beside a target, which ``make`` makes, removed at the end. Its name is no other run's, and its
    lock tells it from one that a killed process left.
    """
    while True:
        partial = Path(make(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent))
        descriptor = _lock(partial, wait=True)
        # Before it was locked, another process may have removed it as a leftover.
        if partial.exists():
            break
        _unlock(descriptor)
    try:
        yield partial
    finally:
        _unlock(descriptor)
        _remove(partial)


def _make_file(*, prefix: str, suffix: str, dir: Path) -> str:
    number, name = tempfile.mkstemp(suffix, prefix, dir)
    os.close(number)
    return name


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left beside a target, and put back an older target that one had moved aside."""
    ours = re.compile(re.escape(f".{target.name}.") + rf"[a-z0-9_]{{8}}({re.escape(_PARTIAL)}|{re.escape(_ASIDE)})")
    for path in target.parent.iterdir():
        if not ours.fullmatch(path.name):
            continue
        try:
            descriptor = _lock(path, wait=False)
        except BlockingIOError:  # another run is writing it
            continue
        if descriptor is None:
            continue
        try:
            older = path / target.name
            if path.suffix == _ASIDE and older.exists() and not os.path.lexists(target):
                older.rename(target)
            _remove(path)
        finally:
            _unlock(descriptor)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Lock a folder or file until `_unlock` or the end of this process; None where that is not possible.

    It is gone, or the system or the disk has no locks. Where another run holds it, it is a BlockingIOError, or is waited for.
    """
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return descriptor
    except OSError as cause:
        _unlock(descriptor)
        if isinstance(cause, BlockingIOError):
            raise
        return None


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _is_at(descriptor: int | None, folder: Path) -> bool:
    """Whether what was opened is what has this name now; without a lock, whether there is something."""
    try:
        return folder.exists() if descriptor is None else os.path.samestat(os.fstat(descriptor), folder.stat())
    except OSError:
        return False


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link, if possible."""
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a power cut does not undo a rename in it."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        sync_path(folder)
