"""What the command lines share: how they parse, speak and end."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from train.common.errors import PromptfoldError, UsageError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose complaint is a `UsageError`, so that all errors look and exit alike."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UsageError(f"{message}. See {self.prog} --help.")


def names(text: str) -> tuple[str, ...]:
    """A flag's comma-separated words."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def say(line: str) -> None:
    """Print a line that shall be seen at once, also through a pipe."""
    print(line, flush=True)


def run_main(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None) -> int:
    """Run one command line and return its exit status.

    0 when it finished, 2 with one line on standard error when the user can mend what went wrong, 130
    after Ctrl-C. Anything else is a bug of ours and keeps its traceback.
    """
    try:
        command(argv)
    except PromptfoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide "some weights were newly initialized", which here is the point, and transformers' own bars."""
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
