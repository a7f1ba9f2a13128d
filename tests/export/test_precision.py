"""``python -m export --precision``: what int8 and fp16 are, what they cost, and who decides whether they are kept."""

import json
import platform
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score

import export.fold.gate
import export.fold.quantize
from export.__main__ import main
from export.bundle.folder import load_bundle
from export.fold.quantize import cpu_flags
from tests.conftest import (
    ENCODERS,
    FAMILIES,
    TOKEN_TYPES,
    VIRTUAL_TOKENS,
    Data,
    family_of,
    make_base_model,
    make_pairs,
    random_batch,
    write_jsonl,
)
from train.__main__ import main as train_main

Folders = Callable[[str], Path]
Precisions = Callable[[str, str], Path]
Pairs = Sequence[tuple[str, str]]

DENSE = {"Gemm", "MatMul"}


def run_file(path: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    """ONNX Runtime alone."""
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], batch)[0]


def run_pairs(path: Path, pairs: Pairs) -> np.ndarray:
    """The logits of pairs by ONNX Runtime and transformers' tokenizer alone.

    int8 scales the numbers of a whole batch alike, so the batches have to be the ones that are documented: of 32, the
    shortest texts first.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
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
    return write_jsonl(
        path,
        [
            {"sentence1": CANDIDATES[row][0], "sentence2": CANDIDATES[row][1], "label": int(label)}
            for row, label in zip(rows, labels, strict=True)
        ],
    )


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


def export_bundle(adapter: Path, out: Path, *flags: object) -> int:
    return main([str(adapter), "--out", str(out), *map(str, flags)])


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def read_rows(path: Path) -> tuple[Pairs, list[int]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["sentence1"], row["sentence2"]) for row in rows], [row["label"] for row in rows]


def check_gate(record: dict[str, Any], fp32: np.ndarray, other: np.ndarray, expected: Sequence[int], name: str) -> None:
    """A gate's record against scikit-learn and SciPy."""
    for field, logits in (("fp32", fp32), ("scores", other)):
        predicted = logits.argmax(axis=1)
        assert record[field] == pytest.approx(
            {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}
        )
    assert record["label_flips"] == (fp32.argmax(axis=1) != other.argmax(axis=1)).sum()
    difference = np.abs(softmax(fp32, axis=1) - softmax(other, axis=1)).max()
    assert record["max_probability_difference"] == pytest.approx(difference, abs=1e-5)
    assert (record["file"], record["n_rows"], record["is_finite"]) == (name, len(expected), True)


