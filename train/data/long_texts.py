"""Texts far beyond the model's limit, cut by characters before they are tokenized.

The library's ``longest_first`` takes time and memory with the square of a text's length. It keeps so many tokens of each
sentence at most as the limit has, so a prefix does in which so many tokens are the same whatever follows: those of all
words but its last two. A sentence is cut only where the prefix has as many, and more than the other sentence where that
one has fewer characters, so that the library still takes the same one for the longer. Two things are not proved but
assumed: that of two sentences which are both cut the one with more characters has more tokens (it decides a single
token, where the limit is odd), and that the end of a word does not change tokens `MOST_CHARACTERS` before it.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_CHARACTERS = 1 << 17
"""The longest prefix that is tried."""
CHARACTERS_A_TOKEN = 8
"""Texts with more for each token of the limit are cut."""
_MARK = "▁"
"""SentencePiece's blank."""
_LONG_WORD = re.compile("[A-Za-z\u00c0-\u024f\u0370-\u052f]{1001,}")


class TextCutter:
    """Cuts texts so that a tokenizer with a limit gives the same tokens."""

    def __init__(self, tokenizer: "Tokenizer", max_length: int) -> None:
        """Take a tokenizer of its own, whose truncation and padding are switched off here."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._max_length = tokenizer, max_length
        self._word_characters = getattr(tokenizer.model, "max_input_chars_per_word", None)
        # Where no token goes on after a blank, a blank begins a word even if nothing splits the text into words.
        self._has_marks = not any(_MARK in token.lstrip(_MARK) for token in tokenizer.get_vocab())

    def cut(self, text: tuple[str, ...]) -> tuple[str, ...]:
        """The one or two sentences of a text without an end that no token of the limit comes from."""
        order = sorted(range(len(text)), key=lambda number: len(text[number]))
        sentences, wanted = list(text), self._max_length
        for number in order:
            sentences[number] = self._prefix(sentences[number], wanted)
            if len(order) > 1 and number == order[0]:
                n_tokens = len(self._tokenizer.encode(sentences[number], add_special_tokens=False).ids)
                wanted = max(wanted, n_tokens + 1)
        return tuple(sentences)

    def _prefix(self, sentence: str, n_tokens: int) -> str:
        """The shortest prefix tried of which so many tokens are the same whatever follows, or the whole sentence."""
        n_characters = CHARACTERS_A_TOKEN * self._max_length
        if len(sentence) > n_characters and self._word_characters is not None and self._word_characters <= 1000:
            # WordPiece takes any longer word for an unknown one.
            sentence = _LONG_WORD.sub(lambda found: found[0][:1001], sentence)
        while n_characters < len(sentence):
            prefix = sentence[:n_characters]
            if self._stable_tokens(prefix) >= n_tokens or n_characters >= MOST_CHARACTERS:
                return prefix
            n_characters *= 2
        return sentence

    def _stable_tokens(self, prefix: str) -> int:
        """How many tokens come before the last two words."""
        encoding = self._tokenizer.encode(prefix, add_special_tokens=False)
        words, tokens = encoding.word_ids, encoding.tokens
        begins = [
            place
            for place in range(1, len(words))
            if words[place] != words[place - 1]
            or (self._has_marks and tokens[place].startswith(_MARK) and not tokens[place - 1].endswith(_MARK))
        ]
        return begins[-2] if len(begins) > 1 else 0


def is_long(text: Sequence[str], max_length: int) -> bool:
    """Whether a sentence has so many characters that it is to be cut before it is tokenized."""
    return any(len(sentence) > CHARACTERS_A_TOKEN * max_length for sentence in text)
