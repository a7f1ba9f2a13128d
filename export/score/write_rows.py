"""Labelled rows as .csv, .tsv, .jsonl and .parquet."""

import csv
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID

import numpy as np

from train.common.errors import DataError, first_line
from train.data.files.chunks import ArrowChunk, Chunk, holds_bytes
from train.data.files.find import ARROW, CSV, JSON, PARQUET, TSV, split_suffix
from train.data.files.options import Limits, remedy
from train.data.read_rows import Source

if TYPE_CHECKING:
    import pyarrow


OUT_TYPES = (".csv", ".jsonl", ".parquet", ".tsv")


@dataclass(frozen=True)
class CsvStyle:
    """How a CSV file is written: as the one that was read, since the same program will open it."""

    delimiter: str = ","
    has_bom: bool = False
    """Whether it begins with a byte-order mark, by which Excel knows UTF-8."""

    @staticmethod
    def of(source: Source, suffix: str) -> "CsvStyle":
        """That of the first file of a source, for an output with this ending."""
        written = source.written[0]
        has_bom = written.encoding is not None and written.encoding.has_bom
        if suffix == TSV or written.dialect is None:
            return CsvStyle("\t" if suffix == TSV else ",", has_bom=has_bom and written.dialect is not None)
        return CsvStyle(written.dialect.delimiter if source.files[0].kind == CSV else ",", has_bom=has_bom)


COMMAS = CsvStyle()


def out_suffix(path: Path) -> str:
    """The ending of an output that is like an input: unpacked, and JSON as lines."""
    kind, _ = split_suffix(path)
    return {JSON: ".jsonl", ".ndjson": ".jsonl", ARROW: PARQUET, ".feather": PARQUET}.get(kind, kind)


def merge_schema(
    chunk: Chunk, before: "pyarrow.Schema | None", suffix: str, limits: Limits | None = None
) -> "pyarrow.Schema":
    """The columns of a chunk and of those before; their types matter only where the ``suffix`` is Parquet's."""
    import pyarrow

    if isinstance(chunk, ArrowChunk):
        schema = chunk.table.schema
        if before is not None and not schema.equals(before):
            raise DataError(f"{chunk.file} has other columns than the files before. Label them one by one.")
        _check_bytes(chunk, suffix)
    else:
        kinds = {} if before is None else dict(zip(before.names, before.types, strict=True))
        for name in chunk.columns:
            kinds[name] = _merge_type(chunk, name, kinds.get(name)) if suffix == ".parquet" else pyarrow.null()
        schema = pyarrow.schema(list(kinds.items()))
    if schema != before:
        _check_schema(chunk, schema, suffix, limits)
    return schema


def _merge_type(chunk: Chunk, name: str, before: Any) -> Any:
    """The type that holds a column in this chunk and, of type ``before``, in those before."""
    import pyarrow

    values = chunk.column(name)
    classes = {type(value) for value in values if value is not None}
    try:
        if bool in classes and len(classes) > 1:
            # pyarrow would take True for 1.0 where fractions precede it.
            raise pyarrow.ArrowTypeError("true or false beside other values")
        schemas = [pyarrow.schema([(name, kind)]) for kind in (before, pyarrow.array(values).type) if kind is not None]
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pyarrow.ArrowException, OverflowError) as cause:
        raise _no_parquet(chunk, name, cause) from cause


def _check_schema(chunk: Chunk, schema: "pyarrow.Schema", suffix: str, limits: Limits | None) -> None:
    """Refuse a column of a type that the format does not have."""
    import pyarrow
    from pyarrow import parquet

    for field in schema:
        if suffix != ".parquet" and _holds_bytes(field.type) and not holds_bytes(field.type):
            raise _no_bytes(chunk, field.name, suffix)
        if suffix == ".parquet":
            try:
                parquet.write_table(pyarrow.schema([field]).empty_table(), pyarrow.BufferOutputStream())
            except pyarrow.ArrowException as cause:
                raise _no_parquet(chunk, field.name, cause, limits) from cause


def _check_bytes(chunk: ArrowChunk, suffix: str) -> None:
    """Refuse a column of bytes that are no text, where the format has only texts."""
    for field in chunk.table.schema:
        is_at_risk = suffix != ".parquet" and holds_bytes(field.type)
        if is_at_risk and any(isinstance(value, bytes) for value in chunk.column(field.name)):
            raise _no_bytes(chunk, field.name, suffix)


def _no_bytes(chunk: Chunk, name: str, suffix: str) -> DataError:
    return DataError(
        f"{chunk.file}: column {name!r:.80} holds bytes, which {suffix[1:]} cannot. Give an --out that ends in .parquet."
    )


