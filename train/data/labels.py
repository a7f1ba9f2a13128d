"""What a label column may hold, by kind of task: a class, a number, or several labels."""

import math
from collections.abc import Iterable, Sequence
from decimal import Decimal

from train.common.errors import DataError
from train.data.classes import find_class, is_no_class, named_value
from train.data.tasks import CLASSIFICATION, MULTI_LABEL, REGRESSION, SEPARATOR, Task

Label = int | float | tuple[float, ...]
"""A class index; a number; or 1 for each label that a row has and 0 for the others."""


def has_no_label(task: Task, value: object) -> bool:
    """Whether a cell of a classification's label column says that its row has no label."""
    is_one = task.kind == CLASSIFICATION and not isinstance(value, list | dict)
    return is_one and is_no_class(value, task.known_labels)


def parse_label(task: Task, value: object, names: Sequence[str] = ()) -> Label:
    """A cell of the label column → the label, as `train.data.tasks.score` and the loss take it.

    ``names`` are those for which numbers in the column stand, where the file says so.

    Raises:
        DataError: it is none of the task; the message follows the row's place and ends without a full stop.
    """
    if task.kind == REGRESSION:
        return _parse_number(value, task.label_column)
    known, column = task.known_labels, f"in column {task.label_column!r}"
    if task.kind == MULTI_LABEL:
        several = split_labels(value)
        if several is None:
            raise DataError(f"label {value!r:.80} {column} is no list of labels, and no text with commas between them")
        unknown = next((name for name in several if name not in known), None)
        if unknown is None:
            return tuple(float(label in several) for label in task.labels)
        value = unknown
    else:
        if isinstance(value, list | dict):
            raise DataError(_not_one(task.label_column, value))
        found = find_class(named_value(value, names), known)
        if found is None and names and task.name == "custom":
            found = find_class(value, known)  # learned before the file had names
        if found is not None:
            return found
    raise DataError(f"label {value!r:.80} {column} is none of task {task.name}'s ({task.label_choices})")


def split_labels(value: object) -> list[str] | None:
    """The labels of a row: a list, or names with a comma between; none of an empty string. None for anything else."""
    if isinstance(value, list) and all(isinstance(item, str | int) for item in value):
        return [str(item) for item in value]
    if isinstance(value, str):
        return [name.strip() for name in value.split(SEPARATOR) if name.strip()]
    return [str(value)] if isinstance(value, int) else None


def _parse_number(value: object, column: str) -> float:
    is_text = isinstance(value, str) and "_" not in value  # 1_000 is a number to Python alone
    try:
        number = float(str(value)) if is_text or isinstance(value, int | float | Decimal) else math.nan
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise DataError(f"label {value!r:.80} in column {column!r} is no finite number, as a regression needs")
    return number


def refuse_other_kind(place: str, column: str, value: object) -> None:
    """Refuse a cell of a classification's label column that holds a list."""
    if isinstance(value, list | dict):
        raise DataError(f"{place}: {_not_one(column, value)}.")


def _not_one(column: str, value: object) -> str:
    return (
        f"column {column!r} holds a {type(value).__name__}, and a classification has one label a row. For several labels a "
        f"row add --kind {MULTI_LABEL} to the training"
    )


def refuse_fractions(file: object, column: str, labels: Iterable[str]) -> None:
    """Refuse a classification's labels, as text, that are all numbers and not all whole."""
    try:
        fractions = sorted(label for label in labels if not float(label).is_integer())
    except ValueError:
        return
    if fractions:
        raise DataError(
            f"{file}: column {column!r} holds numbers with fractions, such as {fractions[0]}. To learn the "
            f"numbers add --kind {REGRESSION}; if they are classes, name them with --labels."
        )


def refuse_equal_numbers(file: object, column: str, numbers: Iterable[Label]) -> None:
    """Refuse a regression's labels that are all equal: there is nothing to learn, and no correlation is defined."""
    if len(distinct := set(numbers)) == 1:
        raise DataError(
            f"{file}: column {column!r} holds {distinct.pop()} in every row, and no correlation with equal numbers is "
            "defined. Give rows whose numbers differ."
        )
