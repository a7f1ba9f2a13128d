"""Graphs by PyTorch's own two exporters: the older one traces with TorchScript, the newer with torch.export."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from export.fold.graphs.description import OPSET, OUTPUTS, Description


@contextmanager
def without_scripts(module: torch.nn.Module) -> Iterator[None]:
    """While this lasts, functions that a model's files compile with TorchScript are plain Python again.

    Compiled ones keep their branches in the graph, as a graph within the graph, which is refused in a bundle (DeBERTa).
    """
    files = {sys.modules[type(part).__module__] for part in module.modules()}
    compiled: list[tuple[Any, str, Any]] = [
        (file, name, value)
        for file in files
        for name, value in vars(file).items()
        if isinstance(value, torch.jit.ScriptFunction) and hasattr(value, "_torchdynamo_inline")
    ]
    for file, name, value in compiled:
        setattr(file, name, value._torchdynamo_inline)
    try:
        yield
    finally:
        for file, name, value in compiled:
            setattr(file, name, value)


def write_with_torchscript(description: Description, path: Path) -> None:
    """Trace a model with TorchScript, as it is."""
    with without_scripts(description.module):
        torch.onnx.export(
            description.module,
            (description.traced_batch(),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=list(description.inputs),
            output_names=list(OUTPUTS),
            dynamic_axes=description.dynamic_axes,
        )


def write_with_dynamo(description: Description, path: Path) -> None:
    """Capture a model with torch.export, which needs the package onnxscript."""
    import onnx_ir

    # It warns of each operator of torchvision, which is not installed.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    shapes = {
        name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
        for name, axes in description.dynamic_axes.items()
        if name in description.inputs
    }
    program = torch.onnx.export(
        description.module,
        kwargs=description.traced_batch(),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(description.inputs),
        output_names=list(OUTPUTS),
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    for value in program.model.graph.inputs:
        # As the other exporters name them; torch.export numbers them.
        value.shape = onnx_ir.Shape(description.dynamic_axes[str(value.name)].values())
    program.save(str(path), external_data=description.is_large)
