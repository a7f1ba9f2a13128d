"""Texts far longer than a model reads are cut to fewer characters before they are tokenized, without another outcome.

A tokenizer works through a whole text before it cuts it, and `longest_first` keeps what it cuts off in pieces: two sentences
of 200,000 characters took 93 s and 14 GB.
"""

import re
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_FIRST_CHARACTERS = 4096
_CHARACTERS_PER_TOKEN = 16
"""The first cut has so many characters for each token that is read, and at least those above."""
_UNSURE_CHARACTERS = 1024
"""How far before a cut a word without an end may change the tokens."""
_MOST_CHARACTERS = 2**20
"""Nothing beyond is read, also where so many characters hold fewer tokens than are read (blanks, or one endless word)."""
_LONGEST_WORD = 1000
_LONG_WORD = re.compile(f"[A-Za-z\u00c0-\u024f\u0370-\u052f]{{{_LONGEST_WORD + 1},}}")
"""Letters that no tokenizer takes for words of their own, as it does with Chinese ones."""
_GROWTH = 8
"""Factor from one beginning that is tried to the next."""


class TextShortener:
    """Cuts texts so that a tokenizer that truncates the longest sentence first gives the same tokens.

    A text's beginning has the same tokens as in the whole text, except in the last two words of the beginning (a word is
    what the tokenizer's pre-tokenizer makes) and, within a word that is longer than twice `_UNSURE_CHARACTERS`, in its end.
    Truncation reads at most ``max_length`` tokens of a sentence, and needs to know besides which sentence has more: the
    spare token of an odd number goes to it. Of two sentences of which one is beyond `_MOST_CHARACTERS` it is the one with
    more characters.
    """

    def __init__(self, tokenizer: "Tokenizer", max_length: int) -> None:
        """``max_length`` is the longest text in tokens that is read, special tokens included."""
        self._tokenizer, self._max_length = tokenizer, max_length
        self._first = max(_FIRST_CHARACTERS, _CHARACTERS_PER_TOKEN * max_length)

    def __call__(self, text: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
        """One or two sentences, each cut where it is much longer than what is read.

        True with them where `_MOST_CHARACTERS` hold fewer tokens than are read: then something else was left out.
        """
        if max(map(len, text)) <= self._first:
            return text, False
        text = tuple(map(self._shorten_words, text))
        ends = [self._end(sentence) for sentence in text]
        n_special = self._whole.num_special_tokens_to_add(len(text) == 2)
        if len(text) == 2 and (self._max_length - n_special) % 2:
            self._keep_order(text, ends)
        lost = any(end == _MOST_CHARACTERS < len(sentence) for sentence, end in zip(text, ends, strict=True))
        return tuple(sentence[:end] for sentence, end in zip(text, ends, strict=True)), lost

    @cached_property
    def _whole(self) -> "Tokenizer":
        """The tokenizer without truncation and padding; a copy, as the original keeps its settings."""
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(self._tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        return copy

    def _encode(self, sentence: str) -> "Encoding":
        return self._whole.encode(sentence, add_special_tokens=False)

    def _shorten_words(self, sentence: str) -> str:
        """WordPiece takes any word that is longer than its bound for an unknown one."""
        bound = getattr(self._whole.model, "max_input_chars_per_word", None)
        if bound is None or bound > _LONGEST_WORD:
            return sentence
        return _LONG_WORD.sub(lambda found: found[0][: _LONGEST_WORD + 1], sentence)

    def _end(self, sentence: str) -> int:
        """Where a sentence may be cut: its beginning has all tokens that are read, and more."""
        end = self._first
        most = min(len(sentence), _MOST_CHARACTERS)
        while end < most and self._sure_tokens(sentence[:end]) < self._max_length:
            end *= _GROWTH
        return min(end, most)

    def _sure_tokens(self, beginning: str) -> int:
        """How many tokens of a text's beginning do not depend on how it goes on."""
        encoding = self._encode(beginning)
        words, offsets = encoding.word_ids, encoding.offsets
        if not words or words[-1] is None:
            return 0
        last = words[-1]
        sure = sum(word is not None and word < last - 1 for word in words)
        start = next(begin for word, (begin, _) in zip(words, offsets, strict=True) if word == last)
        if len(beginning) - start > 2 * _UNSURE_CHARACTERS:
            inside = sum(end <= len(beginning) - _UNSURE_CHARACTERS for _, end in offsets)
            sure = max(sure, inside)
        return sure

    def _keep_order(self, text: tuple[str, ...], ends: list[int]) -> None:
        """Lengthen a cut sentence until the same one of two as before has more tokens."""
        if max(map(len, text)) <= _MOST_CHARACTERS:
            sizes = [len(self._encode(sentence)) for sentence in text]
        else:
            sizes = [len(sentence) for sentence in text]
        # Of two equal ones the second counts as the longer.
        longer, shorter = (0, 1) if sizes[0] > sizes[1] else (1, 0)
        bound = len(self._encode(text[shorter][: ends[shorter]])) + (longer == 0)
        most = min(len(text[longer]), _MOST_CHARACTERS)
        while ends[longer] < most and len(self._encode(text[longer][: ends[longer]])) < bound:
            ends[longer] = min(2 * ends[longer], most)
