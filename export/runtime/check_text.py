"""Checks a text before it is tokenized: not empty, not endless, and valid Unicode."""

from train.common.errors import LongTextError, TextError
from train.data.tasks import Task

MAX_CHARACTERS = 10_000
"""Upper bound for a sentence; no text near it fits the model's positions."""


def check_text(task: Task, sentence1: object, sentence2: object) -> tuple[str, ...]:
    """A user's text, ready for the tokenizer: one sentence, or two, as the task has them.

    Raises:
        TextError: a sentence is empty, too long (`LongTextError`) or not valid Unicode, or there is one too many.
    """
    if task.is_pair:
        return check_sentence(sentence1, "Sentence 1"), check_sentence(sentence2, "Sentence 2")
    if sentence2:
        raise TextError("This model reads one sentence. Leave sentence 2 empty.")
    return (check_sentence(sentence1, "The sentence"),)


def check_sentence(text: object, name: str) -> str:
    """A sentence, ready for the tokenizer; see `check_text`. ``name`` is what error messages call it."""
    if not isinstance(text, str):
        raise TextError(f"{name} is no text. Give a sentence.")
    if not text.strip():
        raise TextError(f"{name} is empty. Write a sentence.")
    if len(text) > MAX_CHARACTERS:
        raise LongTextError(f"{name} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read. Shorten it.")
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        raise TextError(
            f"{name} holds half a surrogate pair at character {cause.start + 1}, which is no valid Unicode. Remove it."
        ) from cause
    return text
