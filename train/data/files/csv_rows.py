"""The rows of a CSV file: every cell is the text in the file ("NA" and "01" too), every bad row is known by its reason.

The csv module reads them. DuckDB 2.0.1 was tried in its place. It does not say on which line a good row begins, so a row
that is refused for its text or label could not be found in the file; a rejected row is missing from the rows, so those
after it lose their numbers; and a second column of one name gets another one.
"""

import csv
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from train.common.errors import DataError
from train.common.limits import MIB
from train.data.files.chunks import Row, trim
from train.data.files.dialect import Dialect, detect_dialect, fit_cells, trim_header
from train.data.files.find import SourceFile
from train.data.files.options import Limits, ReadOptions, remedy
from train.data.files.text import Encoding, open_text

SAMPLE_CHARACTERS = MIB // 4
"""How much of a file is looked at to recognise its dialect."""
_MOST_GIVEN_BACK = 64 * MIB
"""Characters that are read again after quotes that are never closed."""


@dataclass(frozen=True)
class NumberedRow:
    """A row, the line on which it begins, and why it cannot be read, or nothing."""

    line: int
    values: Row
    reason: str = ""


def sample_dialect(file: SourceFile, encoding: Encoding, options: ReadOptions, limits: Limits | None) -> Dialect:
    """Recognise a file's dialect from its first lines."""
    lines: list[str] = []
    with open_text(file, encoding, "", limits) as stream:
        n_characters = 0
        for line in stream:
            lines.append(line)
            n_characters += len(line)
            if n_characters > SAMPLE_CHARACTERS:
                break
        is_whole = not stream.read(1)
    return detect_dialect(lines, file.kind, options, is_whole=is_whole)


def check_names(columns: Sequence[str], name: str) -> None:
    """Refuse a column name that occurs twice among what may be half a million."""
    if twice := [column for column, count in Counter(columns).items() if count > 1]:
        first = columns.index(twice[0])
        second = columns.index(twice[0], first + 1)
        raise DataError(f"{name} has two columns {twice[0]!r:.80}, the {first + 1}. and the {second + 1}. Rename one.")


