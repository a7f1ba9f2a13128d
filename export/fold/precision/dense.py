"""The dense products of a graph: every MatMul or Gemm with a constant matrix on its right, found by structure, not by name."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

DENSE = ("MatMul", "Gemm")


@dataclass(frozen=True)
class DenseProduct:
    """One dense product, x·W."""

    name: str
    """The node's name."""
    source: str
    """The tensor x; its channels are its last axis."""
    weight: str
    """The initializer W."""
    transposed: bool
    """Whether W is stored as (out, in), as a Gemm may have it, and not as (in, out)."""


def load_graph(path: Any) -> onnx.ModelProto:
    """A graph whose dense products have initializers on their right, and whose nodes all have names.

    Exporters also write a matrix as a Constant, or as the Transpose of a constant; ONNX Runtime's quantizer sees neither.
    """
    model = onnx.load(path)
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    constants = {item.name: item for item in graph.initializer}
    made: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type not in DENSE or node.input[1] in constants or node.input[1] not in makers:
            continue
        maker = makers[node.input[1]]
        if maker.op_type == "Constant" and maker.attribute[0].name == "value":
            array = numpy_helper.to_array(maker.attribute[0].t)
        elif maker.op_type == "Transpose" and maker.input[0] in constants:
            orders = [list(item.ints) for item in maker.attribute if item.name == "perm"]
            array = np.transpose(numpy_helper.to_array(constants[maker.input[0]]), *orders)
        else:
            continue
        # The initializer takes the tensor's name, so whatever else reads it still finds it.
        constants[node.input[1]] = numpy_helper.from_array(np.ascontiguousarray(array), node.input[1])
        graph.initializer.append(constants[node.input[1]])
        made.append(maker)
    for maker in made:
        graph.node.remove(maker)
    _drop_unused_constants(graph)
    taken = Counter(node.name for node in graph.node)
    for number, node in enumerate(graph.node):
        if not node.name or taken[node.name] > 1:
            node.name = f"{node.op_type}_{number}"
    return model


def _drop_unused_constants(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {item.name for item in graph.output}
    kept = [item for item in graph.initializer if item.name in used]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def dense_products(graph: onnx.GraphProto) -> list[DenseProduct]:
    """The dense products in fp32, in the graph's order.

    A product with one matrix a head is none: it has no output channel that could be scaled. Nor is a Gemm with a transposed
    source or with factors, which no exporter writes for a dense layer, nor are products that read one matrix in both
    directions, as one of its sides has the scales.
    """
    matrices = {
        item.name for item in graph.initializer if len(item.dims) == 2 and item.data_type == onnx.TensorProto.FLOAT
    }
    found = []
    for node in graph.node:
        if node.op_type in DENSE and node.input[1] in matrices:
            values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            if not values.get("transA") and values.get("alpha", 1) == 1 and values.get("beta", 1) == 1:
                found.append(DenseProduct(node.name, node.input[0], node.input[1], bool(values.get("transB"))))
    directions = Counter(weight for weight, _ in {(product.weight, product.transposed) for product in found})
    return [product for product in found if directions[product.weight] == 1]
