"""The tasks that can be learned: columns, labels, metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.errors import UsageError


@dataclass(frozen=True)
class Task:
    """One classification task over sentence pairs.

    Attributes:
        name: as in ``--task``.
        hub_dataset: the data set's name on the Hugging Face hub.
        hub_config: its configuration there.
        text_columns: the two text columns, in the order in which the model reads them.
        label_column: the column of the class, an index or a name of ``labels``.
        labels: class names in the order of the logits.
        positive_label: the class of which F1 is computed, as GLUE defines it for the task.
    """

    name: str
    hub_dataset: str
    hub_config: str
    text_columns: tuple[str, str]
    label_column: str
    labels: tuple[str, ...]
    positive_label: str


@dataclass(frozen=True)
class Scores:
    """Metrics of one set of predictions, each from 0 to 1."""

    accuracy: float
    f1: float


MRPC = Task(
    name="mrpc",
    hub_dataset="nyu-mll/glue",
    hub_config="mrpc",
    text_columns=("sentence1", "sentence2"),
    label_column="label",
    # The names and their order are those of the data set (nyu-mll/glue, mrpc).
    labels=("not_equivalent", "equivalent"),
    positive_label="equivalent",
)

TASKS = {task.name: task for task in (MRPC,)}


def get_task(name: str) -> Task:
    """Look a task up by name.

    Raises:
        UsageError: there is no such task.
    """
    if name not in TASKS:
        raise UsageError(f"--task {name}: there is no such task. Choose one of: {', '.join(TASKS)}.")
    return TASKS[name]


def score(task: Task, predicted: Sequence[int] | np.ndarray, expected: Sequence[int] | np.ndarray) -> Scores:
    """Accuracy and F1 (scikit-learn), as GLUE defines them for the task.

    Args:
        predicted: class indices, shape = (n_pairs,)
        expected: class indices, shape = (n_pairs,)
    """
    from sklearn.metrics import accuracy_score, f1_score

    positive = task.labels.index(task.positive_label)
    return Scores(
        accuracy=float(accuracy_score(expected, predicted)),
        f1=float(f1_score(expected, predicted, pos_label=positive, zero_division=0)),
    )
