"""The class names in a label column: what a value is called, which values are no class, which are one class twice."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path

from train.common.errors import DataError

_NO_CLASS = {"-1", "-"}
"""What data sets write where a row has no label: GLUE's test sets and SNLI from the hub, SNLI's own files."""
_WHOLE_FLOAT = re.compile(r"([+-]?\d+)\.0*")


def class_text(value: object) -> str | None:
    """The class that a cell names: 1.0 is "1", true "true", "pos " "pos". None for an empty one and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | Decimal):
        return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)
    text = str(value).strip()
    whole = _WHOLE_FLOAT.fullmatch(text)
    return (whole[1] if whole else text) or None


def is_no_class(value: object, known: Mapping[str, int]) -> bool:
    """Whether a cell says that its row has no label: it is empty, NaN, -1 or - and no class has that name."""
    text = class_text(value)
    return text is None or (text in _NO_CLASS and text not in known)


def find_class(value: object, known: Mapping[str, int]) -> int | None:
    """The index of the class that a cell names, or None: its own spelling first, then any case, then true for 1."""
    if isinstance(value, list | dict | tuple):
        return None
    if str(value) in known and not isinstance(value, bool):
        return known[str(value)]
    text = class_text(value)
    if text is None:
        return None
    if text in known:
        return known[text]
    folded: dict[str, set[int]] = {}
    for name, index in known.items():
        folded.setdefault(name.strip().casefold(), set()).add(index)
    text = text.casefold()
    for spelling in (text, {"true": "1", "false": "0", "1": "true", "0": "false"}.get(text)):
        found = folded.get(spelling or "", set())
        if len(found) == 1 and (spelling == text or {"0", "1"} <= folded.keys() or {"true", "false"} <= folded.keys()):
            return found.pop()
    return None


def named_value(value: object, names: Sequence[str]) -> object:
    """The name for which a number stands in a column that has ``names`` (a `datasets.ClassLabel`); -1 stays."""
    if names and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return names[value]
    return value


def name_classes(spellings: Counter[str], file: Path, column: str, *, merge: bool) -> list[str]:
    """The names of the classes of a file, in no order, from how often it has each spelling.

    Raises:
        DataError: two spellings are equal but for case and blanks around them, and they are not to be merged.
    """
    alike: dict[str, list[str]] = {}
    for spelling, _ in spellings.most_common():
        alike.setdefault((class_text(spelling) or "").casefold(), []).append(spelling)
    if not merge and (twins := next((group for group in alike.values() if len(set(group)) > 1), None)):
        raise DataError(
            f"{file}: column {column!r} has labels {twins[0]!r:.80} and {twins[1]!r:.80}, which differ in case or blanks "
            "alone. Add --merge-labels to take such labels for one, or name yours with --labels."
        )
    return [class_text(group[0]) or "" for group in alike.values()]
