"""``python -m export --precision``: gates that close, layers that stay in fp32, rows from elsewhere, several tasks."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModel

import export.fold.precision.gate
from export.bundle.folder import load_bundle
from export.fold.precision.dense import dense_products, load_graph
from export.fold.precision.texts import everyday_texts
from export.runtime.classifier import OnnxClassifier
from tests.conftest import ROOT, SHIPPED, Data, Folders, Second, make_base_model, make_pairs, random_batch, write_jsonl
from tests.export.graphs import manifest_of, refusal, run_export
from tests.export.test_precision import check_gate, easy_rows, hard_rows, read_rows, run_pairs
from tests.slow.export.test_every_kind import train_and_export


def test_auto_leaves_out_a_precision_that_costs_too_much_and_its_cost_is_counted_where_labels_change(
    bundle: Folders, adapter: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = hard_rows(tmp_path / "rows.jsonl", bundle("bert") / "model.onnx")
    out = tmp_path / "b"
    assert run_export(adapter("bert"), "--out", out, "--precision", "auto", "--validation-file", file) == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in bundle("bert").iterdir()}
    assert load_bundle(out).precisions == ("fp32",)
    # fp16 is tried only where there is a GPU for it.
    (refused,) = [record for record in manifest_of(out)["refused"] if record["precision"] == "int8"]
    (gate,) = refused["gates"]
    assert gate["fp32"]["accuracy"] - gate["scores"]["accuracy"] == pytest.approx(gate["label_flips"] / 48)
    assert gate["label_flips"] / 48 > gate["tolerance"]
    # Products in fp32, up to half of the time, were tried too.
    assert refused["int8"]["kept_fp32"]

    # With an open gate the graph stays and can be run again.
    monkeypatch.setattr(export.fold.precision.gate, "GATE_TOLERANCE", 2.0)
    out = tmp_path / "c"
    assert run_export(adapter("bert"), "--out", out, "--precision", "int8", "--validation-file", file) == 0
    gate = check_gate(out, *read_rows(file))
    assert gate["fp32"]["accuracy"] == 1.0
    assert gate["label_flips"] > 0
    assert gate["scores"]["accuracy"] == pytest.approx(1 - gate["label_flips"] / 48)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_adapter_alone_gets_int8_in_every_dense_product_and_its_fidelity(name: str, tmp_path: Path) -> None:
    """From nothing but the texts that come with the program: its training's are not on this machine."""
    out = tmp_path / "b"
    assert run_export(ROOT / "demo" / "adapters" / name, "--out", out) == 0
    (int8,) = [record for record in manifest_of(out)["graphs"] if record["precision"] == "int8"]
    assert (int8["int8"]["kept_fp32"], int8["gates"]) == ([], [])
    assert dense_products(load_graph(out / "model_int8.onnx").graph) == []
    (fidelity,) = int8["fidelity"]
    pairs = [(one, two) for one, two in everyday_texts(is_pair=True)]
    labels = [run_pairs(out / file, pairs).argmax(axis=1) for file in ("model.onnx", "model_int8.onnx")]
    # In other batches dynamic scales move labels whose two logits are nearly equal.
    assert fidelity["equal_labels"] == pytest.approx((labels[0] == labels[1]).sum(), abs=3)
    assert (fidelity["texts"], fidelity["n_texts"]) == ("everyday English", 300)
    assert 294 <= fidelity["equal_labels"] <= 300


def bert_with_an_outlier(folder: Path, *, layer: int, activation: float, weight: float) -> Path:
    """A base model one unit of whose feed-forward part is always the same and is read with one weight."""
    model: Any = AutoModel.from_pretrained(make_base_model(folder, "bert"))
    with torch.no_grad():
        model.encoder.layer[layer].intermediate.dense.bias[0] = activation
        model.encoder.layer[layer].output.dense.weight[:, 0] = 0
        model.encoder.layer[layer].output.dense.weight[0, 0] = weight
    model.save_pretrained(folder)
    return folder


TRAINING = ("--encoder-hidden-size", "16", "--epochs", "2", "--learning-rate", "1e-2")


