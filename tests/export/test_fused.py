"""The graph for a GPU: its operators are counted for every family, so that one that was silently not fused fails."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import export.fold.gate
from export.__main__ import main
from tests.conftest import DECODERS, KINDS, ROOT, TOKEN_TYPES, Data, family_of, peft_logits, random_batch

Folders = Callable[[str], Path]

LAYERS = 2
"""Of every tiny model."""

ONE = LAYERS - 1
"""Layers of an encoder that compute all rows; in the last one only row 0 is computed."""


def expected(kind: str) -> dict[str, int]:
    """How many of each operator there are, by the architecture alone."""
    family = family_of(kind)
    if family == "bloom":  # whose attention has a bias by distance, in a form of its own
        return {"SkipLayerNormalization": 2 * LAYERS, "FastGelu": LAYERS}
    if family == "gpt2":
        return {"MultiHeadAttention": LAYERS, "SkipLayerNormalization": 2 * LAYERS, "FastGelu": LAYERS}
    if family == "llama":
        return {"MultiHeadAttention": LAYERS, "SkipSimplifiedLayerNormalization": 2 * LAYERS}
    if family == "opt":  # a ReLU, and norms before the residual sums are reshaped
        return {"MultiHeadAttention": LAYERS}
    # The embeddings are a residual sum as well, if of each text its own: with token types, or where RoBERTa
    # numbers positions by the tokens that it finds.
    sums = 2 * LAYERS + (family in TOKEN_TYPES or kind.endswith("roberta-v2"))
    attention = {"MultiHeadAttention": LAYERS} if kind.endswith("-v2") else {"Attention": ONE, "MultiHeadAttention": 1}
    return {**attention, "SkipLayerNormalization": sums, "BiasGelu": LAYERS}


FUSED = (
    "Attention",
    "BiasGelu",
    "FastGelu",
    "MultiHeadAttention",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_operator_that_can_be_fused_is_and_the_logits_are_pefts(
    kind: str,
    adapter: Folders,
    base_model: Folders,
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of 40 rows one that changes its label would close the gate, which is not the point here.
    monkeypatch.setattr(export.fold.gate, "GATE_TOLERANCE", 1.0)
    out = tmp_path / "b"
    command = [str(adapter(kind)), "--precision", "fp16", "--validation-file", str(data.validation_file)]
    assert main([*command, "--out", str(out)]) == 0
    model = onnx.load(out / "model_fp16.onnx")
    counts = Counter(node.op_type for node in model.graph.node)
    assert {name: counts[name] for name in FUSED if counts[name]} == expected(kind)
    # MPNet's distances are not sorted into buckets by a logarithm in fp16, which would err at their bounds.
    assert not counts["Log"]
    # What is stored in fp32 beside the fp16 weights is next to nothing.
    sizes = Counter[int]()
    for item in model.graph.initializer:
        sizes[item.data_type] += int(np.prod(item.dims))
    assert sizes[onnx.TensorProto.FLOAT] < 0.01 * sizes[onnx.TensorProto.FLOAT16]

    session = onnxruntime.InferenceSession(out / "model_fp16.onnx", providers=["CPUExecutionProvider"])
    batch = random_batch(np.random.default_rng(3), 5, 19, token_types=family_of(kind) in TOKEN_TYPES)
    if family_of(kind) in DECODERS:
        # PEFT reads the last row, be it padding, and takes a last padding token for padding.
        batch["attention_mask"][:] = 1
        batch["input_ids"][:, -1] = 7
    logits = session.run(["logits"], batch)[0]
    assert logits.dtype == np.float32
    golden = peft_logits(adapter(kind), base_model(family_of(kind)), batch)
    # fp16 has 11 bits of mantissa: a thousandth of each sum, a few sums deep.
    assert np.abs(logits - golden).max() < 2e-2
    assert np.abs(golden - golden[0]).max() > 4e-2


GPU_KINDS = ("bert", "bert-v2", "roberta-v2", "distilbert", "mpnet", "gpt2", "llama-v2", "opt-v2", "bloom")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the CUDA libraries that need no GPU")
def test_cuda_takes_every_node_and_a_request_copies_its_inputs_alone(
    bundle_in: Callable[[str, str], Path], adapter: Folders, second: Callable[..., Path], tmp_path: Path
) -> None:
    """Asked of ONNX Runtime's own CUDA provider, on libraries that launch nothing: else CUDA graphs would be refused."""
    graphs = [bundle_in(kind, "fp16") / "model_fp16.onnx" for kind in GPU_KINDS]
    for kind in ("bert", "llama-v2"):
        several = [str(adapter(kind)), str(second(kind, three=True))]
        assert main([*several, "--out", str(tmp_path / kind), "--precision", "fp16", "--ungated"]) == 0
        graphs.append(tmp_path / kind / "model_fp16.onnx")
    command = [sys.executable, "-m", "tests.gpu.fake_cuda", *map(str, graphs)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(answers) == len(graphs)
    for graph, answer in zip(graphs, answers, strict=True):
        n_inputs = len(onnx.load(graph).graph.input)
        assert (answer["captured"], answer["reason"], answer["copies_to_device"]) == (True, "", n_inputs), graph
        assert answer["kernels"] > 0
        assert answer["products"] > 0


@pytest.mark.parametrize("kind", ["bert", "bert-v2", "gpt2"])
def test_the_graph_for_a_cpu_is_left_unfused(kind: str, bundle: Folders) -> None:
    """There the fused operators are slower than what they replace."""
    model = onnx.load(bundle(kind) / "model.onnx")
    counts = Counter(node.op_type for node in model.graph.node)
    assert not [name for name in FUSED if counts[name]]
