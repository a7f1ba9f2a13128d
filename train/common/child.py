"""Run a function in a child process, which gives all its memory and threads back when it ends."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

from train.common.console import said_to, say
from train.common.errors import EngineError, PromptfoldError

T = TypeVar("T")


class _Line(NamedTuple):
    """What the function said; any number of these come before its reply."""

    text: str


def run_in_child(work: Callable[..., T], *arguments: Any, name: str, remedy: str = "") -> T:
    """Run a function in a new process and return what it returns.

    What the function says is said here, by this thread, so that `said_to` around this call gets it.
    The child never outlives this process: SIGTERM ends it by a `SystemExit`, so that its ``finally`` blocks run.
    A `PromptfoldError` of the function is raised here too. A child that died is an EngineError, whose message begins
    with ``name`` ("The export of adapters/a") and ends with ``remedy``.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(sender, work, arguments))
    child.start()
    sender.close()
    try:
        reply: T | PromptfoldError = _say_until_reply(receiver)
    except EOFError as cause:
        child.join()
        raise EngineError(f"{name} ended unexpectedly (exit code {child.exitcode}). {remedy}".rstrip()) from cause
    except (KeyboardInterrupt, SystemExit, OSError):  # OSError: the reader of the printed lines is gone
        child.terminate()
        raise
    finally:
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
    # Ctrl-C reaches the parent too, which then ends this process.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, _exit_once)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with said_to(lambda line: sender.send(_Line(line))):
            reply = work(*arguments)
    except PromptfoldError as error:
        reply = error
    sender.send(reply)


def _exit_once(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the clean-up
    sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
