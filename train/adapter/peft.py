"""PEFT's part of an adapter folder: its weights, and the models that are made of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.adapter.record import FILES, Adapter
from train.common.errors import AdapterError, ModelError
from train.config import CLASSIFICATION
from train.model.classifier import drop_cache, load_classifier, prompted_classifier
from train.model.find import BASE_FLAG, MALFORMED, BaseModel, find_base_model

if TYPE_CHECKING:
    from peft import PeftModel

    from train.model.prompted import PromptedClassifier


RETRAIN = "Train the adapter again, with a smaller --learning-rate."


def find_adapter_base(adapter: Adapter) -> BaseModel:
    """Find the base model that an adapter was trained on, and refuse another one under its name."""
    try:
        base = find_base_model(adapter.model, BASE_FLAG)
    except ModelError as cause:
        raise ModelError(f"{adapter.folder} needs the base model it was trained on. {cause}") from cause
    if base.sha256 != adapter.model_sha256:
        raise AdapterError(
            f"{adapter.folder} was trained on another base model: its {adapter.model} has weights with SHA-256 "
            f"{adapter.model_sha256[:12]}…, the one in {base.folder} has {base.sha256[:12]}…. "
            f"Put the right base model there, give its folder with {BASE_FLAG}, or train an adapter for this one."
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
    refuse_not_finite(state, path, RETRAIN)
    prompt = state.get("prompt_embeddings")
    if prompt is None or prompt.ndim != 2 or prompt.shape[0] != virtual_tokens:
        raise AdapterError(f"{path} holds no prompt of {virtual_tokens} virtual tokens. Train the adapter again.")
    return state


def refuse_not_finite(tensors: "Mapping[str, Any]", path: Path, remedy: str) -> None:
    """Refuse the tensors of a file with an AdapterError where a number is NaN or infinite."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise AdapterError(f"{path} holds numbers in {bad[0]:.80} that are not finite. {remedy}")


def load_prompted_classifier(
    adapter: Adapter, base: BaseModel, *, attention: str | None = None, is_double: bool = False
) -> "PromptedClassifier":
    """An adapter on its base model, in evaluation mode, for scoring and export, in fp32 or fp64; ``attention`` as for
    `load_classifier`."""
    if adapter.is_merged:
        from train.model.plain import PlainClassifier

        peft_model: Any = load_peft_model(
            adapter.folder, base, adapter.labels, kind=adapter.task.kind, attention=attention
        )
        peft_model = peft_model.double() if is_double else peft_model  # before weights are rounded to their sums
        return PlainClassifier(peft_model.merge_and_unload(), base).eval()
    model = load_classifier(base, adapter.labels, kind=adapter.task.kind, attention=attention)
    weights = read_weights(adapter.folder, adapter.virtual_tokens)
    classifier = prompted_classifier(model, base, adapter.method, weights)
    return classifier.double() if is_double else classifier


def load_peft_model(
    folder: Path,
    base: BaseModel,
    labels: Sequence[str],
    *,
    kind: str = CLASSIFICATION,
    attention: str | None = None,
) -> "PeftModel":
    """An adapter as PEFT itself runs it, in evaluation mode. A decoder takes one text at a time, without padding."""
    from peft import PeftModel
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = load_classifier(base, labels, kind=kind, attention=attention)
    if base.is_decoder:
        # PEFT is only right without padding: with no padding token, a text may end with any token (</s> often is one),
        # and transformers refuses a batch instead of misreading it.
        model.config.pad_token_id = None
    else:
        model.base_model.register_forward_hook(drop_cache)
    try:
        peft_model = PeftModel.from_pretrained(model, folder).eval()
    except (*MALFORMED, RuntimeError, SafetensorError) as cause:
        raise AdapterError(
            f"{folder} does not fit {base.name} ({cause}). Give an adapter of this base model."
        ) from cause
    path = folder / FILES.weights
    if path.is_file():  # a pickle was read by `train.foreign.tensors`
        refuse_not_finite(load_file(path), path, RETRAIN)
    return peft_model
