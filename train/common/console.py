"""What a command prints, and what it keeps libraries from printing."""

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager


def names(text: str) -> tuple[str, ...]:
    """Comma-separated words; one in quotes may hold commas: ``"a, b",c``."""
    cells = next(csv.reader([re.sub("[\r\n\0]", " ", text)], skipinitialspace=True), [])
    return tuple(cell.strip() for cell in cells if cell.strip())


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


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
