"""What is refused in labelled rows: a missing column, a row that cannot be read, has no text or an unknown label."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from train.common.errors import DataError
from train.data.files.chunks import Chunk, trim
from train.data.files.options import Limits, remedy
from train.data.labels import Label, has_no_label, parse_label
from train.data.tasks import Task

FIX_ROW = "Fix or remove the row"
MOST_SHOWN = 20
"""So many bad rows are named, the others counted."""


def check_columns(
    file: str, columns: Sequence[str], wanted: Iterable[str], which: str, limits: Limits | None = None
) -> None:
    """Refuse a file that lacks one of the wanted columns; ``which`` they are is said in a sentence of the message."""
    for name in wanted:
        if name not in columns:
            few = ", ".join(columns[:8]) + (" …" if len(columns) > 8 else "")
            # A file of one column is rare; more often its delimiter is one that is not recognised.
            is_csv = len(columns) == 1 and re.search(r"\.[ct]sv(\.\w+)?$", file, re.IGNORECASE)
            what = remedy(limits, "add --delimiter", "save it with commas there")
            other = f" If another character stands between its cells, {what}." * bool(is_csv)
            raise DataError(f"{file} has no column {name!r:.80}; it has {few:.300}. {which}{other}")


@dataclass(frozen=True)
class CheckedRows:
    """The rows of a chunk, each with its text and label or the reason why it cannot be used."""

    sentences: list[tuple[str, ...]]
    """The one or two sentences of each row; of a bad row whatever is there."""
    labels: list[Label | None]
    """As `train.data.labels.parse_label` gives them; None where a row has none; empty where none were read."""
    bad: Mapping[int, str]
    """Rows that cannot be used, counted from 0 within the chunk → the reason."""
    bad_label: bool
    """Whether a label is among the reasons."""


def check_rows(
    chunk: Chunk, task: Task, *, with_labels: bool, needs_labels: bool = True, max_characters: int | None = None
) -> CheckedRows:
    """Check every row of a chunk; without ``needs_labels`` a row may have no label."""
    sentences = list(zip(*(chunk.column(name) for name in task.text_columns), strict=True))
    bad = dict(chunk.unreadable)
    for row, texts in enumerate(sentences):
        if row not in bad and (reason := _fault(texts, task, max_characters)):
            bad[row] = reason
    labels: list[Label | None] = []
    bad_label = False
    if with_labels:
        names = chunk.class_names(task.label_column)
        for row, value in enumerate(chunk.column(task.label_column)):
            labels.append(None)
            if row in bad or (not needs_labels and has_no_label(task, value)):
                continue
            try:
                labels[row] = parse_label(task, value, names)
            except DataError as cause:
                bad[row], bad_label = str(cause), True
    return CheckedRows(sentences, labels, dict(sorted(bad.items())), bad_label)


def _fault(texts: Sequence[object], task: Task, max_characters: int | None) -> str:
    """Why a row's texts cannot be used, or nothing."""
    for name, text in zip(task.text_columns, texts, strict=True):
        if not isinstance(text, str) or not trim(text):
            but = "" if text is None or isinstance(text, str) else f" but {text!r:.40}"
            return f"column {name!r} holds no text{but}"
        if max_characters is not None and len(text) > max_characters:
            return f"column {name!r} has {len(text):,} characters; at most {max_characters:,} are read"
    return ""


@dataclass
class BadRows:
    """Rows of files that cannot be used: the first few with place and reason, and how many there are."""

    count: int = 0
    shown: list[str] = field(default_factory=list)
    bad_label: bool = False

    def add(self, chunk: Chunk, checked: CheckedRows) -> None:
        """Note a chunk's bad rows."""
        more = [f"{chunk.place(row)}: {reason}" for row, reason in checked.bad.items()]
        self.join(BadRows(len(more), more[:MOST_SHOWN], checked.bad_label))

    def join(self, later: "BadRows") -> None:
        """Note bad rows that come after these."""
        self.count += later.count
        self.shown += later.shown[: MOST_SHOWN - len(self.shown)]
        self.bad_label = self.bad_label or later.bad_label

    def refuse(self, *, or_else: str = "", or_name: str = "", or_skip: str = "") -> None:
        """Refuse the rows, if there are any, with a `DataError` that names them.

        ``or_else`` is how to leave labels unread, ``or_name`` how to give their names, ``or_skip`` how to go on without the
        rows; empty where that cannot be.
        """
        if not self.count:
            return
        others = f", or {or_else} to leave labels unread" if or_else and self.bad_label else ""
        others += f", or {or_name}" if or_name and self.bad_label else ""
        if self.count == 1:
            raise DataError(f"{self.shown[0]}. {FIX_ROW}{others}{or_skip and f', or {or_skip}'}.")
        more = f"\n  and {self.count - len(self.shown):,} more" if self.count > len(self.shown) else ""
        rows = "".join(f"\n  {row}" for row in self.shown)
        raise DataError(
            f"{self.count:,} rows cannot be used. Fix or remove them{others}{or_skip and f', or {or_skip}'}:{rows}{more}"
        )
