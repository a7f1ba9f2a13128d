"""The tasks that can be learned: columns, labels, metrics."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from train.common.errors import UsageError

METRICS = {"accuracy": "accuracy", "f1": "F1", "f1_macro": "macro F1", "matthews": "Matthews correlation"}
"""Names in files → names for people."""
MAX_LABELS = 100
GLUE = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """One classification task over single sentences or pairs of them."""

    name: str
    """As in ``--task``; "custom" for a user's own columns."""
    text_columns: tuple[str, ...]
    """One or two, in the order in which the model reads them."""
    label_column: str
    labels: tuple[str, ...]
    """Class names in the order of the logits."""
    metrics: tuple[str, ...]
    """Names of `METRICS`; the first chooses the best epoch, the next break ties."""
    positive_label: str | None = None
    """The class of which F1 is computed; None where no metric is F1."""
    symmetric: bool = False
    """Whether a pair means the same when its sentences change places."""
    hub_config: str | None = None
    """The configuration of `GLUE` on the Hugging Face hub; None for a user's own task."""
    hub_validation: str = "validation"
    """Name of the validation split there."""

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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Task":
        """The inverse of `as_json`; a KeyError, TypeError or ValueError (its message follows "lacks …") if damaged."""
        lists = {name: tuple(str(item) for item in value[name]) for name in ("text_columns", "labels", "metrics")}
        if not 2 <= len(lists["labels"]) <= MAX_LABELS:
            raise ValueError(f"from 2 to {MAX_LABELS} labels")
        if len(lists["text_columns"]) not in {1, 2}:
            raise ValueError("one or two text columns")
        if not set(lists["metrics"]) <= set(METRICS):
            raise ValueError(f"metrics among {', '.join(METRICS)}")
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
)
TASKS = {task.name: task for task in _TASKS}
MRPC = TASKS["mrpc"]


def get_task(name: str) -> Task:
    """The GLUE task of a name, or a `UsageError`."""
    if name not in TASKS:
        raise UsageError(
            f"--task {name}: there is no such task. Choose one of: {', '.join(TASKS)}; or name the columns of your "
            "own file with --text-columns and --label-column."
        )
    return TASKS[name]


def custom_task(text_columns: tuple[str, ...], label_column: str, labels: Sequence[str]) -> Task:
    """A user's own columns, and labels in the order of the logits; F1 is that of the second of two, or macro F1."""
    if len(set(labels)) != len(labels):
        raise UsageError(f"--labels {','.join(labels)}: a label is named twice. Name each once.")
    if not 2 <= len(labels) <= MAX_LABELS:
        raise UsageError(
            f"Column {label_column!r}: between 2 and {MAX_LABELS} labels can be told apart, not {len(labels)}. "
            "Is it the right --label-column?"
        )
    is_binary = len(labels) == 2
    metrics = ("accuracy", "f1" if is_binary else "f1_macro")
    return Task("custom", text_columns, label_column, tuple(labels), metrics, labels[1] if is_binary else None)


@dataclass(frozen=True)
class Scores:
    """Metrics of one set of predictions."""

    values: dict[str, float]
    """By the names of `METRICS`, in the task's order; from 0 to 1 (Matthews correlation from −1 to 1)."""

    def __str__(self) -> str:
        """For people, in percent: "accuracy 71.1, F1 81.5"."""
        return ", ".join(f"{METRICS[name]} {100 * value:.1f}" for name, value in self.values.items())

    @property
    def key(self) -> tuple[float, ...]:
        """Larger is better: the task's first metric, then the next."""
        return tuple(self.values.values())


def score(task: Task, predicted: Sequence[int] | np.ndarray, expected: Sequence[int] | np.ndarray) -> Scores:
    """The task's metrics (scikit-learn) of class indices, each of shape (n_rows,)."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    classes = list(range(len(task.labels)))
    positive = -1 if task.positive_label is None else task.labels.index(task.positive_label)
    metrics: dict[str, Callable[[], float]] = {
        "accuracy": lambda: accuracy_score(expected, predicted),
        "f1": lambda: f1_score(expected, predicted, pos_label=positive, zero_division=0),
        "f1_macro": lambda: f1_score(expected, predicted, labels=classes, average="macro", zero_division=0),
        "matthews": lambda: matthews_corrcoef(expected, predicted),
    }
    return Scores({name: float(metrics[name]()) for name in task.metrics})
