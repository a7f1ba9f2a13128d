"""Which rows are refused, and how a chunk of rows is labelled."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.runtime.batches import Classified, classify, count_pairs
from export.runtime.classifier import OnnxClassifier
from train.common.errors import DataError
from train.data.read_rows import Chunk
from train.data.tasks import Scores, Task

PREDICTION = "prediction"


PROBABILITY = "probability"


NO_LABELS = "add --no-labels"


def label_indices(chunk: Chunk, task: Task, file: object, *, unread: str = NO_LABELS) -> list[int]:
    """The class indices of a chunk's labels.

    Args:
        file: its name, for a complaint.
        unread: what to do so that labels are left unread, for the same.

    Raises:
        DataError: a row has another one.
    """
    known = task.known_labels
    indices: list[int] = []
    for row, label in enumerate(chunk.column(task.label_column)):
        index = None if label is None else known.get(str(label))
        if index is None:
            raise DataError(
                f"{file}, {chunk.place(row)}: label {label!r:.80} in column {task.label_column!r} is none of task "
                f"{task.name}'s ({task.label_choices}). Mend or drop the row, or {unread} to leave labels unread."
            )
        indices.append(index)
    return indices


def check_texts(chunk: Chunk, task: Task, file: object) -> None:
    """Refuse a row without text.

    Args:
        file: its name, for a complaint.

    Raises:
        DataError: there is one.
    """
    for name in task.text_columns:
        for row, text in enumerate(chunk.column(name)):
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{file}, {chunk.place(row)}: column {name!r} holds no text. Mend or drop the row.")


def check_columns(file: object, columns: Sequence[str], task: Task, *, needs_labels: bool) -> None:
    """Refuse a file that lacks a column.

    Args:
        file: its name, for a complaint.
        needs_labels: whether it must have labels.

    Raises:
        DataError: it lacks one.
    """
    wanted = dict.fromkeys(task.text_columns, "--text-columns")
    if needs_labels:
        wanted[task.label_column] = "--label-column"
    for name, flag in wanted.items():
        if name not in columns:
            raise DataError(f"{file} has no column {name!r}; it has {', '.join(columns)}. Name the right one: {flag}.")


def new_columns(classified: Classified, *, all_probabilities: bool) -> dict[str, list[Any]]:
    """The columns that are added, by name."""
    columns: dict[str, list[Any]] = {
        PREDICTION: classified.predictions,
        PROBABILITY: classified.best_probabilities.tolist(),
    }
    if all_probabilities:
        columns |= {
            name: classified.probabilities[:, index].tolist()
            for index, name in enumerate(_probability_columns(classified.labels))
        }
    return columns


def _probability_columns(labels: Iterable[str]) -> list[str]:
    return [f"{PROBABILITY}_{label}" for label in labels]


def refuse_clash(source: object, columns: Sequence[str], task: Task, *, all_probabilities: bool) -> None:
    """Refuse columns of the input that have the name of one that would be added.

    Args:
        source: the input's name, for a complaint.

    Raises:
        DataError: there is one.
    """
    names = [PREDICTION, PROBABILITY, *(_probability_columns(task.labels) if all_probabilities else ())]
    taken = [name for name in names if name in columns]
    if taken:
        raise DataError(
            f"{source} has a column {taken[0]!r} already, and one of that name would be added. Rename or drop it first."
        )


@dataclass(frozen=True)
class LabelledChunk:
    """What a classifier says of a chunk.

    Attributes:
        added: the new columns by name, one value a row.
        texts_cut: how many texts were longer than the model reads and lost their end.
        counts: as from `count_pairs`; all 0 where the rows have no labels.
    """

    added: dict[str, list[Any]]
    texts_cut: int
    counts: np.ndarray


def label_chunk(
    classifier: OnnxClassifier,
    chunk: Chunk,
    task: Task,
    file: object,
    *,
    is_labelled: bool,
    batch_size: int,
    all_probabilities: bool,
    report: Callable[[int], object] | None = None,
) -> LabelledChunk:
    """Label a chunk whose texts were checked.

    Args:
        task: with the chunk's text and label columns.
        file: its name, for a complaint.
        is_labelled: whether its rows have true labels, to count against.
        report: as for `classify`.

    Raises:
        DataError: a label is none of the task's.
    """
    texts = list(zip(*(chunk.column(name) for name in task.text_columns), strict=True))
    classified = classify(classifier, texts, batch_size=batch_size, report=report)
    expected = label_indices(chunk, task, file) if is_labelled else []
    return LabelledChunk(
        added=new_columns(classified, all_probabilities=all_probabilities),
        texts_cut=int(classified.cut.sum()),
        counts=count_pairs(task, expected, classified.indices if expected else []),
    )


@dataclass(frozen=True)
class Labelled:
    """What a run did.

    Attributes:
        rows: in the input.
        rows_resumed: how many of them an earlier run had labelled.
        parts: in how many chunks.
        seconds: spent on the others; loading the bundle and the first pass are left out.
        texts_cut: how many texts were longer than the model reads and lost their end.
        scores: where the input has labels.
        max_length: how many tokens the model reads.
    """

    rows: int
    rows_resumed: int
    parts: int
    seconds: float
    texts_cut: int
    scores: Scores | None
    max_length: int

    @property
    def rows_per_second(self) -> float:
        """Of the rows that this run labelled."""
        return (self.rows - self.rows_resumed) / self.seconds

    def document(self, out: str) -> dict[str, Any]:
        """What the command line prints as JSON.

        Args:
            out: what was written.
        """
        return {
            "rows": self.rows,
            "seconds": self.seconds,
            "rows_per_second": self.rows_per_second,
            "texts_cut": self.texts_cut,
            "scores": self.scores.values if self.scores is not None else None,
            "out": out,
        }
