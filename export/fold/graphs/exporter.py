"""Which exporter writes a graph, decided in this one place.

Model types that are known are written by optimum, whose graphs ONNX Runtime's optimizer knows. For all others the
exporters are tried in turn, and the first one is taken whose graph gives the module's own logits on batches that were not
traced. Where optimum is not installed, PyTorch's exporters write everything.
"""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import torch

from export.bundle.folder import TASK_IDS
from export.fold.fold import FoldedModel
from export.fold.graphs.description import Description
from export.fold.graphs.files import save_graph
from export.fold.graphs.with_torch import write_with_dynamo, write_with_torchscript
from export.runtime.batches import random_batch
from export.runtime.session import open_session, run_session
from train.common.errors import ModelError, first_line
from train.common.machine import usable_cores

HAS_OPTIMUM = find_spec("optimum") is not None and find_spec("optimum.exporters.onnx") is not None
OPTIMUM, TORCHSCRIPT, DYNAMO = "optimum", "torchscript", "dynamo"
"""Names of the exporters in a manifest: TorchScript under optimum's patches, TorchScript alone, torch.export."""

Exporter = Callable[[Description, Path], None]
TOLERANCE = 1e-4
"""Largest difference of a logit between a graph and the module that it was made of."""
SHAPES = ((1, 1), (3, 21), (2, 40))
"""Batch sizes and lengths of the batches on which exporters are tried, where the model reads so much."""


def write_by_an_exporter(model: FoldedModel, path: Path) -> tuple[Description, str]:
    """Write a model with the first exporter that can.

    Returns:
        the inputs of the graph, and the exporter's name

    Raises:
        ModelError: none can; the reason of each is named.
    """
    description = Description.of(model)
    exporters = _exporters()
    if model.is_known and HAS_OPTIMUM:
        # Tried for every kind in the tests; `export.fold.compare` follows.
        _write(exporters[OPTIMUM], description, path)
        return description, OPTIMUM
    reasons = []
    for name, write in exporters.items():
        # Any error of the other libraries is a reason to try the next exporter.
        try:
            _write(write, description, path)
            difference = _difference(description, model, path)
        except Exception as cause:
            reasons.append(f"{name}: {type(cause).__name__}, {first_line(cause)[:200]}")
            continue
        if difference <= TOLERANCE:
            return description, name
        reasons.append(f"{name}: its graph differs by {difference:.2g} in a logit")
    raise ModelError(
        f"{model.base.name} cannot be exported: no exporter writes a graph for its type {model.base.model_type!r} "
        f"({'; '.join(reasons)}). PyTorch runs it: python -m train.evaluate."
    )


def _write(write: Exporter, description: Description, path: Path) -> None:
    """Write a graph, with the numbers of its tensors in a second file where they are too many for one ONNX file.

    Exporters write such a model as a file for each tensor, or under names of their own.
    """
    if not description.is_large:
        write(description, path)
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        written = Path(scratch) / path.name
        write(description, written)
        save_graph(onnx.load(written), path)


def _exporters() -> dict[str, Exporter]:
    """The exporters that are installed, by name, in the order in which they are tried."""
    exporters: dict[str, Exporter] = {}
    if HAS_OPTIMUM:
        from export.fold.graphs.with_optimum import write_with_optimum

        exporters[OPTIMUM] = write_with_optimum
    return exporters | {TORCHSCRIPT: write_with_torchscript, DYNAMO: write_with_dynamo}


def _difference(description: Description, model: FoldedModel, path: Path) -> float:
    """The largest difference of a logit between a graph and its module, on padded batches of other shapes."""
    session = open_session(path, threads=usable_cores(), use_cuda=False)
    generator = np.random.default_rng(1)
    vocabulary = description.module.config.get_text_config().vocab_size
    found = 0.0
    for n_batch, n_text in SHAPES:
        shape = (n_batch, min(n_text, model.base.positions - model.virtual_tokens))
        batch = random_batch(generator, shape, inputs=description.inputs, vocabulary_size=vocabulary, padded=True)
        if TASK_IDS in description.inputs:
            batch[TASK_IDS] = np.zeros(n_batch, np.int64)
        with torch.inference_mode():
            expected = description.module(**{name: torch.from_numpy(array) for name, array in batch.items()})["logits"]
        actual = run_session(session, {name: batch[name] for name in description.inputs})
        difference = float(np.max(np.abs(actual - expected.float().numpy())))
        found = max(found, difference if np.isfinite(difference) else np.inf)
    return found
