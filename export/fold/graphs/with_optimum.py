"""Graphs by optimum, which says how an architecture is traced, and patches what TorchScript cannot trace."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Registers the architectures that optimum can export; the TasksManager knows none before.
import optimum.exporters.onnx.model_configs  # noqa: F401
from optimum.exporters.onnx.config import TextEncoderOnnxConfig
from optimum.exporters.onnx.convert import export_pytorch
from optimum.exporters.tasks import TasksManager
from optimum.utils.normalized_config import NormalizedTextConfig

from export.fold.graphs.description import OPSET, Description
from export.fold.graphs.with_torch import without_scripts

if TYPE_CHECKING:
    import torch
    from optimum.exporters.onnx.base import OnnxConfig
    from transformers import PretrainedConfig

_TASK = "text-classification"


class _AnyClassifier(TextEncoderOnnxConfig):
    """What is the same for every classifier, for the types that optimum does not know as one."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        axes = {0: "batch_size", 1: "sequence_length"}
        return {"input_ids": axes, "attention_mask": axes}


def describe_architecture(settings: "PretrainedConfig") -> "OnnxConfig":
    """What optimum knows of an architecture with a head for classification: how to trace it."""
    try:
        constructor: Any = TasksManager.get_exporter_config_constructor(
            "onnx", model_type=settings.model_type, task=_TASK, library_name="transformers"
        )
    except (KeyError, ValueError):
        return _AnyClassifier(settings, task=_TASK)
    return constructor(settings)


def write_with_optimum(description: Description, path: Path) -> None:
    """Trace a model with TorchScript under optimum's patches."""
    settings = copy.copy(describe_architecture(description.module.config))
    settings.__class__ = _with_inputs(type(settings), description)
    with without_scripts(description.module):
        export_pytorch(description.module, settings, opset=OPSET, output=path)


def _with_inputs(kind: "type[OnnxConfig]", description: Description) -> "type[OnnxConfig]":
    """optimum's description of an architecture with the inputs of a folded model."""

    class WithInputs(kind):
        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {name: description.dynamic_axes[name] for name in description.inputs}

        def generate_dummy_inputs(self, framework: str = "pt", **_: Any) -> "dict[str, torch.Tensor]":
            return description.traced_batch()

    return WithInputs
