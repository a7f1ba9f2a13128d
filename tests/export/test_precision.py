"""``python -m export --precision``: what int8 and fp16 are, what they cost, and who decides whether they are kept."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score

from export.bundle.folder import load_bundle
from tests.conftest import ENCODERS, Folders, Precisions, family_of, make_pairs, write_jsonl
from tests.export.graphs import INTEGER, manifest_of, open_graph, refusal, run_export

Pairs = Sequence[tuple[str, str]]
DENSE = {"Gemm", "MatMul"}
USUAL_KINDS = ("bert",)


def run_pairs(path: Path, pairs: Pairs) -> np.ndarray:
    """The logits of pairs by ONNX Runtime and transformers' tokenizer alone.

    int8 scales the numbers of a whole batch alike, so the batches have to be the ones that are documented: of 32, the
    shortest texts first.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent)
    session = open_graph(path)
    order = sorted(range(len(pairs)), key=lambda row: len(pairs[row][0]) + len(pairs[row][1]))
    logits = np.empty((len(pairs), 2))
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        batch = tokenizer(*zip(*(pairs[row] for row in rows), strict=True), padding=True, return_tensors="np")
        logits[rows] = session.run(["logits"], dict(batch))[0]
    return logits


CANDIDATES: Pairs = [(str(row["sentence1"]), str(row["sentence2"])) for row in make_pairs(1000, seed=11)]


def by_margin(fp32_file: Path) -> tuple[list[int], np.ndarray]:
    """Candidates, the least certain first, and what fp32 says of each."""
    logits = run_pairs(fp32_file, CANDIDATES)
    return list(np.argsort(np.abs(logits[:, 1] - logits[:, 0]))), logits.argmax(axis=1)


def write_labelled(path: Path, rows: Sequence[int], labels: Sequence[int] | np.ndarray) -> Path:
    pairs = ((CANDIDATES[row], int(label)) for row, label in zip(rows, labels, strict=True))
    return write_jsonl(path, [{"sentence1": one, "sentence2": two, "label": label} for (one, two), label in pairs])


def hard_rows(path: Path, fp32_file: Path) -> Path:
    """48 rows so near the border that whatever disturbs the logits changes labels; fp32 has them all right."""
    order, said = by_margin(fp32_file)
    return write_labelled(path, order[:48], said[order[:48]])


