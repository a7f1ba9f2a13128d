"""Rows from .csv, .jsonl and .parquet files, in chunks that remember their place in the file."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet


Row = dict[str, Any]


# Rows in.


@dataclass(frozen=True)
class TextChunk:
    """Rows of a CSV or a JSON lines file that follow one another.

    Attributes:
        start: how many rows of the file come before them.
        rows: as Python's values; a row may lack a column.
        lines: the line of the file on which each row begins.
    """

    start: int
    rows: list[Row]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """The columns that these rows have, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def column(self, name: str) -> list[Any]:
        """The values of a column, None where a row lacks it."""
        return [row.get(name) for row in self.rows]

    def place(self, row: int) -> str:
        """Where a row stands, for messages; counted from 0 within the chunk."""
        return f"row {self.start + row + 1} (line {self.lines[row]})"

    def column_type(self, name: str) -> "pyarrow.DataType":
        """The type of a column in Arrow; an ArrowException or OverflowError where it has none."""
        import pyarrow

        values = self.column(name)
        kinds = {type(value) for value in values if value is not None}
        if bool in kinds and len(kinds) > 1:
            # pyarrow would take True for 1.0 where fractions stand before it.
            raise pyarrow.ArrowTypeError("true or false beside other values")
        return pyarrow.array(values).type

    def table(self, schema: "pyarrow.Schema") -> "pyarrow.Table":
        """As an Arrow table; an ArrowException or OverflowError where a value does not fit the schema."""
        import pyarrow

        return pyarrow.table([pyarrow.array(self.column(item.name), item.type) for item in schema], schema=schema)


@dataclass(frozen=True)
class ArrowChunk:
    """Rows of a Parquet file that follow one another; members as those of `TextChunk`."""

    start: int
    arrow: "pyarrow.Table"

    def __len__(self) -> int:
        return len(self.arrow)

    @property
    def columns(self) -> list[str]:
        """The file's."""
        return list(self.arrow.column_names)

    @property
    def rows(self) -> list[Row]:
        """As Python's values, made anew at every call."""
        return self.arrow.to_pylist()

    def column(self, name: str) -> list[Any]:
        """The values of a column."""
        return self.arrow.column(name).to_pylist()

    def place(self, row: int) -> str:
        """Where a row stands, for messages."""
        return f"row {self.start + row + 1}"

    def column_type(self, name: str) -> "pyarrow.DataType":
        """The type of a column in the file."""
        return self.arrow.schema.field(name).type

    def table(self, schema: "pyarrow.Schema") -> "pyarrow.Table":
        """As it was read: the schema is this file's own."""
        return self.arrow.cast(schema)


Chunk = TextChunk | ArrowChunk
"""Rows that follow one another, of any format."""


def read_chunks(file: Path, chunk_rows: int) -> Iterator[Chunk]:
    """Read a file chunk by chunk; of the same file always the same chunks.

    Raises:
        DataError: it cannot be read, or what stands in it is not what its name ends in.
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(file, chunk_rows)
        return
    numbered = _read_csv(file) if suffix == ".csv" else _read_jsonl(file)
    start, rows, lines = 0, [], []
    try:
        for line, row in numbered:
            rows.append(row)
            lines.append(line)
            if len(rows) == chunk_rows:
                yield TextChunk(start, rows, lines)
                start, rows, lines = start + len(rows), [], []
    except OSError as cause:
        raise DataError(f"{file} cannot be read ({cause.strerror}).") from cause
    if rows:
        yield TextChunk(start, rows, lines)


def _read_lines(file: Path, newline: str) -> Iterator[str]:
    """The lines of a text file with their ends, each proved to be UTF-8, so that an error can name it."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as stream:
        for number, line in enumerate(stream, start=1):
            if not _is_unicode(line):
                raise DataError(f"{file}, line {number} is not valid UTF-8. Convert the file to UTF-8.")
            yield line


