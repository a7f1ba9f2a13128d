"""The rows of Parquet and Arrow files, as Arrow holds them in memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from train.common.errors import DataError
from train.common.limits import MIB
from train.data.files.chunks import ArrowChunk
from train.data.files.csv_rows import check_names
from train.data.files.find import PARQUET, SourceFile
from train.data.files.options import Limits

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

_UNTRUSTED_STEP_ROWS = 16
"""Rows decoded at a time within limits: a long text that a dictionary repeats is noticed early."""


def read_arrow(file: SourceFile, chunk_rows: int, limits: Limits | None) -> Iterator[ArrowChunk]:
    """The rows of a file, so many in each chunk at least; what pyarrow raises passes through."""
    import pyarrow

    name, start, n_rows, n_bytes = file.name, 0, 0, 0
    batches: list[pyarrow.RecordBatch] = []
    with _open_batches(file, chunk_rows if limits is None else _UNTRUSTED_STEP_ROWS, limits) as opened:
        for batch in opened:
            if limits is not None:
                n_bytes += _decoded_bytes(batch)
                check_bytes(n_bytes, name, "is", limits)
            batches.append(batch)
            n_rows += len(batch)
            if n_rows - start >= chunk_rows:
                yield ArrowChunk(name, start, pyarrow.Table.from_batches(batches))
                start, batches = n_rows, []
        if batches:
            yield ArrowChunk(name, start, pyarrow.Table.from_batches(batches))


@contextmanager
def _open_batches(file: SourceFile, step_rows: int, limits: Limits | None) -> "Iterator[Iterator[pyarrow.RecordBatch]]":
    import pyarrow

    if file.kind == PARQUET:
        with open_parquet(file.path, file.name) as opened:
            if limits is not None:
                _check_footer(opened.metadata, file.name, limits)
            yield parquet_batches(opened, step_rows)
        return
    with pyarrow.OSFile(str(file.path), "rb") as source:
        is_file = source.read(6) == b"ARROW1"  # else a stream, which is what `datasets` writes
        source.seek(0)
        with (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source) as reader:
            check_names(reader.schema.names, file.name)
            whole = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
            yield _slices(whole, step_rows)


def _slices(batches: "Iterator[pyarrow.RecordBatch]", step_rows: int) -> "Iterator[pyarrow.RecordBatch]":
    for batch in batches:
        batch.validate(full=True)
        for start in range(0, len(batch), step_rows):
            yield batch.slice(start, step_rows)


def open_parquet(source: Any, name: str) -> "parquet.ParquetFile":
    """Open a Parquet file, a path or an open file, so that a row group is read step by step, however large it is.

    What pyarrow raises (ArrowException, OSError) passes through; see `train.data.read_rows.unreadable`.
    """
    from pyarrow import parquet

    opened = parquet.ParquetFile(source, buffer_size=MIB, pre_buffer=False, page_checksum_verification=True)
    check_names(opened.schema_arrow.names, name)
    return opened


def parquet_batches(
    opened: "parquet.ParquetFile", batch_rows: int, row_groups: Sequence[int] | None = None
) -> "Iterator[pyarrow.RecordBatch]":
    """The rows of a Parquet file, or of some of its row groups; errors as those of `open_parquet`."""
    for batch in opened.iter_batches(batch_size=batch_rows, row_groups=row_groups):
        batch.validate(full=True)  # Parquet's own reader takes any bytes for UTF-8
        yield batch


def _check_footer(footer: Any, name: str, limits: Limits) -> None:
    """Refuse a Parquet file whose own figures exceed the limits, before anything is decompressed."""
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    check_bytes(sum(column.total_uncompressed_size for column in columns), name, "says that it is", limits)
    if sum(column.num_values for column in columns) > limits.values:
        raise DataError(f"{name} has more than {limits.values:,} values. Leave out columns that hold lists.")


def check_bytes(n_bytes: int, name: str, claim: str, limits: Limits) -> None:
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
