"""A prompted classifier → one ONNX graph with dynamic batch and sequence, the prompt in its initializers.

Heavy: import it where it is used.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

# Registers the architectures that optimum can export; the TasksManager knows none before.
import optimum.exporters.onnx.model_configs  # noqa: F401
import torch
from optimum.exporters.onnx.convert import export_pytorch
from optimum.exporters.tasks import TasksManager

from train.prompted import PromptedClassifier

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


def write_graph(classifier: PromptedClassifier, path: Path) -> Graph:
    """Trace a classifier and write it as ONNX; its prompt becomes constant first.

    optimum says which inputs the architecture takes and patches what cannot be traced. It uses
    PyTorch's TorchScript exporter, as we want it: on eager attention that gives the graph whose
    attention ONNX Runtime's optimiser can fuse.

    Args:
        classifier: built on a model with eager attention.
        path: the file; weights and prompt go into it (ONNX files hold up to 2 GB).
    """
    prompt_initializers = classifier.freeze_prompt()
    constructor = TasksManager.get_exporter_config_constructor(
        "onnx",
        model_type=classifier.config.model_type,
        task="text-classification",
        library_name="transformers",
    )
    with warnings.catch_warnings():
        # Deprecated it is, but optimum's choice; and tracing's warnings are answered by measuring
        # parity on shapes that were not traced.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        # It fears negative indices. Here they count rows and positions: transformers' in masks, ours of last tokens.
        warnings.filterwarnings("ignore", message="Exporting aten::index operator of advanced indexing")
        inputs, outputs = export_pytorch(
            classifier,
            constructor(classifier.config),
            opset=OPSET,
            output=path,
            input_shapes={"batch_size": TRACED.batch_size, "sequence_length": TRACED.sequence_length},
        )
    return Graph(inputs=tuple(inputs), outputs=tuple(outputs), prompt_initializers=prompt_initializers)
