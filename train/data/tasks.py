"""The tasks that can be learned: columns, labels, metrics."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from train.common.errors import UsageError
from train.config import CLASSIFICATION, KINDS, MULTI_LABEL, REGRESSION

METRICS_OF = {
    CLASSIFICATION: {
        "accuracy": "accuracy",
        "f1": "F1",
        "f1_macro": "macro F1",
        "matthews": "Matthews correlation",
    },
    REGRESSION: {"pearson": "Pearson correlation", "spearman": "Spearman correlation", "r2": "R²"},
    MULTI_LABEL: {"f1_micro": "micro F1", "f1_macro": "macro F1"},
}
"""By kind of task: names in files → names for people."""
METRICS = {name: words for metrics in METRICS_OF.values() for name, words in metrics.items()}
"""Those of every kind."""
MAX_LABELS = 1000
NUMBER = "value"
"""The name of a regression's only logit."""
SEPARATOR = ","
"""Between the labels of one text where they are written as one string."""
THRESHOLD = 0.5
"""The probability from which a label is predicted, unless a task has its own."""
RECALLS_SHOWN = 8
GLUE = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """What is learned of single sentences or pairs of them."""

    name: str
    """As in ``--task``; "custom" for a user's own columns."""
    text_columns: tuple[str, ...]
    """One or two, in the order in which the model reads them."""
    label_column: str
    labels: tuple[str, ...]
    """Names of the classes or labels in the order of the logits; `NUMBER` alone for a regression."""
    metrics: tuple[str, ...]
    """Names in `METRICS_OF` its kind; the first chooses the best epoch, the next break ties."""
    positive_label: str | None = None
    """The class of which F1 is computed; None where no metric is F1."""
    symmetric: bool = False
    """Whether a pair means the same when its sentences change places."""
    hub_config: str | None = None
    """The configuration of `GLUE` on the Hugging Face hub; None for a user's own task."""
    hub_validation: str = "validation"
    """Name of the validation split there."""
    kind: str = CLASSIFICATION
    """One of `KINDS`."""
    threshold: float | None = None
    """The probability from which a label is predicted; None where the kind is not multi-label."""

    @property
    def is_pair(self) -> bool:
        return len(self.text_columns) == 2

    @property
    def known_labels(self) -> dict[str, int]:
        """A label as a file may write it (its name and, in a GLUE task, its index) → its class index."""
        names = {name: index for index, name in enumerate(self.labels)}
        # A user's own labels may be numbers themselves; then 2 is the label "2" and not the third one.
        return names if self.name == "custom" else names | {str(index): index for index in names.values()}

    @property
    def label_choices(self) -> str:
        """The first few labels, for a message about an unknown one."""
        few = [repr(name) if self.name == "custom" else f"{i} or {name!r}" for i, name in enumerate(self.labels)]
        return ", ".join(few[:8]) + (" …" if len(few) > 8 else "")

    def with_columns(self, text_columns: tuple[str, ...], label_column: str | None, *, owner: object) -> "Task":
        """The task for a file with other column names; ``owner`` of the task is for the message."""
        if text_columns and len(text_columns) != len(self.text_columns):
            raise UsageError(
                f"{len(text_columns)} text columns are named ({','.join(text_columns):.80}); {owner} was trained on "
                f"{len(self.text_columns)} ({', '.join(self.text_columns)}). Name as many."
            )
        return replace(
            self,
            text_columns=text_columns or self.text_columns,
            label_column=self.label_column if label_column is None else label_column,
        )

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Logits, shape = (n_rows, n_labels) → probabilities, float64, of the same shape.

        They are a softmax over the classes or, multi-label, a sigmoid of each label; a regression's are its numbers.
        """
        logits = logits.astype(np.float64)
        if self.kind == REGRESSION:
            return logits
        if self.kind == MULTI_LABEL:
            # tanh cannot overflow.
            return np.asarray((1 + np.tanh(logits / 2)) / 2)
        # Without the largest logit exp cannot overflow.
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))

    def predict(self, logits: np.ndarray) -> np.ndarray:
        """Logits, shape = (n_rows, n_labels) → what is predicted, in the form in which `score` takes it.

        Class indices, int64, shape = (n_rows,); numbers, float64, shape = (n_rows,); or whether each label is predicted,
        bool, shape = (n_rows, n_labels). A UsageError where a logit is no finite number: argmax would make class 0 of NaN.
        """
        if not np.isfinite(logits).all():
            raise UsageError(
                f"The model's logits for task {self.name} are no finite numbers, so it predicts nothing. If it was trained "
                "here, train it again with a smaller --learning-rate."
            )
        if self.kind == REGRESSION:
            return logits[:, 0].astype(np.float64)
        if self.kind == MULTI_LABEL:
            return self.reach_threshold(self.probabilities(logits))
        return logits.argmax(axis=-1)

    def reach_threshold(self, probabilities: np.ndarray) -> np.ndarray:
        """Whether a multi-label task predicts each label; bool, of the same shape."""
        return np.asarray(probabilities >= (self.threshold or THRESHOLD))

    def join_labels(self, is_predicted: Sequence[Any] | np.ndarray) -> str:
        """The names of a text's labels as one string, in the order of the logits; one flag a label."""
        return SEPARATOR.join(name for name, is_one in zip(self.labels, is_predicted, strict=True) if is_one)

    def as_json(self) -> dict[str, Any]:
        value = asdict(self)
        # What a classification has not is left out, so that older versions read its adapters.
        return {name: item for name, item in value.items() if name not in {"kind", "threshold"}} | (
            {} if self.kind == CLASSIFICATION else {"kind": self.kind, "threshold": self.threshold}
        )

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Task":
        """The inverse of `as_json`; a KeyError, TypeError or ValueError (its message follows "lacks …") if damaged."""
        lists = {name: tuple(str(item) for item in value[name]) for name in ("text_columns", "labels", "metrics")}
        kind, threshold, n_labels = value.get("kind", CLASSIFICATION), value.get("threshold"), len(lists["labels"])
        if kind not in KINDS:
            raise ValueError(f"a kind among {', '.join(KINDS)}")
        if kind == REGRESSION and n_labels != 1:
            raise ValueError("one label, as a regression has")
        if kind != REGRESSION and not 2 <= n_labels <= MAX_LABELS:
            raise ValueError(f"from 2 to {MAX_LABELS} labels")
        if len(lists["text_columns"]) not in {1, 2}:
            raise ValueError("one or two text columns")
        if not set(lists["metrics"]) <= set(METRICS_OF[kind]):
            raise ValueError(f"metrics among {', '.join(METRICS_OF[kind])}")
        is_number = isinstance(threshold, float) and 0 < threshold < 1
        if not (is_number if kind == MULTI_LABEL else threshold is None):
            raise ValueError("a threshold between 0 and 1 where it is multi-label, and none elsewhere")
        return Task(**(value | lists))


