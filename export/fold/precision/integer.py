"""A graph in int8: dense products with a scale for each output channel, and token embeddings with one for each row.

Activations get one scale a tensor: dynamic, from the largest and smallest number of each batch at run time, or static,
from calibration texts; then a row's answer does not depend on the others in its batch.
"""

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from export.fold.precision.dense import DenseProduct, dense_products
from export.fold.precision.rounding import IntegerWeight, round_to_nearest

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

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

    One operator of ONNX Runtime's multiplies, scales and adds the bias in one pass over memory, but where products share a
    matrix. Attention's own products stay, as they have no constant side.

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
    shared = {name for name, n in Counter(product.weight for product in products.values()).items() if n > 1}
    sums = _bias_sums(graph, {name: product for name, product in products.items() if product.weight not in shared})
    summed = {output for _, output in sums.values()}
    nodes: list[onnx.NodeProto] = []
    done: set[str] = set()
    for node in graph.node:
        if node.op_type == "Add" and node.output[0] in summed:
            continue
        if node.name not in products:
            nodes.append(node)
            continue
        source = node.input[0]
        if source not in done:
            done.add(source)
            added, constants = _quantize_activation(source, None if ranges is None else ranges[source])
            nodes += added
            made |= constants
        product = products[node.name]
        # With `session.x64quantprecision` ONNX Runtime cannot convert one matrix for two fused nodes.
        is_fused = product.weight not in shared
        nodes += _integer_product(node, product, *sums.get(node.name, ("", node.output[0])), is_fused=is_fused)
    left = {name for node in nodes for name in node.input}
    kept = [item for item in graph.initializer if item.name in left]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *made.values()])
    _quantize_embeddings(graph)
    if MICROSOFT not in {opset.domain for opset in quantized.opset_import}:
        quantized.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
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
    # A range so small that its step would be 0 in fp32 is one of zeros.
    step = np.float32((high - low) / 255) or np.float32(1)
    node = onnx.helper.make_node("QuantizeLinear", [source, scale, zero], [quantized], name=f"{source}_to_int8")
    return [node], _tensors({scale: np.array(step), zero: np.array(np.rint(-low / step).clip(0, 255), np.uint8)})


def _bias_sums(graph: onnx.GraphProto, products: Mapping[str, DenseProduct]) -> dict[str, tuple[str, str]]:
    """By the names of products that a constant vector is added to, and nothing else reads: that vector, and the sum."""
    sizes = {item.name: list(item.dims) for item in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(item.name for item in graph.output)
    made_by: dict[str, str] = {}
    sums: dict[str, tuple[str, str]] = {}

    def add(name: str, bias: str, total: str) -> None:
        product = products[name]
        if sizes.get(bias) == [sizes[product.weight][0 if product.transposed else 1]]:
            sums[name] = (bias, total)

    for node in graph.node:
        if node.name in products and len(node.input) > 2:
            add(node.name, node.input[2], node.output[0])
        elif node.name in products:
            made_by[node.output[0]] = node.name
        elif node.op_type == "Add":
            for term, bias in (node.input, reversed(node.input)):
                if term in made_by and uses[term] == 1:
                    add(made_by[term], bias, node.output[0])
    return sums


def _integer_product(
    node: onnx.NodeProto, product: DenseProduct, bias: str, output: str, *, is_fused: bool
) -> list[onnx.NodeProto]:
    """The nodes in a dense product's place, the last of which has the product and its bias."""
    make = onnx.helper.make_node
    source, weight, zero = (
        f"{product.source}_quantized",
        f"{product.weight}_quantized",
        f"{product.source}_zero_point",
    )
    scales = [f"{product.source}_scale", f"{product.weight}_scale"]
    other = "" if bias else "".join(node.input[2:])
    result, name = f"{node.name}_product" if other else output, f"{node.name}_integer"
    if is_fused:
        inputs = [source, weight, *scales, zero, "", bias]
        nodes = [make("MatMulIntegerToFloat", inputs, [result], name=name, domain=MICROSOFT)]
    else:
        sums, floats, factors = (f"{node.name}_{what}" for what in ("sums", "floats", "scales"))
        nodes = [
            make("MatMulInteger", [source, weight, zero], [sums], name=name),
            make("Cast", [sums], [floats], name=f"{node.name}_Cast", to=onnx.TensorProto.FLOAT),
            make("Mul", scales, [factors], name=factors),
            make("Mul", [floats, factors], [result], name=f"{node.name}_Mul"),
        ]
    if other:  # a bias that is no vector of the outputs
        nodes.append(make("Add", [result, other], [output], name=f"{node.name}_Add"))
    return nodes


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, onnx.TensorProto]:
    return {name: numpy_helper.from_array(array, name) for name, array in arrays.items()}


def _quantize_embeddings(graph: onnx.GraphProto) -> None:
    """Put the table of token embeddings into int8, symmetric, with a scale for each row.

    No faster, but a quarter of the table's size, and in a small model it is most of the file. A scale a row costs next to
    no quality: minilm's logits move by 0.04 at most through it.
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
