"""CUDA graphs: a session that captures the kernels of each shape of a batch once and replays them."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, OrtValue, RunOptions

MAX_SHAPES = 32
"""How many shapes are captured; each keeps its arrays and a graph on the device for as long as the session lives."""
NOT_CAPTURED = "-1"
"""The ``gpu_graph_id`` with which ONNX Runtime runs without a CUDA graph."""


@dataclass(frozen=True)
class _Place:
    """Inputs and output of one shape, each at an address that never changes."""

    inputs: "dict[str, OrtValue]"
    logits: "OrtValue"
    binding: "IOBinding"
    options: "RunOptions"


class CudaGraphRunner:
    """Runs a session with one set of arrays and one CUDA graph for each shape.

    A CUDA graph replays its kernels on the very addresses it was captured on, so every shape has inputs and an output
    of its own, and a number by which ONNX Runtime finds its graph again (``gpu_graph_id``). The first batch of a shape
    is slow, since it is run and captured. Shapes beyond `MAX_SHAPES` run without a graph.

    Source: ONNX Runtime, docs/execution-providers/CUDA-ExecutionProvider.md, "Using CUDA Graphs".
    """

    def __init__(self, session: "InferenceSession", *, device: str, n_labels: int) -> None:
        """Wrap a session with logits of ``n_labels`` columns; ``device`` is "cuda", or "cpu", where nothing is captured."""
        self._session = session
        self._device = device
        self._n_labels = n_labels
        self._places: dict[tuple[int, ...], _Place] = {}
        # Two batches of a shape would overwrite one another.
        self._lock = threading.Lock()

    def run(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run a batch; arrays by name, each int64 → logits, float32, shape = (n_batch, n_labels)."""
        shape = arrays["input_ids"].shape
        with self._lock:
            place = self._places.get(shape)
            if place is None:
                place = self._make_place(arrays)
                if len(self._places) < MAX_SHAPES:
                    self._places[shape] = place
            for name, value in place.inputs.items():
                value.update_inplace(np.ascontiguousarray(arrays[name]))
            self._session.run_with_iobinding(place.binding, place.options)
            # A copy: on the CPU the next batch writes to the same memory.
            return np.array(place.logits.numpy())

    def _make_place(self, arrays: Mapping[str, np.ndarray]) -> _Place:
        from onnxruntime import OrtValue, RunOptions

        make = OrtValue.ortvalue_from_shape_and_type
        inputs = {name: make(array.shape, np.int64, self._device, 0) for name, array in arrays.items()}
        logits = make((len(arrays["input_ids"]), self._n_labels), np.float32, self._device, 0)
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("logits", logits)
        options = RunOptions()
        number = str(len(self._places)) if len(self._places) < MAX_SHAPES else NOT_CAPTURED
        options.add_run_config_entry("gpu_graph_id", number)
        return _Place(inputs, logits, binding, options)
