"""A visitor's file, read within bounds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from demo.access.limits import MAX_BYTES
from export.runtime.check_text import MAX_CHARACTERS
from export.score.label import check_texts, label_indices
from export.score.write_rows import parquet_schema
from train.common.console import names
from train.common.errors import DataError, UsageError, first_line
from train.data.load import FILE_TYPES
from train.data.read_rows import ArrowChunk, Chunk, read_chunks
from train.data.tasks import Task

if TYPE_CHECKING:
    import pyarrow


MAX_ROWS = 2_000


MAX_DECODED_BYTES = 20_000_000
"""Of a Parquet file's columns without compression, and of what is read from them."""


MAX_PARQUET_VALUES = 2_000_000
"""In a Parquet file: of lists that repeat one value, a few bytes may hold billions."""


PARQUET_STEP_ROWS = 16
"""Read at a time: a page that is small, and a dictionary that names one long text often, are noticed in time."""


MESSAGE_CHARACTERS = 600
"""A complaint quotes from the file, which may hold anything."""


PREDICTION, PROBABILITY, AGREE = "prediction", "probability", "agree"


SIDES = ("pytorch", "onnx")
"""The engines, as the added columns name them."""


@dataclass(frozen=True, eq=False)
class Upload:
    """A file that was read and checked.

    Attributes:
        name: as the visitor calls it, without any folder.
        suffix: one of `FILE_TYPES`.
        rows: all of it.
        task: what the adapter learned, with the file's columns.
        expected: of each row its class index, where the file has labels.
        schema: of a Parquet file.
    """

    name: str
    suffix: str
    rows: Chunk
    task: Task
    expected: tuple[int, ...] | None
    schema: "pyarrow.Schema | None"

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """Of each row its one or two sentences."""
        return list(zip(*(self.rows.column(name) for name in self.task.text_columns), strict=True))


def read_upload(path: Path | None, task: Task, *, text_columns: str = "", label_column: str = "") -> Upload:
    """Read a file that a visitor sent; nothing of it is read before its size is known.

    Args:
        path: where it lies; its name is the visitor's.
        task: what the adapter learned.
        text_columns: the file's, with commas between, where they are not named as in training.
        label_column: the same of its labels.

    Raises:
        UsageError: there is no file, or as many columns are not named as the model reads texts.
        DataError: it is too large, is not what its name says, lacks a column or has one too many, or a row cannot be
            used.
    """
    if path is None:
        raise UsageError(f"No file was given. Choose one that ends in {', '.join(FILE_TYPES)}.")
    name, suffix = path.name, path.suffix.lower()
    if suffix not in FILE_TYPES:
        raise DataError(f"{name}: give a file that ends in {', '.join(FILE_TYPES)}.")
    try:
        size_bytes = path.stat().st_size
    except OSError as cause:
        raise DataError(f"{name} is no longer here. Upload it again.") from cause
    if not size_bytes:
        raise DataError(f"{name} is empty. Give a file with at least one text.")
    if size_bytes > MAX_BYTES:
        raise DataError(
            f"{name} has {size_bytes:,} bytes; at most {MAX_BYTES:,} are taken here. Give fewer rows, or label it with "
            "python -m export.score, which takes files of any size."
        )
    with naming(path):
        rows = _read_parquet(path) if suffix == ".parquet" else _read_text(path, suffix)
        schema = parquet_schema(path, rows, {}) if isinstance(rows, ArrowChunk) else None
        task = _with_columns(task, rows, name, text_columns, label_column)
        check_texts(rows, task, name)
        _check_lengths(rows, task, name)
        expected = None
        if task.label_column in rows.columns:
            expected = tuple(label_indices(rows, task, name, unread="rename the column"))
    return Upload(name=name, suffix=suffix, rows=rows, task=task, expected=expected, schema=schema)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Take the file's folder out of complaints, and what is too long."""
    try:
        yield
    except DataError as error:
        words = str(error).replace(str(path), path.name)
        raise DataError(words if len(words) <= MESSAGE_CHARACTERS else f"{words[:MESSAGE_CHARACTERS]} …") from error


def _read_text(path: Path, suffix: str) -> Chunk:
    """All rows of a CSV or JSON lines file."""
    content = path.read_bytes()
    zero = content.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{path}, byte {zero + 1:,} is zero, as in no text. Is it really a {suffix} file? Save it as such, in UTF-8."
        )
    try:
        content.decode()
    except UnicodeDecodeError as cause:
        line = content.count(b"\n", 0, cause.start) + 1
        raise DataError(
            f"{path}, line {line:,}, byte {cause.start + 1:,} of the file is not valid UTF-8. Save it as a {suffix} file "
            "in UTF-8."
        ) from cause
    rows = next(read_chunks(path, MAX_ROWS + 1), None)
    if rows is None:
        raise DataError(f"{path} has no rows. Give a file with at least one text.")
    if len(rows) > MAX_ROWS:
        raise _too_many_rows(path)
    return rows


