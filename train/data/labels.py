"""What a label column may hold, by kind of task: a class, a number, or several labels."""

import ast
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from types import MappingProxyType
from typing import Any

from train.common.errors import DataError
from train.data.classes import class_text, find_class, is_no_class, named_value
from train.data.tasks import CLASSIFICATION, MULTI_LABEL, REGRESSION, SEPARATOR, Task

Label = int | float | tuple[float, ...]
"""A class index; a number; or 1 for each label that a row has and 0 for the others."""


def has_no_label(task: Task, value: object) -> bool:
    """Whether a cell of a classification's label column says that its row has no label."""
    is_one = task.kind == CLASSIFICATION and not isinstance(value, list | dict)
    return is_one and is_no_class(value, task.known_labels)


def written_sign(task: Task, value: object) -> str:
    """What a cell that is not empty says where its row has no label, such as "NaN"; nothing where it names labels."""
    is_sign = not isinstance(value, list | dict) and is_no_class(value, task.known_labels)
    return (class_text(value) or "") if is_sign else ""


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
        several = split_labels(value, known)
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


def split_labels(value: object, known: Mapping[str, int] = MappingProxyType({})) -> list[str] | None:
    """The labels of a row: a list, or names with a comma between. None for anything else.

    A cell that is empty, or says as `is_no_class` knows that there is no label, has none.
    """
    if not isinstance(value, list | dict) and is_no_class(value, known):
        return []
    if isinstance(value, str) and holds_list(value):
        value = _list_in(value)
    if isinstance(value, list) and all(isinstance(item, str | int) and not isinstance(item, bool) for item in value):
        return [str(item) for item in value]
    if isinstance(value, str):
        names = [name.strip() for name in value.split(SEPARATOR) if name.strip()]
        return None if any(name not in known and _is_part_of_list(name) for name in names) else names
    return [str(value)] if isinstance(value, int) else None


_NUMBERS = re.compile(r"\[[\d.\s]*\]")
"""An array as NumPy prints it."""
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_ITEM = rf"(?:{_QUOTED}|[+-]?\d+)"
_ITEMS = re.compile(rf"\s*(?:{_ITEM}(?:\s*,\s*{_ITEM})*\s*,?|{_QUOTED}(?:\s+{_QUOTED})*)?\s*")
"""What stands in a list, tuple or set as Python writes it, or in an array of texts as NumPy prints it, without commas.
Python itself would read the texts of such an array as one.
"""
_BRACKETS = (("[", "]"), ("{", "}"), ("(", ")"))


def _list_in(text: str) -> list[Any] | None:
    """The list that stands in a text, as pandas writes one into a CSV file: "['a', 'b']"; None if there is none."""
    text = text.strip()
    if text in {"set()", "()"}:
        return []
    inner = text[1:-1]
    if (text[:1], text[-1:]) not in _BRACKETS or not _ITEMS.fullmatch(inner):
        return None
    if (text[0] == "(" and "," not in inner) or (text[0] == "{" and not inner.strip()):
        return None  # a text in parentheses; an empty dict
    try:
        return [ast.literal_eval(item) for item in re.findall(_ITEM, inner)]
    except (ValueError, SyntaxError):  # such as an escape of Python that is none
        return None


def holds_list(text: str) -> bool:
    """Whether a text is a list of labels in brackets, which is not the name of a class."""
    return _NUMBERS.fullmatch(text.strip()) is not None or _list_in(text) is not None


def _is_part_of_list(name: str) -> bool:
    """Whether what stands between commas is a piece of a list that is written in another way: "{x", "'y'" or "[z]"."""
    if not any(map(str.isalnum, name)):
        return False  # such as ":)"
    is_open = any(
        (name[0] == one and end not in name) or (name[-1] == end and one not in name) for one, end in _BRACKETS
    )
    return is_open or name[0] + name[-1] in {"[]", "{}", "''", '""'}


def refuse_joined(file: object, column: str, names: Collection[str]) -> None:
    """Refuse the names of a multi-label column without commas if they are several names with another character between.

    That is so where all parts of one occur in others; with a slash, which single names have too, as others.
    """
    for separator in (";", "|", "/"):
        parts = {name: {part.strip() for part in name.split(separator)} for name in names}
        wholes = [{name} for name in names] if separator == "/" else list(parts.values())
        counts = Counter(part for whole in wholes for part in whole)
        for name, pieces in parts.items():
            if len(pieces) > 1 and all(counts[piece] > (separator != "/") for piece in pieces):
                raise DataError(
                    f"{file}: column {column!r} holds {name!r:.80}, and no cell has a comma. If {separator!r} stands between the "
                    "labels of a text, write a comma there, or lists in JSON lines or Parquet. If it is part of the "
                    "names, name all with --labels."
                )


def refuse_equal_sets(file: object, column: str, labels: Sequence[Label]) -> None:
    """Refuse training rows that all have the same of several labels, as where lists hold a 0 or 1 for each of two."""
    if len(labels) > 1 and len(set(labels)) == 1:
        raise DataError(
            f"{file}: column {column!r} has the same labels in every row, so there is nothing to learn. Give the names of "
            "each row's labels, not a 0 or 1 for each label."
        )


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
