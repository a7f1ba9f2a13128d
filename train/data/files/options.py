"""How files of rows are read: what a user forces, and bounds for untrusted ones."""

import codecs
from dataclasses import dataclass

from train.common.errors import UsageError

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
"""Those that are recognised → their names, which a flag may give too."""
NO_QUOTE = "none"


@dataclass(frozen=True)
class ReadOptions:
    """What is not to be recognised but taken as given; only text files have it."""

    delimiter: str | None = None
    """Between the cells of a CSV file: one character."""
    encoding: str | None = None
    """As Python names it."""
    quote: str | None = None
    """The character around quoted cells; `NO_QUOTE` where quotes are text like any other."""

    @staticmethod
    def parse(delimiter: str | None = None, encoding: str | None = None, quote: str | None = None) -> "ReadOptions":
        """From what ``--delimiter``, ``--encoding`` and ``--quote`` give; a `UsageError` if that cannot be used."""
        if delimiter is not None:
            named = {"\\t": "\t"} | {name: character for character, name in DELIMITERS.items()}
            delimiter = named.get(delimiter, delimiter)
            if len(delimiter) != 1 or delimiter in "\r\n\"'":
                raise UsageError(
                    f"--delimiter {delimiter!r}: give one character, or one of {', '.join(DELIMITERS.values())}."
                )
        if encoding is not None:
            try:
                is_text = codecs.lookup(encoding)._is_text_encoding  # base64 is a codec too
            except LookupError:
                is_text = False
            if not is_text:
                raise UsageError(f"--encoding {encoding}: there is no such encoding. Give one such as utf-8 or cp1252.")
        if quote is not None and quote != NO_QUOTE and (len(quote) != 1 or quote in "\r\n" or quote == delimiter):
            raise UsageError(f"--quote {quote!r}: give one character, such as ', or {NO_QUOTE}.")
        return ReadOptions(delimiter, encoding, quote)

    def as_json(self) -> dict[str, str]:
        """What is forced, under the flags' names."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Limits:
    """Bounds for a file from an untrusted source."""

    file_bytes: int
    rows: int
    decoded_bytes: int
    """Without compression: a text file, or all columns of a Parquet file, as its footer states it and as it is read."""
    values: int
    """Values of a Parquet file: a list that repeats one value stores billions in a few bytes."""
    advice: str
    """What to do with a larger file, for messages."""


def remedy(limits: Limits | None, by_flag: str, of_file: str) -> str:
    """What to do about a file, for messages: within limits, as of a page's visitor, there is no flag to give."""
    return by_flag if limits is None else of_file
