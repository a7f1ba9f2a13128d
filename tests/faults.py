"""Command lines in processes that are killed, starved or misled on purpose.

``python -m tests.faults`` imports everything that training, export and scoring need, once, and then forks a child for
each command line that it reads. So a run costs a second where a fresh interpreter would cost ten, and dies for real.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from pkgutil import walk_packages
from subprocess import Popen
from threading import Timer
from typing import IO, Any

PROGRAMS = {"train": "train.__main__", "export": "export.__main__", "score": "export.score.__main__"}
PROGRAMS |= {"triton": "export.triton"}
"""The module whose ``main`` a command line is given to."""

PACKAGES = ("export.fold", "export.runtime", "export.score", "train.fit", "train.adapter", "train.data", "train.model")
LIBRARIES = (
    *("datasets", "matplotlib.backends.backend_agg", "matplotlib.figure", "peft", "pyarrow.parquet", "sklearn.metrics"),
    *("tqdm", "transformers.models.bert.modeling_bert", "transformers.trainer"),
)
"""What is imported once, before the first child: our packages with all their modules, and what these import late."""

TIME_LIMIT = 120.0  # seconds after which a child hangs; it ends the test, and no figure depends on it


@dataclass(frozen=True)
class Fault:
    """What happens to a run; by default nothing.

    A run's moments are calls of the operating system that rename something, but not among temporary files, or flush it
    to the disk.
    """

    kill_after: float | None = None  # seconds
    kill_at: int = 0  # one of the run's moments, from 1
    file_limit: int | None = None  # bytes beyond which no file may grow
    drop_rights: bool = False  # permission bits bind the run, also where the tests run as root
    clock_goes_back: bool = False  # each look at the clock shows an earlier time than the one before


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status, or less than 0 the signal that killed it; and all that it printed."""

    status: int
    seconds: float
    errors: str
    moments: tuple[str, ...]  # the name of the call at each of them (see `Fault`); none where it was killed

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended it; a run may be done before that comes."""
        return self.status == -signal.SIGKILL

    @property
    def complaint(self) -> str:
        """The last line that it printed; progress bars stand before it."""
        return self.errors.rstrip("\n").rpartition("\n")[2].rpartition("\r")[2]


class Launcher:
    """Runs command lines in children of a process that has imported everything, and ends with its input."""

    def __init__(self, process: Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._requests, self._answers = process.stdin, process.stdout

    def run(self, program: str, words: list[str], fault: Fault | None = None) -> Ended:
        """Run one of `PROGRAMS` to its end, whatever that is."""
        request = {"program": program, "words": words, "fault": asdict(fault or Fault())}
        print(json.dumps(request), file=self._requests, flush=True)
        answer = json.loads(self._answers.readline())
        return Ended(**(answer | {"moments": tuple(answer["moments"])}))


def contents(place: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Read a request a line, answer with a line."""
    modules = [module.name for name in PACKAGES for module in walk_packages(import_module(name).__path__, f"{name}.")]
    for name in (*PROGRAMS.values(), *modules, *LIBRARIES):
        import_module(name)
    for line in requests:
        request = json.loads(line)
        ended = _fork(request["program"], request["words"], Fault(**request["fault"]))
        print(json.dumps(asdict(ended)), file=answers, flush=True)


def _fork(program: str, words: list[str], fault: Fault) -> Ended:
    # Pipes, as a limit on the size of files must not hold for what is printed.
    errors, report = os.pipe(), os.pipe()
    start = time.monotonic()
    child = os.fork()
    if not child:
        os.dup2(errors[1], 1)
        os.dup2(errors[1], 2)
        os._exit(_child(program, words, fault, report=report[1]))
    killer = Timer(TIME_LIMIT if fault.kill_after is None else fault.kill_after, os.kill, (child, signal.SIGKILL))
    killer.start()
    received = []
    for end, own_copy in (errors, report):
        os.close(own_copy)
        with os.fdopen(end, encoding="utf-8", errors="replace") as file:
            received.append(file.read())
    killer.cancel()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - start
    hung = "it hung" if seconds >= TIME_LIMIT else ""
    return Ended(status, seconds, received[0] + hung, tuple(received[1].split()))


def _child(program: str, words: list[str], fault: Fault, *, report: int) -> int:
    """Run a command line under a fault; its exit status."""
    moments: list[str] = []
    try:
        _watch(moments, fault)
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


def _watch(moments: list[str], fault: Fault) -> None:
    """Note each call that makes something last, and end the run at one of them."""
    import train.common.atomic_folder

    def watched(name: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        # Nothing temporary has to last; datasets keeps files there for a moment.
        if not str(arguments[0]).startswith(tempfile.gettempdir()):
            moments.append(name)
            if len(moments) == fault.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)

    for name in ("rename", "replace", "fsync"):
        setattr(os, name, partial(watched, name, getattr(os, name)))
    swap = train.common.atomic_folder.exchange
    train.common.atomic_folder.exchange = partial(watched, "exchange", swap)


def drop_rights() -> None:
    """Let permission bits bind this process, also root's: Linux exempts by a capability, elsewhere the user counts."""
    if os.geteuid():
        return
    if not sys.platform.startswith("linux"):
        os.setuid(65534)
        return
    this_process = (ctypes.c_uint32 * 2)(0x20080522, 0)  # linux/capability.h: _LINUX_CAPABILITY_VERSION_3
    if ctypes.CDLL(None, use_errno=True).capset(this_process, (ctypes.c_uint32 * 6)()):  # none
        raise OSError(ctypes.get_errno(), "capset")


def _turn_the_clock_back() -> None:
    looks = count(1)
    now = time.time()
    time.time = lambda: now - 3600.0 * next(looks)
    time.time_ns = lambda: int(time.time() * 1e9)


if __name__ == "__main__":
    own_output = os.fdopen(os.dup(1), "w")
    # What a library may print while it is imported is no answer.
    os.dup2(2, 1)
    serve(sys.stdin, own_output)
