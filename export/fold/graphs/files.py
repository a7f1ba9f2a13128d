"""Graphs as files: one, or two where the numbers are too many for one message of protobuf."""

from pathlib import Path

import onnx

from export.bundle.folder import data_path
from train.common.limits import MAX_MODEL_BYTES, MIB

LARGEST_FILE_BYTES = MAX_MODEL_BYTES - 64 * MIB
"""From so many bytes of tensors on, a graph has a second file."""


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph whose tensors are all in memory, over an older one."""
    data = data_path(path)
    data.unlink(missing_ok=True)  # onnx.save would append to it
    if sum(len(item.raw_data) for item in model.graph.initializer) < LARGEST_FILE_BYTES:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data.name)
        # onnx.save takes the numbers out of the graph in memory.
        onnx.load_external_data_for_model(model, str(path.parent))