class _Lines:
    """Lines of a file that can be given back: those after the first of a row that is none."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self._back = lines, deque[str]()
        self.taken: list[str] = []
        """Lines of the row that is being read."""
        self.begin = 1
        """The line on which it begins."""
        self._given_back = 0

    def __iter__(self) -> "Iterator[str]":
        return self

    def __next__(self) -> str:
        line = self._back.popleft() if self._back else next(self._lines)
        self.taken.append(line)
        return line

    def start_row(self) -> None:
        self.begin += len(self.taken)
        self.taken.clear()

    def keep(self, n: int) -> None:
        """Give back all but the first lines of the row."""
        rest = self.taken[n:]
        self._given_back += sum(map(len, rest))
        if self._given_back <= _MOST_GIVEN_BACK:
            self._back.extendleft(reversed(rest))
            del self.taken[n:]


def read_csv(
    file: SourceFile, encoding: Encoding, dialect: Dialect, limits: Limits | None, *, quote_is_forced: bool
) -> Iterator[NumberedRow]:
    """The rows of a CSV file in order."""
    name = file.name
    with open_text(file, encoding, "", limits) as stream:
        lines = _Lines(iter(stream))
        reader = dialect.reader(lines)
        try:
            if dialect.has_sep_line:
                next(lines)
                lines.start_row()
            header = next((cells for cells in reader if cells and any(map(str.strip, cells))), [])
        except csv.Error as cause:
            raise DataError(f"{name}, line 1 cannot be read as csv ({cause}).") from cause
        if not header:
            raise DataError(f"{name}: the first line names no columns. Give a CSV file with a header.")
        columns = trim_header(header)
        # Blank names in the middle; a first one is what pandas and R write over the numbers of the rows.
        columns = [column or (f"column {n + 1}" if n else "") for n, column in enumerate(columns)]
        check_names(columns, name)
        if dialect.is_numbered and "" not in columns:
            columns = ["", *columns]
        yield from _read_rows(lines, reader, dialect, columns, limits, quote_is_forced=quote_is_forced)


def _read_rows(
    lines: _Lines,
    reader: Iterator[list[str]],
    dialect: Dialect,
    columns: list[str],
    limits: Limits | None,
    *,
    quote_is_forced: bool,
) -> Iterator[NumberedRow]:
    if_text = remedy(limits, "add --quote none, else --quote '\"'", "put the cell in quotes and each of its own twice")
    while True:
        lines.start_row()
        try:
            cells, reason = next(reader), ""
        except StopIteration:
            return
        except csv.Error as cause:
            cells, reason = [], f"it cannot be read as csv ({cause})"
        if not cells and not reason:
            continue  # an empty line
        fitted = None if reason else fit_cells(cells, len(columns))
        if fitted is None:
            fitted = _read_leniently(lines, dialect, len(columns))
        elif _swallows_rows(lines.taken, dialect, len(columns)) and not quote_is_forced:
            fitted = None
            reason = (
                f"a cell that begins with a quote goes on over {len(lines.taken)} lines that are rows themselves. If "
                f"quotes are part of the texts, {if_text}"
            )
        if fitted is not None:
            repeats = len(columns) > 1 and fitted[-1].strip() == columns[-1] and [*map(trim, fitted)] == columns
            reason = "it is the first line again, as where one file was added to another" if repeats else ""
            yield NumberedRow(lines.begin, dict(zip(columns, fitted, strict=True)), reason)
            continue
        lines.keep(1)
        reason = reason or f"it has {len(cells)} cells, the first line names {len(columns)} columns"
        padded = [*cells, *[""] * len(columns)] if 0 < len(cells) < len(columns) else [lines.taken[0].rstrip("\r\n")]
        yield NumberedRow(lines.begin, dict(zip(columns, [*padded, *[""] * len(columns)], strict=False)), reason)


def _read_leniently(lines: _Lines, dialect: Dialect, n_columns: int) -> list[str] | None:
    r"""A row that is none as the file is written so far, but is one if ``\"`` stands for a quote, or blanks after one for
    nothing.
    """
    quote, delimiter = re.escape(dialect.quote), re.escape(dialect.delimiter)
    tries: list[tuple[Dialect, list[str]]] = []
    if quote and any(f"\\{dialect.quote}" in line for line in islice(lines.taken, 1000)):
        tries.append((replace(dialect, has_escapes=not dialect.has_escapes), lines.taken))
    if quote and re.search(f"{quote} +({delimiter}|$)", lines.taken[0]):
        cleaned = [re.sub(f"{quote} +(?={delimiter}|$)", dialect.quote, line) for line in lines.taken[:1]]
        tries.append((replace(dialect, skips_blanks=True), cleaned))
    for tried, taken in tries:
        rest = iter(taken)
        try:
            cells = fit_cells(next(tried.reader(rest)), n_columns)
        except csv.Error:
            continue
        if cells is not None:
            lines.keep(len(taken) - sum(1 for _ in rest))
            return cells
    return None


def _swallows_rows(taken: list[str], dialect: Dialect, n_columns: int) -> bool:
    """Whether a quoted cell goes on over lines that are rows themselves: its quote is text, or was never closed.

    In a file with tabs that is so where the cell holds a tab too. With another delimiter, which a text may well hold, each
    further line has to have as many cells as a row, and all lines in one column values that this column has elsewhere.
    """
    if len(taken) < 2 or n_columns < 2:
        return False
    if dialect.delimiter == "\t":
        return sum(line.count("\t") for line in taken) > n_columns - 1
    rows = [[cell.strip(dialect.quote) for cell in line.rstrip("\r\n").split(dialect.delimiter)] for line in taken]
    if any(len(cells) != n_columns or (not dialect.skips_blanks and _has_blank(cells)) for cells in rows[1:]):
        return False
    return any(
        all(len(cells) > column and cells[column].strip() in known for cells in rows)
        for column, known in enumerate(dialect.values)
    )


def _has_blank(cells: Sequence[str]) -> bool:
    """Whether a blank follows a delimiter, as it follows a comma in a text."""
    return any(cell.startswith(" ") for cell in cells[1:])
