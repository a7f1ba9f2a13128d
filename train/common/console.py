"""What a command prints, and what it keeps libraries from printing."""

import csv
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, cast


def names(text: str) -> tuple[str, ...]:
    """Comma-separated words; one in quotes may hold commas: ``"a, b",c``."""
    cells = next(csv.reader([re.sub("[\r\n\0]", " ", text)], skipinitialspace=True), [])
    return tuple(cell.strip() for cell in cells if cell.strip())


def print_line(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


_LISTENERS: ContextVar[tuple[Callable[[str], None], ...]] = ContextVar("listeners", default=(print_line,))
"""What gets the lines of this thread."""


def say(line: str) -> None:
    """Tell the user a line: it is printed at once, or goes where `said_to` sends it."""
    for listen in _LISTENERS.get():
        listen(line)


@contextmanager
def said_to(*listeners: Callable[[str], None]) -> Iterator[None]:
    """Send what this thread says to these functions, in place of `print_line`."""
    before = _LISTENERS.set(listeners)
    try:
        yield
    finally:
        _LISTENERS.reset(before)


class _Stream:
    """A standard stream that raises no error: its first one is kept, and nothing more is written.

    What a run was for is a folder or a file: it shall not be lost because its lines have no reader any more. A character that
    the stream's encoding lacks is written as a backslash and its number.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: OSError | None = None
        with suppress(AttributeError, OSError):  # another kind of stream, or what waits in it cannot be written
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, act: Callable[..., object], *arguments: str) -> None:
        if self.failure is not None:
            return
        try:
            act(*arguments)
        except OSError as cause:
            self.failure = cause
            # What waits in the buffer would fail again when the interpreter ends, with a traceback.
            with suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


@contextmanager
def lasting_streams() -> Iterator[Callable[[], OSError | None]]:
    """Within the block, no write to standard output or standard error fails; yields what tells output's first error."""
    before = sys.stdout, sys.stderr
    out, err = (None if stream is None else _Stream(stream) for stream in before)

    def failure() -> OSError | None:
        if out is None:
            return None
        out.flush()
        return out.failure

    sys.stdout, sys.stderr = cast(Any, out), cast(Any, err)
    try:
        yield failure
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and its "some weights were newly initialized", which is intended here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
