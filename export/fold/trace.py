"""Step 3, trace: a folded model → one ONNX graph with dynamic batch and sequence, the prompts in its initializers."""

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Registers the architectures that optimum can export; the TasksManager knows none before.
import optimum.exporters.onnx.model_configs  # noqa: F401
import torch
from optimum.exporters.onnx.base import OnnxConfig
from optimum.exporters.onnx.convert import export_pytorch
from optimum.exporters.tasks import TasksManager

from export.bundle.folder import TASK_IDS
from export.fold.fold import FoldedModel
from export.fold.rewrites.gpu_operators import exporting_fused_attention, fuse_operators
from export.fold.rewrites.many_tasks import MultiTaskClassifier
from train.common.errors import ModelError
from train.common.limits import MAX_MODEL_BYTES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OPSET = 18
TRACED_SHAPE = {"batch_size": 2, "sequence_length": 16}
"""The one shape that is traced; parity is measured on others."""


def write_graph(model: FoldedModel, path: Path) -> tuple[list[str], list[str]]:
    """Trace a model and write it as ONNX into one file, weights and prompts included.

    optimum says which inputs the architecture takes and patches what cannot be traced. It uses
    PyTorch's TorchScript exporter, whose graph of a decoder's eager attention ONNX Runtime's optimizer knows.

    Returns:
        names of the inputs and of the outputs, in order

    Raises:
        ModelError: the weights do not fit into an ONNX file.
    """
    n_bytes = sum(tensor.nbytes for tensor in model.module.state_dict().values())
    if n_bytes >= MAX_MODEL_BYTES:
        raise ModelError(
            f"{model.base.name} has {n_bytes / 1e9:.1f} GB of fp32 weights; one ONNX file holds "
            f"{MAX_MODEL_BYTES / 1e9:.1f} GB. Take a smaller base model."
        )
    settings = model.module.config
    description = describe_architecture(settings)
    if isinstance(model.module, MultiTaskClassifier):
        description.__class__ = _with_task_ids(type(description))
    heads = settings.num_attention_heads
    attention = exporting_fused_attention(OPSET, heads=heads, virtual_tokens=model.virtual_tokens)
    with warnings.catch_warnings():
        # optimum uses the deprecated exporter, and parity is measured on shapes that were not traced.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        # It warns of negative indices. Here they count rows and positions: transformers' in masks, ours of last tokens.
        warnings.filterwarnings("ignore", message="Exporting aten::index operator of advanced indexing")
        # How many rows of the position table a text takes is no constant, and need not be one.
        warnings.filterwarnings("ignore", message="Constant folding - Only steps=1 can be constant folded")
        with attention if model.for_gpu else nullcontext():
            shapes = dict(TRACED_SHAPE)
            names = export_pytorch(model.module, description, opset=OPSET, output=path, input_shapes=shapes)
        if model.for_gpu:
            fuse_operators(path, heads=heads, hidden_size=settings.hidden_size)
    inputs, outputs = map(list, names)
    return inputs, outputs


def describe_architecture(settings: "PretrainedConfig") -> OnnxConfig:
    """What optimum knows of an architecture with a head for classification: its inputs, and how to trace it."""
    return TasksManager.get_exporter_config_constructor(
        "onnx", model_type=settings.model_type, task="text-classification", library_name="transformers"
    )(settings)


def _with_task_ids(description: type[OnnxConfig]) -> type[OnnxConfig]:
    """optimum's description of an architecture with one more input, the number of each row's task."""

    class WithTaskIds(description):
        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {**super().inputs, TASK_IDS: {0: "batch_size"}}

        def generate_dummy_inputs(self, framework: str = "pt", **shapes: Any) -> dict[str, torch.Tensor]:
            # The plain description makes an input for each name that it knows; it does not know ours.
            plain = copy.copy(self)
            plain.__class__ = description
            others: dict[str, torch.Tensor] = plain.generate_dummy_inputs(framework, **shapes)
            return {**others, TASK_IDS: torch.zeros(len(others["input_ids"]), dtype=torch.long)}

    return WithTaskIds
