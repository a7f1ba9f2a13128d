"""The graph for a GPU: its operators are counted for each kind, so that one that was silently not fused fails."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from export.bundle.folder import load_bundle
from export.runtime.session import KEY_STARTS_END
from tests.conftest import ENCODERS, ROOT, TOKEN_TYPES, Folders, Precisions, family_of, peft_logits
from tests.export.graphs import N_LAYERS, peft_batch, run_file

USUAL_KINDS = ("bert",)


def expected(kind: str) -> dict[str, int]:
    """How many of each operator there are, by the architecture alone."""
    family = family_of(kind)
    if family == "bloom":  # whose attention has a bias by distance, in a form of its own
        return {"SkipLayerNormalization": 2 * N_LAYERS, "FastGelu": N_LAYERS}
    if family == "gpt2":
        return {"MultiHeadAttention": N_LAYERS, "SkipLayerNormalization": 2 * N_LAYERS, "FastGelu": N_LAYERS}
    if family == "llama":
        return {"MultiHeadAttention": N_LAYERS, "SkipSimplifiedLayerNormalization": 2 * N_LAYERS}
    if family == "opt":  # a ReLU, and norms before the residual sums are reshaped
        return {"MultiHeadAttention": N_LAYERS}
    # The embeddings are a residual sum as well, if of each text its own: with token types, or where RoBERTa
    # numbers positions by the tokens that it finds.
    sums = 2 * N_LAYERS + (family in TOKEN_TYPES or kind.endswith("roberta-v2"))
    # In the last layer only row 0 is computed.
    packed = {"Attention": N_LAYERS - 1, "MultiHeadAttention": 1}
    attention = {"MultiHeadAttention": N_LAYERS} if kind.endswith("-v2") else packed
    return {**attention, "SkipLayerNormalization": sums, "BiasGelu": N_LAYERS}


FUSED = {"Attention", "BiasGelu", "FastGelu", "MultiHeadAttention"}
FUSED |= {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}


def test_every_operator_that_can_be_fused_is_and_the_logits_are_pefts(
    kind: str, bundle_in: Precisions, adapter: Folders, base_model: Folders
) -> None:
    folder = bundle_in(kind, "fp16")
    assert load_bundle(folder).precisions == ("fp32", "fp16")
    fp32, fp16 = (onnx.load(folder / name) for name in ("model.onnx", "model_fp16.onnx"))
    counts = Counter(node.op_type for node in fp16.graph.node)
    assert {name: counts[name] for name in FUSED if counts[name]} == expected(kind)
    # MPNet's distances are not sorted into buckets by a logarithm in fp16, which would err at their bounds.
    assert not counts["Log"]
    # On a CPU the fused operators are slower than what they replace.
    assert not [node for node in fp32.graph.node if node.op_type in FUSED]
    # What is stored in fp32 beside the fp16 weights is next to nothing.
    sizes = Counter[int]()
    for item in fp16.graph.initializer:
        sizes[item.data_type] += int(np.prod(item.dims))
    assert sizes[onnx.TensorProto.FLOAT] < 0.01 * sizes[onnx.TensorProto.FLOAT16]
    ends = ([*model.graph.input, *model.graph.output] for model in (fp32, fp16))
    types = [[(item.name, item.type.tensor_type.elem_type) for item in items] for items in ends]
    assert types[0] == types[1]

    batch = peft_batch(kind, 5, 19)
    logits, before = (run_file(folder / name, batch) for name in ("model_fp16.onnx", "model.onnx"))
    # What a session replaces that leaves attention to cuDNN: keys are hidden by their numbers alone.
    is_known = family_of(kind) in ENCODERS and family_of(kind) != "mpnet"
    assert (KEY_STARTS_END in {item.name for item in fp16.graph.initializer}) is is_known
    if is_known:
        # A name of its own, since the session reads it for as long as it lives.
        none = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.int64))
        options = onnxruntime.SessionOptions()
        options.add_initializer(KEY_STARTS_END, none)
        session = onnxruntime.InferenceSession(folder / "model_fp16.onnx", options, providers=["CPUExecutionProvider"])
        assert np.array_equal(session.run(["logits"], batch)[0], logits)
    golden = peft_logits(adapter(kind), base_model(family_of(kind)), batch)
    # fp16 has 11 bits of mantissa: a thousandth of each sum, a few sums deep, which rarely point the same way.
    assert np.abs(logits - golden).max() < 2e-2
    assert 0 < np.abs(logits - before).max() < 20 * 2**-11 * np.abs(before).max()
    assert np.abs(golden - golden[0]).max() > 4e-2


def attention_kernels(graph: Path) -> dict[str, list[str]]:
    """Those that ONNX Runtime takes on a Hopper GPU: cuDNN's where the graph does not say where each text's rows begin."""
    model = onnx.load(graph).graph
    if not any("Attention" in node.op_type for node in model.node):
        return {"without": [], "with CUDA graphs": []}
    says_it = KEY_STARTS_END in {item.name for item in model.initializer}
    cudnn = "CUDNN_FLASH_ATTENTION"
    return {"without": ["EFFICIENT_ATTENTION" if says_it else cudnn], "with CUDA graphs": [cudnn]}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc, which compiles the CUDA libraries that need no GPU")
def test_cuda_takes_every_node_and_a_request_copies_its_inputs_alone(gpu_bundles: list[Path]) -> None:
    """Asked of ONNX Runtime's own CUDA provider, on libraries that launch nothing: else CUDA graphs would be refused."""
    graphs = [folder / "model_fp16.onnx" for folder in gpu_bundles]
    command = [sys.executable, "-m", "tests.gpu.fake_cuda", *map(str, graphs)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    for graph, answer in zip(graphs, answers, strict=True):
        n_inputs = len(onnx.load(graph).graph.input)
        assert (answer["captured"], answer["reason"], answer["copies_to_device"]) == (True, "", n_inputs), graph
        assert answer["kernels"] > 0
        assert answer["products"] > 0
        assert answer["attention"] == attention_kernels(graph), graph


@pytest.fixture
def gpu_bundles(bundle_in: Precisions) -> list[Path]:
    return [bundle_in(kind, "fp16") for kind in USUAL_KINDS]
