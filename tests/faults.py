"""Command lines in processes that are killed, starved or misled on purpose.

``python -m tests.faults`` imports everything that training, export and scoring need, once, and then forks a child for
each command line that it reads. So a run costs a second where a fresh interpreter would cost ten, and dies for real.
"""

import ctypes
import errno
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from tests.conftest import ON_CPU, ROOT

PROGRAMS = {
    "train": "train.__main__",
    "export": "export.__main__",
    "score": "export.score.__main__",
    "triton": "export.triton",
}
"""The module whose ``main`` a command line is given to."""

WARM = (
    *PROGRAMS.values(),
    "datasets",
    "export.fold.pipeline",
    "export.fold.trace",
    "export.fold.compare",
    "export.fold.quantize",
    "export.runtime.session",
    "export.fold.rewrites.many_tasks",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "peft",
    "pyarrow.parquet",
    "sklearn.metrics",
    "tqdm",
    "train.fit.seeds",
    "train.fit.trainer",
    "transformers.models.bert.modeling_bert",
    "transformers.trainer",
)

TIME_LIMIT = 120.0
"""Seconds after which a child hangs. It ends the test; no figure depends on it."""

KILL = "kill"


@dataclass(frozen=True)
class Fault:
    """What happens to a run. Nothing of it: an unbroken one.

    Attributes:
        kill_after: SIGKILL after so many seconds.
        strike_at: which of the run's moments is struck, from 1. A moment is a call of the operating system that
            renames something, but not among temporary files, or flushes it to the disk.
        strike: `KILL`, or the name of the error that the call gives instead of working ("ENOSPC").
        file_limit: bytes beyond which no file may grow.
        drop_rights: whether permission bits bind it, also where the tests run as root.
        clock_goes_back: whether each look at the clock shows an earlier time than the one before.
        no_exchange: whether two folders cannot change places in one step, as on systems other than Linux.
    """

    kill_after: float | None = None
    strike_at: int = 0
    strike: str = KILL
    file_limit: int | None = None
    drop_rights: bool = False
    clock_goes_back: bool = False
    no_exchange: bool = False


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        status: its exit status, or less than 0 the signal that killed it.
        seconds: how long it lived.
        output: what it printed.
        errors: what it printed on standard error.
        moments: of its moments (see `Fault`) the name of each call; none where it was killed.
    """

    status: int
    seconds: float
    output: str
    errors: str
    moments: tuple[str, ...]

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended it; a run may be done before that comes."""
        return self.status == -signal.SIGKILL

    @property
    def complaint(self) -> str:
        """The last line on standard error; progress bars stand before it."""
        return self.errors.rstrip("\n").rpartition("\n")[2].rpartition("\r")[2]


class Launcher:
    """Runs command lines in children of a process that has imported everything."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, program: str, words: list[str], fault: Fault | None = None) -> Ended:
        """Run one of `PROGRAMS` to its end, whatever that is."""
        request = {"program": program, "words": words, "fault": asdict(fault or Fault())}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Ended(**(answer | {"moments": tuple(answer["moments"])}))


@contextmanager
def launcher(scratch: Path) -> Iterator[Launcher]:
    """Start the process that forks.

    Args:
        scratch: folder for the temporary files of runs that are killed.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults"],
        cwd=ROOT,
        env=os.environ | ON_CPU | {"TMPDIR": str(scratch)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield Launcher(process)
        assert process.stdin is not None
        process.stdin.close()  # it ends with its input


# What runs in that process, and in its children.


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Read a request a line, answer with a line."""
    for name in WARM:
        import_module(name)
    for line in requests:
        request = json.loads(line)
        print(
            json.dumps(asdict(_fork(request["program"], request["words"], Fault(**request["fault"])))),
            file=answers,
            flush=True,
        )


def _fork(program: str, words: list[str], fault: Fault) -> Ended:
    # Pipes, as a limit on the size of files must not hold for what is printed.
    pipes = [os.pipe() for _ in range(3)]
    start = time.monotonic()
    child = os.fork()
    if not child:
        for (_, end), target in zip(pipes, (1, 2), strict=False):
            os.dup2(end, target)
        os._exit(_child(program, words, fault, report=pipes[2][1]))
    for _, end in pipes:
        os.close(end)
    kill_at = start + (TIME_LIMIT if fault.kill_after is None else fault.kill_after)
    received = _read_all([end for end, _ in pipes], child, kill_at)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - start
    output, errors, moments = (text.decode(errors="replace") for text in received)
    if seconds >= TIME_LIMIT:
        errors += "it hung"
    return Ended(status, seconds, output, errors, tuple(moments.split()))


def _read_all(ends: list[int], child: int, kill_at: float) -> list[bytes]:
    """What a child writes into its pipes until it ends; it is killed at that moment of the monotonic clock."""
    received = dict.fromkeys(ends, b"")
    opened = set(ends)
    is_alive = True
    while opened:
        remaining = max(0.0, kill_at - time.monotonic()) if is_alive else None
        ready, _, _ = select.select(opened, [], [], remaining)
        if not ready:
            os.kill(child, signal.SIGKILL)
            is_alive = False
        for end in ready:
            chunk = os.read(end, 1 << 16)
            received[end] += chunk
            if not chunk:
                opened.remove(end)
                os.close(end)
    return list(received.values())


def _child(program: str, words: list[str], fault: Fault, *, report: int) -> int:
    """Run a command line under a fault; its exit status."""
    moments: list[str] = []
    try:
        _strike(moments, fault)
        if fault.file_limit is not None:
            # Python ignores the signal, so that a write that goes too far fails like one on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_limit, fault.file_limit))
        if fault.drop_rights:
            drop_rights()
        if fault.clock_goes_back:
            _turn_the_clock_back()
        status: int = import_module(PROGRAMS[program]).main(words)
    except BaseException:  # what the interpreter would do
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(report, " ".join(moments).encode())
    return status


def _strike(moments: list[str], fault: Fault) -> None:
    """Put a fault into the calls that make something last, and note each of them."""
    import train.common.atomic_folder

    def struck(name: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if str(arguments[0]).startswith(tempfile.gettempdir()):
            # Nothing there has to last; datasets keeps files there for a moment.
            return call(*arguments, **named)
        moments.append(name)
        if len(moments) == fault.strike_at:
            if fault.strike == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            number = getattr(errno, fault.strike)
            raise OSError(number, os.strerror(number), str(arguments[0]))
        return call(*arguments, **named)

    for name in ("rename", "replace", "fsync"):
        setattr(os, name, partial(struck, name, getattr(os, name)))
    if fault.no_exchange:
        train.common.atomic_folder.exchange = lambda *_: False
    else:
        train.common.atomic_folder.exchange = partial(struck, "exchange", train.common.atomic_folder.exchange)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def drop_rights() -> None:
    """Let permission bits bind this process, also root's: Linux exempts by a capability, elsewhere the user counts."""
    if os.geteuid():
        return
    if not sys.platform.startswith("linux"):
        os.setuid(65534)
        return
    header = _CapabilityHeader(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    none = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(ctypes.byref(header), ctypes.byref(none)):
        raise OSError(ctypes.get_errno(), "capset")


def _turn_the_clock_back() -> None:
    now = time.time()
    looks = 0

    def earlier() -> float:
        nonlocal looks
        looks += 1
        return now - 3600.0 * looks

    time.time = earlier
    time.time_ns = lambda: int(earlier() * 1e9)


if __name__ == "__main__":
    own_output = os.fdopen(os.dup(1), "w")
    # What a library may print while it is imported is no answer.
    os.dup2(2, 1)
    serve(sys.stdin, own_output)