def _is_unicode(text: str) -> bool:
    """Whether a text is free of surrogates, which stand for what could not be decoded."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _twice(names: Sequence[str]) -> list[str]:
    """The names that stand there more than once; a first line may hold half a million."""
    return [name for name, count in Counter(names).items() if count > 1]


def _read_csv(file: Path) -> Iterator[tuple[int, Row]]:
    """Rows and the lines on which they begin, every cell as the text that stands there (as `train.data.load` reads it)."""
    # The csv module's limit of 128 kB a cell stays: a quote that is never closed would else take the
    # whole rest of the file into memory.
    reader = csv.reader(_read_lines(file, newline=""), strict=True)
    try:
        names = next(reader, [])
        if not names:
            raise DataError(f"{file}: the first line names no columns. Give a CSV file with a header.")
        twice = _twice(names)
        if twice:
            raise DataError(f"{file}: the first line names the column {twice[0]!r} twice. Rename one.")
        line, row = reader.line_num + 1, 0
        for cells in reader:
            if cells:  # not an empty line
                row += 1
                if len(cells) != len(names):
                    raise DataError(
                        f"{file}, row {row} (line {line}) has {len(cells)} cells, the first line names {len(names)} "
                        "columns. Mend or drop the row."
                    )
                yield line, dict(zip(names, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as cause:
        raise DataError(f"{file}, line {reader.line_num} cannot be read as csv ({cause}).") from cause


def _read_jsonl(file: Path) -> Iterator[tuple[int, Row]]:
    """Rows and their lines."""
    for number, line in enumerate(_read_lines(file, newline="\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as cause:
            raise DataError(f"{file}, line {number} is no JSON ({cause}). Mend or drop the line.") from cause
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number} holds no JSON object. Give one object a line.")
        if "\\u" in line and not _is_unicode(json.dumps(row, ensure_ascii=False)):
            raise DataError(
                f"{file}, line {number} holds half a surrogate pair, which is no valid Unicode. Mend or drop the line."
            )
        yield number, row


def _read_parquet(file: Path, chunk_rows: int) -> Iterator[Chunk]:
    import pyarrow

    start = 0
    try:
        with open_parquet(file, file) as opened:
            for batch in parquet_batches(opened, chunk_rows):
                yield ArrowChunk(start, pyarrow.Table.from_batches([batch]))
                start += len(batch)
    except (pyarrow.ArrowException, OSError) as cause:
        raise unreadable_parquet(file, start, cause) from cause


def open_parquet(source: Any, file: object) -> "parquet.ParquetFile":
    """Open a Parquet file so that a row group is read piece by piece, however large it is.

    Args:
        source: a path or an open file.
        file: its name, for a complaint.

    Raises:
        DataError: two of its columns have one name.
        pyarrow.ArrowException, OSError: it cannot be read.
    """
    from pyarrow import parquet

    # The pieces are of buffer_size.
    opened = parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    twice = _twice(opened.schema_arrow.names)
    if twice:
        opened.close()
        raise DataError(f"{file} has two columns {twice[0]!r}. Rename one.")
    return opened


def parquet_batches(
    opened: "parquet.ParquetFile", batch_rows: int, row_groups: Sequence[int] | None = None
) -> Iterator["pyarrow.RecordBatch"]:
    """The rows of a Parquet file, or of some of its row groups, each proved to be what its type says.

    Raises:
        pyarrow.ArrowException, OSError: they cannot be read.
    """
    for batch in opened.iter_batches(batch_size=batch_rows, row_groups=row_groups):
        batch.validate(full=True)  # Parquet's own reader takes any bytes for UTF-8
        yield batch


def unreadable_parquet(file: object, rows_read: int, cause: BaseException) -> DataError:
    """The complaint about a Parquet file that cannot be read on."""
    after = f" after row {rows_read}" if rows_read else ""
    return DataError(f"{file} cannot be read as parquet{after} ({first_line(cause)}). Write it anew.")
