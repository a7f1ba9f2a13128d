"""How a CSV file is written: what stands between its cells and around them, recognised from its first lines."""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from train.data.files.chunks import trim
from train.data.files.options import DELIMITERS, NO_QUOTE, ReadOptions

MAX_CELL_CHARACTERS = 1 << 26
"""A longer cell comes of a quote that is never closed."""

_SEP_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
"""The first line by which a file tells Excel its delimiter."""
_BLANK_BEFORE_QUOTE = re.compile(r'[,;|\t] +"')


@dataclass(frozen=True)
class Dialect:
    """The way in which the rows of a CSV file are written."""

    delimiter: str
    quote: str = '"'
    """The character around quoted cells; empty where quotes are text like any other."""
    has_escapes: bool = False
    r"""Whether a quote within a quoted cell may be written as ``\"``, not only as two quotes."""
    skips_blanks: bool = False
    """Whether the blanks after a delimiter are no part of the cell."""
    has_sep_line: bool = False
    """Whether the line ``sep=;`` comes before the header."""
    columns: tuple[str, ...] = ()
    """The names in the header, for people."""
    is_numbered: bool = False
    """Whether each row begins with its number, over which R writes no name."""
    values: tuple[frozenset[str], ...] = ()
    """What the cells of one line hold in the first rows, for each column."""

    def reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        """The csv module's reader, strict: what is not quite CSV is an error."""
        csv.field_size_limit(MAX_CELL_CHARACTERS)
        return csv.reader(
            lines,
            delimiter=self.delimiter,
            quotechar=self.quote or None,
            quoting=csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
            escapechar="\\" if self.quote and self.has_escapes else None,
            skipinitialspace=self.skips_blanks,
            strict=True,
        )

    def __str__(self) -> str:
        """For people."""
        delimiter = DELIMITERS.get(self.delimiter, repr(self.delimiter))
        quote = f", cells quoted by {self.quote}" if self.quote not in {"", '"'} else ""
        quote = quote if self.quote else ", quotes taken as text"
        few = ", ".join(" ".join(name.split()) for name in self.columns[:8]) + (" …" if len(self.columns) > 8 else "")
        return f"delimiter {delimiter}{quote}" + (f", columns {few:.200}" if few else "")


def fit_cells(cells: Sequence[str], n_columns: int) -> list[str] | None:
    """The cells of a row with so many columns, without empty ones beyond; None if they are too many or too few."""
    if len(cells) < n_columns or any(cell.strip() for cell in cells[n_columns:]):
        return None
    return list(cells[:n_columns])


def detect_dialect(lines: Sequence[str], suffix: str, options: ReadOptions, *, is_whole: bool) -> Dialect:
    """The dialect in which most of a file's first lines are rows of as many cells as the header has.

    ``suffix`` is the file's ending, ``is_whole`` says that the lines are all that it has.
    """
    has_sep_line = False
    # In a .tsv file the tab is tried first.
    delimiters = sorted(DELIMITERS, key=lambda character: suffix != ".tsv" or character != "\t")
    if lines and (named := _SEP_LINE.fullmatch(lines[0].lstrip("\ufeff"))):
        has_sep_line, lines, delimiters = True, lines[1:], [named[1]]
    if options.delimiter is not None:
        delimiters = [options.delimiter]
    header = next((line for line in lines if line.strip()), "").strip()
    # Only what the header holds can stand between columns; a file of one column has none.
    delimiters = [character for character in delimiters if character in header] or delimiters[:1]
    apostrophes = re.fullmatch(r"'[^']*'(.'[^']*')*", header) is not None
    quotes = ["'", '"', ""] if apostrophes else ['"', ""]
    if options.quote is not None:
        quotes = ["" if options.quote == NO_QUOTE else options.quote]
    text = "".join(lines)
    best, best_bad = Dialect(delimiters[0], quotes[0]), len(lines) + 1
    for quote in quotes:
        for tried in _variants(quote, delimiters, text):
            n_bad = _count_bad(lines, tried, is_whole=is_whole)
            # Quotes are text only where that alone makes every line a row.
            is_worth_it = quote or len(quotes) == 1 or (n_bad == 0 and not _has_quoted(text, tried.delimiter))
            if n_bad < best_bad and is_worth_it:
                best, best_bad = tried, n_bad
    best = replace(best, skips_blanks=best.skips_blanks or _has_blanks(lines, best))
    best = replace(best, has_sep_line=has_sep_line, columns=_header(lines, best))
    rows = [cells for cells in _read_sample(lines, best) if cells is None or any(map(trim, cells))][1:]
    values = [
        frozenset(cell for cell in column if cell and len(cell.splitlines()) == 1)
        for column in zip_longest(*filter(None, rows), fillvalue="")
    ]
    return replace(best, is_numbered=_is_numbered(rows, len(best.columns)), values=tuple(values))