def _glue(
    name: str, text_columns: str, labels: str, metrics: str = "accuracy", *, validation: str = "validation"
) -> Task:
    """A GLUE task; columns, labels and metrics are separated by spaces. Those with F1 are about paraphrases."""
    columns, classes, measures = (tuple(words.split()) for words in (text_columns, labels, metrics))
    is_paraphrase = "f1" in measures
    positive = classes[1] if is_paraphrase else None
    return Task(name, columns, "label", classes, measures, positive, is_paraphrase, name, validation)


# Columns, labels and their order are those of nyu-mll/glue; metrics are GLUE's (arXiv 1804.07461, table 1).
_TASKS = (
    _glue("mrpc", "sentence1 sentence2", "not_equivalent equivalent", "accuracy f1"),
    _glue("qqp", "question1 question2", "not_duplicate duplicate", "accuracy f1"),
    _glue("rte", "sentence1 sentence2", "entailment not_entailment"),
    _glue("qnli", "question sentence", "entailment not_entailment"),
    _glue("wnli", "sentence1 sentence2", "not_entailment entailment"),
    _glue("mnli", "premise hypothesis", "entailment neutral contradiction", validation="validation_matched"),
    _glue("sst2", "sentence", "negative positive"),
    _glue("cola", "sentence", "unacceptable acceptable", "matthews accuracy"),
    replace(_glue("stsb", "sentence1 sentence2", NUMBER, "pearson spearman r2"), kind=REGRESSION, symmetric=True),
)
TASKS = {task.name: task for task in _TASKS}
MRPC = TASKS["mrpc"]
MORE_SPLITS = {"mnli": ("validation_mismatched",)}
"""By task: further validation splits of `GLUE`, on which the adapter that is kept is scored too."""


def get_task(name: str) -> Task:
    """The GLUE task of a name, or a `UsageError`."""
    if name not in TASKS:
        raise UsageError(
            f"--task {name}: there is no such task. Choose one of: {', '.join(TASKS)}; or name the columns of your "
            "own file with --text-columns and --label-column."
        )
    return TASKS[name]