def _too_many_rows(path: Path) -> DataError:
    return DataError(
        f"{path} has more than {MAX_ROWS:,} rows, which is the most that is taken here. Give fewer, or label it with "
        "python -m export.score, which takes files of any size."
    )


def _read_parquet(path: Path) -> ArrowChunk:
    """All rows of a Parquet file."""
    import pyarrow

    with path.open("rb") as file:
        if file.read(4) != b"PAR1":
            raise DataError(f"{path} is no Parquet file, whatever its name says. Name it after what it is.")
    tables: list[pyarrow.Table] = []
    n_rows = n_bytes = 0
    try:
        _check_metadata(path)
        for step in read_chunks(path, PARQUET_STEP_ROWS):
            assert isinstance(step, ArrowChunk)
            tables.append(step.arrow)
            n_rows += len(step)
            n_bytes += _decoded_bytes(step.arrow)
            # What the file says of itself need not be true.
            if n_rows > MAX_ROWS:
                raise _too_many_rows(path)
            if n_bytes > MAX_DECODED_BYTES:
                raise _too_much(path, "is")
        if not tables:
            raise DataError(f"{path} has no rows. Give a file with at least one text.")
        return ArrowChunk(0, pyarrow.concat_tables(tables))
    except (pyarrow.ArrowException, OSError) as cause:
        raise DataError(f"{path} cannot be read as parquet ({first_line(cause)}). Write it anew.") from cause


def _check_metadata(path: Path) -> None:
    """Refuse a Parquet file whose own figures are beyond the limits, before anything is decompressed."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    if metadata.num_rows > MAX_ROWS:
        raise _too_many_rows(path)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    if sum(column.total_uncompressed_size for column in columns) > MAX_DECODED_BYTES:
        raise _too_much(path, "says that it is")
    if sum(column.num_values for column in columns) > MAX_PARQUET_VALUES:
        raise DataError(f"{path} has more than {MAX_PARQUET_VALUES:,} values. Leave out columns that hold lists.")


def _too_much(path: Path, claim: str) -> DataError:
    return DataError(
        f"{path} {claim} more than {MAX_DECODED_BYTES:,} bytes long without compression. Give fewer rows or columns."
    )


def _decoded_bytes(table: "pyarrow.Table") -> int:
    """Size in memory, each text counted wherever it stands: a dictionary's is stored once and read often."""
    from pyarrow import types

    encoded = [column for column in table.columns if types.is_dictionary(column.type)]
    size_bytes: int = table.nbytes + sum(column.cast(column.type.value_type).nbytes for column in encoded)
    return size_bytes


def _with_columns(task: Task, rows: Chunk, name: str, text_columns: str, label_column: str) -> Task:
    """The task with the file's columns, which must be there."""
    wanted, label = names(text_columns), label_column.strip() or None
    if wanted and len(wanted) != len(task.text_columns):
        raise UsageError(
            f"{len(wanted)} text columns are named, but this model reads {len(task.text_columns)} "
            f"({', '.join(task.text_columns)}). Name as many, with a comma between."
        )
    task = task.with_columns(wanted, label, owner=name)
    columns = rows.columns
    for column in (*task.text_columns, *([] if label is None else [label])):
        if column not in columns:
            few = ", ".join(map(repr, columns[:8])) + (" …" if len(columns) > 8 else "")
            raise DataError(
                f"{name} has no column {column!r:.80}; it has {few:.300}. Name its own text columns or label column."
            )
    added = [f"{what}_{side}" for side in SIDES for what in (PREDICTION, PROBABILITY)]
    for column in (*added, AGREE):
        if column in columns:
            raise DataError(
                f"{name} has a column {column!r} already, and one of that name would be added. Rename or drop it."
            )
    return task


def _check_lengths(rows: Chunk, task: Task, name: str) -> None:
    for column in task.text_columns:
        for row, text in enumerate(rows.column(column)):
            if len(text) > MAX_CHARACTERS:
                raise DataError(
                    f"{name}, {rows.place(row)}: column {column!r} has {len(text):,} characters; at most "
                    f"{MAX_CHARACTERS:,} are read. Shorten it."
                )
