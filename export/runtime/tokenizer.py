"""A bundle's tokenizer: texts in, input arrays out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.bundle.folder import FILES, Bundle
from export.runtime.session import EXPORT_AGAIN
from train.common.errors import BundleError, first_line, is_of_tokenizers
from train.common.limits import MAX_TEXT_BYTES, check_file
from train.data.long_texts import TextShortener


@dataclass(frozen=True)
class EncodedTexts:
    """A batch of texts as the graph takes it."""

    arrays: dict[str, np.ndarray]
    """``input_ids``, ``attention_mask``, and ``token_type_ids`` if the model takes them; int64, shape = (n_batch, n_text)"""
    cut: tuple[bool, ...]
    """Whether each text was longer than the limit and lost its end."""


class TextTokenizer:
    """tokenizer.json for single texts and pairs: cut to a limit (longest sentence first), padded on the right."""

    def __init__(
        self,
        path: Path,
        *,
        max_length: int,
        pad_token_id: int,
        inputs: Sequence[str],
        token_types: bool = True,
        vocabulary_size: int | None = None,
    ) -> None:
        """Load a tokenizer.

        Args:
            max_length: longest text in tokens, special tokens included.
            inputs: names of the graph's inputs; those that a tokenizer does not make are left out.
            token_types: whether the second sentence has another token type than the first.
            vocabulary_size: how many tokens the graph has embeddings for, if it is known.

        Raises:
            BundleError: it is no tokenizer, has no such padding token, or has tokens that the graph does not know.
        """
        from tokenizers import Tokenizer

        check_file(path, MAX_TEXT_BYTES, BundleError, EXPORT_AGAIN)
        self._path = path
        with self._library_failures():
            self._tokenizer = Tokenizer.from_file(str(path))
        pad_token = self._tokenizer.id_to_token(pad_token_id)
        if pad_token is None:
            raise BundleError(f"{path} has no token {pad_token_id} to pad with. {EXPORT_AGAIN}")
        if vocabulary_size is not None:
            self._check_vocabulary(vocabulary_size)
        self._shorten = TextShortener(self._tokenizer, max_length)
        self._tokenizer.enable_truncation(max_length, strategy="longest_first")
        self._tokenizer.enable_padding(pad_id=pad_token_id, pad_token=pad_token)
        self._inputs = tuple(inputs)
        self._token_types = token_types

    def __call__(self, texts: Sequence[tuple[str, ...]]) -> EncodedTexts:
        """Tokenize texts of one or two sentences, at least one text, into a batch that is padded to its longest."""
        with self._library_failures():
            short = [self._shorten(text) for text in texts]
            encodings = self._tokenizer.encode_batch([text if len(text) == 2 else text[0] for text, _ in short])
        fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        arrays = {
            name: np.array([getattr(encoding, field) for encoding in encodings], dtype=np.int64)
            for name, field in fields.items()
            if name in self._inputs
        }
        if not self._token_types and "token_type_ids" in arrays:
            arrays["token_type_ids"][:] = 0
        cut = (bool(encoding.overflowing) or lost for encoding, (_, lost) in zip(encodings, short, strict=True))
        return EncodedTexts(arrays, tuple(cut))

    def characters_read(self, text: tuple[str, ...]) -> tuple[int, ...]:
        """How many characters of each sentence the model reads, when the text is cut to the limit."""
        with self._library_failures():
            encoding = self._tokenizer.encode(*text)
        ends = [0] * len(text)
        for (_, end), sequence in zip(encoding.offsets, encoding.sequence_ids, strict=True):
            # Special tokens and padding belong to no sentence.
            if sequence is not None:
                ends[sequence] = max(ends[sequence], end)
        return tuple(ends)

    def _check_vocabulary(self, size: int) -> None:
        """Refuse tokens without an embedding, at which a later text would fail."""
        last = max(self._tokenizer.get_added_tokens_decoder(), default=0)
        if max(last, self._tokenizer.get_vocab_size() - 1) < size:
            return
        beyond = [token for token, number in self._tokenizer.get_vocab().items() if number >= size]
        if beyond:
            raise BundleError(
                f"{self._path} has {len(beyond):,} tokens, such as {min(beyond)!r:.40}, beyond the {size:,} that the graph "
                f"has embeddings for. {EXPORT_AGAIN}"
            )

    @contextmanager
    def _library_failures(self) -> Iterator[None]:
        """Turn the library's errors over a malformed file into a `BundleError`."""
        try:
            yield
        except BaseException as cause:
            if not is_of_tokenizers(cause):
                raise
            raise BundleError(f"{self._path} is no tokenizer ({first_line(cause)}). {EXPORT_AGAIN}") from cause


def bundle_tokenizer(bundle: Bundle) -> TextTokenizer:
    """A bundle's tokenizer, set up for its graph."""
    return TextTokenizer(
        bundle.folder / FILES.tokenizer,
        max_length=bundle.max_length,
        pad_token_id=bundle.pad_token_id,
        inputs=bundle.text_inputs,
        token_types=bundle.token_types,
        vocabulary_size=bundle.vocabulary_size,
    )