def custom_task(
    text_columns: tuple[str, ...],
    label_column: str,
    labels: Sequence[str],
    kind: str = CLASSIFICATION,
    threshold: float | None = None,
) -> Task:
    """A user's own columns, and labels in the order of the logits; F1 is that of the second of two, or macro F1."""
    if kind == REGRESSION:
        return Task("custom", text_columns, label_column, (NUMBER,), tuple(METRICS_OF[kind]), kind=kind)
    if len(set(labels)) != len(labels):
        raise UsageError(f"--labels {','.join(labels)}: a label is named twice. Name each once.")
    if not 2 <= len(labels) <= MAX_LABELS:
        raise UsageError(
            f"Column {label_column!r}: between 2 and {MAX_LABELS} labels can be told apart, not {len(labels)}. "
            "Is it the right --label-column?"
        )
    if kind == MULTI_LABEL:
        if with_comma := [name for name in labels if SEPARATOR in name]:
            raise UsageError(
                f"Column {label_column!r}: label {with_comma[0]!r:.80} has a comma, which stands between the labels of a "
                "text. Rename it."
            )
        metrics, threshold = tuple(METRICS_OF[kind]), THRESHOLD if threshold is None else threshold
        return Task("custom", text_columns, label_column, tuple(labels), metrics, kind=kind, threshold=threshold)
    is_binary = len(labels) == 2
    metrics = ("accuracy", "f1" if is_binary else "f1_macro")
    return Task("custom", text_columns, label_column, tuple(labels), metrics, labels[1] if is_binary else None)


def interval_words(intervals: Mapping[str, tuple[float, float]], form: str = ".1f") -> str:
    """Intervals by metric, in percent, for people; ``form`` is that of each bound."""
    return ", ".join(
        f"{METRICS[name]} {format(100 * low, form)} to {format(100 * high, form)}"
        for name, (low, high) in intervals.items()
    )


@dataclass(frozen=True)
class Scores:
    """Metrics of one set of predictions."""

    values: dict[str, float]
    """By the names of `METRICS`, in the task's order; at most 1, and larger is better."""
    recalls: dict[str, float] = field(default_factory=dict)
    """By label: how much of the rows that have it was found, from 0 to 1; without labels that no row has."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % interval of each metric, by its name; empty where none was measured."""

    def __str__(self) -> str:
        """For people, in percent: "accuracy 71.1, F1 81.5"."""
        return ", ".join(f"{METRICS[name]} {round(100 * value, 1) + 0.0:.1f}" for name, value in self.values.items())

    @property
    def interval_words(self) -> str:
        """The intervals in percent, for people: "accuracy 66.9 to 75.2, F1 77.9 to 84.8"."""
        return interval_words(self.intervals)

    @property
    def key(self) -> tuple[float, ...]:
        """Larger is better: the task's first metric, then the next."""
        return tuple(self.values.values())

    @property
    def recall_words(self) -> str:
        """The recall of each label in percent, for people; of many labels the lowest; empty for a regression."""
        names = sorted(self.recalls, key=lambda name: self.recalls[name])[:RECALLS_SHOWN]
        shown = ", ".join(f"{name} {100 * self.recalls[name]:.1f}" for name in self.recalls if name in names)
        return shown + (f" (the lowest of {len(self.recalls)})" if len(self.recalls) > len(names) else "")

    def with_recalls(self) -> str:
        """For people: the metrics and, where there are any, the recalls."""
        return f"{self}; recall {self.recall_words}" if self.recalls else str(self)


def best_scores(named: Mapping[str, Scores]) -> tuple[str, Scores]:
    """The best of several scores of one task, as of its baselines, with its name; "" and no metrics where there is none."""
    return max(named.items(), key=lambda item: item[1].key, default=("", Scores({})))


