"""Labelled files (.csv, .jsonl, .parquet), read in chunks of rows that remember their place in the file."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.errors import DataError, first_line
from train.common.limits import MIB

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

FILE_TYPES = (".csv", ".jsonl", ".parquet")

Row = dict[str, Any]

_UNTRUSTED_STEP_ROWS = 16
"""Parquet rows decoded at a time within limits: a long text that a dictionary repeats is noticed early."""


@dataclass(frozen=True)
class Limits:
    """Bounds for a file from an untrusted source."""

    file_bytes: int
    rows: int
    decoded_bytes: int
    """All Parquet columns without compression, both as the footer states it and as it is read."""
    values: int
    """Values of a Parquet file: a list that repeats one value stores billions in a few bytes."""
    advice: str
    """What to do with a larger file, for messages."""


@dataclass(frozen=True)
class TextChunk:
    """Rows of a CSV or a JSON lines file that follow one another."""

    file: str
    """The file's name, for messages."""
    start: int
    """How many rows of the file come before."""
    rows: Sequence[Row]
    """As Python values; a row of JSON lines may lack a column."""
    lines: Sequence[int]
    """The line of the file on which each row begins."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def column(self, name: str) -> list[Any]:
        """The values of a column, None where a row lacks it."""
        return [row.get(name) for row in self.rows]

    def place(self, row: int) -> str:
        """Where a row is, for messages; counted from 0 within the chunk."""
        return f"{self.file}, row {self.start + row + 1} (line {self.lines[row]})"


@dataclass(frozen=True)
class ArrowChunk:
    """Rows of a Parquet file that follow one another; members as those of `TextChunk`."""

    file: str
    start: int
    table: "pyarrow.Table"

    def __len__(self) -> int:
        return len(self.table)

    @property
    def rows(self) -> Sequence[Row]:
        return self.table.to_pylist()

    @property
    def columns(self) -> list[str]:
        return list(self.table.column_names)

    def column(self, name: str) -> list[Any]:
        return self.table.column(name).to_pylist()

    def place(self, row: int) -> str:
        return f"{self.file}, row {self.start + row + 1}"


Chunk = TextChunk | ArrowChunk


def check_source(file: Path, name: str, limits: Limits | None = None) -> None:
    """Refuse a file that is missing, empty, too large or has an unknown ending; ``name`` is for the message."""
    if file.suffix.lower() not in FILE_TYPES:
        raise DataError(f"{name}: give a file that ends in {', '.join(FILE_TYPES)}.")
    try:
        if not file.is_file():
            raise DataError(f"{name}: there is no such file.")
        n_bytes = file.stat().st_size
        with file.open("rb") as stream:
            is_empty = not stream.read(1)
    except OSError as cause:
        raise DataError(f"{name} cannot be read ({cause.strerror or cause}).") from cause
    if is_empty:
        raise DataError(f"{name} is empty. Give a file with at least one text.")
    if limits is not None and n_bytes > limits.file_bytes:
        raise DataError(
            f"{name} has {n_bytes:,} bytes; at most {limits.file_bytes:,} are taken here. Give fewer rows, or "
            f"{limits.advice}."
        )


def read_chunks(file: Path, chunk_rows: int, *, name: str = "", limits: Limits | None = None) -> Iterator[Chunk]:
    """Read a file chunk by chunk, always the same chunks of the same file. Errors are `DataError`.

    Messages call the file ``name``, by default its path. With ``limits.rows`` rows in a chunk, a file within the limits
    is one chunk.
    """
    import pyarrow

    name = name or str(file)
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        chunks: Iterator[Chunk] = _read_parquet(file, name, chunk_rows, limits)
    else:
        chunks = _in_chunks(_read_csv(file, name) if suffix == ".csv" else _read_jsonl(file, name), name, chunk_rows)
    n_rows = 0
    try:
        for chunk in chunks:
            n_rows += len(chunk)
            if limits is not None and n_rows > limits.rows:
                raise DataError(
                    f"{name} has more than {limits.rows:,} rows, which is the most that is taken here. Give fewer, or "
                    f"{limits.advice}."
                )
            yield chunk
    except (pyarrow.ArrowException, OSError) as cause:
        raise unreadable(name, n_rows, cause) from cause
    if not n_rows:
        raise DataError(f"{name} has no rows. Give a file with at least one text.")


def unreadable(name: str, rows_read: int, cause: BaseException) -> DataError:
    """The error for a file that cannot be read on."""
    kind = Path(name).suffix.lower()[1:]
    after = f" after row {rows_read}" if rows_read else ""
    return DataError(f"{name} cannot be read as {kind}{after} ({first_line(cause):.300}). Write it anew.")


def _in_chunks(rows: Iterator[tuple[int, Row]], name: str, chunk_rows: int) -> Iterator[TextChunk]:
    """Rows and the lines on which they begin → chunks."""
    start = 0
    while taken := list(islice(rows, chunk_rows)):
        lines, values = zip(*taken, strict=True)
        yield TextChunk(name, start, values, lines)
        start += len(taken)


def _read_lines(file: Path, name: str, newline: str) -> Iterator[str]:
    """The lines of a text file with their ends."""
    with file.open(encoding="utf-8-sig", newline=newline) as stream:
        try:
            for line in stream:
                if "\0" in line:
                    raise _no_text(file, name)
                yield line
        except UnicodeDecodeError as cause:
            raise _no_text(file, name) from cause


def _no_text(file: Path, name: str) -> DataError:
    """The error for a file that is not text in UTF-8, with the place of the first byte that shows it."""
    offset = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            bad = line.find(b"\0")  # valid in UTF-8, but in no text: the file is of another kind
            try:
                line.decode()
            except UnicodeDecodeError as cause:
                bad = cause.start
            if bad >= 0:
                return DataError(
                    f"{name}, line {number:,}, byte {offset + bad + 1:,} of the file is not UTF-8 text. Is it really a "
                    f"{file.suffix} file? Save it as such, in UTF-8."
                )
            offset += len(line)
    return DataError(f"{name} changed while it was read.")


def _check_names(columns: Sequence[str], name: str) -> None:
    """Refuse a column name that occurs twice among what may be half a million."""
    if twice := [column for column, count in Counter(columns).items() if count > 1]:
        raise DataError(f"{name} has two columns {twice[0]!r:.80}. Rename one.")


def _read_csv(file: Path, name: str) -> Iterator[tuple[int, Row]]:
    """Lines on which rows begin, and the rows; every cell is the text in the file ("NA" and "01" too)."""
    # The csv module's limit of 128 kB a cell stays: a quote that is never closed would take the rest of the file.
    reader = csv.reader(_read_lines(file, name, newline=""), strict=True)
    try:
        header = next(reader, [])
        if not header:
            raise DataError(f"{name}: the first line names no columns. Give a CSV file with a header.")
        _check_names(header, name)
        line, row = reader.line_num + 1, 0
        for cells in reader:
            if cells:  # not an empty line
                row += 1
                if len(cells) != len(header):
                    raise DataError(
                        f"{name}, row {row} (line {line}) has {len(cells)} cells, the first line names {len(header)} "
                        "columns. Fix or remove the row."
                    )
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as cause:
        raise DataError(f"{name}, line {reader.line_num} cannot be read as csv ({cause}).") from cause


def _read_jsonl(file: Path, name: str) -> Iterator[tuple[int, Row]]:
    """Line numbers and the rows there."""
    for number, line in enumerate(_read_lines(file, name, newline="\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as cause:
            raise DataError(
                f"{name}, line {number} holds half a surrogate pair, which is no valid Unicode. Fix or remove the line."
            ) from cause
        except (ValueError, RecursionError) as cause:
            raise DataError(f"{name}, line {number} is no JSON ({cause}). Fix or remove the line.") from cause
        if not isinstance(row, dict):
            raise DataError(f"{name}, line {number} holds no JSON object. Give one object a line.")
        yield number, row


def _read_parquet(file: Path, name: str, chunk_rows: int, limits: Limits | None) -> Iterator[ArrowChunk]:
    import pyarrow

    start = n_rows = n_bytes = 0
    batches: list[pyarrow.RecordBatch] = []
    with open_parquet(file, name) as opened:
        if limits is not None:
            _check_footer(opened.metadata, name, limits)
        for batch in parquet_batches(opened, chunk_rows if limits is None else _UNTRUSTED_STEP_ROWS):
            if limits is not None:
                n_bytes += _decoded_bytes(batch)
                _check_bytes(n_bytes, name, "is", limits)
            batches.append(batch)
            n_rows += len(batch)
            if n_rows - start >= chunk_rows:
                yield ArrowChunk(name, start, pyarrow.Table.from_batches(batches))
                start, batches = n_rows, []
        if batches:
            yield ArrowChunk(name, start, pyarrow.Table.from_batches(batches))


def open_parquet(source: Any, name: str) -> "parquet.ParquetFile":
    """Open a Parquet file, a path or an open file, so that a row group is read step by step, however large it is.

    What pyarrow raises (ArrowException, OSError) passes through; see `unreadable`.
    """
    from pyarrow import parquet

    opened = parquet.ParquetFile(source, buffer_size=MIB, pre_buffer=False, page_checksum_verification=True)
    _check_names(opened.schema_arrow.names, name)
    return opened


def parquet_batches(
    opened: "parquet.ParquetFile", batch_rows: int, row_groups: Sequence[int] | None = None
) -> Iterator["pyarrow.RecordBatch"]:
    """The rows of a Parquet file, or of some of its row groups; errors as those of `open_parquet`."""
    for batch in opened.iter_batches(batch_size=batch_rows, row_groups=row_groups):
        batch.validate(full=True)  # Parquet's own reader takes any bytes for UTF-8
        yield batch


def _check_footer(footer: Any, name: str, limits: Limits) -> None:
    """Refuse a Parquet file whose own figures exceed the limits, before anything is decompressed."""
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    _check_bytes(sum(column.total_uncompressed_size for column in columns), name, "says that it is", limits)
    if sum(column.num_values for column in columns) > limits.values:
        raise DataError(f"{name} has more than {limits.values:,} values. Leave out columns that hold lists.")


def _check_bytes(n_bytes: int, name: str, claim: str, limits: Limits) -> None:
    if n_bytes > limits.decoded_bytes:
        raise DataError(
            f"{name} {claim} more than {limits.decoded_bytes:,} bytes long without compression. Give fewer rows or "
            "columns."
        )


def _decoded_bytes(batch: "pyarrow.RecordBatch") -> int:
    """Size in memory, with every text counted as often as it occurs: a dictionary stores it once."""
    from pyarrow import types

    encoded = [column for column in batch.columns if types.is_dictionary(column.type)]
    return int(batch.nbytes + sum(column.dictionary_decode().nbytes for column in encoded))
