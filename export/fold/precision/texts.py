"""Calibration texts: the training's, a given file's, or 300 pairs of everyday English. Their labels are never read."""

from collections.abc import Sequence
from dataclasses import dataclass
from glob import has_magic
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.adapter.record import Adapter
from train.common.errors import DataError
from train.common.limits import MAX_MODEL_BYTES
from train.data.check_rows import BadRows, check_columns, check_rows
from train.data.files.find import find_files
from train.data.files.options import ReadOptions
from train.data.read_rows import find_source, read_chunks, sha256_of_rows
from train.data.tasks import Task
from train.data.token_ids import tokens_per_word

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Texts = tuple[tuple[str, ...], ...]

_AS_GIVEN = ReadOptions()
ENGLISH = "everyday English"
EVERYDAY = Path(__file__).with_name("everyday_pairs.txt")
"""In each line a sentence, a paraphrase of it, and another sentence on the same topic."""
MOST_TEXTS = 512
"""A longer file gives texts from all of its parts; the first 100,000 rows are read."""
MOST_ROWS = 100_000
FEWEST_TEXTS = 32
"""With fewer, the interval of the share of equal labels is too wide to say anything: 32 of 32 may be 89 %."""
MOST_TOKENS_PER_WORD = 1.7
"""Everyday English has 1.0 to 1.3 in the tokenizer of an English or a multilingual model."""
LEAST_OF_TRAINING, MOST_OF_TRAINING = 0.25, 1.35
"""How many times as many tokens a word as the training's texts other texts may have. With the tokenizer of an English model
MRPC has 1.07, everyday English 1.01, a tweet 1.2, Spanish 1.5 and German 1.7 to 1.9; in a language without blanks a whole
sentence is one word."""
MOST_UNKNOWN = 0.05
"""Share of the tokens that may be unknown."""


@dataclass(frozen=True)
class CalibrationTexts:
    """Texts of one task, on which activations are measured and a precision is compared with fp32."""

    name: str
    """Where they come from, for people."""
    rows: Texts
    trouble: str = ""
    """Why the answers to them say little of this model, in words; else empty."""


def read_texts(adapter: Adapter, given: Path | None, tokenizer: "PreTrainedTokenizerFast") -> CalibrationTexts:
    """The texts of a given file, or of the training's file where it lies unchanged, or everyday English.

    Raises:
        DataError: the given file cannot be read, lacks a column, or has too few texts.
    """
    if given is not None:
        rows = _read_file(given, adapter.task)
        if len(rows) < FEWEST_TEXTS:
            raise DataError(
                f"--calibration-file {given} has {len(rows)} texts, too few to say what int8 costs: give at least "
                f"{FEWEST_TEXTS}, better some hundreds."
            )
        return CalibrationTexts(given.name, rows, _trouble(given.name, rows, tokenizer, adapter))
    trained = unchanged_file(adapter.train_file, adapter.train_sha256)
    if trained is not None:
        rows = _read_file(trained, adapter.task, adapter.read_options)
        if len(rows) >= FEWEST_TEXTS:
            return CalibrationTexts(trained.name, rows)
    rows = everyday_texts(is_pair=adapter.task.is_pair)
    return CalibrationTexts(ENGLISH, rows, _trouble(ENGLISH, rows, tokenizer, adapter))


def unchanged_file(file: Path | None, sha256: str) -> Path | None:
    """What a training read, a file or several, if it is on this machine and still the same."""
    # An adapter of strangers may name a pattern that stands for a whole disk.
    if file is None or has_magic(str(file.parent)) or "**" in file.name:
        return None
    try:
        files = find_files(file, str(file))
        # Its rows are held in memory.
        if (
            not all(part.path.is_file() for part in files)
            or sum(part.path.stat().st_size for part in files) > MAX_MODEL_BYTES
        ):
            return None
        return file if sha256_of_rows(files) == sha256 else None
    except (DataError, OSError):  # it is not here, or may not be read
        return None


def everyday_texts(*, is_pair: bool) -> Texts:
    """The pairs that come with the program, or their sentences alone."""
    lines = [line.split("\t") for line in EVERYDAY.read_text(encoding="utf-8").splitlines()]
    if is_pair:
        return tuple((line[0], other) for line in lines for other in line[1:])
    return tuple((sentence,) for line in lines for sentence in line)


def _read_file(file: Path, task: Task, options: ReadOptions = _AS_GIVEN) -> Texts:
    rows: list[tuple[str, ...]] = []
    bad = BadRows()
    for chunk in read_chunks(find_source(file, flag="--calibration-file", options=options), 8192):
        if not chunk.start:
            check_columns(
                chunk.file, chunk.columns, task.text_columns, f"Task {task.name} reads {', '.join(task.text_columns)}."
            )
        checked = check_rows(chunk, task, with_labels=False)
        bad.add(chunk, checked)
        rows += checked.sentences
        if len(rows) >= MOST_ROWS:
            break
    bad.refuse()
    return spread(rows, MOST_TEXTS)


def spread(rows: Sequence[tuple[str, ...]], most: int) -> Texts:
    """At most so many of the rows, from all parts."""
    picked = np.linspace(0, len(rows) - 1, min(len(rows), most), dtype=int)
    return tuple(rows[index] for index in picked)


def _trouble(texts: str, rows: Texts, tokenizer: "PreTrainedTokenizerFast", adapter: Adapter) -> str:
    """Why texts of this name are no measure for an adapter, whose language is another one then."""
    ids = tokenizer(list(chain.from_iterable(rows)), add_special_tokens=False, verbose=False)["input_ids"]
    n_tokens = sum(map(len, ids))
    n_unknown = sum(row.count(tokenizer.unk_token_id) for row in ids)
    if n_unknown > MOST_UNKNOWN * n_tokens:
        return f"the tokenizer does not know {100 * n_unknown / n_tokens:.0f} % of the words in {texts}"
    found, trained = tokens_per_word(tokenizer, rows), adapter.tokens_per_word
    words = f"the tokenizer splits {texts} into {found:.1f} tokens a word"
    if trained and not LEAST_OF_TRAINING * trained <= found <= MOST_OF_TRAINING * trained:
        return f"{words} and the training's texts into {trained:.1f}, so these are in another language"
    if texts == ENGLISH and found > MOST_TOKENS_PER_WORD:
        return f"{words}, so it is for another language"
    return ""
