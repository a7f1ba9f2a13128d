"""The tokenizer of a base model or an adapter, set up for texts and pairs."""

from pathlib import Path
from typing import TYPE_CHECKING

from train.common.console import quiet_transformers
from train.common.errors import ModelError, first_line, is_of_tokenizers
from train.model.find import MALFORMED, BaseModel
from train.untrusted.base_model import refuse_tokenizer_detours

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
        if not (is_of_tokenizers(cause) or isinstance(cause, MALFORMED)):
            raise
        raise ModelError(f"{folder} holds no tokenizer that can be loaded ({first_line(cause)}).") from cause
    if not tokenizer.is_fast:
        raise ModelError(f"The tokenizer in {folder} has no fast (tokenizer.json) form, which promptfold needs.")
    tokenizer.model_max_length = max_length
    tokenizer.padding_side = "right"
    # Some base models ship these switched on.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def base_tokenizer(base: BaseModel, max_length: int) -> "PreTrainedTokenizerFast":
    """A base model's tokenizer as an adapter keeps it.

    A decoder's own puts nothing between two sentences, and the row of its last word would be pooled. So each sentence
    ends with a newline (or the end-of-text token, where a newline is no single token), by a rule in tokenizer.json.
    """
    tokenizer = load_tokenizer(base.folder, max_length, gguf_file=base.gguf_file)
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
