"""PEFT's part of an adapter folder: its configuration, its weights, and the models that are made of them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from train.adapter.record import ADAPTER, FILES, Adapter
from train.common.errors import AdapterError, ModelError
from train.common.folder_record import read_json_object
from train.common.limits import MAX_MODEL_BYTES, MAX_TOKENS
from train.common.records import parse_record
from train.config import P_TUNING, P_TUNING_V2
from train.model.classifier import load_classifier, prompted_classifier
from train.model.find import MALFORMED, BaseModel, find_base_model

if TYPE_CHECKING:
    from peft import PeftModel

    from train.model.prompted import PromptedClassifier

TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


@dataclass(frozen=True)
class _PeftConfig:
    """The entries of adapter_config.json that decide what PEFT does, with the values that are safe.

    Some of PEFT's other thirty types import the module that the file names, or read a pickle that it names.
    """

    peft_type: Literal["P_TUNING", "PREFIX_TUNING"]
    task_type: Literal["SEQ_CLS"]
    num_virtual_tokens: TokenCount
    token_dim: TokenCount
    num_layers: TokenCount
    num_transformer_submodules: TokenCount
    auto_mapping: None = None


def check_peft_config(folder: Path, method: str, virtual_tokens: int) -> None:
    """Refuse a configuration with which PEFT would do anything but load the prompt that training.json describes."""
    path = folder / FILES.config
    value = read_json_object(path, AdapterError, ADAPTER.remedy)
    config = parse_record(_PeftConfig, value, AdapterError, str(path), ADAPTER.remedy)
    expected = ({P_TUNING: "P_TUNING", P_TUNING_V2: "PREFIX_TUNING"}[method], virtual_tokens)
    if (config.peft_type, config.num_virtual_tokens) != expected:
        raise AdapterError(
            f"{path} describes a {config.peft_type} prompt of {config.num_virtual_tokens} tokens, {FILES.training} a "
            f"{expected[0]} prompt of {expected[1]}. {ADAPTER.remedy}"
        )
    sizes = (config.num_virtual_tokens, config.token_dim, config.num_layers, config.num_transformer_submodules)
    n_bytes = 4 * 2 * math.prod(sizes)
    if n_bytes > MAX_MODEL_BYTES:
        raise AdapterError(f"{path} describes a prompt of {n_bytes / 1e9:,.0f} GB. {ADAPTER.remedy}")


def find_adapter_base(adapter: Adapter) -> BaseModel:
    """Find the base model that an adapter was trained on, and refuse another one under its name."""
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


def read_weights(folder: Path, virtual_tokens: int) -> "dict[str, Any]":
    """The tensors in a folder that `save_weights` wrote, by name."""
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
    """An adapter on its base model, in evaluation mode, for scoring and export; ``attention`` as for `load_classifier`."""
    model = load_classifier(base, adapter.labels, kind=adapter.task.kind, attention=attention)
    return prompted_classifier(model, base, adapter.method, read_weights(adapter.folder, adapter.virtual_tokens))


def load_peft_model(folder: Path, base: BaseModel, labels: Sequence[str]) -> "PeftModel":
    """An adapter as PEFT itself runs it, in evaluation mode. A decoder takes one text at a time, without padding."""
    from peft import PeftModel
    from safetensors import SafetensorError

    model = load_classifier(base, labels)
    if base.is_decoder:
        # PEFT is only right without padding: with no padding token, a text may end with any token (</s> often is one),
        # and transformers refuses a batch instead of misreading it.
        model.config.pad_token_id = None
    else:
        model.base_model.register_forward_hook(_drop_cache)
    try:
        return PeftModel.from_pretrained(model, folder).eval()
    except (*MALFORMED, RuntimeError, SafetensorError) as cause:
        raise AdapterError(
            f"{folder} does not fit {base.name} ({cause}). Give an adapter of this base model."
        ) from cause


def _drop_cache(_: object, __: object, outputs: Any) -> Any:
    """Remove the cache, which PEFT's `_prefix_tuning_forward` takes for the pooled row in models without a pooler."""
    if getattr(outputs, "past_key_values", None) is None:
        return outputs
    return type(outputs)(**{name: value for name, value in outputs.items() if name != "past_key_values"})
