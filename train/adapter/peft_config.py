"""PEFT's adapter_config.json: which of its settings are safe to give to PEFT."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from train.adapter.record import ADAPTER, FILES, MERGED
from train.common.errors import AdapterError
from train.common.folder_record import read_json_object
from train.common.limits import MAX_MODEL_BYTES, MAX_TOKENS
from train.common.records import parse_record
from train.config import P_TUNING, P_TUNING_V2

TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]

PROMPT_TYPES = {P_TUNING: "P_TUNING", P_TUNING_V2: "PREFIX_TUNING"}
"""PEFT's type of each method with a prompt, as an adapter folder has it."""
MERGED_TYPES = (
    *("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "FOURIERFT", "LN_TUNING", "VERA", "VBLORA"),
    *("RANDLORA", "MISS", "C3A", "DELORA", "ROAD"),
)
"""PEFT's types that change weights, and that PEFT can merge into them."""
METHODS = (*PROMPT_TYPES, *(f"{kind.lower()}{MERGED}" for kind in MERGED_TYPES))
"""Every method that an adapter folder may have."""

PLAIN_SETTINGS = frozenset(
    """
    alpha alpha_pattern apply_GS base_model_name_or_path beta1 beta2 bias block_share block_size
    block_size_pattern boft_block_num boft_block_size boft_dropout boft_n_butterfly_factor coft d_initial
    decompose_both decompose_factor delora_lambda deltaT ensure_weight_tying eps exclude_modules
    fan_in_fan_out feedforward_modules group_size inference_mode init_ia3_weights init_lora_weights init_r
    init_weights init_logits_std init_vector_bank_bound lambda_pattern layers_pattern layers_to_transform
    lora_alpha lora_bias lora_dropout megatron_core mini_r miss_dropout module_dropout
    modules_to_save n_frequency n_frequency_pattern num_cayley_neumann_terms num_vectors oft_block_size
    orth_reg_weight peft_type peft_version projection_prng_key qalora_group_size r randlora_alpha
    randlora_dropout random_loc_seed rank_dropout rank_dropout_scale rank_pattern revision
    save_only_topk_weights save_projection scaling sparse target_modules target_parameters target_r task_type
    tfinal tinit topk total_step use_cayley_neumann use_dora use_effective_conv2d use_rslora variant
    vblora_dropout vector_length vera_dropout very_sparse
    """.split()  # noqa: SIM905 -- a list would take a line for each
)
"""Settings of `MERGED_TYPES`, from 0.3 on, that are data: some others name a module, which PEFT would import
(megatron_config), or a file that torch.load would read (corda_config)."""
_PLAIN_STARTS = (
    *(True, False, "gaussian", "orthogonal", "olora", "pissa", "bat", "mini"),
    *("xavier_uniform", "kaiming_uniform"),
)
"""Safe values of init_lora_weights, init_weights and init_ia3_weights; the weights are then read from the file."""


@dataclass(frozen=True)
class _PeftConfig:
    """The entries of adapter_config.json that decide what PEFT does with a prompt, with the values that are safe.

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
    """Refuse a configuration with which PEFT would do anything but load what training.json describes."""
    path = folder / FILES.config
    value = read_json_object(path, AdapterError, ADAPTER.remedy)
    if method not in PROMPT_TYPES:
        if (f"{str(value.get('peft_type')).lower()}{MERGED}", virtual_tokens) != (method, 0):
            raise AdapterError(
                f"{path} describes {value.get('peft_type')!r:.40}, {FILES.training} {method} with {virtual_tokens} "
                f"virtual tokens. {ADAPTER.remedy}"
            )
        check_merged_config(path, value)
        return
    config = parse_record(_PeftConfig, value, AdapterError, str(path), ADAPTER.remedy)
    expected = (PROMPT_TYPES[method], virtual_tokens)
    if (config.peft_type, config.num_virtual_tokens) != expected:
        raise AdapterError(
            f"{path} describes a {config.peft_type} prompt of {config.num_virtual_tokens} tokens, {FILES.training} a "
            f"{expected[0]} prompt of {expected[1]}. {ADAPTER.remedy}"
        )
    sizes = (config.num_virtual_tokens, config.token_dim, config.num_layers, config.num_transformer_submodules)
    n_bytes = 4 * 2 * math.prod(sizes)
    if n_bytes > MAX_MODEL_BYTES:
        raise AdapterError(f"{path} describes a prompt of {n_bytes / 1e9:,.0f} GB. {ADAPTER.remedy}")


def check_merged_config(path: Path, value: dict[str, Any]) -> None:
    """Refuse a configuration of one of `MERGED_TYPES` that is more than plain data known here."""
    remedy = "If it is your own, merge it with PEFT (merge_and_unload), and save and use that as a model of its own."
    if value.get("task_type") != "SEQ_CLS":
        raise AdapterError(f"{path} is for task_type {value.get('task_type')!r:.40}. Give an adapter for SEQ_CLS.")
    for name, setting in value.items():
        # PEFT writes an entry for everything that is not used, too.
        if name not in PLAIN_SETTINGS and setting:
            raise AdapterError(
                f"{path} sets {name[:40]} to {setting!r:.80}, which promptfold does not give to PEFT. {remedy}"
            )
        if not _is_plain(setting):
            raise AdapterError(f"{path} sets {name[:40]} to {setting!r:.80}, which is no plain value. {remedy}")
        is_start = name.startswith("init_") and name.endswith("weights")
        if is_start and setting is not None and setting not in _PLAIN_STARTS:
            raise AdapterError(
                f"{path} sets {name} to {setting!r:.80}, which promptfold does not give to PEFT. {remedy}"
            )


def _is_plain(setting: object) -> bool:
    """Whether a setting is a text, a number or nothing, or a list or a table of these."""
    inner = list(setting.values()) if isinstance(setting, dict) else setting
    if isinstance(inner, list):
        return all(not isinstance(item, dict) and _is_plain(item) for item in inner)
    return inner is None or isinstance(inner, str | int | float)
