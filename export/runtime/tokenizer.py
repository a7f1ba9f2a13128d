"""A bundle's tokenizer: texts in, input arrays out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.bundle.folder import Bundle
from export.runtime.session import EXPORT_AGAIN
from train.common.errors import BundleError, first_line, is_of_tokenizers
from train.common.limits import MAX_TEXT_BYTES, check_file


@dataclass(frozen=True)
class EncodedTexts:
    """A batch of texts as the graph takes it.

    Attributes:
        arrays: ``input_ids`` and ``attention_mask``, with ``token_type_ids`` where the model takes
            them; each int64, shape = (n_batch, n_text)
        cut: for each text, whether it was longer than the limit and lost its end.
    """

    arrays: dict[str, np.ndarray]
    cut: tuple[bool, ...]


class TextTokenizer:
    """tokenizer.json, set up for single texts and pairs: cut to a limit (longest sentence first), padded on the right."""

    def __init__(
        self, path: Path, *, max_length: int, pad_token_id: int, inputs: Sequence[str], token_types: bool = True
    ) -> None:
        """Load a tokenizer.

        Args:
            path: tokenizer.json
            max_length: longest text in tokens, special tokens included.
            pad_token_id: what fills the end of shorter texts.
            inputs: which of ``input_ids``, ``attention_mask``, ``token_type_ids`` to give.
            token_types: whether the second sentence is of another type than the first, where types are given.

        Raises:
            BundleError: it is no tokenizer, or has no such padding token.
        """
        from tokenizers import Tokenizer

        check_file(path, MAX_TEXT_BYTES, BundleError, EXPORT_AGAIN)
        self._path = path
        with self._library_failures():
            self._tokenizer = Tokenizer.from_file(str(path))
        pad_token = self._tokenizer.id_to_token(pad_token_id)
        if pad_token is None:
            raise BundleError(f"{path} has no token {pad_token_id} to pad with. {EXPORT_AGAIN}")
        self._tokenizer.enable_truncation(max_length, strategy="longest_first")
        self._tokenizer.enable_padding(pad_id=pad_token_id, pad_token=pad_token)
        self._inputs = tuple(inputs)
        self._token_types = token_types

    def __call__(self, texts: Sequence[tuple[str, ...]]) -> EncodedTexts:
        """Tokenise texts into one batch, padded to its longest.

        Args:
            texts: of each its one or two sentences; at least one text.
        """
        with self._library_failures():
            encodings = self._tokenizer.encode_batch([text if len(text) == 2 else text[0] for text in texts])
        arrays = {
            "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
            "token_type_ids": np.array([encoding.type_ids for encoding in encodings], dtype=np.int64),
        }
        if not self._token_types:
            arrays["token_type_ids"][:] = 0
        return EncodedTexts(
            arrays={name: arrays[name] for name in self._inputs},
            cut=tuple(bool(encoding.overflowing) for encoding in encodings),
        )

    @contextmanager
    def _library_failures(self) -> Iterator[None]:
        """Turn what the library makes of a file that only looks like a tokenizer into a `BundleError`."""
        try:
            yield
        except BaseException as cause:
            if not is_of_tokenizers(cause):
                raise
            raise BundleError(f"{self._path} is no tokenizer ({first_line(cause)}). {EXPORT_AGAIN}") from cause

    def characters_read(self, text: tuple[str, ...]) -> tuple[int, ...]:
        """How far into each of its one or two sentences a text is read, in characters, when it is cut to the limit."""
        with self._library_failures():
            encoding = self._tokenizer.encode(*text)
        ends = [0] * len(text)
        for (_, end), sequence in zip(encoding.offsets, encoding.sequence_ids, strict=True):
            # Special tokens and padding are of no sentence.
            if sequence is not None:
                ends[sequence] = max(ends[sequence], end)
        return tuple(ends)


def bundle_tokenizer(bundle: Bundle) -> TextTokenizer:
    """The tokenizer of a bundle, set up for its graph."""
    return TextTokenizer(
        bundle.tokenizer_path,
        max_length=bundle.max_length,
        pad_token_id=bundle.pad_token_id,
        inputs=bundle.text_inputs,
        token_types=bundle.token_types,
    )
