"""Rows in and rows out: .csv, .jsonl and .parquet as chunks of rows, and each of them turned into any other.

In a chunk every row knows its place in the file, so that a message can name it. Out, a value of one format
becomes what is nearest to it in another:

    csv → all              texts as they stand there
    all → csv              texts as they are, nothing for null, all else as in JSON
    parquet → csv, jsonl   dates, times and decimals as text; bytes are refused
    jsonl → parquet        one type a column, which must hold all rows
"""

import csv
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import numpy as np

from train.errors import DataError, first_line

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
    """Rows and the lines on which they begin, every cell as the text that stands there (as `train.data` reads it)."""
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


# Rows out.


def merge_types(file: Path, chunk: Chunk, name: str, before: Any, out_suffix: str) -> Any:
    """The Arrow type that holds a column so far; only Parquet needs one, and the others cannot hold bytes.

    Args:
        before: the type that holds it in the chunks before; None where it is new, or no type is needed.
        out_suffix: of what shall be written.

    Raises:
        DataError: no type holds it, or the format does not.
    """
    import pyarrow

    if out_suffix != ".parquet":
        if isinstance(chunk, ArrowChunk) and _holds_bytes(chunk.column_type(name)):
            raise DataError(
                f"{file}: column {name!r} holds bytes, which {out_suffix[1:]} cannot. Give an --out that ends in .parquet."
            )
        return None
    if isinstance(chunk, ArrowChunk):
        return chunk.column_type(name)
    try:
        found = chunk.column_type(name)
        if before is None or found == before:
            return found
        schemas = [pyarrow.schema([(name, item)]) for item in (before, found)]
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pyarrow.ArrowException, OverflowError) as cause:
        raise _no_parquet(file, name, cause) from cause


def _no_parquet(file: Path, name: str, cause: BaseException) -> DataError:
    return DataError(
        f"{file}: column {name!r} cannot be written as parquet, which wants one type for all rows "
        f"({first_line(cause)}). Give an --out that ends in .jsonl."
    )


def _holds_bytes(kind: Any) -> bool:
    """Whether an Arrow type holds bytes at any depth."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    if types.is_nested(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return "binary" in str(kind)


def parquet_schema(file: Path, chunk: Chunk, types: Mapping[str, Any]) -> "pyarrow.Schema":
    """The schema in which a file's columns are written to Parquet: its own where it has one.

    It is tried column by column, on no rows at all: Parquet cannot hold every Arrow type.

    Args:
        chunk: any of the file's.
        types: of every column, as `merge_types` found it in all chunks.

    Raises:
        DataError: Parquet cannot hold a column.
    """
    import pyarrow
    from pyarrow import parquet

    schema = chunk.arrow.schema if isinstance(chunk, ArrowChunk) else pyarrow.schema(list(types.items()))
    for field in schema:
        try:
            alone = pyarrow.schema([field])
            parquet.write_table(alone.empty_table(), pyarrow.BufferOutputStream())
        except pyarrow.ArrowException as cause:
            raise _no_parquet(file, field.name, cause) from cause
    return schema


def write_part(
    path: Path,
    chunk: Chunk,
    added: Mapping[str, Sequence[Any]],
    *,
    columns: Sequence[str],
    schema: "pyarrow.Schema | None",
    neutralise: bool = False,
) -> None:
    """Write a chunk and the columns that are added to it, in the format that the name ends in.

    Args:
        added: texts, fractions or booleans by column, one a row.
        columns: all that the file has, this chunk's among them.
        schema: of these; needed for Parquet alone.
        neutralise: whether no cell of a CSV file may be a formula where a spreadsheet opens it.

    Raises:
        DataError: a value cannot be written in that format.
    """
    if path.suffix == ".parquet":
        assert schema is not None
        write_parquet(path, chunk, added, schema)
        return
    rows = [
        {name: _plain(value) for name, value in row.items()} | dict(zip(added, values, strict=True))
        for row, *values in zip(chunk.rows, *added.values(), strict=True)
    ]
    with path.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix == ".jsonl":
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        writer = csv.writer(_LineFeeds(stream.write))
        names = [*columns, *added]
        cell = _neutral_cell if neutralise else _cell
        if not chunk.start:
            writer.writerow([cell(name) for name in names])
        writer.writerows([cell(row.get(name)) for name in names] for row in rows)


@dataclass(frozen=True)
class _LineFeeds:
    """Ends the lines of a `csv.writer` in a line feed alone.

    With ``lineterminator="\\n"`` the writer would leave a carriage return within a cell unquoted, and the
    file could not be read again.
    """

    write_on: Callable[[str], int]

    def write(self, line: str) -> int:
        return self.write_on(line.removesuffix("\r\n") + "\n")


def _cell(value: Any) -> str:
    """A value in CSV: texts as they are, nothing for null, all else as in JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _neutral_cell(value: Any) -> str:
    """The same with an apostrophe before what a spreadsheet would take for a formula; -3.5 is a number and stays."""
    cell = _cell(value)
    return f"'{cell}" if cell.startswith(_FORMULA_STARTS) and not _NUMBER.fullmatch(cell) else cell


def _plain(value: Any) -> Any:
    """A value as JSON has it: dates and decimals as text, null for what is no number."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):  # a map's entries are tuples
        return [_plain(item) for item in value]
    if isinstance(value, date | time_of_day):
        return value.isoformat()
    if isinstance(value, timedelta | Decimal | UUID):
        return str(value)
    raise DataError(
        f"A value of type {type(value).__name__} can be written to parquet alone. Give an --out that ends in .parquet."
    )


def write_parquet(sink: Any, chunk: Chunk, added: Mapping[str, Sequence[Any]], schema: "pyarrow.Schema") -> None:
    """Write a chunk and the columns that are added to it as one Parquet row group.

    Args:
        sink: a path or an open file.
        added: as for `write_part`.
        schema: of the chunk's own columns.

    Raises:
        DataError: a value does not fit the schema.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        table = chunk.table(schema)
    except (pyarrow.ArrowException, OverflowError) as cause:
        raise DataError(
            f"{chunk.place(0)} to {chunk.place(len(chunk) - 1)} cannot be written as parquet ({first_line(cause)}). "
            "Give an --out that ends in .jsonl."
        ) from cause
    for name, values in added.items():
        table = table.append_column(name, pyarrow.array(values))
    parquet.write_table(table, sink, row_group_size=len(table), write_page_checksum=True)


def join_parts(parts: Sequence[Path], whole: Path) -> None:
    """Put files of one format together, in their order; in Parquet each becomes one row group."""
    if whole.suffix != ".parquet":
        with whole.open("wb") as stream:
            for path in parts:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, stream)
        return
    from pyarrow import parquet

    with parquet.ParquetWriter(whole, parquet.read_schema(parts[0]), write_page_checksum=True) as writer:
        for path in parts:
            with parquet.ParquetFile(path) as part:
                table = part.read()
            writer.write_table(table, row_group_size=len(table))
