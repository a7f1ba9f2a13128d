"""What a classifier is made of: found from its configuration, by building it without weights, and from the model itself."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

from train.common.console import quiet_transformers
from train.common.errors import ModelError, first_line
from train.common.limits import MAX_TOKENS

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_DEFAULT_POSITIONS = 2048  # for models that state no number (BLOOM)
_POSITION_SETTINGS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_BUILDING = (ValueError, TypeError, AttributeError, KeyError, IndexError, ImportError, RuntimeError, ZeroDivisionError)
"""What transformers raises for settings that fit no model."""


@dataclass(frozen=True)
class Architecture:
    """The facts of a model type and its sizes on which prompts, tokenizers and exports depend."""

    is_decoder: bool
    """Whether it is causal: then the row of the last real token is classified."""
    embedding_width: int
    """Width of the token embeddings, which may differ from that of the layers."""
    vocabulary_size: int
    """How many tokens have an embedding."""
    n_numbers: int
    """Count of its weights."""
    positions: int
    """How many tokens it can number."""
    takes_token_types: bool
    """Whether it tells two sentences apart by token types."""
    takes_keys_values: bool
    """Whether its forward pass has an argument for keys and values."""


def check_type(name: str, settings: "PretrainedConfig") -> None:
    """Refuse a type of which transformers has no text classifier that takes a prompt.

    Raises:
        ModelError: it is such a type.
    """
    from transformers import AutoModelForSequenceClassification

    if type(settings) not in AutoModelForSequenceClassification._model_mapping:
        raise _unsupported(name, settings, "transformers has no text classifier of this type")
    if settings.is_encoder_decoder:
        raise _unsupported(
            name, settings, "it is an encoder with a decoder, of which PEFT puts no prompt before the text"
        )


def _unsupported(name: str, settings: "PretrainedConfig", why: str) -> ModelError:
    return ModelError(
        f"Base model {name} is of type {settings.model_type!r}, which is not supported: {why}. Take an encoder (bert, "
        "roberta, modernbert …) or a decoder (gpt2, llama, qwen3 …)."
    )


def read_architecture(name: str, settings: "PretrainedConfig", max_numbers: int) -> Architecture:
    """Build a classifier on PyTorch's meta device, which has no memory, and look at it.

    ``max_numbers`` is the largest count of weights that the model's files can hold.

    Raises:
        ModelError: a model of this type takes no embeddings in place of token ids, or the configuration cannot be used
            or describes more numbers than ``max_numbers``.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        with quiet_transformers(), torch.device("meta"), _counting(name, max_numbers), warnings.catch_warnings():
            # DeBERTa's file is imported here, and torch.jit.script, which it calls, goes away.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            model = AutoModelForSequenceClassification.from_config(settings, trust_remote_code=False)
    except _BUILDING as cause:
        raise ModelError(f"Base model {name}: its config.json cannot be used ({first_line(cause)}).") from cause
    if not {"inputs_embeds", "attention_mask"} <= set(signature(model.forward).parameters):
        raise _unsupported(name, settings, "it takes no embeddings in place of token ids, or no mask")
    backbone = signature(model.base_model.forward).parameters
    is_decoder = hasattr(model, "score")
    n_types = getattr(settings, "type_vocab_size", None) or 0
    # GPT-2 takes words in place of types.
    has_types = n_types > 1 and not is_decoder and "token_type_ids" in signature(model.forward).parameters
    vocabulary_size, embedding_width = model.get_input_embeddings().weight.shape
    return Architecture(
        is_decoder=is_decoder,
        embedding_width=embedding_width,
        vocabulary_size=vocabulary_size,
        n_numbers=sum(tensor.numel() for tensor in model.parameters()),
        positions=_positions(model),
        takes_token_types=has_types,
        takes_keys_values="past_key_values" in backbone,
    )


def head_modules(model: "PreTrainedModel") -> list[str]:
    """Names of a classifier's parts that classify: all beside the backbone, and the pooler within it.

    A base model's file may lack any of them, and a new one starts from random numbers: an adapter has to hold them all.
    """
    beside = [
        name for name, module in model.named_children() if name != model.base_model_prefix and _has_weights(module)
    ]
    pooler = getattr(model.base_model, "pooler", None)
    return [*beside, *(["pooler"] if pooler is not None and _has_weights(pooler) else [])]


def keys_values_of(
    model: "PreTrainedModel", ids: Sequence[int], *, is_decoder: bool
) -> "list[tuple[torch.Tensor, torch.Tensor]]":
    """Every layer's keys and values for a text of n_ids tokens, each of shape = (1, n_key_value_heads, n_ids, n_head).

    A decoder's are those of its cache; an encoder's are computed by the modules that BERT and its copies have. The list is
    empty for a model with neither.
    """
    import torch

    backbone: Any = model.base_model
    batch = torch.tensor([list(ids)], device=model.device)
    model.eval()  # as `PromptedClassifier` keeps it
    if is_decoder:
        with torch.no_grad():
            cache = backbone(batch, use_cache=True).past_key_values
        return [(layer.keys, layer.values) for layer in getattr(cache, "layers", [])]
    seen: dict[str, list[torch.Tensor]] = {"key": [], "value": []}
    hooks = [
        module.register_forward_hook(lambda _, __, states, kind=kind: seen[kind].append(states))
        for kind in seen
        for name, module in backbone.named_modules()
        if name.endswith(f".attention.self.{kind}")
    ]
    try:
        with torch.no_grad():
            backbone(batch)
    finally:
        for hook in hooks:
            hook.remove()
    heads = getattr(model.config, "num_attention_heads", 1)

    def split(states: torch.Tensor) -> torch.Tensor:
        return states.view(1, len(ids), heads, -1).transpose(1, 2)

    return [(split(key), split(value)) for key, value in zip(seen["key"], seen["value"], strict=True)]


def key_value_heads(model: "PreTrainedModel", *, is_decoder: bool) -> int:
    """The number of heads that keys and values have, which is lower than that of queries in grouped-query attention."""
    settings: Any = model.config.get_text_config()
    if not is_decoder:
        return settings.num_attention_heads
    states = keys_values_of(model, [0], is_decoder=True)
    return states[0][0].shape[1]


def _has_weights(module: Any) -> bool:
    return next(module.parameters(), None) is not None


def _positions(model: "PreTrainedModel") -> int:
    settings = model.config.get_text_config()
    stated = (getattr(settings, name, None) for name in _POSITION_SETTINGS)
    positions = next((value for value in stated if isinstance(value, int) and value > 0), _DEFAULT_POSITIONS)
    for name, table in model.named_modules():
        # RoBERTa and its relatives number from padding_idx + 1.
        padding = getattr(table, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None and table.num_embeddings == positions:
            positions -= padding + 1
    return min(positions, MAX_TOKENS)


@contextmanager
def _counting(name: str, max_numbers: int) -> Iterator[None]:
    """Stop a model that is being built as soon as it has more modules, weights and buffers than ``max_numbers``.

    It would take memory for them once it is loaded, whatever its files hold.
    """
    from torch.nn.modules import module as hooks

    found = 0

    def count(_: object, __: str, value: Any) -> None:
        nonlocal found
        found += value.numel() if hasattr(value, "numel") else 1
        if found > max_numbers:
            raise ModelError(
                f"Base model {name}: its config.json describes a model of more than {max_numbers:,} numbers, which does "
                "not fit its weights. Take an unbroken copy."
            )

    registered = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
        hooks.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for one in registered:
            one.remove()
