"""Rows of a file that follow one another, with their places in the file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]

_BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
"""Blanks, those without a width and the byte-order mark too, which Python's own strip leaves."""


def trim(text: str) -> str:
    """A text without blanks around it, visible or not."""
    return text.strip(_BLANKS)


@dataclass(frozen=True)
class TextChunk:
    """Rows of a CSV or a JSON file that follow one another."""

    file: str
    """The file's name, for messages."""
    start: int
    """How many rows of the file come before."""
    rows: Sequence[Row]
    """As Python values; a row of JSON may lack a column."""
    lines: Sequence[int]
    """The line of the file on which each row begins."""
    unreadable: Mapping[int, str] = field(default_factory=dict)
    """Rows that are none, counted from 0 within the chunk → the reason; ``rows`` has what there is of their text."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def column(self, name: str) -> list[Any]:
        """The values of a column, None where a row lacks it."""
        return [row.get(name) for row in self.rows]

    def class_names(self, _name: str) -> tuple[str, ...]:
        """The names for which the numbers in a column stand, where the file says so; else none."""
        return ()

    def place(self, row: int) -> str:
        """Where a row is, for messages; counted from 0 within the chunk."""
        return f"{self.file}, row {self.start + row + 1} (line {self.lines[row]})"


@dataclass(frozen=True)
class ArrowChunk:
    """Rows of a Parquet or an Arrow file that follow one another; members as those of `TextChunk`."""

    file: str
    start: int
    table: "pyarrow.Table"

    def __len__(self) -> int:
        return len(self.table)

    @property
    def unreadable(self) -> Mapping[int, str]:
        return {}

    @property
    def rows(self) -> Sequence[Row]:
        columns = {name: self.column(name) for name in self.columns}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    @property
    def columns(self) -> list[str]:
        return list(self.table.column_names)

    def column(self, name: str) -> list[Any]:
        """The values of a column; bytes that are UTF-8 as text, which is what some programs write texts as."""
        values = self.table.column(name)
        return [_as_text(value) for value in values.to_pylist()] if holds_bytes(values.type) else values.to_pylist()

    def class_names(self, name: str) -> tuple[str, ...]:
        return class_names(self.table.schema, name)

    def place(self, row: int) -> str:
        return f"{self.file}, row {self.start + row + 1}"


Chunk = TextChunk | ArrowChunk


def holds_bytes(kind: Any) -> bool:
    """Whether a column of an Arrow type holds bytes themselves; a list of them does not."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return "binary" in str(kind) and not types.is_nested(kind)


def _as_text(value: Any) -> Any:
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def class_names(schema: "pyarrow.Schema", column: str) -> tuple[str, ...]:
    """The names of a `datasets.ClassLabel` column, from what datasets writes into a schema's metadata; else none.

    https://github.com/huggingface/datasets/blob/5.0.1/src/datasets/features/features.py, `Features.arrow_schema`
    """
    content = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        feature = json.loads(content)["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else []
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
