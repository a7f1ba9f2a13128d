"""A graph in int8: dense layers by optimum's dynamic quantization, and the token embeddings row by row.

Weights have a scale for each output channel, ahead of time, activations one for each tensor, at run time.
"""

import platform
import re
import tempfile
from pathlib import Path

import numpy as np
import onnx
from optimum.onnxruntime import ORTQuantizer, QuantizationConfig
from optimum.onnxruntime.configuration import AutoQuantizationConfig

from export.bundle.folder import FP32, GRAPH_FILES, INT8

DENSE = ("MatMul", "Gemm")


def write_int8(folder: Path, *, keep: set[int]) -> None:
    """Write a bundle's fp32 graph in int8, without the layers to keep.

    optimum quantizes only dense layers: attention's own products have no constant side, and optimum, unlike ONNX Runtime,
    would turn both of their sides into int8 at run time. It knows one scale for a table, `_quantize_embeddings` one a row.
    """
    source, target = folder / GRAPH_FILES[FP32], folder / GRAPH_FILES[INT8]
    model = onnx.load(source, load_external_data=False)
    ranks = {item.name: len(item.dims) for item in model.graph.initializer}
    layers = layers_of(model)
    excluded = []
    for node in model.graph.node:
        # A product with one matrix a head has no channel that could be scaled.
        if node.op_type in DENSE and (ranks.get(node.input[1]) != 2 or layers.get(node.name) in keep):
            # ONNX Runtime splits a Gemm before it looks for the names.
            excluded += [node.name, f"{node.name}_MatMul"]
    # optimum writes its own record and a copy of the tokenizer beside the graph.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        quantizer = ORTQuantizer.from_pretrained(folder, file_name=source.name)
        quantizer.quantize(_quantization(excluded), save_dir=scratch, file_suffix=INT8)
        written = Path(scratch) / target.name
        quantized = onnx.load(written)
        _quantize_embeddings(quantized.graph)
        onnx.save(quantized, written)
        written.replace(target)


def layers_of(model: onnx.ModelProto) -> dict[str, int]:
    """The number of the transformer's layer to which each dense node belongs, by the node's name."""
    # The module's number in a list, as in "/queries.3/Gemm" and "/model/h.3/attn/c_attn/Gemm".
    found = {node.name: re.search(r"\.(\d+)/", node.name) for node in model.graph.node if node.op_type in DENSE}
    numbers = {name: int(match.group(1)) for name, match in found.items() if match}
    # `CpuEncoder` keeps the last layer's query out of the list.
    last = max(numbers.values(), default=0)
    return numbers | {node.name: last for node in model.graph.node if "last_query/" in node.name}


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
    (position,) = (
        index
        for index, node in enumerate(nodes)
        if node.op_type == "Gather" and node.input[0] in tables and node.input[1] in ids
    )
    node = nodes[position]
    name = node.input[0]
    table = onnx.numpy_helper.to_array(tables[name])
    scales = np.abs(table).max(axis=1, keepdims=True) / 127
    scales[scales == 0] = 1  # a row of zeros, as [PAD] may have
    graph.initializer.remove(tables[name])
    graph.initializer.append(onnx.numpy_helper.from_array(np.rint(table / scales).astype(np.int8), f"{name}_quantized"))
    graph.initializer.append(onnx.numpy_helper.from_array(scales, f"{name}_scale"))
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


def _quantization(excluded: list[str]) -> QuantizationConfig:
    """The form of int8 that this processor multiplies without overflow."""
    arguments = {"is_static": False, "per_channel": True, "operators_to_quantize": list(DENSE)}
    arguments["nodes_to_exclude"] = excluded
    if platform.machine().lower() in {"arm64", "aarch64"}:
        return AutoQuantizationConfig.arm64(**arguments)
    if {"avx512_vnni", "avx_vnni"} & cpu_flags():
        return AutoQuantizationConfig.avx512_vnni(**arguments)
    # Without VNNI two products of 8 bits are summed in 16, which overflows unless the weights have 7. Named after AVX-512,
    # but right for AVX2 too: optimum's own choice there, unsigned weights, is widened to 16 bits first, which takes longer.
    return AutoQuantizationConfig.avx512(**arguments, reduce_range=True)


def cpu_flags() -> frozenset[str]:
    """The processor's instruction sets, as Linux lists them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()
