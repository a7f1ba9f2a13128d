"""A graph in int8: dense products with a scale for each output channel, and token embeddings with one for each row.

Activations get one scale a tensor: dynamic, from the largest and smallest number of each batch at run time, or static,
from calibration texts; then a row's answer does not depend on the others in its batch.
"""

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from export.fold.precision.dense import DenseProduct, dense_products
from export.fold.precision.rounding import IntegerWeight, round_to_nearest

Range = tuple[float, float]
"""The smallest and the largest number of a tensor."""


def quantize_products(
    model: onnx.ModelProto,
    *,
    weights: Mapping[str, IntegerWeight] | None = None,
    kept_fp32: Collection[str] = (),
    ranges: Mapping[str, Range] | None = None,
) -> onnx.ModelProto:
    """A graph with its dense products in int8, but for those to keep, by their names, and with int8 token embeddings.

    The nodes are those that ONNX Runtime fuses: MatMulInteger, Cast, Mul, Add. Attention's own products stay, as they have
    no constant side.

    Args:
        weights: matrices in integers, by their initializers' names; others are rounded to the nearest of 8 bits
        kept_fp32: products that stay in fp32, by their nodes' names
        ranges: of each product's source by its name, for static scales; dynamic ones without
    """
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    graph = quantized.graph
    products = {product.name: product for product in dense_products(graph) if product.name not in kept_fp32}
    made: dict[str, onnx.TensorProto] = {}
    transposed = {product.weight: product.transposed for product in products.values()}
    for item in graph.initializer:
        if item.name in transposed:
            weight = (weights or {}).get(item.name)
            if weight is None:
                matrix = numpy_helper.to_array(item)
                weight = round_to_nearest(matrix.T if transposed[item.name] else matrix)
            made |= _tensors({f"{item.name}_quantized": weight.values, f"{item.name}_scale": weight.scales})
    nodes: list[onnx.NodeProto] = []
    done: set[str] = set()
    for node in graph.node:
        if node.name not in products:
            nodes.append(node)
            continue
        source = node.input[0]
        if source not in done:
            done.add(source)
            added, constants = _quantize_activation(source, None if ranges is None else ranges[source])
            nodes += added
            made |= constants
        nodes += _integer_product(node, products[node.name])
    left = {name for node in nodes for name in node.input}
    kept = [item for item in graph.initializer if item.name in left]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *made.values()])
    _quantize_embeddings(graph)
    return quantized


def _quantize_activation(source: str, bounds: Range | None) -> tuple[list[onnx.NodeProto], dict[str, onnx.TensorProto]]:
    """The nodes that make uint8 of a tensor, and their constants by name."""
    quantized, scale, zero = (f"{source}_{what}" for what in ("quantized", "scale", "zero_point"))
    if bounds is None:
        node = onnx.helper.make_node(
            "DynamicQuantizeLinear", [source], [quantized, scale, zero], name=f"{source}_to_int8"
        )
        return [node], {}
    # Zero must have a number of its own, as in ONNX's DynamicQuantizeLinear.
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    step = np.float32((high - low) / 255) if high > low else np.float32(1)
    node = onnx.helper.make_node("QuantizeLinear", [source, scale, zero], [quantized], name=f"{source}_to_int8")
    return [node], _tensors({scale: np.array(step), zero: np.array(np.rint(-low / step).clip(0, 255), np.uint8)})


def _integer_product(node: onnx.NodeProto, product: DenseProduct) -> list[onnx.NodeProto]:
    """The nodes in a dense product's place."""
    source, name, (output,) = product.source, node.name, node.output
    sums, floats, scale = f"{name}_sums", f"{name}_floats", f"{name}_scales"
    has_bias = node.op_type == "Gemm" and len(node.input) > 2 and bool(node.input[2])
    product_output = f"{name}_product" if has_bias else output
    make = onnx.helper.make_node
    integers = [f"{source}_quantized", f"{product.weight}_quantized", f"{source}_zero_point"]
    nodes = [
        make("MatMulInteger", integers, [sums], name=f"{name}_integer"),
        make("Cast", [sums], [floats], name=f"{name}_Cast", to=onnx.TensorProto.FLOAT),
        make("Mul", [f"{source}_scale", f"{product.weight}_scale"], [scale], name=f"{name}_scales"),
        make("Mul", [floats, scale], [product_output], name=f"{name}_Mul"),
    ]
    if has_bias:
        nodes.append(make("Add", [product_output, node.input[2]], [output], name=f"{name}_Add"))
    return nodes


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, onnx.TensorProto]:
    return {name: numpy_helper.from_array(array, name) for name, array in arrays.items()}


def _quantize_embeddings(graph: onnx.GraphProto) -> None:
    """Put the table of token embeddings into int8, symmetric, with a scale for each row.

    No faster, but a quarter of the table's size, and in a small model it is most of the file. A scale a row costs next to
    no quality: minilm's logits move by 0.04 at most through it alone, by 0.4 through int8 in the dense layers.
    """
    tables = {item.name: item for item in graph.initializer}
    nodes = list(graph.node)
    ids = {"input_ids"}
    for node in nodes:
        # GPT-2 and OPT reshape the ids before they look them up.
        if node.op_type == "Reshape" and node.input[0] in ids:
            ids.add(node.output[0])
    found = (
        index
        for index, node in enumerate(nodes)
        if node.op_type == "Gather" and node.input[0] in tables and node.input[1] in ids
    )
    position = next(found, None)
    # A table that something else reads too would be in the file twice.
    if position is None or sum(name == nodes[position].input[0] for node in nodes for name in node.input) > 1:
        return
    node = nodes[position]
    name = node.input[0]
    table = onnx.numpy_helper.to_array(tables[name])
    rounded = round_to_nearest(table.T)
    graph.initializer.remove(tables[name])
    values, scales = np.ascontiguousarray(rounded.values.T), rounded.scales[:, None]
    graph.initializer.extend(_tensors({f"{name}_quantized": values, f"{name}_scale": scales}).values())
    rows, scale, whole = f"{node.name}_rows", f"{node.name}_scale", f"{node.name}_float"
    make = onnx.helper.make_node
    looked_up = [
        make("Gather", [f"{name}_quantized", node.input[1]], [rows], name=f"{node.name}_quantized"),
        make("Gather", [f"{name}_scale", node.input[1]], [scale], name=f"{node.name}_of_scales"),
        make("Cast", [rows], [whole], name=f"{node.name}_Cast", to=onnx.TensorProto.FLOAT),
        make("Mul", [whole, scale], [node.output[0]], name=f"{node.name}_Mul"),
    ]
    del graph.node[:]
    graph.node.extend([*nodes[:position], *looked_up, *nodes[position + 1 :]])
