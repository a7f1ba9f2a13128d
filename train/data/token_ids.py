"""Rows of text → token ids, and the order in which training sees them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.data.long_texts import TextShortener
from train.data.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast


_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Encoded:
    """Rows in the order of the data: what the tokenizer gives, lists of n_tokens integers, and ``labels``, an index.

    (Plain lists: indexing a `datasets.Dataset` takes longer than the rest of a training step's Python.)
    """

    rows: "list[dict[str, Any]]"
    swapped: "list[dict[str, Any]]"
    """The same rows with their sentences in the other order; empty for single sentences."""
    texts_cut: int
    """How many rows were longer than the limit and lost their end."""


def sentences_of(dataset: "Dataset", task: Task) -> list[tuple[str, ...]]:
    """The one or two sentences of each row."""
    return list(zip(*(dataset[column] for column in task.text_columns), strict=True))


def tokens_per_word(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[tuple[str, ...]]) -> float:
    """Tokens, without special ones, for each word or punctuation mark of at most 512 texts; 0 without words.

    Texts in another language than the tokenizer's have far more.
    """
    step = -(-len(texts) // 512) or 1
    sentences = [sentence for text in texts[::step] for sentence in text]
    n_tokens = sum(map(len, tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"]))
    n_words = sum(len(_WORD.findall(sentence)) for sentence in sentences)
    return n_tokens / n_words if n_words else 0.0


def encode(dataset: "Dataset", task: Task, tokenizer: "PreTrainedTokenizerFast", *, swap: bool = False) -> Encoded:
    """Tokenise a split; rows over the tokenizer's ``model_max_length`` lose their end, the longer sentence first.

    With ``swap`` the pairs are tokenized in the other order as well.
    """
    shorten = TextShortener(tokenizer.backend_tokenizer, tokenizer.model_max_length)
    texts, lost = zip(*map(shorten, sentences_of(dataset, task)), strict=True)
    columns = [list(column) for column in zip(*texts, strict=True)]
    labels = list(dataset[task.label_column])
    whole_lengths = [len(ids) for ids in tokenizer(*columns, verbose=False)["input_ids"]]
    return Encoded(
        rows=_rows(tokenizer, columns, labels),
        swapped=_rows(tokenizer, columns[::-1], labels) if swap else [],
        texts_cut=sum(
            length > tokenizer.model_max_length or is_lost for length, is_lost in zip(whole_lengths, lost, strict=True)
        ),
    )


def _rows(tokenizer: "PreTrainedTokenizerFast", columns: list[list[str]], labels: list[int]) -> list[dict[str, Any]]:
    encoded = tokenizer(*columns, truncation="longest_first")
    names = list(encoded)
    return [
        dict(zip(names, values, strict=True)) | {"labels": label}
        for label, *values in zip(labels, *(encoded[name] for name in names), strict=True)
    ]


class LengthGroupedSampler:
    """An order of the training rows in which each batch holds rows of similar length.

    Rows are shuffled, cut into blocks of fifty batches, and sorted by length within a block; then the batches are
    shuffled. There is hardly any padding, and the batches stay random. (transformers 5 removed its own.)

    The order, and which of a pair's two orders is shown, follow from the seed and the epoch alone, so an interrupted
    run sees the same batches again, and so does each of several processes.
    """

    BATCHES_IN_A_BLOCK = 50

    def __init__(self, lengths: list[int], *, batch_size: int, seed: int, swap: bool) -> None:
        """Create the order for rows of so many tokens; ``batch_size`` is that of all processes together.

        With ``swap`` half of the rows, at random, come from the second half of the data: `Encoded.swapped`.
        """
        self.epoch = 0
        self._lengths, self._batch_size = lengths, batch_size
        self._seed, self._swap = seed, swap

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        import numpy as np

        generator = np.random.default_rng((self._seed, self.epoch))
        order = generator.permutation(len(self._lengths))
        block = self._batch_size * self.BATCHES_IN_A_BLOCK
        batches = []
        for start in range(0, len(order), block):
            rows = sorted(order[start : start + block].tolist(), key=lambda row: self._lengths[row])
            batches += [rows[first : first + self._batch_size] for first in range(0, len(rows), self._batch_size)]
        # An incomplete batch stays last: in the middle it would shift the rows of all that follow.
        last = [batches.pop()] if len(batches[-1]) < self._batch_size else []
        generator.shuffle(batches)
        swapped = generator.random(len(order)) < 0.5 if self._swap else np.zeros(len(order), bool)
        for batch in batches + last:
            for row in batch:
                yield row + len(self._lengths) * int(swapped[row])
