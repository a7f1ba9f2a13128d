"""What a command prints, and what it keeps libraries from printing."""

import csv
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


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
