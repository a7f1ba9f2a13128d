"""A visitor's file, read within limits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.access.limits import MAX_BYTES
from export.runtime.check_text import MAX_CHARACTERS
from export.score.label import PREDICTION, PROBABILITY, check_added
from export.score.write_rows import CsvStyle, merge_schema, out_suffix
from train.common.console import names
from train.common.errors import DataError, UsageError
from train.config import MULTI_LABEL, REGRESSION
from train.data.check_rows import BadRows, check_columns, check_rows
from train.data.files.chunks import Chunk
from train.data.files.find import FILE_TYPES, PACKED
from train.data.files.options import Limits
from train.data.read_rows import find_source, read_chunks
from train.data.tasks import Task

if TYPE_CHECKING:
    import pyarrow

MAX_ROWS = 2_000
UPLOAD_TYPES = (*FILE_TYPES, *PACKED)

LIMITS = Limits(
    file_bytes=MAX_BYTES,
    rows=MAX_ROWS,
    decoded_bytes=20_000_000,
    values=2_000_000,
    advice="label it with python -m export.score, which takes files of any size",
)

AGREE = "agree"
SIDES = ("pytorch", "onnx")
"""The engines, as the added columns name them."""


@dataclass(frozen=True, eq=False)
class Upload:
    """A file that was read and checked."""

    name: str
    """As the visitor calls it, without any folder."""
    rows: Chunk
    """All of the file."""
    task: Task
    """What the adapter learned, with the file's columns."""
    sentences: list[tuple[str, ...]]
    """The one or two sentences of each row."""
    expected: Sequence[Any] | None
    """The label of each row, as `train.data.labels.parse_label` gives it, where the file has labels."""
    schema: "pyarrow.Schema"
    """As from `merge_schema`."""
    style: CsvStyle
    """How a CSV file is written again."""
    description: str
    """What was recognised of how the file is written, for people; may be empty."""

    @property
    def suffix(self) -> str:
        """The ending of the labelled file."""
        return out_suffix(Path(self.name))

    @property
    def has_equal_numbers(self) -> bool:
        """Whether it has a regression's labels that are all equal, with which no correlation is defined."""
        return self.task.kind == REGRESSION and self.expected is not None and len(set(self.expected)) == 1


def read_upload(path: Path | None, task: Task, *, text_columns: str = "", label_column: str = "") -> Upload:
    """Read a visitor's file for a task; columns are given where they differ from those of the training."""
    if path is None:
        raise UsageError(f"No file was given. Choose one that ends in {', '.join(FILE_TYPES)}.")
    name = path.name
    if not path.exists():
        raise DataError(f"{name} is no longer here. Upload it again.")
    source = find_source(path, name, limits=LIMITS)
    (rows,) = read_chunks(source, MAX_ROWS)
    columns = rows.columns
    label = label_column.strip() or None
    task = task.with_columns(names(text_columns), label, owner="this model")
    wanted = [*task.text_columns, *([] if label is None else [label])]
    if len(rows.unreadable) < len(rows):
        check_columns(name, columns, wanted, "Name its own text columns or label column.", LIMITS)
    each = [f"{PROBABILITY}_{label}" for label in task.labels] if task.kind == MULTI_LABEL else []
    added = [f"{what}_{side}" for side in SIDES for what in (PREDICTION, PROBABILITY, *each)]
    check_added(name, columns, [*added, AGREE])
    has_labels = task.label_column in columns
    checked, bad = check_rows(rows, task, with_labels=has_labels, max_characters=MAX_CHARACTERS), BadRows()
    bad.add(rows, checked)
    bad.refuse(or_else="rename the column")
    suffix = out_suffix(path)
    schema, style = merge_schema(rows, None, suffix, LIMITS), CsvStyle.of(source, suffix)
    return Upload(
        name, rows, task, checked.sentences, checked.labels if has_labels else None, schema, style, source.description
    )