def easy_rows(path: Path, fp32_file: Path, n_rows: int = 40) -> Path:
    """Rows far from the border, of either answer where there are enough; fp32 has all of them right but every fourth."""
    order, said = by_margin(fp32_file)
    order = order[len(order) // 2 :]
    either = [[row for row in order if said[row] == answer][-n_rows // 2 :] for answer in (0, 1)]
    rows = [row for pair in zip(*either, strict=False) for row in pair]
    rows += [row for row in reversed(order) if row not in rows][: n_rows - len(rows)]
    return write_labelled(path, rows, [1 - said[row] if i % 4 == 3 else said[row] for i, row in enumerate(rows)])


def read_rows(path: Path) -> tuple[Pairs, list[int]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["sentence1"], row["sentence2"]) for row in rows], [row["label"] for row in rows]


def check_gate(folder: Path, pairs: Pairs, expected: Sequence[int]) -> dict[str, Any]:
    """The record of int8's gate on rows.jsonl, held against scikit-learn and SciPy."""
    gate: dict[str, Any]
    (gate,) = manifest_of(folder)["graphs"][1]["gates"]
    fp32, int8 = (run_pairs(folder / name, pairs) for name in ("model.onnx", "model_int8.onnx"))
    for field, logits in (("fp32", fp32), ("scores", int8)):
        predicted = logits.argmax(axis=1)
        scores = {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}
        assert gate[field] == pytest.approx(scores)
    assert gate["label_flips"] == (fp32.argmax(axis=1) != int8.argmax(axis=1)).sum()
    difference = np.abs(softmax(fp32, axis=1) - softmax(int8, axis=1)).max()
    assert gate["max_probability_difference"] == pytest.approx(difference, abs=1e-5)
    assert (gate["file"], gate["n_rows"], gate["is_finite"]) == ("rows.jsonl", len(expected), True)
    return gate


def test_int8_is_written_with_what_it_costs(
    kind: str, bundle: Folders, adapter: Folders, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = easy_rows(no_leftovers / "rows.jsonl", bundle(kind) / "model.onnx")
    out = no_leftovers / "b"
    capsys.readouterr()
    assert run_export(adapter(kind), "--out", out, "--precision", "int8", "--validation-file", file) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {path.name for path in bundle(kind).iterdir()} | {"model_int8.onnx"}
    fp32, int8 = manifest_of(out)["graphs"]
    assert fp32 == {"precision": "fp32", "file": "model.onnx", "gates": []}
    assert (int8["precision"], int8["file"]) == ("int8", "model_int8.onnx")
    assert manifest_of(out)["refused"] == []
    gate = check_gate(out, *read_rows(file))
    assert (gate["tolerance"], int8["int8"]["kept_fp32"]) == (0.005, [])
    assert gate["scores"]["accuracy"] == 0.75
    # It is another graph, and the person at the terminal reads what it costs.
    assert 0 < gate["max_probability_difference"] < 0.1
    assert "int8 on rows.jsonl: accuracy 75.0 (fp32 75.0, change +0.0 to +0.0), F1" in printed
    assert f"calibrated on {int8['int8']['n_texts']} texts of everyday English" in printed
    assert "0 of 40 labels changed" in printed
    assert load_bundle(out).precisions == ("fp32", "int8")


def test_a_precision_that_costs_too_much_fails_when_named(
    bundle: Folders, adapter: Folders, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = hard_rows(no_leftovers / "rows.jsonl", bundle("bert") / "model.onnx")
    out = shutil.copytree(bundle("gpt2"), no_leftovers / "b")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    flags = ("--precision", "int8", "--validation-file", file, "--overwrite")
    error = refusal(capsys, adapter("bert"), "--out", out, *flags)
    assert error.startswith("error: int8 on rows.jsonl: accuracy ")
    assert "(fp32 100.0, change " in error
    assert "More than 0.5 points may not be lost, so nothing was written. Take --precision auto or fp32." in error
    # An older bundle there outlives the failure, byte by byte.
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def linear_layers(base_folder: Path) -> int:
    """How many dense layers transformers' own classifier has."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForSequenceClassification.from_pretrained(base_folder)
    return sum(isinstance(module, torch.nn.Linear | Conv1D) for module in model.modules())


def test_dense_layers_and_token_embeddings_are_integer_and_nothing_else(
    kind: str, bundle_in: Precisions, base_model: Folders
) -> None:
    folder = bundle_in(kind, "int8")
    model = onnx.load(folder / "model_int8.onnx")
    arrays = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    weights = [
        arrays[node.input[1]]
        for node in model.graph.node
        # An attention's product, which has no constant side, would fail here.
        if node.op_type in INTEGER
    ]
    # An encoder's last key and value are no dense layers any more, but one matrix a head.
    folded = 2 if family_of(kind) in ENCODERS else 0
    assert len(weights) == linear_layers(base_model(family_of(kind))) - folded
    assert {weight.ndim for weight in weights} == {2}
    assert {weight.dtype.name for weight in weights} == {"int8"}
    # No dense layer was left over.
    assert not [
        node.name
        for node in model.graph.node
        if node.op_type in DENSE and node.input[1] in arrays and arrays[node.input[1]].ndim == 2
    ]
    # Of what rows are looked up in, the tokens' table is int8, with a scale a row; the rest kept its numbers.
    looked_up = {node.input[0]: node.input[1] for node in model.graph.node if node.op_type == "Gather"}
    rank_2 = {name: ids for name, ids in looked_up.items() if name in arrays and arrays[name].ndim == 2}
    (table,) = (name for name in rank_2 if arrays[name].dtype.name == "int8")
    of_tokens = table.removesuffix("_quantized")
    assert {name for name, ids in rank_2.items() if ids == rank_2[table]} == {table, f"{of_tokens}_scale"}
    before = {item.name: numpy_helper.to_array(item) for item in onnx.load(folder / "model.onnx").graph.initializer}
    row_scales = arrays.pop(f"{of_tokens}_scale")
    error = np.abs(arrays.pop(table) * row_scales - before[of_tokens]).max(axis=1)
    assert (error <= np.abs(before[of_tokens]).max(axis=1) / 127 / 2 + 1e-7).all()
    assert of_tokens not in arrays
    for name in [*manifest_of(folder)["prompt_initializers"], *(rank_2.keys() & arrays.keys())]:
        assert np.array_equal(arrays[name], before[name])
    # By output channel: a scale for each column.
    scales = [array for name, array in arrays.items() if name.endswith("_scale")]
    assert sorted(scale.size for scale in scales) == sorted(weight.shape[1] for weight in weights)


@pytest.mark.parametrize(
    ("precision", "name", "words"),
    [
        ("int8", "", "What int8 costs is unknown: the tokenizer does not know"),
        ("fp16", "", "Give labelled rows with --validation-file, or texts in its language with --calibration-file"),
        *(("auto", name, f"--validation-file {{folder}}/{name}") for name in ("none.jsonl", "empty.jsonl", "rows.txt")),
    ],
)
def test_where_nothing_can_say_what_a_precision_costs_it_is_refused(
    precision: str, name: str, words: str, adapter: Folders, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (no_leftovers / "empty.jsonl").touch()
    (no_leftovers / "rows.txt").write_text("x")
    rows = ("--validation-file", no_leftovers / name) if name else ()
    folder = adapter("bert")
    capsys.readouterr()
    assert run_export(folder, "--out", no_leftovers / "b", "--precision", precision, *rows) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert words.format(folder=no_leftovers) in printed.err
    assert not (no_leftovers / "b").exists()
