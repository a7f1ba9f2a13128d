"""The graph in int8 for CPUs and in fp16 for CUDA.

int8: dynamic quantization by optimum: weights by output channel ahead of time, activations by tensor at run time; and the
token embeddings, row by row. When the whole graph in int8 fails the gate, layers go back to fp32, the most sensitive
first.

Heavy: import it where it is used.
"""

import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from optimum.onnxruntime import ORTQuantizer, QuantizationConfig
from optimum.onnxruntime.configuration import AutoQuantizationConfig

from export.bundle.folder import FP16, FP32, GRAPH_FILES, INT8, Gate
from export.fold.gate import LabelledBatches, gate_tasks, graph_runner, measure_gates, reference_logits

RANKING_ROWS = 64
"""Labelled rows on which layers are ranked by how much int8 disturbs them."""


def make_int8(
    folder: Path,
    tasks: Sequence[LabelledBatches],
    *,
    threads: int,
    report: Callable[[str], object] = lambda _: None,
) -> list[Gate]:
    """Quantise a bundle's fp32 graph; leave layers in fp32 until it passes the gate, half of them at most.

    Args:
        folder: holds ``model.onnx``; ``model_int8.onnx`` is written there.
        tasks: labelled rows of each task; all have to pass. With none, the whole graph is quantised and nothing judged.
        report: takes a line for the person who waits.

    Returns:
        the gates of the first candidate that passes, or of the last one tried, of which one says that it failed
    """
    references = reference_logits(folder, INT8, tasks, threads)
    target = folder / GRAPH_FILES[INT8]

    def attempt(kept: Sequence[int]) -> list[Gate]:
        _quantize(folder, target, keep=set(kept))
        return gate_tasks(folder, INT8, tasks, references, threads=threads, kept_fp32=kept)

    gates = attempt([])
    if all(gate.passed for gate in gates):
        return gates
    layers = sorted(set(_layers_of(onnx.load(folder / GRAPH_FILES[FP32])).values()))
    report(f"      int8 throughout: {'; '.join(map(str, gates))}; ranking the {len(layers)} layers")
    ranked = _by_disturbance(folder, tasks, layers, threads)
    for n_kept in range(1, len(layers) // 2 + 1):
        gates = attempt(sorted(ranked[:n_kept]))
        if all(gate.passed for gate in gates):
            break
        report(f"      int8: {'; '.join(map(str, gates))}")
    return gates


def _by_disturbance(folder: Path, tasks: Sequence[LabelledBatches], layers: Sequence[int], threads: int) -> list[int]:
    """Layers in the order in which they shall go back to fp32: first the one without which int8 disturbs least."""
    few = [data.head(RANKING_ROWS) for data in tasks]
    references = reference_logits(folder, INT8, few, threads)
    target = folder / GRAPH_FILES[INT8]
    remaining = {}
    for layer in layers:
        _quantize(folder, target, keep={layer})
        run = graph_runner(target, INT8, threads)
        differences = [
            np.abs(data.logits(run) - reference).mean() for data, reference in zip(few, references, strict=True)
        ]
        remaining[layer] = float(np.mean(differences))
    return sorted(layers, key=remaining.__getitem__)


def make_fp16(folder: Path, tasks: Sequence[LabelledBatches], *, threads: int) -> list[Gate]:
    """Convert the graph for a GPU to fp16; inputs and logits keep their types. Norms and softmaxes sum in fp32 inside.

    Args:
        folder: holds ``model.onnx``, and in ``model_fp16.onnx``, which is written anew, the fused graph in fp32.
        tasks: labelled rows of each task.
    """
    from onnxruntime.transformers.onnx_model import OnnxModel

    path = folder / GRAPH_FILES[FP16]
    model = OnnxModel(onnx.load(path))
    with warnings.catch_warnings():
        # The mask's fp32 minimum becomes fp16's, which hides as well, and numbers below fp16's smallest become 0.
        warnings.simplefilter("ignore", UserWarning)
        model.convert_float_to_float16(keep_io_types=True)
    model.save_model_to_file(str(path))
    return measure_gates(folder, FP16, tasks, threads=threads)


def _quantize(folder: Path, target: Path, *, keep: set[int]) -> None:
    """Write the fp32 graph of a folder in int8, but for some layers.

    optimum quantises dense layers alone: attention's own products have no constant side, and optimum, unlike ONNX Runtime,
    would turn both of their sides into int8 at run time. For a table it knows one scale, `_quantize_embeddings` one a row.
    """
    source = folder / GRAPH_FILES[FP32]
    model = onnx.load(source, load_external_data=False)
    ranks = {item.name: len(item.dims) for item in model.graph.initializer}
    layers = _layers_of(model)
    excluded = []
    for node in model.graph.node:
        # A product with one matrix a head has no channel that could be scaled.
        if node.op_type in {"MatMul", "Gemm"} and (ranks.get(node.input[1]) != 2 or layers.get(node.name) in keep):
            # ONNX Runtime takes a Gemm apart before it looks for the names.
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


def _quantize_embeddings(graph: onnx.GraphProto) -> None:
    """Put the table of token embeddings into int8, symmetric, with a scale for each row.

    No faster, but a quarter of the table's size, and in a small model it is most of the file. A scale a row costs next to
    no quality: minilm's logits move by 0.04 at most through it alone, by 0.4 through int8 in the dense layers.
    """
    tables = {item.name: item for item in graph.initializer}
    nodes = list(graph.node)
    ids = _reshaped("input_ids", nodes)
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


def _reshaped(name: str, nodes: Sequence[onnx.NodeProto]) -> set[str]:
    """A tensor, and what it is called in other shapes: GPT-2 and OPT reshape the ids before they look them up."""
    names = {name}
    for node in nodes:  # in the order in which they run
        if node.op_type == "Reshape" and node.input[0] in names:
            names.add(node.output[0])
    return names


def _quantization(excluded: list[str]) -> QuantizationConfig:
    """What this processor multiplies without overflow."""
    arguments = {
        "is_static": False,
        "per_channel": True,
        "operators_to_quantize": ["MatMul", "Gemm"],
        "nodes_to_exclude": excluded,
    }
    if platform.machine().lower() in {"arm64", "aarch64"}:
        return AutoQuantizationConfig.arm64(**arguments)
    flags = cpu_flags()
    if {"avx512_vnni", "avx_vnni"} & flags:
        return AutoQuantizationConfig.avx512_vnni(**arguments)
    # Without VNNI two products of 8 bits are summed in 16, which overflows unless the weights have 7. Named after AVX-512,
    # but right for AVX2 too: optimum's own choice there, unsigned weights, is widened to 16 bits first, which takes longer.
    return AutoQuantizationConfig.avx512(**arguments, reduce_range=True)


def cpu_flags() -> frozenset[str]:
    """What Linux says the processor can do; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def _layers_of(model: onnx.ModelProto) -> dict[str, int]:
    """Of each dense layer in the graph, by its node's name, the number of the transformer's layer that it is part of."""
    numbers = {}
    for node in model.graph.node:
        # "/queries.3/Gemm" and "/model/h.3/attn/c_attn/Gemm" alike: the module's number in a list
        found = re.search(r"\.(\d+)/", node.name)
        if found and node.op_type in {"MatMul", "Gemm"}:
            numbers[node.name] = int(found.group(1))
    # `FoldedEncoder` keeps the last layer's query out of the list.
    last = max(numbers.values(), default=0)
    return numbers | {node.name: last for node in model.graph.node if "last_query/" in node.name}