def _read_sample(lines: Sequence[str], dialect: Dialect) -> Iterator[list[str] | None]:
    """The rows among a file's first lines, None for what is none."""
    reader = dialect.reader(lines)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield None


def _is_numbered(rows: Sequence[Sequence[str] | None], n_columns: int) -> bool:
    """Whether all rows have a cell more than there are columns and begin with their numbers, from 0 or 1 on.

    A row of another length is named as a bad one.
    """
    numbers = [
        (place, cells[0].strip())
        for place, cells in enumerate(rows)
        if cells and len(cells) == n_columns + 1 and cells[-1].strip()
    ]
    return bool(numbers) and any(all(number == str(place + first) for place, number in numbers) for first in (0, 1))


def _header(lines: Sequence[str], dialect: Dialect) -> tuple[str, ...]:
    try:
        return tuple(trim_header(next((cells for cells in dialect.reader(lines) if any(map(trim, cells))), ())))
    except csv.Error:
        return ()


def _variants(quote: str, delimiters: Sequence[str], text: str) -> Iterator[Dialect]:
    """The ways in which lines with such quotes may be written."""
    for delimiter in delimiters:
        dialects = [Dialect(delimiter, quote)]
        if quote and f"\\{quote}" in text:
            dialects.append(replace(dialects[0], has_escapes=True))
        if quote and _BLANK_BEFORE_QUOTE.search(text):
            dialects += [replace(dialect, skips_blanks=True) for dialect in dialects]
        yield from dialects


def _has_quoted(text: str, delimiter: str) -> bool:
    """Whether a cell has a quote at both ends."""
    edge = re.escape(delimiter)
    return re.search(rf'(?:^|{edge})"[^"\r\n]*"(?:{edge}|$)', text, re.MULTILINE) is not None


def _count_bad(lines: Sequence[str], dialect: Dialect, *, is_whole: bool) -> int:
    """How many rows have not as many cells as the header, or a cell with tabs and line ends, which is several rows."""
    reader, n_columns, n_bad = dialect.reader(iter(lines)), 0, 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as cause:
            n_bad += is_whole or "end of data" not in str(cause)
            continue
        if cells is None:
            return n_bad
        if cells and not n_columns:
            n_columns = len(trim_header(cells))
        elif cells:
            is_numbered = cells[0].strip().isdigit() and fit_cells(cells, n_columns + 1) is not None
            is_bad = fit_cells(cells, n_columns) is None and not is_numbered
            n_bad += is_bad or (dialect.delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells))


def trim_header(cells: Sequence[str]) -> list[str]:
    """The names in a header, without blanks around them and without empty ones at its end."""
    names = [trim(cell) for cell in cells]
    while len(names) > 1 and not names[-1]:
        names.pop()
    return names


def _has_blanks(lines: Sequence[str], dialect: Dialect) -> bool:
    """Whether a blank follows every delimiter: then it is no part of the cells."""
    if not dialect.delimiter.strip():
        return False
    try:
        rows = [cells for cells in dialect.reader(lines[:50]) if len(cells) > 1]
    except csv.Error:
        return False
    return bool(rows) and all(cell[:1] == " " or not cell for cells in rows for cell in cells[1:])
