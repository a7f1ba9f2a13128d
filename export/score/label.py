"""What both engines share: how a chunk of rows is labelled, what identifies a run, and what it adds up to."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from export.runtime.batches import Classified, classify
from export.runtime.classifier import OnnxClassifier
from export.score.finished_chunks import ChunkRecord, FinishedChunks
from export.score.options import Opened, ScoreOptions
from export.score.write_rows import COMMAS, CsvStyle, encode_rows
from train.common.errors import DataError, UsageError
from train.config import CLASSIFICATION, MULTI_LABEL, REGRESSION
from train.data.check_rows import BadRows, check_columns, check_rows
from train.data.files.chunks import Chunk
from train.data.tasks import Scores, Task, count_pairs, score_counts, score_numbers

if TYPE_CHECKING:
    import pyarrow

PREDICTION, PROBABILITY, PROBLEM = "prediction", "probability", "problem"
NO_LABELS = "add --no-labels"
SKIP = "add --skip-bad-rows to label the others"


def check_header(file: str, columns: Sequence[str], task: Task, options: ScoreOptions) -> None:
    """Refuse a file that lacks one of the task's columns, or has one with the name of an added column."""
    wanted = [*task.text_columns, *([task.label_column] if options.label_column is not None else [])]
    check_columns(file, columns, wanted, "Name the right ones: --text-columns, --label-column.")
    check_added(file, columns, _added_columns(task, options))


def check_added(file: str, columns: Sequence[str], added: Iterable[str]) -> None:
    """Refuse a file that has one of the columns to be added."""
    for name in added:
        if name in columns:
            raise DataError(
                f"{file} has a column {name!r} already, and one of that name would be added. Rename or drop it first."
            )


def _added_columns(task: Task, options: ScoreOptions) -> list[str]:
    nothing = Classified.of(task, np.empty((0, len(task.labels))), np.empty(0, bool))
    return [*added_values(nothing, options), *([PROBLEM] if options.skip_bad_rows else [])]


def added_values(classified: Classified, options: ScoreOptions) -> dict[str, list[Any]]:
    """The columns that are added, with the value of each row; the names depend on the kind of task alone."""
    task = classified.task
    added: dict[str, list[Any]] = {PREDICTION: classified.predictions}
    if task.kind == CLASSIFICATION:
        added[PROBABILITY] = classified.best_probabilities.tolist()
    if task.kind == MULTI_LABEL or options.all_probabilities:
        columns = zip(task.labels, classified.probabilities.T.tolist(), strict=True)
        added |= {f"{PROBABILITY}_{label}": values for label, values in columns}
    return added


def _spread(values: Sequence[Any], rows: Sequence[int], n_rows: int) -> list[Any]:
    """The values of some rows among all of them; None for the others."""
    by_row = dict(zip(rows, values, strict=True))
    return [by_row.get(row) for row in range(n_rows)]


def refuse_bad_rows(bad: BadRows, n_rows: int, options: ScoreOptions) -> None:
    """Refuse rows that cannot be used; where they are to be skipped, only if no other is left."""
    if not options.skip_bad_rows or bad.count == n_rows:
        bad.refuse(or_else=NO_LABELS, or_skip="" if options.skip_bad_rows else SKIP)


def describe_run(
    options: ScoreOptions, opened: Opened, *, is_labelled: bool, precision: str, engine: str
) -> dict[str, Any]:
    """What decides the output's bytes in both engines, under names that a message can show. Plain JSON."""
    return {
        "bundle_sha256": opened.bundle.manifest_sha256,
        "task": opened.bundle.find_task(options.task).name,
        "precision": precision,
        "text_columns": ",".join(opened.task.text_columns),
        "label_column": opened.task.label_column if is_labelled else None,
        "all_probabilities": options.all_probabilities,
        "batch_size": options.batch_size,
        "chunk_rows": options.chunk_rows,
        "engine": engine,
        **options.read_options.as_json(),
        **({"skip_bad_rows": True} if options.skip_bad_rows else {}),
    }