@pytest.mark.parametrize("kind", ["distilbert", "gpt2-v2"])
def test_int8_is_written_with_what_it_costs(
    kind: str, bundle: Folders, adapter: Folders, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = easy_rows(no_leftovers / "rows.jsonl", bundle(kind) / "model.onnx")
    out = no_leftovers / "b"
    capsys.readouterr()
    assert export_bundle(adapter(kind), out, "--precision", "int8", "--validation-file", file) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {path.name for path in bundle(kind).iterdir()} | {"model_int8.onnx"}
    fp32, int8 = manifest_of(out)["graphs"]
    assert fp32 == {"precision": "fp32", "file": "model.onnx", "gates": []}
    assert (int8["precision"], int8["file"]) == ("int8", "model_int8.onnx")
    assert manifest_of(out)["refused"] == []
    pairs, expected = read_rows(file)
    (gate,) = int8["gates"]
    check_gate(
        gate, run_pairs(out / "model.onnx", pairs), run_pairs(out / "model_int8.onnx", pairs), expected, "rows.jsonl"
    )
    assert (gate["tolerance"], gate["kept_fp32"]) == (0.005, [])
    assert gate["scores"]["accuracy"] == 0.75
    # It is another graph, and the person at the terminal reads what it costs.
    assert 0 < gate["max_probability_difference"] < 0.1
    assert "int8 on rows.jsonl: accuracy 75.0 (fp32 75.0), F1" in printed
    assert "0 of 40 labels changed" in printed
    assert load_bundle(out).precisions == ("fp32", "int8")


def test_what_int8_costs_is_counted_where_labels_change(
    bundle: Folders, adapter: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows are refused in the next test; here the gate is open, so that the graph stays and can be run again."""
    monkeypatch.setattr(export.fold.gate, "GATE_TOLERANCE", 2.0)
    file = hard_rows(tmp_path / "rows.jsonl", bundle("bert") / "model.onnx")
    out = tmp_path / "b"
    assert export_bundle(adapter("bert"), out, "--precision", "int8", "--validation-file", file) == 0
    (gate,) = manifest_of(out)["graphs"][1]["gates"]
    pairs, expected = read_rows(file)
    check_gate(
        gate, run_pairs(out / "model.onnx", pairs), run_pairs(out / "model_int8.onnx", pairs), expected, "rows.jsonl"
    )
    assert gate["fp32"]["accuracy"] == 1.0
    assert gate["label_flips"] > 0
    assert gate["scores"]["accuracy"] == pytest.approx(1 - gate["label_flips"] / 48)


def test_a_precision_that_costs_too_much_fails_when_named_and_is_left_out_by_auto(
    bundle: Folders, adapter: Folders, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = hard_rows(no_leftovers / "rows.jsonl", bundle("bert") / "model.onnx")
    out = no_leftovers / "b"
    capsys.readouterr()
    assert export_bundle(adapter("bert"), out, "--precision", "int8", "--validation-file", file) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: int8 on rows.jsonl: accuracy ")
    assert "(fp32 100.0)" in error
    assert "More than 0.5 points may not be lost, so nothing was written. Take --precision auto or fp32." in error
    assert not out.exists()

    # An older bundle there outlives the failure, byte by byte.
    shutil.copytree(bundle("electra"), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    flags = ("--precision", "int8", "--validation-file", file, "--overwrite")
    assert export_bundle(adapter("bert"), out, *flags) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    assert export_bundle(adapter("bert"), out, "--precision", "auto", "--validation-file", file, "--overwrite") == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in bundle("bert").iterdir()}
    assert load_bundle(out).precisions == ("fp32",)
    # fp16 is tried only where there is a GPU for it.
    (refused,) = [record for record in manifest_of(out)["refused"] if record["precision"] == "int8"]
    (gate,) = refused["gates"]
    assert gate["fp32"]["accuracy"] - gate["scores"]["accuracy"] == pytest.approx(gate["label_flips"] / 48)
    assert gate["label_flips"] / 48 > gate["tolerance"]
    # Of two layers one may stay in fp32, and that was tried too.
    assert len(gate["kept_fp32"]) == 1


def linear_layers(base_folder: Path) -> int:
    """How many dense layers transformers' own classifier has."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForSequenceClassification.from_pretrained(base_folder)
    return sum(isinstance(module, torch.nn.Linear | Conv1D) for module in model.modules())


@pytest.mark.parametrize("kind", [*FAMILIES, "bert-v2"])
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
        if node.op_type == "MatMulInteger"
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


def hide_outlier(base_folder: Path, layer: int) -> None:
    """Give a layer's feed-forward part one unit that is always 1000 and that nothing reads.

    In fp32 the model stays what it was. In int8 all units share one scale, so that the others are 0.
    """
    import torch
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(base_folder)
    with torch.no_grad():
        model.encoder.layer[layer].intermediate.dense.bias[0] = 1000
        model.encoder.layer[layer].output.dense.weight[:, 0] = 0
    model.save_pretrained(base_folder)


def train_adapter(base_folder: Path, out: Path, data: Data, flags: str = "") -> Path:
    settings = f"--model {base_folder} --virtual-tokens {VIRTUAL_TOKENS} --encoder-hidden-size 16 --epochs 2"
    assert train_main(shlex.split(f"{settings} --out {out} --learning-rate 1e-2 {flags}") + data.flags) == 0
    return out


@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_that_int8_breaks_stays_in_fp32(layer: int, tmp_path: Path, data: Data) -> None:
    from transformers import AutoModel

    base = make_base_model(tmp_path / "base", "bert")
    hide_outlier(base, layer)
    adapter_folder = train_adapter(base, tmp_path / "adapter", data)
    assert export_bundle(adapter_folder, tmp_path / "plain", "--precision", "fp32") == 0
    file = easy_rows(tmp_path / "rows.jsonl", tmp_path / "plain" / "model.onnx", n_rows=200)
    out = tmp_path / "b"
    assert export_bundle(adapter_folder, out, "--precision", "int8", "--validation-file", file) == 0
    (gate,) = manifest_of(out)["graphs"][1]["gates"]
    assert gate["kept_fp32"] == [layer]
    pairs, expected = read_rows(file)
    check_gate(
        gate, run_pairs(out / "model.onnx", pairs), run_pairs(out / "model_int8.onnx", pairs), expected, "rows.jsonl"
    )

    before, after = (onnx.load(out / name) for name in ("model.onnx", "model_int8.onnx"))
    weights = {item.name: numpy_helper.to_array(item) for item in before.graph.initializer}
    dense = [
        node for node in before.graph.node if node.op_type in DENSE and weights.get(node.input[1], np.ones(1)).ndim == 2
    ]
    left = {item.name for item in after.graph.initializer if item.data_type == TensorProto.FLOAT}
    kept = [node.name for node in dense if node.input[1] in left]
    # Query, key, value, output and two of the feed-forward part; the last layer has its key and value in other form.
    assert len(kept) == (6 if layer == 0 else 4)
    integer = [node for node in after.graph.node if node.op_type == "MatMulInteger"]
    assert len(integer) == len(dense) - len(kept)
    assert not {name.removesuffix("/Gemm") for name in kept} & {node.name.partition("/Gemm")[0] for node in integer}
    # And it is the right ones that were spared.
    spared = AutoModel.from_pretrained(base).encoder.layer[layer].intermediate.dense.weight.detach().numpy()
    assert any(np.array_equal(weights[node.input[1]], spared) for node in dense if node.name in kept)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_without_labelled_rows_no_other_precision_can_be_asked_for(
    precision: str, adapter: Folders, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert export_bundle(adapter("bert"), no_leftovers / "b", "--precision", precision) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --precision {precision} is kept only if labelled rows show what it costs")
    assert "Give one with --validation-file, or take --precision fp32." in error
    assert list(no_leftovers.iterdir()) == []


def test_without_labelled_rows_auto_is_fp32_alone_and_says_why(
    adapter: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert export_bundle(adapter("bert"), tmp_path / "b", "--precision", "auto") == 0
    assert (
        "fp32 alone: what another precision costs can be measured only with --validation-file"
        in capsys.readouterr().out
    )
    assert load_bundle(tmp_path / "b").precisions == ("fp32",)


def test_the_file_that_the_adapter_was_validated_with_is_taken_where_it_lies_unchanged(
    adapter: Folders, bundle: Folders, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.fold.gate, "GATE_TOLERANCE", 2.0)
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / data.validation_file.name
    shutil.copy(data.validation_file, copy)
    assert export_bundle(adapter("bert"), tmp_path / "b") == 0
    (gate,) = manifest_of(tmp_path / "b")["graphs"][1]["gates"]
    assert (gate["file"], gate["n_rows"]) == ("validation.jsonl", 40)
    # One row fewer is another file, whatever its name.
    copy.write_text("".join(copy.read_text().splitlines(keepends=True)[:-1]))
    assert export_bundle(adapter("bert"), tmp_path / "c") == 0
    assert load_bundle(tmp_path / "c").precisions == ("fp32",)
    # Unless it is given.
    assert export_bundle(adapter("bert"), tmp_path / "d", "--validation-file", copy) == 0
    assert manifest_of(tmp_path / "d")["graphs"][1]["gates"][0]["n_rows"] == 39
    # And fp32 needs none.
    assert export_bundle(adapter("bert"), tmp_path / "e", "--precision", "fp32", "--validation-file", copy) == 0
    assert load_bundle(tmp_path / "e").precisions == ("fp32",)


def test_the_columns_of_a_validation_file_may_have_other_names(
    adapter: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.fold.gate, "GATE_TOLERANCE", 2.0)
    labels = ("not_equivalent", "equivalent")
    rows: list[dict[str, object]] = [
        {"first": row["sentence1"], "second": row["sentence2"], "gold": labels[index % 2]}
        for index, row in enumerate(make_pairs(20, seed=4))
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    columns = ("--text-columns", "first,second", "--label-column", "gold")
    flags = ("--precision", "int8", "--validation-file", file)
    assert export_bundle(adapter("bert"), tmp_path / "b", *flags, *columns) == 0
    (gate,) = manifest_of(tmp_path / "b")["graphs"][1]["gates"]
    pairs = [(str(row["first"]), str(row["second"])) for row in rows]
    fp32, int8 = (run_pairs(tmp_path / "b" / name, pairs) for name in ("model.onnx", "model_int8.onnx"))
    check_gate(gate, fp32, int8, [index % 2 for index in range(20)], "rows.jsonl")
    # The bundle reads what the adapter was trained on, not what this file is like.
    assert load_bundle(tmp_path / "b").find_task().task.text_columns == ("sentence1", "sentence2")

    capsys.readouterr()
    for more, words in (
        ((), "rows.jsonl has no column 'sentence1'; it has first, second, gold"),
        (
            ("--text-columns", "first", "--label-column", "gold"),
            "was trained on 2 (sentence1, sentence2). Name as many",
        ),
        (("--text-columns", "first,second", "--label-column", "second"), "rows.jsonl, row 1"),
    ):
        assert export_bundle(adapter("bert"), tmp_path / "c", *flags, *more) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
        assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("none.jsonl", None, "none.jsonl"), ("empty.jsonl", "", "empty.jsonl"), ("rows.txt", "x", "rows.txt")],
)
def test_a_validation_file_that_cannot_be_read_costs_no_work(
    name: str, content: str | None, words: str, adapter: Folders, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (no_leftovers / name).write_text(content)
    capsys.readouterr()
    flags = ("--precision", "auto", "--validation-file", no_leftovers / name)
    assert export_bundle(adapter("bert"), no_leftovers / "b", *flags) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert words in printed.err
    assert "[1/5]" not in printed.out
    assert not (no_leftovers / "b").exists()


def test_an_unknown_precision_is_refused(adapter: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert export_bundle(adapter("bert"), tmp_path / "b", "--precision", "int4") == 2
    assert capsys.readouterr().err == "error: --precision int4: choose one of fp32, fp16, int8, auto.\n"


@pytest.mark.parametrize("kind", ["bert", "roberta-v2", "gpt2", "llama"])
def test_fp16_gives_nearly_the_logits_of_fp32_and_takes_and_gives_the_same_types(
    kind: str, bundle_in: Precisions
) -> None:
    folder = bundle_in(kind, "fp16")
    assert load_bundle(folder).precisions == ("fp32", "fp16")
    fp32, fp16 = (onnx.load(folder / name) for name in ("model.onnx", "model_fp16.onnx"))
    for side in ("input", "output"):
        types = [
            [(item.name, item.type.tensor_type.elem_type) for item in getattr(model.graph, side)]
            for model in (fp32, fp16)
        ]
        assert types[0] == types[1]
    # The weights are half as long.
    floats = Counter[int]()
    for item in fp16.graph.initializer:
        floats[item.data_type] += int(np.prod(item.dims))
    assert floats[TensorProto.FLOAT16] > 20 * floats[TensorProto.FLOAT]

    batch = random_batch(np.random.default_rng(5), 8, 30, token_types=family_of(kind) in TOKEN_TYPES)
    before, after = (run_file(folder / name, batch) for name in ("model.onnx", "model_fp16.onnx"))
    # fp16 rounds to 11 bits; some 20 roundings lie one behind the other, and they rarely point the same way.
    rounding = 2**-11 * np.abs(before).max()
    assert 0 < np.abs(after - before).max() < 20 * rounding


def overflow_in_fp16(base_folder: Path) -> None:
    """Let a feed-forward part give 81,000 in one place, which fp32 holds and fp16 does not."""
    import torch
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(base_folder)
    with torch.no_grad():
        model.encoder.layer[0].intermediate.dense.bias[0] = 9000
        model.encoder.layer[0].output.dense.weight[0, 0] = 9
    model.save_pretrained(base_folder)


def test_a_graph_that_gives_no_numbers_fails_the_gate_whatever_it_seems_to_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The argmax of what is no number is a label too, and with as many rows of either label it scores as well as fp32."""
    base = make_base_model(tmp_path / "base", "bert")
    overflow_in_fp16(base)
    data = Data(
        write_jsonl(tmp_path / "train.jsonl", make_pairs(64, seed=1)),
        write_jsonl(tmp_path / "validation.jsonl", make_pairs(40, seed=2)),
    )
    adapter_folder = train_adapter(base, tmp_path / "adapter", data, "--task rte")
    assert export_bundle(adapter_folder, tmp_path / "plain", "--precision", "fp32") == 0
    pairs, _ = read_rows(data.validation_file)
    said = run_pairs(tmp_path / "plain" / "model.onnx", pairs).argmax(axis=1)
    # Half of the rows of each answer have it right, so that every answer scores the same.
    seen: Counter[int] = Counter()
    rows: list[dict[str, object]] = []
    for (first, second), answer in zip(pairs, said, strict=True):
        seen[answer] += 1
        rows.append({"sentence1": first, "sentence2": second, "label": int(seen[answer] % 2)})
    file = write_jsonl(tmp_path / "rows.jsonl", rows[: len(rows) - len(rows) % 2])
    capsys.readouterr()
    assert export_bundle(adapter_folder, tmp_path / "b", "--precision", "fp16", "--validation-file", file) == 2
    error = capsys.readouterr().err
    assert "some logits are no numbers" in error
    assert not (tmp_path / "b").exists()


VNNI = frozenset({"avx2", "avx512f", "avx512_vnni"})


@pytest.mark.parametrize(
    ("machine", "flags", "largest"),
    [
        ("x86_64", VNNI, 127),
        ("x86_64", frozenset({"avx2", "avx_vnni"}), 127),
        ("x86_64", frozenset({"avx2", "avx512f"}), 64),
        ("AMD64", frozenset(), 64),
        ("aarch64", frozenset(), 127),
    ],
)
def test_a_processor_that_would_overflow_gets_weights_of_seven_bits(
    machine: str,
    flags: frozenset[str],
    largest: int,
    bundle: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without VNNI, pairs of products are summed in 16 bits: 2 · 255 · 127 is more than 32,767, 2 · 255 · 64 is not."""
    monkeypatch.setattr(export.fold.quantize, "cpu_flags", lambda: flags)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    folder = tmp_path / "b"
    shutil.copytree(bundle("bert"), folder)
    export.fold.quantize._quantize(folder, folder / "model_int8.onnx", keep=set())
    assert {path.name for path in folder.iterdir()} == {path.name for path in bundle("bert").iterdir()} | {
        "model_int8.onnx"
    }
    model = onnx.load(folder / "model_int8.onnx")
    arrays = {item.name: numpy_helper.to_array(item).astype(int) for item in model.graph.initializer}
    names = [name.removesuffix("_zero_point") for name in arrays if name.endswith("_zero_point")]
    assert len(names) == 12
    # What is multiplied is the distance from the zero point.
    distances = [np.abs(arrays[f"{name}_quantized"] - arrays[f"{name}_zero_point"]).max() for name in names]
    assert max(distances) == largest


def test_what_the_processor_can_do_is_read_as_linux_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(export.fold.quantize, "Path", lambda _: file)
    assert cpu_flags() == frozenset()  # no such file: not Linux
    file.write_text("processor\t: 0\nmodel name\t: X avx9\nflags\t\t: fpu sse2 avx512_vnni\nbugs\t\t: a b\n")
    assert cpu_flags() == {"fpu", "sse2", "avx512_vnni"}
    file.write_text("processor\t: 0\nFeatures\t: fp asimd\n")  # as on ARM
    assert cpu_flags() == frozenset()


def test_a_layer_search_never_keeps_more_than_half_of_the_layers(
    bundle: Folders, adapter: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gate that nothing passes, every candidate is tried, and each leaves one more layer alone."""
    tried: list[set[int]] = []
    quantize = export.fold.quantize._quantize

    def spy(folder: Path, target: Path, *, keep: set[int]) -> None:
        tried.append(set(keep))
        quantize(folder, target, keep=keep)

    monkeypatch.setattr(export.fold.gate, "GATE_TOLERANCE", -1.0)
    monkeypatch.setattr(export.fold.quantize, "_quantize", spy)
    file = easy_rows(tmp_path / "rows.jsonl", bundle("gpt2") / "model.onnx")
    assert export_bundle(adapter("gpt2"), tmp_path / "b", "--precision", "int8", "--validation-file", file) == 2
    # All of it, each layer spared alone to rank them, and the better of the two.
    assert tried[:3] == [set(), {0}, {1}]
    assert len(tried) == 4
    assert tried[3] in ({0}, {1})
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