@pytest.mark.parametrize("layer", [0, 1])
def test_an_outlier_that_would_break_int8_is_smoothed_away(layer: int, tmp_path: Path, data: Data) -> None:
    """In fp32 the model stays what it was. In plain int8 all units share the outlier's scale, so that the others are 0."""
    base = bert_with_an_outlier(tmp_path / "base", layer=layer, activation=1000, weight=0)
    adapter_folder, plain = train_and_export(base, tmp_path / "plain", data, *TRAINING)
    file = easy_rows(tmp_path / "rows.jsonl", plain / "model.onnx", n_rows=200)
    out = tmp_path / "b"
    texts = ("--calibration-file", data.train_file)
    assert run_export(adapter_folder, "--out", out, "--precision", "int8", "--validation-file", file, *texts) == 0
    check_gate(out, *read_rows(file))
    form = load_bundle(out).graphs[1].int8
    assert form is not None
    assert form.kept_fp32 == ()
    assert form.alpha is not None
    kinds = Counter(node.op_type for node in onnx.load(out / "model_int8.onnx").graph.node)
    assert kinds["MatMulIntegerToFloat"] == 12


def test_the_file_that_the_adapter_was_validated_with_is_taken_where_it_lies_unchanged(
    adapter: Folders, bundle: Folders, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.fold.precision.gate, "GATE_TOLERANCE", 2.0)
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copy(data.validation_file, tmp_path))
    assert run_export(adapter("bert"), "--out", "b") == 0
    (gate,) = manifest_of(tmp_path / "b")["graphs"][1]["gates"]
    assert (gate["file"], gate["n_rows"]) == ("validation.jsonl", 40)
    # One row fewer is another file, whatever its name; unless it is given. And fp32 needs none.
    copy.write_text("".join(copy.read_text().splitlines(keepends=True)[:-1]))
    given = ("--validation-file", copy)
    for flags, rows in (((), set()), (given, {39}), (("--precision", "fp32", *given), set())):
        assert run_export(adapter("bert"), "--out", "b", "--overwrite", *flags) == 0
        graphs = load_bundle(tmp_path / "b").graphs
        assert {gate.n_rows for graph in graphs for gate in graph.gates} == rows
        assert ("int8" in [graph.precision for graph in graphs]) == bool(rows)


