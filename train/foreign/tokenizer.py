"""The tokenizer of an adapter made elsewhere, as its author used it."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from train.common.errors import AdapterError
from train.foreign.source import TOKENIZER_FILES, Source
from train.model.find import BaseModel
from train.model.tokenizer import fit_vocabulary, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def source_tokenizer(
    source: Source, base: BaseModel, max_length: int, *, accepted: set[str]
) -> "PreTrainedTokenizerFast":
    """The tokenizer beside an adapter, else the base model's; what stands around a sentence stays as its author had it.

    Only the outputs that the model has ``accepted`` are kept. An AdapterError where it has more words than the
    base model.
    """
    if source.has_tokenizer:
        with TemporaryDirectory() as copied:
            # Alone: beside config.json or code, transformers may take another class.
            for name in TOKENIZER_FILES:
                if (source.folder / name).is_file():
                    shutil.copyfile(source.folder / name, Path(copied) / name)
            tokenizer = load_tokenizer(Path(copied), max_length)
    else:
        tokenizer = load_tokenizer(base.folder, max_length, gguf_file=base.gguf_file)
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in accepted]
    remedy = "Give the base model of this vocabulary with --base-model."
    fit_vocabulary(tokenizer, base, source.folder if source.has_tokenizer else base.folder, AdapterError, remedy)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer
