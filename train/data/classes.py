"""The class names in a label column: what a value is called, which values are no class, which are one class twice."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path

from train.common.errors import DataError
from train.data.files.chunks import trim

_NO_CLASS = {"-1", "-", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "\\N"}
"""What is written where a row has no label: by GLUE's test sets and SNLI from the hub, by SNLI's own files, and by R,
pandas, spreadsheets and databases.
"""
_WHOLE_FLOAT = re.compile(r"([+-]?\d+)\.0*")
_WHOLE = re.compile(r"[+]?0*(\d+)")


def class_text(value: object) -> str | None:
    """The class that a cell names: 1.0 is "1", true "true", "pos " "pos". None for an empty one and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | Decimal):
        return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)
    text = trim(str(value))
    whole = _WHOLE_FLOAT.fullmatch(text)
    return (whole[1] if whole else text) or None


def is_no_class(value: object, known: Mapping[str, int]) -> bool:
    """Whether a cell says that its row has no label: it is empty, or in `_NO_CLASS` and no class has that name."""
    text = class_text(value)
    return text is None or (text in _NO_CLASS and find_class(text, known) is None)


def _key(text: str) -> str:
    """What spellings of one class have in common: not their case, blanks, Unicode form, nor zeros before a number."""
    folded = " ".join(trim(unicodedata.normalize("NFKC", text)).split()).casefold()
    whole = _WHOLE.fullmatch(folded)
    return whole[1] if whole else folded


def find_class(value: object, known: Mapping[str, int]) -> int | None:
    """The index of the class that a cell names, or None: its own spelling first, then any, then true for 1."""
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
        folded.setdefault(_key(name), set()).add(index)
    text = _key(text)
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
        DataError: two spellings are equal but for case, blanks and the like, and they are not to be merged.
    """
    alike: dict[str, list[str]] = {}
    keys = {spelling: _key(class_text(spelling) or "") for spelling in spellings}
    # Where there is nothing but numbers and truth, true is 1; else a 1 is a class like any other.
    truth = {"true": "1", "false": "0"} if set(keys.values()) <= {"0", "1", "true", "false"} else {}
    for spelling, _ in spellings.most_common():
        alike.setdefault(truth.get(keys[spelling], keys[spelling]), []).append(spelling)
    if not merge and (twins := next((group for group in alike.values() if len(set(group)) > 1), None)):
        look_alike = unicodedata.normalize("NFKC", twins[0]) == unicodedata.normalize("NFKC", twins[1])
        one, other = (ascii(name) if look_alike else repr(name) for name in twins[:2])
        raise DataError(
            f"{file}: column {column!r} has labels {one:.80} and {other:.80}, which differ in case or blanks "
            "alone, or as Unicode or numbers are written. Add --merge-labels to take such labels for one, or name yours with --labels."
        )
    return [class_text(group[0]) or "" for group in alike.values()]
