"""What a label column may hold, by kind of task: a class, a number, or several labels."""

import ast
import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

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
            raise DataError(no_labels(value, task.label_column))
        if len(set(several)) < len(several):
            raise DataError(
                f"label {value!r:.80} {column} names a label twice. Give the names of a row's labels, not a 0 or 1 for each"
            )
        indices = [find_class(name, known) for name in several]
        if None not in indices:
            return tuple(float(index in indices) for index in range(len(task.labels)))
        value = several[indices.index(None)]
    else:
        if isinstance(value, list | dict):
            raise DataError(_not_one(task.label_column, value))
        found = find_class(named_value(value, names), known)
        if found is None and names and task.name == "custom":
            found = find_class(value, known)  # learned before the file had names
        if found is not None:
            return found
        if isinstance(value, str) and holds_list(value):
            raise DataError(_not_one(task.label_column, value))
        value = named_value(value, names)
    raise DataError(f"label {value!r:.80} {column} is none of task {task.name}'s ({task.label_choices})")


def no_labels(value: object, column: str) -> str:
    """Why a cell of a multi-label column cannot be used where `split_labels` gives None."""
    return f"label {value!r:.80} in column {column!r} is no list of labels, and no text with commas between them"


def split_labels(value: object) -> list[str] | None:
    """The labels of a row: a list, or names with a comma between; none of an empty string. None for anything else."""
    if isinstance(value, str) and holds_list(value):
        value = _list_in(value.strip())
    if isinstance(value, list) and all(isinstance(item, str | int) and not isinstance(item, bool) for item in value):
        return [str(item) for item in value]
    if isinstance(value, str):
        return [name.strip() for name in value.split(SEPARATOR) if name.strip()]
    return [str(value)] if isinstance(value, int) else None


_NUMBERS = re.compile(r"\[[\d.\s]*\]")
"""An array as NumPy prints it."""


def _list_in(text: str) -> list[Any] | None:
    """The list that stands in a text, as pandas writes one into a CSV file: "['a', 'b']"; None if there is none."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def holds_list(text: str) -> bool:
    """Whether a text is a list of labels in brackets, which is not the name of a class."""
    text = text.strip()
    return _NUMBERS.fullmatch(text) is not None or _list_in(text) is not None


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
    if isinstance(value, list | dict) or (isinstance(value, str) and holds_list(value)):
        raise DataError(f"{place}: {_not_one(column, value)}.")


def _not_one(column: str, value: object) -> str:
    kind = "dict" if isinstance(value, dict) else "list"
    return (
        f"column {column!r} holds a {kind}, and a classification has one label a row. For several labels a "
        f"row train with kind {MULTI_LABEL}"
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
