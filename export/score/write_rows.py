"""Labelled rows to .csv, .jsonl and .parquet files."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import numpy as np

from train.common.errors import DataError, first_line
from train.data.read_rows import ArrowChunk, Chunk

if TYPE_CHECKING:
    import pyarrow


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
