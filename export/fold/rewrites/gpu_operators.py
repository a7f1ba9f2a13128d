"""Operators that ONNX Runtime computes in one kernel: on a GPU they save launches and trips to memory.

On a CPU they lose: in a MiniLM graph at batch 32 × 60, a `SkipLayerNormalization` took 2.5 ms, the sum and the norm that
it replaces 1.1, and the fused graph 229 ms, the other 199 (ONNX Runtime 1.31, fp32, AVX-512). So only the graph for CUDA
has them.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch.onnx import register_custom_op_symbolic, symbolic_helper, unregister_custom_op_symbolic
from torch.onnx._internal.torchscript_exporter import _type_utils

from export.fold.graphs.files import save_graph
from export.runtime.session import KEY_STARTS_END

ATTENTION = "aten::scaled_dot_product_attention"
LOWEST = float(torch.finfo(torch.float32).min)
"""Added to the score of a masked key."""
BIAS_ALIGNMENT = 4
"""A bias for the memory-efficient kernel has rows of a multiple of this length. ONNX Runtime 1.31 takes that kernel where
the number of queries is a multiple of 8, does not look at the number of keys, and fails during a request."""


@contextlib.contextmanager
def exporting_fused_attention(opset: int, *, heads: int, virtual_tokens: int) -> Iterator[None]:
    """While this lasts, a trace writes PyTorch's attention as ``com.microsoft::MultiHeadAttention``.

    A trace does not know its own shapes: each layer has ``heads`` heads and ``virtual_tokens`` more keys than queries.
    """
    n_more = -virtual_tokens % BIAS_ALIGNMENT
    register_custom_op_symbolic(ATTENTION, partial(_multi_head_attention, heads, n_more), opset)
    try:
        yield
    finally:
        unregister_custom_op_symbolic(ATTENTION, opset)


def absent_input(g: Any) -> Any:
    """An optional input of an operator that is left out."""
    none = g.op("prim::Constant")
    none.setType(torch._C.OptionalType.ofTensor())
    return none


def _multi_head_attention(heads: int, n_more: int, g: Any, *inputs: Any) -> Any:
    """The symbolic of an attention for torch.onnx; shapes = (n_batch, n_heads, n_rows, n_head)

    The operator takes queries as (n_batch, n_rows, n_heads · n_head), keys and values as they are. ``n_more`` hidden keys
    are put in front.
    """
    query, key, value, attn_mask, _, is_causal, scale, *_ = inputs
    if symbolic_helper._maybe_get_const(is_causal, "b") is True:
        raise ValueError("causal attention without a mask has no fused form here")
    rows = g.op("Constant", value_t=torch.tensor([0, 0, -1]))
    by_head = g.op("Constant", value_t=torch.tensor([0, 0, heads, -1]))
    tensors = [g.op("Reshape", g.op("Transpose", query, perm_i=[0, 2, 1, 3]), rows), key, value]
    if not symbolic_helper._is_none(attn_mask):
        none = absent_input(g)
        if _type_utils.JitScalarType.from_value(attn_mask) == _type_utils.JitScalarType.BOOL:
            shown, hidden = (g.op("Constant", value_t=torch.tensor(value)) for value in (0.0, LOWEST))
            attn_mask = g.op("Where", attn_mask, shown, hidden)
        if n_more:
            tensors[1:] = [_padded_in_front(g, tensor, 2, n_more, 0.0) for tensor in (key, value)]
            attn_mask = _padded_in_front(g, attn_mask, 3, n_more, LOWEST)
        tensors += [none, none, attn_mask]
    attributes: dict[str, float] = {"num_heads_i": heads}
    factor = symbolic_helper._maybe_get_const(scale, "f")
    if isinstance(factor, float):
        attributes["scale_f"] = factor
    mixed = g.op("com.microsoft::MultiHeadAttention", *tensors, **attributes)
    return g.op("Transpose", g.op("Reshape", mixed, by_head), perm_i=[0, 2, 1, 3])


def _padded_in_front(g: Any, tensor: Any, dim: int, n_more: int, fill: float) -> Any:
    """A tensor of four dimensions with more rows in front of one of them."""
    pads = torch.zeros(8, dtype=torch.long)
    pads[dim] = n_more
    constants = (g.op("Constant", value_t=value) for value in (pads, torch.tensor(fill)))
    return g.op("Pad", tensor, *constants, mode_s="constant")


def fuse_operators(path: Path, *, heads: int, hidden_size: int) -> None:
    """Fuse residual sums with layer norms, and biases with GELUs, by ONNX Runtime's tool; the file is written anew."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    # Attention is one operator already, and the embeddings' norm includes the prompt.
    options.enable_attention = False
    options.enable_embed_layer_norm = False
    # The tool would use the positions of one text for all.
    options.enable_rotary_embeddings = False
    sizes = {"num_heads": heads, "hidden_size": hidden_size}
    optimized = optimize_model(str(path), model_type="bert", **sizes, optimization_options=options, opt_level=0)
    _keep_on_device(optimized.model.graph)
    for item in optimized.model.graph.initializer:
        # Sessions know it by this name, without those of the modules around its own.
        if item.name.endswith(KEY_STARTS_END):
            optimized.replace_input_of_all_nodes(item.name, KEY_STARTS_END)
            item.name = KEY_STARTS_END
    save_graph(optimized.model, path)


ARITHMETIC = frozenset({"Add", "Div", "Mod", "Mul", "Sub"})
OF_SIZES = ARITHMETIC | {"Gather", "Squeeze"}
"""Operators that ONNX Runtime computes on the host if all their inputs are a shape's numbers and constants."""


def _keep_on_device(graph: onnx.GraphProto) -> None:
    """Let no sum or product of numbers on the device take a size from the host, as torch.onnx's ``x[rows, columns]`` does.

    ONNX Runtime would copy the size to the device during a request, and refuses to capture a CUDA graph with such a
    copy. A ``Range`` over that one number computes it on the device.
    """
    on_host = {item.name for item in graph.initializer}
    sizes: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    make = onnx.helper.make_node
    for node in graph.node:
        inputs = [name for name in node.input if name]
        is_of_sizes = node.op_type in OF_SIZES and sizes.intersection(inputs) and on_host.issuperset(inputs)
        if node.op_type == "Shape" or is_of_sizes:
            sizes.update(node.output)
            on_host.update(node.output)
        elif node.op_type == "Constant":
            on_host.update(node.output)
        elif node.op_type in ARITHMETIC and sizes.intersection(inputs):
            (place,) = (index for index, name in enumerate(node.input) if name in sizes)
            size, name = node.input[place], node.name
            one = onnx.numpy_helper.from_array(np.array(1))
            nodes += [
                make("Constant", [], [f"{name}_one"], name=f"{name}_one", value=one),
                make("Add", [size, f"{name}_one"], [f"{name}_end"], name=f"{name}_end"),
                make("Range", [size, f"{name}_end", f"{name}_one"], [f"{name}_sizes"], name=f"{name}_Range"),
                make("Squeeze", [f"{name}_sizes"], [f"{name}_size"], name=f"{name}_Squeeze"),
            ]
            node.input[place] = f"{name}_size"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
