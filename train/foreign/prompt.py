"""An adapter with a prompt, of any of PEFT's types, as the two files of PEFT's that an adapter folder holds."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from train.adapter.peft_config import PROMPT_TYPES
from train.common.errors import AdapterError, UsageError
from train.config import P_TUNING_V2
from train.foreign.source import PROMPT_METHODS, REMEDY, Source
from train.foreign.tensors import PROMPT, TASK_COLUMNS, TASK_ROWS
from train.model.find import BaseModel

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_MULTITASK = "MULTITASK_PROMPT_TUNING"


def prompt_of(source: Source, tensors: "Mapping[str, torch.Tensor]", task_id: int | None) -> "torch.Tensor":
    """The prompt's table, float32, shape = (n_virtual, n_width)

    With `MULTITASK_PROMPT_TUNING` it is one task's: the shared table times the task's own factors (arXiv 2303.02861;
    peft/tuners/multitask_prompt_tuning/model.py, `forward`).
    """
    if source.peft_type != _MULTITASK and task_id is not None:
        raise UsageError(f"--task-id {task_id}: {source.folder} is no {_MULTITASK}. Leave it out.")
    table = tensors.get(PROMPT)
    if table is None or table.ndim != 2 or len(table) != source.config.get("num_virtual_tokens"):
        raise AdapterError(
            f"{source.weights} holds no prompt ({PROMPT}) of {source.config.get('num_virtual_tokens')!r:.20} virtual tokens. "
            f"{REMEDY}"
        )
    table = table.float()
    if source.peft_type != _MULTITASK:
        return table.contiguous()
    columns, rows = tensors.get(TASK_COLUMNS), tensors.get(TASK_ROWS)
    if columns is None or rows is None or columns.ndim != 3 or rows.ndim != 3 or len(columns) != len(rows):
        raise AdapterError(f"{source.weights} holds no {TASK_COLUMNS} and {TASK_ROWS} that belong together. {REMEDY}")
    if task_id is None and len(columns) > 1:
        raise UsageError(
            f"{source.folder} holds prompts of {len(columns)} tasks. Choose one with --task-id 0 or higher."
        )
    number = task_id or 0
    if number >= len(columns):
        raise UsageError(
            f"--task-id {number}: {source.folder} holds prompts of {len(columns)} tasks, numbered from 0. Give a lower one."
        )
    factors = columns[number].float() @ rows[number].float()
    if factors.shape != table.shape:
        raise AdapterError(f"{source.weights} holds factors of another shape than its prompt. {REMEDY}")
    return (table * factors).contiguous()


def check_fit(source: Source, table: "torch.Tensor", base: BaseModel, settings: "PretrainedConfig") -> dict[str, int]:
    """Refuse a prompt for a base model of another size; the sizes for adapter_config.json."""
    sizes = {
        "token_dim": base.hidden_size,
        "num_layers": settings.num_hidden_layers,
        "num_attention_heads": settings.num_attention_heads,
    }
    sizes |= {name: value for name in sizes if isinstance(value := source.config.get(name), int)}
    in_every_layer = PROMPT_METHODS[source.peft_type] == P_TUNING_V2
    expected = 2 * settings.num_hidden_layers * sizes["token_dim"] if in_every_layer else base.hidden_size
    wrong = table.shape[1] != expected
    if in_every_layer and not wrong:
        heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
        own = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        wrong = sizes["token_dim"] != heads * own
    if wrong or sizes["num_layers"] != settings.num_hidden_layers:
        raise AdapterError(
            f"{source.weights} holds a prompt for another base model: it is {table.shape[1]} wide for "
            f"{sizes['num_layers']} layers, and {base.name} has {settings.num_hidden_layers} layers of width "
            f"{settings.hidden_size} and embeddings of width {base.hidden_size}. Give the right one with --base-model."
        )
    return sizes


def config_of(source: Source, table: "torch.Tensor", base: BaseModel, sizes: Mapping[str, int]) -> dict[str, Any]:
    """adapter_config.json of an adapter folder, which PEFT itself loads."""
    return {
        "peft_type": PROMPT_TYPES[PROMPT_METHODS[source.peft_type]],
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base.hub_name,
        "inference_mode": True,
        "modules_to_save": source.config.get("modules_to_save"),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(table),
        **sizes,
    }
