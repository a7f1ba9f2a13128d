"""Operators that ONNX Runtime computes in one go: for GPUs, where what they save is launches and trips to memory.

On a CPU they lose: of a MiniLM graph at batch 32 × 60, a `SkipLayerNormalization` took 2.5 ms, the sum and the norm that
it replaces 1.1, and the fused graph 229 ms, the other 199 (ONNX Runtime 1.31, fp32, AVX-512). So only the graph for CUDA
has them.

Heavy: import it where it is used.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.onnx import register_custom_op_symbolic, symbolic_helper, unregister_custom_op_symbolic
from torch.onnx._internal.torchscript_exporter import _type_utils

ATTENTION = "aten::scaled_dot_product_attention"

LOWEST = float(torch.finfo(torch.float32).min)
"""Added to the score of a key that is masked."""


@contextlib.contextmanager
def attention_in_one(opset: int, *, heads: int) -> Iterator[None]:
    """While this lasts, a trace writes PyTorch's attention as ``com.microsoft::MultiHeadAttention``.

    Args:
        heads: of every layer; a trace does not know its own shapes.
    """
    register_custom_op_symbolic(ATTENTION, partial(_multi_head_attention, heads), opset)
    try:
        yield
    finally:
        unregister_custom_op_symbolic(ATTENTION, opset)


def _multi_head_attention(  # noqa: PLR0917 -- called so by torch.onnx
    heads: int,
    g: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: Any = None,
    is_causal: Any = None,
    scale: Any = None,
    enable_gqa: Any = None,
) -> Any:
    """What torch.onnx calls for an attention; shapes = (n_batch, n_heads, n_rows, n_head)

    The operator takes queries as (n_batch, n_rows, n_heads · n_head), keys and values as they are.
    """
    if symbolic_helper._maybe_get_const(is_causal, "b") is True:
        raise ValueError("causal attention without a mask has no fused form here")
    rows = g.op("Constant", value_t=torch.tensor([0, 0, -1]))
    by_head = g.op("Constant", value_t=torch.tensor([0, 0, heads, -1]))
    inputs = [g.op("Reshape", g.op("Transpose", query, perm_i=[0, 2, 1, 3]), rows), key, value]
    if not symbolic_helper._is_none(attn_mask):
        none = g.op("prim::Constant")
        none.setType(torch._C.OptionalType.ofTensor())
        if _type_utils.JitScalarType.from_value(attn_mask) == _type_utils.JitScalarType.BOOL:
            shown, hidden = (g.op("Constant", value_t=torch.tensor(value)) for value in (0.0, LOWEST))
            attn_mask = g.op("Where", attn_mask, shown, hidden)
        inputs += [none, none, attn_mask]
    attributes: dict[str, float] = {"num_heads_i": heads}
    factor = symbolic_helper._maybe_get_const(scale, "f")
    if isinstance(factor, float):
        attributes["scale_f"] = factor
    mixed = g.op("com.microsoft::MultiHeadAttention", *inputs, **attributes)
    return g.op("Transpose", g.op("Reshape", mixed, by_head), perm_i=[0, 2, 1, 3])


def fuse_operators(path: Path, *, heads: int, hidden_size: int) -> None:
    """Put residual sums and layer norms, and biases and GELUs, into one operator each, by ONNX Runtime's tool.

    Args:
        path: the graph; it is written anew.
        heads: of every layer.
        hidden_size: width of the rows.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    # Attention is one operator already, and the embeddings' norm has the prompt in it.
    options.enable_attention = False
    options.enable_embed_layer_norm = False
    # It takes the positions of one text for those of all.
    options.enable_rotary_embeddings = False
    optimized = optimize_model(
        str(path),
        model_type="bert",
        num_heads=heads,
        hidden_size=hidden_size,
        optimization_options=options,
        opt_level=0,
    )
    optimized.save_model_to_file(str(path))
