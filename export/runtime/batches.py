"""Many texts through one classifier: batches of like length, answers in the caller's order."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass

import numpy as np

from export.bundle.folder import TASK_IDS
from export.runtime.classifier import OnnxClassifier
from train.data.tasks import Scores, Task


@dataclass(frozen=True)
class Classified:
    """What a classifier says of texts, in their order.

    Attributes:
        labels: names of the classes, in the order of the logits.
        indices: of each text its most probable class; int64, shape = (n_texts,)
        probabilities: of every class; float64, shape = (n_texts, n_labels)
        cut: whether a text was longer than the model reads and lost its end; bool, shape = (n_texts,)
    """

    labels: tuple[str, ...]
    indices: np.ndarray
    probabilities: np.ndarray
    cut: np.ndarray

    @staticmethod
    def of(labels: tuple[str, ...], logits: np.ndarray, cut: np.ndarray) -> "Classified":
        """What logits mean.

        Args:
            logits: float, shape = (n_texts, n_labels)
        """
        return Classified(labels=labels, indices=logits.argmax(axis=1), probabilities=softmax(logits), cut=cut)

    @property
    def predictions(self) -> list[str]:
        """Of each text the name of its most probable class."""
        return [self.labels[index] for index in self.indices]

    @property
    def best_probabilities(self) -> np.ndarray:
        """Of each text the probability of its most probable class; float64, shape = (n_texts,)"""
        return self.probabilities[np.arange(len(self.indices)), self.indices]


def classify(
    classifier: OnnxClassifier,
    texts: Sequence[tuple[str, ...]],
    *,
    batch_size: int = 32,
    report: Callable[[int], object] | None = None,
) -> Classified:
    """Classify texts in batches of like length, each padded to its own longest.

    Args:
        texts: of each its one or two sentences, as the classifier's task has them.
        batch_size: texts in one run of the graph.
        report: called after every batch with the number of texts in it.
    """
    labels = classifier.task.task.labels
    logits = np.empty((len(texts), len(labels)), np.float64)
    cut = np.zeros(len(texts), bool)
    for rows in in_batches(texts, batch_size):
        encoded = classifier.tokenize([texts[row] for row in rows])
        logits[rows] = classifier.logits(encoded.arrays)
        cut[rows] = encoded.cut
        if report is not None:
            report(len(rows))
    return Classified.of(labels, logits, cut)


@dataclass(frozen=True, eq=False)
class TokenRow:
    """A text as token ids, and whose it is.

    Attributes:
        arrays: the text inputs of the graph by name; each int64, shape = (n_text,)
        task_number: `export.bundle.folder.BundleTask.number`.
    """

    arrays: Mapping[str, np.ndarray]
    task_number: int


@dataclass(frozen=True, eq=False)
class RowLogits:
    """What a graph says of rows, in their order.

    Attributes:
        logits: float32, shape = (n_rows, n_labels of the task with the most)
        batch_sizes: with how many rows, itself included, each went through the graph; int64, shape = (n_rows,)
    """

    logits: np.ndarray
    batch_sizes: np.ndarray


def run_rows(classifier: OnnxClassifier, rows: Sequence[TokenRow], *, batch_size: int) -> RowLogits:
    """Run rows of any lengths, and where the bundle is shared of any tasks, in batches of like length.

    Args:
        batch_size: rows in one run of the graph.

    Raises:
        TextError: a row is none that the model can read.
        BundleError: as `OnnxClassifier.logits`.
    """
    bundle = classifier.bundle
    n_labels = max(len(task.task.labels) for task in bundle.tasks)
    logits = np.empty((len(rows), n_labels), np.float32)
    batch_sizes = np.empty(len(rows), np.int64)
    for numbers in in_batches([(row.arrays["input_ids"],) for row in rows], batch_size):
        batch = [rows[number] for number in numbers]
        # Only token ids have a padding of their own: a mask and token types end in zeros.
        fill = dict.fromkeys(bundle.text_inputs, 0) | {"input_ids": bundle.pad_token_id}
        arrays = {name: _padded([row.arrays[name] for row in batch], fill[name]) for name in bundle.text_inputs}
        if bundle.is_shared:
            arrays[TASK_IDS] = np.array([row.task_number for row in batch], np.int64)
        logits[numbers] = classifier.logits(arrays)
        batch_sizes[numbers] = len(batch)
    return RowLogits(logits, batch_sizes)


def _padded(rows: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """Rows of different lengths as one array, filled up on the right."""
    padded = np.full((len(rows), max(map(len, rows))), fill, rows[0].dtype)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def in_batches(texts: Sequence[tuple[Sized, ...]], batch_size: int) -> Iterator[list[int]]:
    """The numbers of the texts of each batch, so that texts of like length meet.

    Args:
        texts: of each its one or two sentences, or its token ids.
    """
    # Characters stand in for tokens where nothing is tokenised yet. sorted() is stable, so the same texts always make
    # the same batches.
    order = sorted(range(len(texts)), key=lambda row: sum(map(len, texts[row])))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def softmax(logits: np.ndarray) -> np.ndarray:
    """The probabilities of the classes, which lie along the last axis; float64, shape = shape of the logits"""
    # The largest logit is taken off first, so that exp cannot overflow.
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def count_pairs(task: Task, expected: Sequence[int] | np.ndarray, predicted: Sequence[int] | np.ndarray) -> np.ndarray:
    """The confusion matrix: how many rows of each class were predicted as each.

    Args:
        expected: class indices, shape = (n_rows,)
        predicted: class indices, shape = (n_rows,)

    Returns:
        int64, shape = (n_labels expected, n_labels predicted)
    """
    counts = np.zeros((len(task.labels), len(task.labels)), np.int64)
    np.add.at(counts, (np.asarray(expected, np.int64), np.asarray(predicted, np.int64)), 1)
    return counts


def score_counts(task: Task, counts: np.ndarray) -> Scores:
    """The task's metrics, equal to `train.data.tasks.score`'s, from counts alone: they do not grow with the rows.

    Args:
        counts: as `count_pairs` gives them
    """
    right = np.diag(counts).astype(np.float64)
    expected, predicted = counts.sum(axis=1).astype(np.float64), counts.sum(axis=0).astype(np.float64)
    n_rows = expected.sum()
    # F1 = 2·TP / (2·TP + FP + FN), and 0 of a class that is neither there nor predicted
    f1 = 2 * right / np.maximum(expected + predicted, 1)
    values: dict[str, float] = {}
    for name in task.metrics:
        if name == "accuracy":
            value = right.sum() / n_rows
        elif name == "f1_macro":
            value = f1.mean()
        elif name == "matthews":
            # the correlation of the one-hot classes, over all of them; 0 where one side never varies
            spread = (n_rows**2 - expected @ expected) * (n_rows**2 - predicted @ predicted)
            value = (right.sum() * n_rows - expected @ predicted) / np.sqrt(spread) if spread else 0.0
        else:
            assert task.positive_label is not None
            value = f1[task.labels.index(task.positive_label)]
        values[name] = float(value)
    return Scores(values)
