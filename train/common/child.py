"""Child processes, and the signals that end them and their parent."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

from train.common.console import lasting_streams, said_to, say
from train.common.errors import EngineError, PromptfoldError

T = TypeVar("T")

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ExitOnce:
    """A handler for SIGTERM: raises `SystemExit`, so that ``finally`` blocks run.

    A second signal does nothing, since it would interrupt them.
    """

    def __init__(self, status: int) -> None:
        self._status = status
        self.is_ending = False

    def __call__(self, *_: object) -> None:
        if not self.is_ending:
            self.is_ending = True
            sys.exit(self._status)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Within the block, the exception of a signal ends the command even where Python drops it or makes another of it.

    Python drops what is raised within a weak reference's callback, and goes on (`sys.unraisablehook`). Such a callback
    follows every import: SIGTERM was lost in 3 of 440 starts of the page that were ended as they began. Within the
    creation of an enumeration it makes a `RuntimeError` of it, and code of ours could make that an error of the user's.
    """
    before = sys.unraisablehook

    def repeat(dropped: Any) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        if isinstance(dropped.exc_value, SystemExit) and isinstance(handler, ExitOnce):
            handler.is_ending = False
        elif isinstance(dropped.exc_value, KeyboardInterrupt):
            handler = signal.getsignal(signal.SIGINT)
        else:
            before(dropped)
            return
        # By a timer, after the callback: within it, the exception would be dropped again.
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    sys.unraisablehook = repeat
    try:
        yield
    except Exception as error:
        cause = error.__cause__
        while cause is not None:
            if isinstance(cause, (KeyboardInterrupt, SystemExit)):
                raise cause from None
            cause = cause.__cause__
        raise
    finally:
        sys.unraisablehook = before


def uninterrupted(work: Callable[..., T], *arguments: Any) -> T:
    """Run a function that no signal may interrupt, such as an import; a signal's exception is raised at its end."""
    # Python raises them in the main thread alone, which waits for this one at the end of the block.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work, *arguments).result()


def new_child(
    work: Callable[..., object], *arguments: Any, name: str | None = None, daemon: bool = False
) -> BaseProcess:
    """A process for `start_child`, which does not end at Ctrl-C: that reaches the whole group, and the parent decides."""
    # "spawn": a fork would copy the parent's threads and locks in whatever state they are.
    return multiprocessing.get_context("spawn").Process(target=_begin, args=(work, arguments), name=name, daemon=daemon)


def start_child(child: BaseProcess) -> None:
    """Start a process of `new_child`, wholly or not at all: one whose parent left off within its start prints a traceback."""

    def start() -> None:
        resource_tracker.ensure_running()  # its own start, the first time, would undo the next line
        # The child inherits this.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        child.start()

    uninterrupted(start)


def _begin(work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # They have waited since before the process began (`start_child`), also while it imported this module.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
    with lasting_streams():
        work(*arguments)


class _Line(NamedTuple):
    """What the function said; any number of these come before its reply."""

    text: str


def run_in_child(work: Callable[..., T], *arguments: Any, name: str, remedy: str = "") -> T:
    """Run a function in a new process, which gives all its memory and threads back, and return what it returns.

    What the function says is said here, by this thread, so that `said_to` around this call gets it.
    The child never outlives this process: SIGTERM ends it by a `SystemExit`, so that its ``finally`` blocks run.
    A `PromptfoldError` of the function is raised here too. A child that died is an EngineError, whose message begins
    with ``name`` ("The export of adapters/a") and ends with ``remedy``.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = new_child(_run, sender, work, arguments)
    try:
        start_child(child)
        sender.close()
        reply: T | PromptfoldError = _say_until_reply(receiver)
    except EOFError as cause:
        child.join()
        raise EngineError(f"{name} ended unexpectedly (exit code {child.exitcode}). {remedy}".rstrip()) from cause
    except (KeyboardInterrupt, SystemExit, OSError):  # OSError: the reader of the printed lines is gone
        if child.pid is not None:
            child.terminate()
        raise
    finally:
        if child.pid is not None:
            child.join()
        receiver.close()
    if isinstance(reply, PromptfoldError):
        raise reply
    return reply


def _say_until_reply(receiver: Connection) -> Any:
    """The reply; an EOFError where the child died before it."""
    while True:
        try:
            received = receiver.recv()
        except OSError as cause:
            raise EOFError("within a message") from cause
        if not isinstance(received, _Line):
            return received
        say(received.text)


def _run(sender: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGTERM, ExitOnce(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with signals_kept(), said_to(lambda line: sender.send(_Line(line))):
            reply = work(*arguments)
    except PromptfoldError as error:
        reply = error
    sender.send(reply)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
