"""Classifiers without any prompt, whose scores a learned prompt has to beat."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from train.common.processes import is_main_process
from train.config import MULTI_LABEL, REGRESSION
from train.data.tasks import Scores, Task, score
from train.model.classifier import load_classifier
from train.model.find import BaseModel
from train.model.tokenizer import fit_vocabulary, load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Threshold:
    """Predicts label ``above`` where a number reaches ``value``, else the other of two labels."""

    value: float
    above: int

    @staticmethod
    def fit(values: np.ndarray, labels: np.ndarray) -> "Threshold":
        """The threshold with the best accuracy for values and labels (0 or 1), both of shape = (n_rows,)."""
        distinct, place = np.unique(values, return_inverse=True)
        zeros, ones = (np.concatenate([[0], np.cumsum(np.bincount(place, labels == label))]) for label in (0, 1))
        # right[i]: correct predictions when the i smallest distinct values get label 0 and the others 1
        right = zeros + ones[-1] - ones
        # The outermost thresholds are finite, as JSON has no infinities.
        edges = np.concatenate([[distinct[0] - 1], (distinct[1:] + distinct[:-1]) / 2, [distinct[-1] + 1]])
        if right.max() >= len(values) - right.min():
            return Threshold(float(edges[right.argmax()]), above=1)
        return Threshold(float(edges[right.argmin()]), above=0)

    def predict(self, values: np.ndarray) -> np.ndarray:
        """Values → class indices, both of shape = (n_rows,)."""
        return np.where(values >= self.value, self.above, 1 - self.above)


@dataclass(frozen=True)
class Line:
    """Predicts a number as an affine function of another one."""

    slope: float
    intercept: float

    @staticmethod
    def fit(values: np.ndarray, labels: np.ndarray) -> "Line":
        """The line with the least squared error, for values and numbers, both of shape = (n_rows,)."""
        slope = 0.0
        if values.min() < values.max():
            slope = float(np.cov(values, labels, bias=True)[0, 1] / values.var())
        return Line(slope, float(labels.mean() - slope * values.mean()))

    def predict(self, values: np.ndarray) -> np.ndarray:
        """Values → numbers, both of shape = (n_rows,)."""
        return self.slope * values + self.intercept


@dataclass(frozen=True)
class Baselines:
    """Predictions that need no prompt, fitted on training data."""

    constant: int | float | tuple[int, ...]
    """What is always predicted: a class; the mean of the numbers; the most frequent set of labels, as their indices."""
    cosine: Threshold | Line | None
    """On the cosine of the mean-pooled embeddings of both sentences, by the same frozen base model; None for tasks
    that are not pairs with two classes or a number."""
    frequent: tuple[int, ...] = ()
    """Where it is multi-label, the other constant: the most frequent labels, as many as make the best micro F1."""

    @staticmethod
    def fit(task: Task, base: BaseModel, train: "Dataset") -> "Baselines":
        """Fit all on training data, as from `train.data.load.load_split`."""
        labels = np.array(train[task.label_column])
        if task.kind == MULTI_LABEL:
            sets, counts = np.unique(labels, axis=0, return_counts=True)
            return Baselines(_indices(sets[counts.argmax()]), None, _most_frequent(labels))
        if task.kind == REGRESSION:
            line = Line.fit(_cosines(base, task, train), labels) if task.is_pair else None
            return Baselines(float(labels.mean()), line)
        constant = int(np.bincount(labels, minlength=len(task.labels)).argmax())
        if task.positive_label is not None:  # always predicting the other class has an F1 of 0
            constant = task.labels.index(task.positive_label)
        cosine = None
        if task.is_pair and len(task.labels) == 2:
            cosine = Threshold.fit(_cosines(base, task, train), labels)
        return Baselines(constant, cosine)

    def score(self, task: Task, base: BaseModel, dataset: "Dataset") -> dict[str, Scores]:
        """The scores of all on other rows, by a name for people."""
        expected = np.array(dataset[task.label_column])
        return {name: score(task, answers, expected) for name, answers in self.predict(task, base, dataset).items()}

    def predict(self, task: Task, base: BaseModel, dataset: "Dataset") -> dict[str, np.ndarray]:
        """The predictions of all for other rows, in the form of `Task.predict`, by a name for people."""
        n_rows, predicted = len(dataset), {}
        for constant in (self.constant, *([self.frequent] if self.frequent not in {(), self.constant} else [])):
            name, answer = _constant_answer(task, constant)
            predicted[f"always {name}"] = np.repeat(answer[None], n_rows, axis=0)
        if self.cosine is not None:
            predicted["cosine of the frozen model's embeddings"] = self.cosine.predict(_cosines(base, task, dataset))
        return predicted

    def as_json(self) -> dict[str, Any]:
        """For training.json."""
        return asdict(self)


def _constant_answer(task: Task, constant: int | float | tuple[int, ...]) -> tuple[str, np.ndarray]:
    """What is predicted for one row, for people and as `score` takes it."""
    if isinstance(constant, tuple):
        is_predicted = np.isin(np.arange(len(task.labels)), constant)
        return (f"`{task.join_labels(is_predicted)}`" if constant else "no label"), is_predicted
    if task.kind == REGRESSION:
        return f"the mean, {constant:.4g}", np.array(constant)
    return f"`{task.labels[int(constant)]}`", np.array(constant)


def _indices(is_present: np.ndarray) -> tuple[int, ...]:
    return tuple(np.flatnonzero(is_present).tolist())


def _most_frequent(labels: np.ndarray) -> tuple[int, ...]:
    """The constant set of labels with the best micro F1, for labels of shape = (n_rows, n_labels): the most frequent ones.

    The most frequent labels are the best set of their size, so only the size has to be tried.
    """
    order = np.argsort(-labels.sum(axis=0), kind="stable")
    hits = labels.sum(axis=0)[order].cumsum()
    n_labels = np.arange(1, len(order) + 1)
    f1 = 2 * hits / (n_labels * len(labels) + labels.sum())
    return tuple(sorted(order[: f1.argmax() + 1].tolist()))


def _cosines(base: BaseModel, task: Task, dataset: "Dataset", *, batch_size: int = 64) -> np.ndarray:
    """The cosine of the two sentences of each row, each as the mean of its last hidden states, shape = (n_rows,)."""
    import torch
    from tqdm.auto import tqdm

    # The tokenizer as it is, without the special tokens that `base_tokenizer` adds for a classifier.
    tokenizer = load_tokenizer(base.folder, base.positions, gguf_file=base.gguf_file)
    fit_vocabulary(tokenizer, base, base.folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # As a classifier, whose head is not used: that its backbone is whole is checked there.
    model: Any = load_classifier(base, ("first", "second")).base_model.eval()
    if torch.cuda.is_available():
        model = model.cuda()
    texts = [text for column in task.text_columns for text in dataset[column]]
    embedded: list[np.ndarray] = []
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="cosine baseline", unit="batch", leave=False, disable=not is_main_process()):
        rows = [texts[row] for row in order[start : start + batch_size]]
        batch = tokenizer(rows, truncation=True, padding=True, return_tensors="pt")
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
        embedded.append(torch.nn.functional.normalize(mean.float(), dim=1).cpu().numpy())
    first, second = np.split(np.concatenate(embedded)[np.argsort(order)], 2)
    cosines: np.ndarray = (first * second).sum(axis=1)
    return cosines
