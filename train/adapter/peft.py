"""The part of an adapter folder that is PEFT's: its configuration and weights, and models made of them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.adapter.record import ADAPTER, FILES, Adapter
from train.common.errors import AdapterError, ModelError
from train.common.folder_record import read_json_object
from train.common.limits import MAX_MODEL_BYTES, MAX_TOKENS, whole_number
from train.config import METHODS, P_TUNING, P_TUNING_V2
from train.model.find import BaseModel, find_base_model

if TYPE_CHECKING:
    from peft import PeftModel

    from train.model.prompted import PromptedClassifier


_PEFT_TYPES = {P_TUNING: "P_TUNING", P_TUNING_V2: "PREFIX_TUNING"}
"""By method, PEFT's name for it."""


def check_peft_config(adapter: Adapter) -> None:
    """Refuse a configuration with which PEFT would do anything but load a prompt of our two kinds.

    Of its some thirty kinds others import the module that the file names, or read the pickles that it names.

    Raises:
        AdapterError: it is another one, or makes a table larger than any.
    """
    path = adapter.folder / FILES.config
    config = read_json_object(path, AdapterError, ADAPTER.remedy)
    expected = {
        "peft_type": _PEFT_TYPES[adapter.method],
        "task_type": "SEQ_CLS",
        "num_virtual_tokens": adapter.virtual_tokens,
        "auto_mapping": None,
    }
    for name, value in expected.items():
        if config.get(name) != value:
            raise AdapterError(
                f"{path} has {name} {config.get(name)!r:.80}; an adapter of this kind has {value!r}. {ADAPTER.remedy}"
            )
    sizes = ("num_virtual_tokens", "token_dim", "num_layers", "num_transformer_submodules")
    try:
        n_bytes = 4 * 2 * math.prod(whole_number(config, name, 1, MAX_TOKENS) for name in sizes)
    except (KeyError, ValueError) as cause:
        raise AdapterError(f"{path} lacks {cause}. {ADAPTER.remedy}") from cause
    if n_bytes > MAX_MODEL_BYTES:
        raise AdapterError(f"{path} describes a prompt of {n_bytes / 1e9:,.0f} GB. {ADAPTER.remedy}")


def method_of(name: object) -> str:
    if name not in METHODS:
        raise ValueError(f"a method among {', '.join(METHODS)}")
    return str(name)


def find_adapter_base(adapter: Adapter) -> BaseModel:
    """Find the base model that an adapter was trained on.

    Raises:
        AdapterError: what is found under that name has other weights or another width.
        HubError, ModelError: as `find_base_model` does.
    """
    try:
        base = find_base_model(adapter.model)
    except ModelError as cause:
        raise ModelError(f"{adapter.folder} needs the base model it was trained on. {cause}") from cause
    if base.sha256 != adapter.model_sha256:
        raise AdapterError(
            f"{adapter.folder} was trained on another base model: its {adapter.model} has weights with SHA-256 "
            f"{adapter.model_sha256[:12]}…, the one in {base.folder} has {base.sha256[:12]}…. "
            "Put the right base model there, or train an adapter for this one."
        )
    return base


def load_adapter_weights(adapter: Adapter) -> "dict[str, Any]":
    """The tensors of an adapter by name.

    Raises:
        AdapterError: they have no prompt of the stated length.
    """
    return read_weights(adapter.folder, adapter.virtual_tokens)


def read_weights(folder: Path, virtual_tokens: int) -> "dict[str, Any]":
    """The tensors in a folder that `save_weights` wrote, by name.

    Raises:
        AdapterError: they have no prompt of that length.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / FILES.weights
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as cause:
        raise AdapterError(f"{path} cannot be read ({cause}). Train the adapter again.") from cause
    prompt = state.get("prompt_embeddings")
    if prompt is None or prompt.ndim != 2 or prompt.shape[0] != virtual_tokens:
        raise AdapterError(f"{path} holds no prompt of {virtual_tokens} virtual tokens. Train the adapter again.")
    return state


def load_prompted_classifier(
    adapter: Adapter, base: BaseModel, *, attention: str | None = None
) -> "PromptedClassifier":
    """An adapter on its base model, in evaluation mode: what is scored and exported.

    Args:
        attention: as for `train.model.classifier.load_classifier`.

    Raises:
        AdapterError, ModelError: the adapter does not fit the base model.
    """
    from train.model.classifier import load_classifier, prompted_classifier

    model = load_classifier(base, adapter.labels, attention=attention)
    return prompted_classifier(model, base, adapter.method, load_adapter_weights(adapter))


def load_peft_model(folder: Path, base: BaseModel, labels: Sequence[str]) -> "PeftModel":
    """An adapter as PEFT itself runs it, in evaluation mode: the tutorial's model, and the reference for parity.

    A decoder takes one text at a time, without padding.

    Raises:
        AdapterError: PEFT cannot put the adapter on this base model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from train.model.classifier import load_classifier

    model = load_classifier(base, labels)
    if base.is_decoder:
        # PEFT's rows are right without padding only. So no token is padding here: a text may end with the one that
        # otherwise is (as </s> often is), and transformers refuses a batch of several instead of misreading it.
        model.config.pad_token_id = None
    else:
        model.base_model.register_forward_hook(_drop_cache)
    try:
        return PeftModel.from_pretrained(model, folder).eval()
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as cause:
        raise AdapterError(
            f"{folder} does not fit {base.name} ({cause}). Give an adapter of this base model."
        ) from cause


def _drop_cache(_: object, __: object, outputs: Any) -> Any:
    """Take the cache out of an encoder's outputs.

    PEFT's `_prefix_tuning_forward` reads the pooled row from ``outputs[1]`` where there is a second output. Of models
    without a pooler (RoBERTa, ELECTRA) that is the cache since transformers returns it, and PEFT fails.
    """
    if getattr(outputs, "past_key_values", None) is None:
        return outputs
    return type(outputs)(**{name: value for name, value in outputs.items() if name != "past_key_values"})
