"""The tensors of an adapter of PEFT's, by the names that PEFT gives them today."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from train.adapter.peft import refuse_not_finite
from train.common.errors import AdapterError, first_line
from train.foreign.source import PICKLE, REMEDY, Source

if TYPE_CHECKING:
    import torch

PROMPT, TASK_COLUMNS, TASK_ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
_HEAD = re.compile(r"(?:base_model\.)?(?:model\.)?((?:classifier|score|pre_classifier)\..*)")
"""A tensor of the head, with the prefix of either kind of method or with none."""


def read_tensors(source: Source) -> "dict[str, torch.Tensor]":
    """Every tensor by the name in the file; an AdapterError for a file that is damaged or holds anything else."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = source.weights
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True) if path.name == PICKLE else load_file(path)
    except (SafetensorError, OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as cause:
        raise AdapterError(f"{path} cannot be read ({first_line(cause)}). {REMEDY}") from cause
    is_named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not is_named or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise AdapterError(f"{path} holds something else than tensors by name. {REMEDY}")
    if not tensors:
        raise AdapterError(f"{path} holds no tensors. {REMEDY}")
    refuse_not_finite(tensors, path, REMEDY)
    return tensors


def todays_names(source: Source, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """The same tensors by the names that PEFT writes since 0.3.

    Copies of a wrapped module (PEFT 0.2 and people who save ``model.state_dict()`` keep both) are reduced to the trained
    one: ``classifier.modules_to_save.default.weight`` → ``classifier.weight``. A head that was saved by the names of the
    other kind of method, or of the model alone, gets the prefix of its kind.

    Source: peft/utils/save_and_load.py, get_peft_model_state_dict, releases 0.2.0 to 0.21.2.
    """
    has_prompt = PROMPT in tensors or any(name.startswith("prompt_encoder.") for name in tensors)
    prefix = "base_model." if has_prompt else "base_model.model."
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        new = re.sub(r"\.modules_to_save(?=\.)|\.default(?=\.|$)", "", name)
        # Beside the plain name, which PEFT loads, a copy is what `bias="all"` or a resized embedding made it write.
        if ".original_module." in name or (".modules_to_save." in name and new in tensors):
            continue
        if new.startswith("prompt_encoder."):
            # model.state_dict() of an adapter that was loaded for inference holds the table there.
            if not new.endswith("embedding.weight") or PROMPT in tensors:
                raise AdapterError(
                    f"{source.weights} holds the prompt encoder itself ({name:.80}). Save the adapter with "
                    "PeftModel.save_pretrained, which writes what it computes."
                )
            new = PROMPT
        elif new not in {PROMPT, TASK_COLUMNS, TASK_ROWS} and (head := _HEAD.fullmatch(new)):
            new = prefix + head[1]
        elif has_prompt and new not in {PROMPT, TASK_COLUMNS, TASK_ROWS}:
            new = prefix + new.removeprefix(prefix)
        if new in renamed:
            raise AdapterError(f"{source.weights} holds {new:.80} twice, the second time as {name:.80}. {REMEDY}")
        renamed[new] = tensor
    # Until 0.10 PEFT wrote the bias that it trains beside LoRA by the module's own name.
    layers = {name.partition(".lora_")[0] for name in renamed if ".lora_" in name}
    return {
        f"{layer}.base_layer.bias" if kind == "bias" and layer in layers else name: tensor
        for name, tensor in renamed.items()
        for layer, _, kind in [name.rpartition(".")]
    }