def test_the_columns_of_a_validation_file_may_have_other_names(
    adapter: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.fold.precision.gate, "GATE_TOLERANCE", 2.0)
    labels = ("not_equivalent", "equivalent")
    pairs = [(str(row["sentence1"]), str(row["sentence2"])) for row in make_pairs(20, seed=4)]
    rows: list[dict[str, object]]
    rows = [{"first": one, "second": two, "gold": labels[i % 2]} for i, (one, two) in enumerate(pairs)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    columns = ("--text-columns", "first,second", "--label-column", "gold")
    flags = ("--precision", "int8", "--validation-file", file)
    assert run_export(adapter("bert"), "--out", tmp_path / "b", *flags, *columns) == 0
    check_gate(tmp_path / "b", pairs, [index % 2 for index in range(20)])
    # The bundle reads what the adapter was trained on, not what this file is like.
    assert load_bundle(tmp_path / "b").find_task().task.text_columns == ("sentence1", "sentence2")

    for more, words in (
        ("", "rows.jsonl has no column 'sentence1'; it has first, second, gold"),
        ("--text-columns first --label-column gold", "was trained on 2 (sentence1, sentence2). Name as many"),
        ("--text-columns first,second --label-column second", "rows.jsonl, row 1"),
    ):
        assert words in refusal(capsys, adapter("bert"), "--out", tmp_path / "c", *flags, *more.split())
        assert not (tmp_path / "c").exists()


def test_a_graph_that_gives_no_numbers_fails_the_gate_whatever_it_seems_to_score(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The argmax of what is no number is a label too, and with as many rows of either label it scores as well as fp32."""
    # fp32 holds a sum of 81,000, fp16 does not.
    base = bert_with_an_outlier(tmp_path / "base", layer=0, activation=9000, weight=9)
    adapter_folder, plain = train_and_export(base, tmp_path / "plain", data, *TRAINING, "--task", "rte")
    pairs, _ = read_rows(data.validation_file)
    said = run_pairs(plain / "model.onnx", pairs).argmax(axis=1)
    # Half of the rows of each answer have it right, so that every answer scores the same.
    seen: Counter[int] = Counter()
    rows: list[dict[str, object]] = []
    for (first, second), answer in zip(pairs, said, strict=True):
        seen[answer] += 1
        rows.append({"sentence1": first, "sentence2": second, "label": int(seen[answer] % 2)})
    file = write_jsonl(tmp_path / "rows.jsonl", rows[: len(rows) - len(rows) % 2])
    flags = ("--precision", "fp16", "--validation-file", file)
    assert "some logits are no numbers" in refusal(capsys, adapter_folder, "--out", tmp_path / "b", *flags)
    assert not (tmp_path / "b").exists()


def test_products_go_back_to_fp32_until_half_of_the_time_is_spent_in_them(
    bundle: Folders, adapter: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gate that nothing passes, ever more products are tried in fp32, and then the graph is refused."""
    monkeypatch.setattr(export.fold.precision.gate, "GATE_TOLERANCE", -1.0)
    file = easy_rows(tmp_path / "rows.jsonl", bundle("gpt2") / "model.onnx")
    out = tmp_path / "b"
    assert run_export(adapter("gpt2"), "--out", out, "--validation-file", file) == 0
    (refused,) = manifest_of(out)["refused"]
    assert refused["precision"] == "int8"
    model = load_graph(out / "model.onnx")
    sizes = {item.name: np.prod(item.dims) for item in model.graph.initializer}
    # Every product but the head's runs for all tokens.
    times = {product.name: sizes[product.weight] for product in dense_products(model.graph)}
    kept = set(refused["int8"]["kept_fp32"])
    assert kept < set(times)
    assert 0.2 < sum(times[name] for name in kept) / sum(times.values()) < 0.55
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "b"}
    assert run_export(adapter("gpt2"), "--out", tmp_path / "c", "--precision", "int8", "--validation-file", file) == 2
    assert not (tmp_path / "c").exists()


def test_int8_is_gated_for_each_task(
    adapter: Folders, second: Second, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [adapter("bert"), second("bert")]
    files = [data.validation_file, data.train_file]
    assert run_export(*adapters, "--precision", "int8", "--validation-file", *files, "--out", tmp_path / "b") == 0
    bundle = load_bundle(tmp_path / "b")
    gates = bundle.graphs[1].gates
    assert [(gate.file, gate.n_rows) for gate in gates] == [("validation.jsonl", 40), ("train.jsonl", 64)]
    # A further one must be judged too.
    third = shutil.copytree(second("bert"), tmp_path / "third")
    error = refusal(capsys, third, "--add", "--out", tmp_path / "b")
    assert "holds other precisions than fp32, and what they cost this task is unknown, and the file" in error
    assert "Give one with --validation-file." in error
    assert load_bundle(tmp_path / "b") == bundle
    assert run_export(third, "--add", "--validation-file", data.validation_file, "--out", tmp_path / "b") == 0
    bundle = load_bundle(tmp_path / "b")
    assert [task.name for task in bundle.tasks] == ["bert", "other", "third"]
    assert [gate.n_rows for gate in bundle.graphs[1].gates] == [40, 64, 40]
    batch = random_batch(np.random.default_rng(1), 4, 12, token_types=True)
    logits = {
        (task, precision): OnnxClassifier(bundle, task=task, precision=precision, threads=1).logits(batch)
        for task in ("other", "third")
        for precision in ("fp32", "int8")
    }
    # The third is the second under another name, also in the graph to which it was added.
    assert np.array_equal(logits["other", "int8"], logits["third", "int8"])
    assert 0 < np.abs(logits["third", "int8"] - logits["third", "fp32"]).max() < 0.2
