"""What is refused in labelled rows: a missing column, a row without text, an unknown label."""

from collections.abc import Iterable, Sequence

from train.common.errors import DataError
from train.data.labels import Label, parse_label
from train.data.read_rows import Chunk
from train.data.tasks import Task

FIX_ROW = "Fix or remove the row"


def check_columns(file: str, columns: Sequence[str], wanted: Iterable[str], remedy: str) -> None:
    """Refuse a file that lacks one of the wanted columns; the message ends in ``remedy``."""
    for name in wanted:
        if name not in columns:
            few = ", ".join(columns[:8]) + (" …" if len(columns) > 8 else "")
            raise DataError(f"{file} has no column {name!r:.80}; it has {few:.300}. {remedy}")


def read_sentences(chunk: Chunk, task: Task, *, max_characters: int | None = None) -> list[tuple[str, ...]]:
    """The one or two sentences of each row; the first row without text, or with more characters, is refused."""
    rows = list(zip(*(chunk.column(name) for name in task.text_columns), strict=True))
    for row, sentences in enumerate(rows):
        for name, sentence in zip(task.text_columns, sentences, strict=True):
            if not isinstance(sentence, str) or not sentence.strip():
                raise DataError(f"{chunk.place(row)}: column {name!r} holds no text. {FIX_ROW}.")
            if max_characters is not None and len(sentence) > max_characters:
                raise DataError(
                    f"{chunk.place(row)}: column {name!r} has {len(sentence):,} characters; at most "
                    f"{max_characters:,} are read. Shorten it."
                )
    return rows


def read_labels(chunk: Chunk, task: Task, *, or_else: str = "") -> list[Label]:
    """The label of each row (`parse_label`); the first row whose label is none of the task is refused.

    ``or_else`` is how to leave labels unread, for the message; empty where they are needed.
    """
    labels: list[Label] = []
    for row, value in enumerate(chunk.column(task.label_column)):
        try:
            labels.append(parse_label(task, value))
        except DataError as cause:
            otherwise = f", or {or_else} to leave labels unread" if or_else else ""
            raise DataError(f"{chunk.place(row)}: {cause}. {FIX_ROW}{otherwise}.") from cause
    return labels
