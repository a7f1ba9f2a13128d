"""Model types that take the generic way, each as a tiny configuration in which whatever is special about it happens."""

from dataclasses import dataclass, field
from typing import Any

POSITIONS = 48
"""How many tokens every tiny model can number, prompt included."""
WINDOW = 8
"""Tokens that a sliding window sees, where a model has one: much fewer than texts have in the tests."""

_USUAL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}
_ENCODER = _USUAL | {"intermediate_size": 64, "type_vocab_size": 2}
_FROM_2 = _ENCODER | {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1}
# Grouped-query attention.
_DECODER = _USUAL | {"intermediate_size": 64, "num_key_value_heads": 2}
_WIDE_HEADS = _DECODER | {"head_dim": 16}  # heads together wider than the layers
_GEMMA = _WIDE_HEADS | {"sliding_window": WINDOW, "query_pre_attn_scalar": 16}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": POSITIONS}
_DISENTANGLED = _ENCODER | {"type_vocab_size": 0, "relative_attention": True, "position_biased_input": False}


@dataclass(frozen=True)
class Family:
    """A model type."""

    sizes: dict[str, Any]
    """Settings of its tiny configuration."""
    takes_v2: bool = False
    """Whether PEFT's prefix tuning runs on it."""
    is_decoder: bool = False
    ignored: dict[str, Any] = field(default_factory=dict)
    """A change of the configuration after which what is special about the family is ignored, and its logits are others."""


GENERIC = {
    "albert": Family(_ENCODER | {"embedding_size": 16}, ignored={"num_hidden_layers": 1}),
    "camembert": Family(_FROM_2, takes_v2=True),
    "deberta": Family(_DISENTANGLED | {"pos_att_type": ["c2p", "p2c"]}, ignored={"pos_att_type": ["c2p"]}),
    "deberta-v2": Family(
        _DISENTANGLED
        | {"pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
        ignored={"pos_att_type": ["p2c"]},
    ),
    "ernie": Family(_ENCODER | {"use_task_id": True}, takes_v2=True),
    "modernbert": Family(
        _USUAL
        | {"num_hidden_layers": 4, "intermediate_size": 64, "local_attention": WINDOW, "global_attn_every_n_layers": 2}
        | {"cls_token_id": 0, "bos_token_id": 0, "eos_token_id": 2, "sep_token_id": 2},
        ignored={"local_attention": 4 * POSITIONS},
    ),
    "nezha": Family(_ENCODER | {"max_relative_position": 8}, ignored={"max_relative_position": 7}),
    "rembert": Family(_ENCODER | {"input_embedding_size": 16, "output_embedding_size": 24}, takes_v2=True),
    "squeezebert": Family(_ENCODER | {"embedding_size": 32, "q_groups": 2, "intermediate_groups": 2}),
    "xlm-roberta-xl": Family(_FROM_2, takes_v2=True),
    "falcon": Family(
        _USUAL | {"alibi": False, "new_decoder_architecture": False, "multi_query": True},
        takes_v2=True,
        is_decoder=True,
        ignored={"rope_theta": 10.0},
    ),
    "gemma": Family(_WIDE_HEADS, takes_v2=True, is_decoder=True),
    "gemma2": Family(_GEMMA, takes_v2=True, is_decoder=True, ignored={"sliding_window": 4 * POSITIONS}),
    "gemma3_text": Family(
        _GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
        takes_v2=True,
        is_decoder=True,
        ignored={"sliding_window": 4 * POSITIONS},
    ),
    "gpt_neox": Family(
        _USUAL | {"intermediate_size": 64, "rotary_pct": 0.5},
        takes_v2=True,
        is_decoder=True,
        ignored={"rotary_pct": 1.0},
    ),
    "gptj": Family(_GPT | {"rotary_dim": 4}, takes_v2=True, is_decoder=True, ignored={"rotary_dim": 8}),
    "mistral": Family(
        _DECODER | {"sliding_window": WINDOW}, takes_v2=True, is_decoder=True, ignored={"sliding_window": None}
    ),
    "nemotron": Family(
        _DECODER | {"partial_rotary_factor": 0.5},
        takes_v2=True,
        is_decoder=True,
        ignored={"partial_rotary_factor": 1.0},
    ),
    "phi": Family(
        _DECODER | {"partial_rotary_factor": 0.5},
        takes_v2=True,
        is_decoder=True,
        ignored={"partial_rotary_factor": 1.0},
    ),
    "phi3": Family(
        _DECODER | {"sliding_window": WINDOW, "original_max_position_embeddings": POSITIONS},
        takes_v2=True,
        is_decoder=True,
        ignored={"sliding_window": None},
    ),
    "qwen2": Family(
        _DECODER | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        takes_v2=True,
        is_decoder=True,
        ignored={"sliding_window": 4 * POSITIONS},
    ),
    "qwen3": Family(_WIDE_HEADS, takes_v2=True, is_decoder=True, ignored={"rope_theta": 10.0}),
    "smollm3": Family(
        _DECODER | {"no_rope_layers": [1, 0]}, takes_v2=True, is_decoder=True, ignored={"no_rope_layers": [1, 1]}
    ),
    "stablelm": Family(
        _DECODER | {"partial_rotary_factor": 0.5},
        takes_v2=True,
        is_decoder=True,
        ignored={"partial_rotary_factor": 1.0},
    ),
}
"""By the name in config.json."""

REFUSED = {
    "convbert": Family(_ENCODER | {"embedding_size": 32}),
    "funnel": Family(
        {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1], "num_decoder_layers": 1}
        | {"architectures": ["FunnelBaseModel"]},  # of its two backbones, the one that its classifier has
    ),
    "mobilebert": Family(
        _ENCODER | {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16, "type_vocab_size": 2}
    ),
}
"""Types that are refused: what they say of a text depends on its padding, in transformers and in PEFT, or (Funnel) they
shorten texts, which no exporter writes."""