@dataclass(frozen=True)
class ChunkLabeller:
    """Labels chunks whose rows were checked, and keeps them."""

    classifier: OnnxClassifier
    chunks: FinishedChunks
    task: Task
    """With the file's columns."""
    is_labelled: bool
    options: ScoreOptions
    schema: "pyarrow.Schema"
    style: CsvStyle = COMMAS

    def label(self, number: int, chunk: Chunk, report: Callable[[int], object] | None = None) -> ChunkRecord:
        """Label a chunk and write it; ``report`` is called after every batch with the number of rows in it."""
        checked = check_rows(chunk, self.task, with_labels=self.is_labelled)
        good = [row for row in range(len(chunk)) if row not in checked.bad]
        sentences = [checked.sentences[row] for row in good]
        classified = classify(self.classifier, sentences, batch_size=self.options.batch_size, report=report)
        if report is not None and checked.bad:
            report(len(checked.bad))
        expected = [checked.labels[row] for row in good] if self.is_labelled else []
        counts = count_pairs(self.task, expected, classified.predicted if expected else [])
        values = added_values(classified, self.options)
        added = {name: _spread(items, good, len(chunk)) for name, items in values.items()}
        numbers = [name for name in added if name != PREDICTION or self.task.kind == REGRESSION]
        if self.options.skip_bad_rows:
            added[PROBLEM] = [checked.bad.get(row) for row in range(len(chunk))]
        content = encode_rows(
            chunk, added, self.schema, self.chunks.suffix, style=self.style, with_header=number == 0, numbers=numbers
        )
        pairs = [[int(i), int(j), int(counts[i, j])] for i, j in np.argwhere(counts)]
        points = []
        if self.task.kind == REGRESSION and expected:
            points = np.stack([np.array(expected, np.float64), classified.predicted], axis=1).tolist()
        n_cut = int(classified.cut.sum())
        return self.chunks.add(number, content, rows=len(chunk), texts_cut=n_cut, counts=pairs, numbers=points)


@dataclass(frozen=True)
class Labelled:
    """What a run did."""

    rows: int
    rows_resumed: int
    """Rows that an earlier run had labelled."""
    seconds: float
    """Spent on the others; without the first pass, and on a cluster with the start of the workers."""
    texts_cut: int
    """How many rows were longer than the model reads and lost their end."""
    scores: Scores | None
    """Where the input has labels, and they have scores."""
    max_length: int
    """How many tokens the model reads."""
    why_unscored: str = ""
    """Why labels have no scores; empty where they have, and where there are none."""
    rows_skipped: int = 0
    """Bad rows, which have no prediction."""
    cluster: Mapping[str, float] = field(default_factory=dict)
    """What only a run on a cluster reports."""

    @property
    def rows_per_second(self) -> float:
        """Counts the rows that this run labelled."""
        return (self.rows - self.rows_resumed) / self.seconds

    def document(self, out: str) -> dict[str, Any]:
        """What the command line prints as JSON, with the name of what was written."""
        return {
            "rows": self.rows,
            "seconds": self.seconds,
            "rows_per_second": self.rows_per_second,
            "texts_cut": self.texts_cut,
            "scores": self.scores.values if self.scores is not None else None,
            "recalls": self.scores.recalls if self.scores is not None else None,
            "out": out,
            **({"rows_skipped": self.rows_skipped} if self.rows_skipped else {}),
            **self.cluster,
        }


def add_up(records: Iterable[tuple[ChunkRecord, bool]], task: Task, *, is_labelled: bool, max_length: int) -> Labelled:
    """The result of a run from the record of each chunk, and whether it was resumed.

    Nothing of a record is kept but a regression's numbers, 16 bytes a row: a correlation of ranks needs all of them.
    """
    counts = count_pairs(task, [], [])
    numbers = [np.empty((0, 2))]
    rows = rows_resumed = texts_cut = 0
    start = time.perf_counter()
    for record, is_resumed in records:
        rows += record.rows
        rows_resumed += record.rows * is_resumed
        texts_cut += record.texts_cut
        for row, column, n in record.counts:
            counts[row, column] += n
        if record.numbers:
            numbers.append(np.array(record.numbers, np.float64))
    seconds = time.perf_counter() - start
    scores, why_unscored = None, ""
    if is_labelled and task.kind != REGRESSION:
        scores = score_counts(task, counts)
    elif is_labelled:
        expected, predicted = np.concatenate(numbers).T
        try:
            scores = score_numbers(predicted, expected)
        except UsageError as cause:  # every row is labelled all the same
            why_unscored = str(cause)
    return Labelled(rows, rows_resumed, seconds, texts_cut, scores, max_length, why_unscored)
