"""Step 3, trace: a folded model → one ONNX graph with dynamic batch and sequence, the prompts in its initializers."""

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from export.fold.fold import FoldedModel
from export.fold.graphs.description import OPSET, OUTPUTS
from export.fold.graphs.exporter import write_by_an_exporter
from export.fold.graphs.sizes import share_sizes
from export.fold.rewrites.gpu_operators import exporting_fused_attention, fuse_operators


@dataclass(frozen=True)
class WrittenGraph:
    """What was written, for the manifest."""

    inputs: tuple[str, ...]
    """Names, in order."""
    outputs: tuple[str, ...]
    exporter: str


def write_graph(model: FoldedModel, path: Path) -> WrittenGraph:
    """Trace a model and write it as ONNX, weights and prompts included, beyond 2 GB in a second file.

    Raises:
        ModelError: no exporter can write the model.
    """
    settings = model.module.config
    heads = getattr(settings, "num_attention_heads", 1)
    attention = exporting_fused_attention(OPSET, heads=heads, virtual_tokens=model.virtual_tokens)
    fuses = model.for_gpu and model.is_known
    with warnings.catch_warnings():
        # The exporters call parts of PyTorch that go away; parity is measured on shapes that were not traced.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        # It warns of negative indices. Here they count rows and positions: transformers' in masks, ours of last tokens.
        warnings.filterwarnings("ignore", message="Exporting aten::index operator of advanced indexing")
        # How many rows of the position table a text takes is no constant, and need not be one.
        warnings.filterwarnings("ignore", message="Constant folding - Only steps=1 can be constant folded")
        with attention if fuses else nullcontext():
            description, exporter = write_by_an_exporter(model, path)
        if fuses:
            fuse_operators(path, heads=heads, hidden_size=settings.hidden_size)
        if not model.for_gpu:  # there, sizes that several nodes share would be copied from the host at each request
            share_sizes(path)
    return WrittenGraph(description.inputs, OUTPUTS, exporter)
