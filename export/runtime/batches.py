"""Many texts through one classifier: batches of similar length, answers in the caller's order."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.bundle.folder import TASK_IDS
from export.runtime.classifier import OnnxClassifier
from train.common.errors import BundleError
from train.config import MULTI_LABEL, REGRESSION
from train.data.tasks import Task


@dataclass(frozen=True)
class Classified:
    """What a classifier says of texts, in their order."""

    task: Task
    predicted: np.ndarray
    """As from `Task.predict`: class indices, numbers, or whether a text has each label; one a text"""
    probabilities: np.ndarray
    """As from `Task.probabilities`; float64, shape = (n_texts, n_labels)"""
    cut: np.ndarray
    """Whether a text was longer than the model reads and lost its end; bool, shape = (n_texts,)"""

    @staticmethod
    def of(task: Task, logits: np.ndarray, cut: np.ndarray) -> "Classified":
        """From logits, shape = (n_texts, n_labels)"""
        return Classified(task, task.predict(logits), task.probabilities(logits), cut)

    @property
    def predictions(self) -> list[Any]:
        """For each text the name of its most probable class, its number, or its labels in one string."""
        if self.task.kind == REGRESSION:
            numbers: list[Any] = self.predicted.tolist()
            return numbers
        if self.task.kind == MULTI_LABEL:
            return [self.task.join_labels(row) for row in self.predicted]
        return [self.task.labels[index] for index in self.predicted]

    @property
    def best_probabilities(self) -> np.ndarray:
        """A classification's probability of the class that is predicted; float64, shape = (n_texts,)"""
        return self.probabilities[np.arange(len(self.predicted)), self.predicted]


def classify(
    classifier: OnnxClassifier,
    texts: Sequence[tuple[str, ...]],
    *,
    batch_size: int = 32,
    report: Callable[[int], object] | None = None,
) -> Classified:
    """Classify texts in batches of similar length; ``report`` is called after each with the number of texts in it.

    Raises:
        BundleError: as from `OnnxClassifier.logits`, or a logit is no number, of which a label would be made all the same.
    """
    task = classifier.task.task
    logits = np.empty((len(texts), len(task.labels)), np.float64)
    cut = np.zeros(len(texts), bool)
    for rows in in_batches(texts, batch_size):
        encoded = classifier.tokenize([texts[row] for row in rows])
        logits[rows], cut[rows] = classifier.logits(encoded.arrays), encoded.cut
        if report is not None:
            report(len(rows))
    _refuse_not_finite(classifier, logits)
    return Classified.of(task, logits, cut)


def _refuse_not_finite(classifier: OnnxClassifier, logits: np.ndarray) -> None:
    if not np.isfinite(logits).all():
        raise BundleError(
            f"{classifier.bundle.folder} gave logits that are no numbers, in {classifier.execution.precision}. Export it "
            "again, and take --precision fp32 if that does not help."
        )


@dataclass(frozen=True, eq=False)
class TokenRow:
    """A text as token ids, and its task."""

    arrays: Mapping[str, np.ndarray]
    """The text inputs of the graph by name; each int64, shape = (n_text,)"""
    task_number: int


@dataclass(frozen=True, eq=False)
class RowLogits:
    """What a graph says of rows, in their order."""

    logits: np.ndarray
    """float32, shape = (n_rows, n_labels of the task with the most)"""
    batch_sizes: np.ndarray
    """How many rows were in the batch of each; int64, shape = (n_rows,)"""


def run_rows(classifier: OnnxClassifier, rows: Sequence[TokenRow], *, batch_size: int) -> RowLogits:
    """Run rows of any lengths, and of any of the bundle's tasks, in batches of similar length; see `OnnxClassifier.logits`."""
    bundle = classifier.bundle
    logits = np.empty((len(rows), bundle.n_labels), np.float32)
    batch_sizes = np.empty(len(rows), np.int64)
    for numbers in in_batches([(row.arrays["input_ids"],) for row in rows], batch_size):
        batch = [rows[number] for number in numbers]
        # A mask and token types are padded with zeros.
        fill = dict.fromkeys(bundle.text_inputs, 0) | {"input_ids": bundle.pad_token_id}
        arrays = {name: _padded([row.arrays[name] for row in batch], fill[name]) for name in bundle.text_inputs}
        if bundle.has_many_tasks:
            arrays[TASK_IDS] = np.array([row.task_number for row in batch], np.int64)
        logits[numbers] = classifier.logits(arrays)
        batch_sizes[numbers] = len(batch)
    _refuse_not_finite(classifier, logits)
    return RowLogits(logits, batch_sizes)


def _padded(rows: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """Rows of different lengths as one array, filled on the right."""
    padded = np.full((len(rows), max(map(len, rows))), fill, rows[0].dtype)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def random_batch(
    generator: np.random.Generator,
    shape: tuple[int, int],
    *,
    inputs: Sequence[str],
    vocabulary_size: int,
    pad_token_id: int | None = None,
    padded: bool = False,
) -> dict[str, np.ndarray]:
    """Random token ids in every place, padding included; the second half of a row is its second sentence.

    Args:
        inputs: names of the graph's inputs; ``task_ids`` among them is left to the caller.
        vocabulary_size: ids are drawn below it.
        pad_token_id: an id that is not drawn, as RoBERTa gives it no position; by default all are.
        padded: whether rows end in padding after a random length; the first row is always full.

    Returns:
        int64 by name, each of the given shape, (n_batch, n_text)
    """
    n_batch, n_text = shape
    lengths = np.full(n_batch, n_text)
    if padded:
        lengths[1:] = generator.integers(1, n_text + 1, n_batch - 1)
    ids = generator.integers(0, vocabulary_size, shape)
    if pad_token_id is not None:
        ids[ids == pad_token_id] = (pad_token_id + 1) % vocabulary_size
    columns = np.arange(n_text)
    batch = {
        "input_ids": ids,
        "attention_mask": (columns < lengths[:, None]).astype(np.int64),
        "token_type_ids": np.broadcast_to(columns >= n_text // 2, shape).astype(np.int64),
    }
    return {name: array for name, array in batch.items() if name in inputs}


def in_batches(texts: Sequence[tuple[Sized, ...]], batch_size: int) -> Iterator[list[int]]:
    """The numbers of the texts in each batch, with texts of similar length together; a text may also be token ids."""
    # Characters approximate tokens before the tokenizer ran. sorted() is stable: the same texts make the same batches.
    order = sorted(range(len(texts)), key=lambda row: sum(map(len, texts[row])))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def differ(task: Task, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether two predictions of each row, as from `Task.predict`, are different labels; bool, shape = (n_rows,)

    Numbers are never other labels: how far apart they are says more.
    """
    if task.kind == REGRESSION:
        return np.zeros(len(one), bool)
    return np.asarray((one != other).reshape(len(one), -1).any(axis=1))
