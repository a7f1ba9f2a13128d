"""A prompted classifier → one ONNX graph with dynamic batch and sequence, the prompt in its initializers.

Heavy: import it where it is used.
"""

import copy
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Registers the architectures that optimum can export; the TasksManager knows none before.
import optimum.exporters.onnx.model_configs  # noqa: F401
import torch
from optimum.exporters.onnx.base import OnnxConfig
from optimum.exporters.onnx.convert import export_pytorch
from optimum.exporters.tasks import TasksManager

from export.bundle.folder import TASK_IDS
from export.fold.encoder import FoldedEncoder
from export.fold.gpu_encoder import FusedEncoder
from export.fold.gpu_operators import attention_in_one, fuse_operators
from export.fold.many_tasks import SharedClassifier
from train.model.prompted import PromptedClassifier, has_absolute_positions

if TYPE_CHECKING:
    from transformers import PretrainedConfig


OPSET = 18


@dataclass(frozen=True)
class TracedShape:
    """The one shape that was traced; parity is measured on others."""

    batch_size: int
    sequence_length: int


TRACED = TracedShape(batch_size=2, sequence_length=16)


@dataclass(frozen=True)
class Graph:
    """What was written.

    Attributes:
        inputs, outputs: their names in order.
        prompt_initializers: names of the initializers that hold the prompt.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    prompt_initializers: tuple[str, ...]


def write_graph(
    classifier: PromptedClassifier | SharedClassifier,
    path: Path,
    *,
    is_decoder: bool,
    virtual_tokens: int,
    fused: bool = False,
) -> Graph:
    """Trace a classifier and write it as ONNX; its prompt becomes constant first.

    optimum says which inputs the architecture takes and patches what cannot be traced. It uses
    PyTorch's TorchScript exporter, whose graph of a decoder's eager attention ONNX Runtime's optimiser knows.

    Args:
        classifier: built on a model with eager attention; with ``fused``, of a decoder with PyTorch's own (sdpa).
        path: the file; weights and prompt go into it (ONNX files hold up to 2 GB).
        virtual_tokens: length of the prompt.
        is_decoder: whether the model is causal; an encoder is written out anew (`FoldedEncoder`), if it can be.
        fused: write the operators that a GPU wants (`export.fold.gpu_operators`). A shared classifier's encoder must be fused itself.
    """
    module: torch.nn.Module
    if isinstance(classifier, SharedClassifier):
        prompt_initializers, module = classifier.names, classifier.eval()
    elif is_decoder or not has_absolute_positions(classifier.config):
        prompt_initializers, module = classifier.freeze_prompt(), classifier
    else:
        module = (FusedEncoder if fused else FoldedEncoder)(classifier).eval()
        prompt_initializers = module.prompt_names
    description = describe_architecture(classifier.config)
    if isinstance(classifier, SharedClassifier):
        description.__class__ = _with_task_ids(type(description))
    with warnings.catch_warnings():
        # Deprecated it is, but optimum's choice; and tracing's warnings are answered by measuring
        # parity on shapes that were not traced.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        # It fears negative indices. Here they count rows and positions: transformers' in masks, ours of last tokens.
        warnings.filterwarnings("ignore", message="Exporting aten::index operator of advanced indexing")
        # How many rows of the position table a text takes is no constant, and need not be one.
        warnings.filterwarnings("ignore", message="Constant folding - Only steps=1 can be constant folded")
        heads = classifier.config.num_attention_heads
        with attention_in_one(OPSET, heads=heads, virtual_tokens=virtual_tokens) if fused else nullcontext():
            inputs, outputs = export_pytorch(
                module,
                description,
                opset=OPSET,
                output=path,
                input_shapes={"batch_size": TRACED.batch_size, "sequence_length": TRACED.sequence_length},
            )
        if fused:
            fuse_operators(path, heads=heads, hidden_size=classifier.config.hidden_size)
    return Graph(inputs=tuple(inputs), outputs=tuple(outputs), prompt_initializers=prompt_initializers)


def describe_architecture(settings: "PretrainedConfig") -> OnnxConfig:
    """What optimum knows of an architecture with a head for classification: its inputs, and how to trace it."""
    constructor = TasksManager.get_exporter_config_constructor(
        "onnx", model_type=settings.model_type, task="text-classification", library_name="transformers"
    )
    description: OnnxConfig = constructor(settings)
    return description


def _with_task_ids(description: type[OnnxConfig]) -> type[OnnxConfig]:
    """optimum's description of an architecture with one more input, the number of each row's task."""

    class WithTaskIds(description):
        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {**super().inputs, TASK_IDS: {0: "batch_size"}}

        def generate_dummy_inputs(self, framework: str = "pt", **shapes: Any) -> dict[str, torch.Tensor]:
            others: dict[str, torch.Tensor] = description.generate_dummy_inputs(
                _without_task_ids(self, description), framework, **shapes
            )
            return {**others, TASK_IDS: torch.zeros(len(others["input_ids"]), dtype=torch.long)}

    return WithTaskIds


def _without_task_ids(wider: OnnxConfig, description: type[OnnxConfig]) -> OnnxConfig:
    """The plain description again: it makes an input for each name that it knows, and would not know ours."""
    plain = copy.copy(wider)
    plain.__class__ = description
    return plain
