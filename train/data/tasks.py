"""The tasks that can be learned: columns, labels, metrics."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from train.common.errors import UsageError

METRICS = {"accuracy": "accuracy", "f1": "F1", "f1_macro": "macro F1", "matthews": "Matthews correlation"}
"""Names in artefacts → names for people."""


MAX_LABELS = 100


@dataclass(frozen=True)
class Task:
    """One classification task over single texts or pairs of them.

    Attributes:
        name: as in ``--task``; "custom" for a user's own columns.
        text_columns: one or two text columns, in the order in which the model reads them.
        label_column: the column of the class, an index or a name of ``labels``.
        labels: class names in the order of the logits.
        metrics: what is computed, names of `METRICS`; the first chooses the best epoch, the next break ties.
        positive_label: the class of which F1 is computed; None where no metric is F1.
        symmetric: whether a pair means the same when its sentences change places.
        hub_config: the configuration of ``nyu-mll/glue`` on the Hugging Face hub, None for a user's own task.
        hub_validation: the name of the validation split there.
    """

    name: str
    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    positive_label: str | None = None
    symmetric: bool = False
    hub_config: str | None = None
    hub_validation: str = "validation"

    @property
    def is_pair(self) -> bool:
        """Whether a row has two texts."""
        return len(self.text_columns) == 2

    @property
    def known_labels(self) -> dict[str, int]:
        """How a label may stand in a file → its class index: by name and, in a GLUE task, by index."""
        names = {name: index for index, name in enumerate(self.labels)}
        # A user's own labels may be numbers themselves; then 2 is the label "2" and not the third one.
        return names if self.name == "custom" else names | {str(index): index for index in names.values()}

    @property
    def label_choices(self) -> str:
        """The first few of them, for a complaint about another one."""
        few = [repr(name) if self.name == "custom" else f"{i} or {name!r}" for i, name in enumerate(self.labels)]
        return ", ".join(few[:8]) + (" …" if len(few) > 8 else "")

    def with_columns(self, text_columns: tuple[str, ...], label_column: str | None, *, owner: object) -> "Task":
        """The task as a file has it whose columns have other names; nothing given, nothing changed.

        Args:
            owner: the folder that was trained, for a complaint.

        Raises:
            UsageError: it has another number of texts.
        """
        if text_columns and len(text_columns) != len(self.text_columns):
            raise UsageError(
                f"--text-columns {','.join(text_columns)}: {owner} was trained on {len(self.text_columns)} "
                f"({', '.join(self.text_columns)}). Name as many."
            )
        return replace(
            self,
            text_columns=text_columns or self.text_columns,
            label_column=self.label_column if label_column is None else label_column,
        )

    def as_json(self) -> dict[str, Any]:
        """For training.json."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Task":
        """The inverse of `as_json`.

        Raises:
            KeyError, TypeError: an entry is missing or unknown.
            ValueError: an entry cannot be what it says; the message reads on from "lacks".
        """
        lists = {name: tuple(str(item) for item in value[name]) for name in ("text_columns", "labels", "metrics")}
        if not 2 <= len(lists["labels"]) <= MAX_LABELS:
            raise ValueError(f"from 2 to {MAX_LABELS} labels")
        if len(lists["text_columns"]) not in {1, 2}:
            raise ValueError("one or two text columns")
        if not set(lists["metrics"]) <= set(METRICS):
            raise ValueError(f"metrics among {', '.join(METRICS)}")
        return Task(**(value | lists))


GLUE = "nyu-mll/glue"


def _glue(
    name: str,
    text_columns: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    *,
    positive_label: str | None = None,
    symmetric: bool = False,
    validation: str = "validation",
) -> Task:
    return Task(
        name=name,
        text_columns=text_columns,
        label_column="label",
        labels=labels,
        metrics=metrics,
        positive_label=positive_label,
        symmetric=symmetric,
        hub_config=name,
        hub_validation=validation,
    )


# Columns, labels and their order are those of nyu-mll/glue; metrics are GLUE's (arXiv 1804.07461, table 1).
TASKS = {
    task.name: task
    for task in (
        _glue(
            "mrpc",
            ("sentence1", "sentence2"),
            ("not_equivalent", "equivalent"),
            ("accuracy", "f1"),
            positive_label="equivalent",
            symmetric=True,
        ),
        _glue(
            "qqp",
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            ("accuracy", "f1"),
            positive_label="duplicate",
            symmetric=True,
        ),
        _glue("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
        _glue("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
        _glue("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
        _glue(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validation="validation_matched",
        ),
        _glue("sst2", ("sentence",), ("negative", "positive")),
        _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
    )
}


MRPC = TASKS["mrpc"]


def get_task(name: str) -> Task:
    """Look a task up by name.

    Raises:
        UsageError: there is no such task.
    """
    if name not in TASKS:
        raise UsageError(
            f"--task {name}: there is no such task. Choose one of: {', '.join(TASKS)}; or name the columns of your "
            "own file with --text-columns and --label-column."
        )
    return TASKS[name]


def custom_task(text_columns: tuple[str, ...], label_column: str, labels: Sequence[str]) -> Task:
    """A user's own columns and labels; two classes are scored by accuracy and F1 of the second, more by macro F1.

    Args:
        labels: class names in the order that the logits shall have.

    Raises:
        UsageError: too few or too many labels, or one of them twice.
    """
    if len(set(labels)) != len(labels):
        raise UsageError(f"--labels {','.join(labels)}: a label stands there twice. Name each once.")
    if not 2 <= len(labels) <= MAX_LABELS:
        raise UsageError(
            f"Column {label_column!r}: between 2 and {MAX_LABELS} labels can be told apart, not {len(labels)}. "
            "Is it the right --label-column?"
        )
    binary = len(labels) == 2
    return Task(
        name="custom",
        text_columns=text_columns,
        label_column=label_column,
        labels=tuple(labels),
        metrics=("accuracy", "f1" if binary else "f1_macro"),
        positive_label=labels[1] if binary else None,
    )


@dataclass(frozen=True)
class Scores:
    """Metrics of one set of predictions.

    Attributes:
        values: by the names of `METRICS`, in the task's order; from 0 to 1 (Matthews correlation from −1 to 1).
    """

    values: dict[str, float]

    def __str__(self) -> str:
        """For people, in percent: "accuracy 71.1, F1 81.5"."""
        return ", ".join(f"{METRICS[name]} {100 * value:.1f}" for name, value in self.values.items())

    @property
    def key(self) -> tuple[float, ...]:
        """What "better" means: the task's first metric, then the next."""
        return tuple(self.values.values())


def score(task: Task, predicted: Sequence[int] | np.ndarray, expected: Sequence[int] | np.ndarray) -> Scores:
    """The task's metrics (scikit-learn).

    Args:
        predicted: class indices, shape = (n_rows,)
        expected: class indices, shape = (n_rows,)
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    values: dict[str, float] = {}
    for name in task.metrics:
        if name == "accuracy":
            value = accuracy_score(expected, predicted)
        elif name == "matthews":
            value = matthews_corrcoef(expected, predicted)
        elif name == "f1_macro":
            value = f1_score(
                expected, predicted, labels=list(range(len(task.labels))), average="macro", zero_division=0
            )
        else:
            assert task.positive_label is not None
            value = f1_score(expected, predicted, pos_label=task.labels.index(task.positive_label), zero_division=0)
        values[name] = float(value)
    return Scores(values)