def score(task: Task, predicted: Sequence[Any] | np.ndarray, expected: Sequence[Any] | np.ndarray) -> Scores:
    """The task's metrics (scikit-learn) of what `Task.predict` gives, and of the rows' labels in the same form."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, recall_score

    if task.kind == REGRESSION:
        return score_numbers(predicted, expected)
    classes = None if task.kind == MULTI_LABEL else list(range(len(task.labels)))
    positive = -1 if task.positive_label is None else task.labels.index(task.positive_label)
    options: dict[str, Any] = {"labels": classes, "zero_division": 0}
    metrics: dict[str, Callable[[], float]] = {
        "accuracy": lambda: accuracy_score(expected, predicted),
        "f1": lambda: f1_score(expected, predicted, pos_label=positive, zero_division=0),
        "f1_macro": lambda: f1_score(expected, predicted, average="macro", **options),
        "f1_micro": lambda: f1_score(expected, predicted, average="micro", **options),
        "matthews": lambda: matthews_corrcoef(expected, predicted),
    }
    recalls = recall_score(expected, predicted, average=None, labels=classes, zero_division=np.nan)
    named = {name: float(value) for name, value in zip(task.labels, recalls, strict=True) if not np.isnan(value)}
    return Scores({name: float(metrics[name]()) for name in task.metrics}, named)


def count_pairs(task: Task, expected: Sequence[Any] | np.ndarray, predicted: Sequence[Any] | np.ndarray) -> np.ndarray:
    """How often labels and predictions met; int64.

    The confusion matrix of class indices, shape = (n_labels expected, n_labels predicted). Where it is multi-label, for
    each label the rows that neither have nor get it, only get it, only have it, and both; shape = (n_labels, 4). Of a
    regression, whose numbers cannot be counted, nothing; shape = (0, 0).
    """
    n_labels = len(task.labels)
    if task.kind == REGRESSION:
        return np.zeros((0, 0), np.int64)
    if task.kind == MULTI_LABEL:
        codes = 2 * np.array(expected, np.int64).reshape(-1, n_labels) + np.array(predicted, np.int64).reshape(
            -1, n_labels
        )
        return np.stack([(codes == code).sum(axis=0) for code in range(4)], axis=1)
    counts = np.zeros((n_labels, n_labels), np.int64)
    np.add.at(counts, (np.asarray(expected, np.int64), np.asarray(predicted, np.int64)), 1)
    return counts


def score_counts(task: Task, counts: np.ndarray) -> Scores:
    """The metrics of `score` from `count_pairs`, whose size the rows do not change; of no regression."""
    if task.kind == MULTI_LABEL:
        return _score_label_counts(task, counts)
    right = np.diag(counts).astype(np.float64)
    expected, predicted = counts.sum(axis=1).astype(np.float64), counts.sum(axis=0).astype(np.float64)
    n_rows = expected.sum()
    # F1 = 2·TP / (2·TP + FP + FN), and 0 for a class that is neither expected nor predicted
    f1 = 2 * right / np.maximum(expected + predicted, 1)
    # The correlation of the one-hot classes; 0 where one side never varies.
    spread = (n_rows**2 - expected @ expected) * (n_rows**2 - predicted @ predicted)
    values = {
        "accuracy": right.sum() / n_rows,
        "f1_macro": f1.mean(),
        "matthews": (right.sum() * n_rows - expected @ predicted) / np.sqrt(spread) if spread else 0.0,
    }
    if task.positive_label is not None:
        values["f1"] = f1[task.labels.index(task.positive_label)]
    return Scores({name: float(values[name]) for name in task.metrics}, _recalls(task, right, expected))


def _score_label_counts(task: Task, counts: np.ndarray) -> Scores:
    only_predicted, missed, right = counts[:, 1:].astype(np.float64).T
    # The same F1 as above, of each label and of all of them together.
    values = {
        "f1_micro": 2 * right.sum() / max((2 * right + only_predicted + missed).sum(), 1),
        "f1_macro": (2 * right / np.maximum(2 * right + only_predicted + missed, 1)).mean(),
    }
    return Scores({name: float(values[name]) for name in task.metrics}, _recalls(task, right, right + missed))


def _recalls(task: Task, right: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """By label, from rows that have it and get it, and rows that have it; both float64, shape = (n_labels,)"""
    rows = zip(task.labels, right.tolist(), expected.tolist(), strict=True)
    return {name: found / there for name, found, there in rows if there}


def score_numbers(predicted: Sequence[float] | np.ndarray, expected: Sequence[float] | np.ndarray) -> Scores:
    """A regression's metrics; numbers, each of shape (n_rows,). Predictions that are all equal have no correlation: 0.

    Raises:
        UsageError: the expected numbers are all equal, or one of the predictions is not finite.
    """
    found, true = np.asarray(predicted, np.float64), np.asarray(expected, np.float64)
    if not np.isfinite(found).all():
        raise UsageError("A prediction is no finite number. If this is training, take a smaller --learning-rate.")
    if len(true) == 0 or true.min() == true.max():
        raise UsageError("The labels are all equal, so no correlation with them is defined.")
    # R² is 1 less the squared error in units of that of the labels' own mean; it has no lower bound.
    r2 = 1 - ((true - found) ** 2).sum() / ((true - true.mean()) ** 2).sum()
    ranks = (_ranks(found), _ranks(true))
    return Scores({"pearson": _correlation(found, true), "spearman": _correlation(*ranks), "r2": float(r2)})


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation of two arrays of shape (n_rows,); 0 where one of them never varies."""
    if one.min() == one.max() or other.min() == other.max():  # the mean of equal numbers is rounded
        return 0.0
    one, other = one - one.mean(), other - other.mean()
    return float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value from 1, the mean rank where several are equal; float64, shape = (n_rows,)"""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])
