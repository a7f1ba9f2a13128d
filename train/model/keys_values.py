"""The keys and values that a model's attention computes: P-Tuning v2 learns some that stand before a text's."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


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