def _no_parquet(chunk: Chunk, name: str, cause: BaseException, limits: Limits | None = None) -> DataError:
    what = remedy(limits, "Give an --out that ends in .jsonl", "Leave it out, or write the rows as .jsonl")
    return DataError(
        f"{chunk.file}: column {name!r:.80} cannot be written as parquet, which wants one type for all rows "
        f"({first_line(cause):.300}). {what}."
    )


def _holds_bytes(kind: Any) -> bool:
    """Whether an Arrow type holds bytes at any depth."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    if types.is_nested(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return "binary" in str(kind)


def encode_rows(
    chunk: Chunk,
    added: Mapping[str, Sequence[Any]],
    schema: "pyarrow.Schema",
    suffix: str,
    *,
    style: CsvStyle = COMMAS,
    with_header: bool = True,
    no_formulas: bool = False,
    numbers: Collection[str] = (),
) -> bytes:
    """A chunk and the columns that are added to it, in the format of a file name ending.

    ``schema`` is that of the whole file, from `merge_schema`. The first chunk of a CSV file has its header. With
    ``no_formulas`` a spreadsheet that opens a CSV file finds no formula in a cell. ``numbers`` are the added columns that
    hold numbers: a chunk of bad rows alone has none, and in Parquet a column has one type in all chunks.
    """
    if suffix == ".parquet":
        return _encode_parquet(chunk, added, schema, numbers)
    rows = [
        {name: _plain(value) for name, value in row.items()} | dict(zip(added, values, strict=True))
        for row, *values in zip(chunk.rows, *added.values(), strict=True)
    ]
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    names = [*schema.names, *added]
    header = [{name: name for name in names}] if with_header else []
    lines: list[str] = []
    # With lineterminator="\n" a carriage return in a cell would not be quoted, and the file could not be read again.
    writer = csv.writer(SimpleNamespace(write=lines.append), delimiter=style.delimiter)
    writer.writerows([_cell(row.get(name), no_formulas=no_formulas) for name in names] for row in [*header, *rows])
    mark = "\ufeff" if style.has_bom and with_header else ""
    return (mark + "".join(line.removesuffix("\r\n") + "\n" for line in lines)).encode()


# What a spreadsheet would take for a formula; -3.5 is a number.
_FORMULA = re.compile(r"(?![+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\Z)[=+\-@\t\r]", re.ASCII)


def _cell(value: Any, *, no_formulas: bool) -> str:
    """A value in CSV: texts as they are, nothing for null, all else as in JSON; an apostrophe before a formula."""
    if not isinstance(value, str):
        value = "" if value is None else json.dumps(value, ensure_ascii=False)
    return f"'{value}" if no_formulas and _FORMULA.match(value) else value


def _plain(value: Any) -> Any:
    """A value as JSON has it: dates and decimals as text, null for a float that is not finite."""
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


def _encode_parquet(
    chunk: Chunk, added: Mapping[str, Sequence[Any]], schema: "pyarrow.Schema", numbers: Collection[str]
) -> bytes:
    """One Parquet row group; ``schema`` is that of the chunk's own columns."""
    import pyarrow
    from pyarrow import parquet

    try:
        if isinstance(chunk, ArrowChunk):
            table = chunk.table.cast(schema)
        else:
            table = pyarrow.table([pyarrow.array(chunk.column(item.name), item.type) for item in schema], schema=schema)
    except (pyarrow.ArrowException, OverflowError) as cause:
        raise DataError(
            f"{chunk.place(0)}, or one of the {len(chunk) - 1} rows after it, cannot be written as parquet "
            f"({first_line(cause)}). Give an --out that ends in .jsonl."
        ) from cause
    for name, values in added.items():
        is_empty = all(value is None for value in values)
        kind = pyarrow.float64() if name in numbers else pyarrow.string()
        table = table.append_column(name, pyarrow.array(values, kind if is_empty else None))
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink, row_group_size=len(table), write_page_checksum=True)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def join_files(contents: Iterable[bytes], whole: Path, suffix: str) -> None:
    """Join the contents of files of one format in their order; in Parquet each becomes one row group."""
    if suffix != ".parquet":
        with whole.open("wb") as stream:
            stream.writelines(contents)
        return
    import pyarrow
    from pyarrow import parquet

    tables = (parquet.ParquetFile(pyarrow.BufferReader(content)).read() for content in contents)
    first = next(tables)
    with parquet.ParquetWriter(whole, first.schema, write_page_checksum=True) as writer:
        for table in chain([first], tables):
            writer.write_table(table, row_group_size=len(table))
