"""The tokenizer of a base model or an adapter, set up for texts and pairs."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.console import quiet_transformers
from train.common.errors import ModelError, PromptfoldError, first_line, is_of_tokenizers
from train.common.folder_record import read_json_object
from train.model.find import MALFORMED, BaseModel
from train.untrusted.base_model import refuse_tokenizer_detours

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt")
"""Files from which transformers makes a fast tokenizer by itself."""


def load_tokenizer(folder: Path, max_length: int, *, gguf_file: str | None = None) -> "PreTrainedTokenizerFast":
    """Load a fast tokenizer from a folder of a base model or of an adapter.

    ``max_length`` is the longest text in tokens; the tokenizer's own limit leaves no room for a prompt.
    """
    from transformers import AutoTokenizer

    refuse_tokenizer_detours(folder)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, gguf_file=gguf_file, local_files_only=True, trust_remote_code=False
            )
        tokenizer("a", "a")  # some broken files load and fail at their first text
    except BaseException as cause:
        if not (is_of_tokenizers(cause) or isinstance(cause, (*MALFORMED, ImportError))):
            raise
        why = first_line(cause) if gguf_file else _lacking(folder) or first_line(cause)[:300]
        raise ModelError(f"{folder} holds no tokenizer that can be loaded ({why}).") from cause
    if not tokenizer.is_fast:
        raise ModelError(f"The tokenizer in {folder} has no fast (tokenizer.json) form, which promptfold needs.")
    tokenizer.model_max_length = max_length
    tokenizer.padding_side = "right"
    # Some base models ship these switched on.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _lacking(folder: Path) -> str:
    """What a folder without tokenizer.json lacks to be read, as far as its files tell; else empty.

    transformers converts other files, with these packages; its own messages name neither the file nor the package.
    """
    from transformers.utils import is_protobuf_available

    if (folder / "tokenizer.json").is_file():
        return ""
    models = sorted(folder.glob("*.model"))
    wanted = _files_read(folder)
    if models and wanted and not any((folder / name).is_file() for name in wanted):
        return (
            f"for a model of this type transformers makes one of {' or '.join(wanted)}, not of {models[0].name}; copy "
            "tokenizer.json from the model's source"
        )
    for path in models:
        with path.open("rb") as file:
            is_sentencepiece = file.read(1) == b"\n"  # a protobuf message whose first field is a token; else base64
        here = {"tiktoken": find_spec("tiktoken") is not None}
        if is_sentencepiece:
            here = {"sentencepiece": find_spec("sentencepiece") is not None, "protobuf": is_protobuf_available()}
        missing = " ".join(name for name, is_here in here.items() if not is_here)
        if missing:
            return f"converting its {path.name} needs what is not installed; run: pip install {missing}"
    if not any((folder / name).is_file() for name in _VOCABULARIES) and not models:
        return (
            f"it has none of tokenizer.json, {', '.join(_VOCABULARIES)} and *.model; copy them from the model's source"
        )
    return ""


def _files_read(folder: Path) -> list[str]:
    """The files of which transformers makes a fast tokenizer for a model of a folder's type; none where it does not say."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    names: Any = TOKENIZER_MAPPING_NAMES.get(_entry(folder / "config.json", "model_type"))
    stated = _entry(folder / "tokenizer_config.json", "tokenizer_class")
    name = f"{stated.removesuffix('Fast')}Fast" if stated else names[-1] if isinstance(names, tuple) else names
    kind = tokenizer_class_from_name(name) if name else None
    return sorted(getattr(kind, "vocab_files_names", {}).values())


def _entry(path: Path, key: str) -> str:
    """A text in a JSON file; empty where there is none."""
    value = read_json_object(path, ModelError, "").get(key) if path.is_file() else None
    return value if isinstance(value, str) else ""


def fit_vocabulary(
    tokenizer: "PreTrainedTokenizerFast",
    base: BaseModel,
    owner: Path,
    error: type[PromptfoldError] = ModelError,
    remedy: str = "Take the two that belong together, or leave these tokens out of the tokenizer's files.",
) -> None:
    """Refuse a tokenizer, found in the folder ``owner``, with tokens for which the base model has no embedding.

    A padding token that was added alone is left out, and another takes its place: padding is masked wherever it stands.
    """
    size = base.vocabulary_size
    beyond = _tokens_from(tokenizer, size)
    if beyond == [tokenizer.pad_token]:
        _leave_padding_out(tokenizer, size)
        beyond = _tokens_from(tokenizer, size)
    if beyond:
        named = ", ".join(f"{token!r:.40}" for token in beyond[:3])
        raise error(
            f"The tokenizer in {owner} has {len(tokenizer):,} tokens and {base.name} has embeddings for {size:,}, so "
            f"{len(beyond):,} tokens have none, such as {named}. {remedy}"
        )


def _leave_padding_out(tokenizer: "PreTrainedTokenizerFast", size: int) -> None:
    """Take another padding token and leave out the tokens from number ``size`` on, if the padding token is nothing else."""
    for role, token in tokenizer.special_tokens_map.items():
        if role != "pad_token" and (token == tokenizer.pad_token or tokenizer.pad_token in list(token)):
            return  # such as the one that ends a text, which is no padding there
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["id"] < size]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(plain))


def _tokens_from(tokenizer: "PreTrainedTokenizerFast", first: int) -> list[str]:
    """The tokens with this number or a larger one, by number."""
    numbers = tokenizer.get_vocab()
    return sorted((token for token, number in numbers.items() if number >= first), key=lambda token: numbers[token])


def base_tokenizer(base: BaseModel, max_length: int) -> "PreTrainedTokenizerFast":
    """A base model's tokenizer as an adapter keeps it.

    A decoder's own puts nothing between two sentences, and the row of its last word would be pooled. So each sentence
    ends with a newline (or the end-of-text token, where a newline is no single token), by a rule in tokenizer.json.

    Raises:
        ModelError: it cannot be loaded, or has tokens for which the model has no embedding.
    """
    tokenizer = load_tokenizer(base.folder, max_length, gguf_file=base.gguf_file)
    fit_vocabulary(tokenizer, base, base.folder)
    if not base.is_decoder:
        if not base.takes_token_types:
            tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        return tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    newline = backend.encode("\n", add_special_tokens=False).ids
    end = newline[0] if len(newline) == 1 else tokenizer.eos_token_id
    if end is None:
        raise ModelError(f"The tokenizer of {base.name} has neither a newline nor an end-of-text token.")
    first = backend.encode("a").ids[0]
    begin = first if first == tokenizer.bos_token_id else None
    named = {backend.id_to_token(token): token for token in (begin, end) if token is not None}
    start = f"{backend.id_to_token(begin)}:0 " if begin is not None else ""
    stop = backend.id_to_token(end)
    backend.post_processor = TemplateProcessing(
        single=f"{start}$A:0 {stop}:0",
        pair=f"{start}$A:0 {stop}:0 $B:0 {stop}:0",
        special_tokens=list(named.items()),
    )
    # Any token will do, as padding is masked and never pooled.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or stop
    # Llama's class puts its own rule into every tokenizer.json that it writes. The plain class keeps ours.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        model_input_names=["input_ids", "attention_mask"],
        **tokenizer.special_tokens_map,
    )
