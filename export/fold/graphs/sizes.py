"""Sizes of tensors, computed once a request in place of once a layer.

A traced layer reads the sizes of its own tensors, and computes with each: SmolLM2's graph has 523 such nodes, and 1,000 that
take a number out or put one in. All these sizes are constants, an axis of an input, or one with the prompt's length added.
Where ONNX Runtime's symbolic shape inference says which, one node stands for all tensors of the same shape, and ONNX
Runtime merges what follows as it opens the graph.
"""

import re
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.fold.graphs.files import save_graph

FEWEST = 10
"""How many nodes of that kind a graph has at least to be rewritten; one of rewritten layers has three."""

LARGEST_CONSTANT = 1000
"""Numbers in a constant that may be a shape."""

_SUM = re.compile(r"(\w+)(?: \+ (\d+))?")
"""A size as the inference writes it: an axis's name, or "sequence_length + 20"."""


def share_sizes(path: Path) -> None:
    """Let a graph compute each shape once, as far as shapes are known. Its logits stay the same to the last bit."""
    model = onnx.load(path)
    if sum(node.op_type == "Shape" for node in model.graph.node) < FEWEST:
        return
    if shapes := _known_shapes(model):
        _Shapes(model.graph).replace(shapes)
        save_graph(model, path)


def _known_shapes(model: onnx.ModelProto) -> dict[str, list[int | str]]:
    """Shapes by the tensors' names; none where the inference does not know an operator."""
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    outline = onnx.ModelProto()
    outline.CopyFrom(model)
    for item in outline.graph.initializer:
        if np.prod(item.dims) > LARGEST_CONSTANT:
            item.ClearField("raw_data")
    # Where it fails, it leaves the graph in the current folder.
    with TemporaryDirectory() as scratch, chdir(scratch):
        try:
            inferred = SymbolicShapeInference.infer_shapes(outline)
        except Exception:  # of no class of its own
            return {}
    values = [*inferred.graph.input, *inferred.graph.value_info]
    return {
        item.name: [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in item.type.tensor_type.shape.dim
        ]
        for item in values
    }


class _Shapes:
    """Nodes before all others of a graph, which compute each shape from the shapes of its inputs."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._axes = {
            axis.dim_param: (item.name, number)
            for item in reversed(graph.input)
            for number, axis in enumerate(item.type.tensor_type.shape.dim)
            if axis.dim_param
        }
        self._nodes: dict[str, onnx.NodeProto] = {}
        self._constants: dict[str, onnx.TensorProto] = {}

    def replace(self, shapes: dict[str, list[int | str]]) -> None:
        """Let what reads a tensor's shape read the one that stands for all such shapes."""
        kept, shared = [], {}
        for node in self._graph.node:
            shape = None
            if node.op_type == "Shape" and not node.attribute:
                shape = self._shape(shapes.get(node.input[0], []))
            if shape is None:
                kept.append(node)
            else:
                shared[node.output[0]] = shape
        for node in kept:
            for number, name in enumerate(node.input):
                node.input[number] = shared.get(name, name)
        del self._graph.node[:]
        self._graph.node.extend([*self._nodes.values(), *kept])
        self._graph.initializer.extend(self._constants.values())

    def _shape(self, sizes: list[int | str]) -> str | None:
        """The tensor that has the sizes, or None where one is unknown."""
        parts = [part for part in map(self._size, sizes) if part]
        if not parts or len(parts) < len(sizes):
            return None
        return self._node("Concat", parts, "shape_" + "_".join(map(str, sizes)), axis=0)

    def _size(self, size: int | str) -> str | None:
        found = _SUM.fullmatch(str(size))
        if isinstance(size, int):
            return self._constant(size)
        if found is None or found[1] not in self._axes:
            return None
        source, axis = self._axes[found[1]]
        name = self._node("Shape", [source], f"size_{found[1]}", start=axis, end=axis + 1)
        return self._node("Add", [name, self._constant(int(found[2]))], f"size_{size}") if found[2] else name

    def _constant(self, number: int) -> str:
        name = f"size_{number}"
        self._constants[name] = numpy_helper.from_array(np.array([number], np.int64), name)
        return name

    def _node(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self._nodes.setdefault(name, helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name
