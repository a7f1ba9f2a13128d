"""What int8 is made by: smoothing that changes nothing in fp32, static scales, fidelity, and the texts for both."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser
from scipy.stats import binomtest

from export.__main__ import main as export
from export.bundle.folder import load_bundle
from export.fold.precision.calibration import TaskBatches, measure_activations
from export.fold.precision.choose import Int8Chooser
from export.fold.precision.dense import dense_products, load_graph
from export.fold.precision.fidelity import compare_logits, wilson_interval
from export.fold.precision.integer import quantize_products
from export.fold.precision.smooth import channel_scales, smooth
from export.fold.precision.texts import everyday_texts, read_texts
from tests.conftest import ROOT, SHIPPED, Folders, make_pairs, random_batch, write_jsonl
from tests.export.graphs import manifest_of, open_graph, refusal, run_export
from train.adapter.folder import load_adapter
from train.common.errors import PrecisionError
from train.data.tasks import MRPC, TASKS
from train.model.tokenizer import load_tokenizer

MNLI = TASKS["mnli"]
N, M = 8, 12
"""Channels of a handwritten graph, and of its wide part."""


def make_graph(body: str, weights: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A graph x → y with random constants."""
    model: onnx.ModelProto = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 18]> g (float[b, t, {N}] x) => (float[b, t, {N}] y) {{ {body} }}'
    )
    generator = np.random.default_rng(3)
    for name, shape in weights.items():
        array = generator.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for number, node in enumerate(model.graph.node):
        node.name = f"node{number}"
    return model


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return np.asarray(open_graph(model.SerializeToString()).run(["y"], {"x": x})[0])


NORM = "n = LayerNormalization<axis = -1>(x, g, h)"
NORM_WEIGHTS = {"g": (N,), "h": (N,)}
SQUARE, UP, DOWN = (N, N), (N, M), (M, N)


@pytest.mark.parametrize(
    ("body", "weights", "n_muls"),
    [
        # A norm that feeds its products alone, and one that feeds the residual too.
        (f"{NORM} y = MatMul(n, w)", NORM_WEIGHTS | {"w": SQUARE}, 0),
        (f"{NORM} p = MatMul(n, w) y = Add(p, n)", NORM_WEIGHTS | {"w": SQUARE}, 1),
        (f"{NORM} p = MatMul(n, w) q = MatMul(n, v) y = Add(p, q)", NORM_WEIGHTS | {"w": SQUARE, "v": SQUARE}, 0),
        # As a decoder's: the root mean square, its weights in a Mul, a gate.
        ("m = Mul(x, g) y = MatMul(m, w)", {"g": (N,), "w": SQUARE}, 0),
        (
            "g = MatMul(x, a) s = Sigmoid(g) u = MatMul(x, c) m = Mul(s, u) y = MatMul(m, d)",
            {"a": UP, "c": UP, "d": DOWN},
            1,  # x itself is no node's
        ),
        # Attention of two heads: its values take the scales of what reads its output.
        (
            """h = Constant<value_ints = [0, 0, 2, 4]>() f = Constant<value_ints = [0, 0, 8]>()
            q = MatMul(x, b) k = Reshape(q, h) l = Transpose<perm = [0, 2, 1, 3]>(k) r = Transpose<perm = [0, 2, 3, 1]>(k)
            s = MatMul(l, r) p = Softmax<axis = -1>(s)
            v = MatMul(x, a) u = Reshape(v, h) w = Transpose<perm = [0, 2, 1, 3]>(u)
            c = MatMul(p, w) t = Transpose<perm = [0, 2, 1, 3]>(c) j = Reshape(t, f) y = MatMul(j, d)""",
            {"a": SQUARE, "b": SQUARE, "d": SQUARE},
            1,
        ),
        # As OPT's: ReLU lets a scale through, a bias takes its part.
        ("p = MatMul(x, a) q = Add(p, k) r = Relu(q) y = MatMul(r, d)", {"a": UP, "k": (M,), "d": DOWN}, 1),
        # GELU and its like do not, and there the Mul is on the widest tensor.
        ("p = MatMul(x, a) r = Tanh(p) y = MatMul(r, d)", {"a": UP, "d": DOWN}, 2),
        # One matrix in two places, as in ALBERT, gets the same scales.
        ("p = MatMul(x, w) r = Tanh(p) y = MatMul(r, w)", {"w": SQUARE}, 2),
        # And one that something else reads too gets none.
        ("p = MatMul(x, w) s = ReduceSum(w) y = Add(p, s)", {"w": SQUARE}, 0),
    ],
)
def test_smoothing_changes_nothing_in_fp32_and_costs_a_mul_only_where_nothing_can_take_it(
    body: str, weights: dict[str, tuple[int, ...]], n_muls: int
) -> None:
    model = make_graph(body, weights)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 5, N)).astype(np.float32)
    largest = {
        product.source: np.exp(generator.normal(size=_width(model, product.weight, product.transposed)))
        for product in dense_products(model.graph)
    }
    smoothed = smooth(model, largest, 0.5, wide=True)
    counts = Counter(node.op_type for node in smoothed.graph.node)
    assert counts["Mul"] - Counter(node.op_type for node in model.graph.node)["Mul"] == n_muls
    assert np.abs(run(smoothed, x) - run(model, x)).max() < 1e-5
    names = {item.name for item in model.graph.initializer}
    is_changed = [
        not np.array_equal(numpy_helper.to_array(before), numpy_helper.to_array(after))
        for before, after in zip(model.graph.initializer, smoothed.graph.initializer, strict=False)
        if before.name in names
    ]
    assert any(is_changed) == ("ReduceSum" not in body)


def _width(model: onnx.ModelProto, weight: str, transposed: bool) -> int:
    (dims,) = (list(item.dims) for item in model.graph.initializer if item.name == weight)
    return int(dims[1] if transposed else dims[0])


def test_smoothing_of_a_whole_classifier_is_exact_and_static_int8_gives_a_row_the_same_bits_in_every_batch(
    bundle: Folders,
) -> None:
    folder = bundle("bert")
    model = load_graph(folder / "model.onnx")
    batches = [random_batch(np.random.default_rng(seed), 6, 12, token_types=True) for seed in range(3)]
    texts = [TaskBatches("made up", 0, MRPC, tuple(batches))]
    activations = measure_activations(model, texts)
    largest = {name: found.largest for name, found in activations.items()}
    smoothed = smooth(model, largest, 0.6, wide=True)
    run_model = {
        "fp32": _session(model),
        "smoothed": _session(smoothed),
        "static": _session(
            quantize_products(
                smoothed, ranges={name: found.range for name, found in measure_activations(smoothed, texts).items()}
            )
        ),
        "dynamic": _session(quantize_products(smoothed)),
    }
    logits = {name: [session.run(["logits"], batch)[0] for batch in batches] for name, session in run_model.items()}
    for name, tolerance in (("smoothed", 1e-5), ("static", 0.2), ("dynamic", 0.2)):
        assert np.abs(np.subtract(logits[name], logits["fp32"])).max() < tolerance, name
    assert np.abs(np.subtract(logits["static"], logits["fp32"])).max() > 1e-5

    def beside(name: str, batch: dict[str, np.ndarray], row: int, *others: int) -> np.ndarray:
        part = {key: array[[row, *others]] for key, array in batch.items()}
        return np.asarray(run_model[name].run(["logits"], part)[0][0])

    for batch, whole in zip(batches, logits["static"], strict=True):
        for row in range(len(whole)):
            for others in ((), (0,), (5, 3), (0, 1, 2, 3, 4, 5, 0, 1, 2, 3)):
                assert np.array_equal(beside("static", batch, row, *others), whole[row])
    differences = [
        np.abs(beside("dynamic", batch, row, 0) - whole[row]).max()
        for batch, whole in zip(batches, logits["dynamic"], strict=True)
        for row in range(len(whole))
    ]
    assert max(differences) > 0


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return open_graph(model.SerializeToString())


def test_dead_channels_and_outliers_get_scales_that_are_numbers() -> None:
    activations = np.array([1.0, 0.0, 1e4, np.inf, np.nan])
    weights = np.ones(5)
    scales = channel_scales(activations, weights, 0.5)
    assert np.isfinite(scales).all()
    assert scales.max() <= 1e4
    # Dead, infinite and no number: left alone. So is what is small: other texts may have more in it than these.
    assert (scales[[0, 1, 3, 4]] == 1).all()
    # The geometric mean of 1 and 1e4 at α 0.5 is 10.
    assert scales[2] == pytest.approx(10)
    # A channel that nothing reads may be made smaller than one that something does.
    read, unread = (channel_scales(np.array([1, 1e3]), np.array([1.0, size]), 0.5)[1] for size in (1.0, 0.0))
    assert unread > read
    assert (channel_scales(np.zeros(3), np.ones(3), 0.5) == 1).all()


@pytest.mark.parametrize("outlier", [1e4, 0.0])
def test_an_outlier_that_breaks_int8_does_not_break_it_when_it_is_smoothed(outlier: float) -> None:
    model = make_graph("y = MatMul(x, w)", {"w": SQUARE})
    x = np.random.default_rng(1).normal(size=(4, 6, N)).astype(np.float32)
    x[..., 3] *= outlier
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[3] = 0.1 / max(outlier, 1)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    largest = {"x": np.abs(x).max(axis=(0, 1))}
    expected = x.astype(np.float64) @ weight.astype(np.float64)
    plain, smoothed = (
        np.abs(run(quantize_products(graph), x) - expected).mean()
        for graph in (model, smooth(model, largest, 0.5, wide=True))
    )
    assert smoothed < 0.05
    if outlier:
        assert smoothed < plain / 10


def test_matrices_that_exporters_write_as_nodes_are_found(tmp_path: Path) -> None:
    values = np.random.default_rng(2).normal(size=(N, N)).astype(np.float32)
    model = make_graph(
        "c = Constant<value = float {0}>() p = MatMul(x, c) t = Transpose<perm = [1, 0]>(w) y = MatMul(p, t)",
        {"w": SQUARE},
    )
    model.graph.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(values))
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "model.onnx")
    loaded = load_graph(tmp_path / "model.onnx")
    assert [node.op_type for node in loaded.graph.node] == ["MatMul", "MatMul"]
    products = dense_products(loaded.graph)
    assert [product.source for product in products] == ["x", "p"]
    assert len({product.name for product in products}) == 2
    x = np.random.default_rng(0).normal(size=(2, 3, N)).astype(np.float32)
    assert np.abs(run(loaded, x) - run(model, x)).max() < 1e-5
    assert "MatMulIntegerToFloat" in {node.op_type for node in quantize_products(loaded).graph.node}


def test_fidelity_and_its_intervals_are_those_of_scipy() -> None:
    for hits, n in ((300, 300), (0, 40), (291, 300)):
        expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
        assert wilson_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-6)
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(200, 3))
    logits = reference + generator.normal(size=(200, 3)) / 10
    found = compare_logits(TaskBatches("made up", 0, MNLI, ()), reference, logits)
    assert found.equal_labels == (reference.argmax(1) == logits.argmax(1)).sum()
    assert found.rms_logit_difference == pytest.approx(np.linalg.norm(reference - logits) / np.sqrt(600))
    assert found.max_logit_difference == np.abs(reference - logits).max()
    assert found.passed == (found.equal_labels >= 196)
    assert not compare_logits(TaskBatches("", 0, MNLI, ()), reference, np.full((200, 3), np.nan)).passed


def test_the_everyday_pairs_are_300_and_no_two_alike() -> None:
    pairs = everyday_texts(is_pair=True)
    assert len(set(pairs)) == len(pairs) == 300
    assert len(set(everyday_texts(is_pair=False))) == 450
    words = [len(sentence.split()) for pair in pairs for sentence in pair]
    assert (min(words), max(words)) == pytest.approx((2, 20), abs=2)


GERMAN = (
    "Die Katze sitzt auf der Fensterbank und schaut den Vögeln zu.",
    "Der Zug nach Hamburg fährt von Gleis sieben ab.",
)


def calibration_file(path: Path, n_rows: int) -> Path:
    rows = [{"sentence1": row["sentence1"], "sentence2": row["sentence2"]} for row in make_pairs(n_rows, seed=9)]
    return write_jsonl(path, rows)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "texts.jsonl"),
        (
            [{"sentence1": "word1", "sentence2": "word2"}] * 31,
            "texts.jsonl has 31 texts, too few to say what int8 costs",
        ),
        ([{"sentence1": "word1"}] * 40, "texts.jsonl has no column 'sentence2'"),
        (
            [{"sentence1": "word1", "sentence2": ""}] * 40,
            "texts.jsonl, row 1 (line 1): column 'sentence2' holds no text",
        ),
        ([{"sentence1": "word1", "sentence2": "word2"}] * 40, "fp32 gives all texts of texts.jsonl the same label"),
        (
            [{"sentence1": "kein Wort", "sentence2": "word2"}] * 40,
            "costs is unknown: the tokenizer does not know 67 % of the words in texts.jsonl. Give labelled rows with",
        ),
    ],
)
def test_calibration_files_that_say_nothing_are_refused_and_leave_nothing(
    rows: Sequence[dict[str, object]],
    words: str,
    adapter: Folders,
    no_leftovers: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_jsonl(no_leftovers / "texts.jsonl", list(rows))
    flags = ("--precision", "int8", "--calibration-file", file)
    assert words in refusal(capsys, adapter("bert"), "--out", no_leftovers / "b", *flags)
    assert [path.name for path in no_leftovers.iterdir()] == ["texts.jsonl"]


@pytest.mark.parametrize(
    ("texts", "trained", "trouble"),
    [
        (GERMAN, 1.07, "texts.jsonl into 1.7 tokens a word and the training's texts into 1.1, so these are in another"),
        (GERMAN, 1.6, ""),
        (GERMAN, 0.0, ""),  # an adapter of which the training's texts are not known
        (None, 1.07, ""),
        (
            None,
            0.7,
            "splits everyday English into 1.0 tokens a word and the training's texts into 0.7, so these are in",
        ),
        (None, 12.0, "so these are in another language"),  # one without blanks between its words
    ],
)
def test_texts_in_another_language_than_the_trainings_are_no_measure(
    texts: tuple[str, str] | None, trained: float, trouble: str, tmp_path: Path
) -> None:
    adapter = replace(load_adapter(ROOT / "demo" / "adapters" / SHIPPED[0]), tokens_per_word=trained)
    tokenizer = load_tokenizer(adapter.folder, 128)
    rows: list[dict[str, object]] = [dict(zip(adapter.task.text_columns, texts or (), strict=False))] * 40
    file = write_jsonl(tmp_path / "texts.jsonl", rows) if texts else None
    found = read_texts(adapter, file, tokenizer)
    assert found.name == (file.name if file else "everyday English")
    assert trouble in found.trouble and bool(trouble) == bool(found.trouble)


def test_a_graph_without_a_product_with_a_constant_matrix_is_refused(tmp_path: Path) -> None:
    onnx.save(make_graph("y = Tanh(x)", {}), tmp_path / "model.onnx")
    with pytest.raises(PrecisionError, match=r"int8 would win nothing: .* constant matrix\. Take --precision fp32\."):
        Int8Chooser(tmp_path, [])
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_an_interrupted_quantization_leaves_nothing(
    adapter: Folders, no_leftovers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C while the second of its candidates is made."""
    quantize = Mock(side_effect=[DEFAULT, KeyboardInterrupt], wraps=quantize_products)
    monkeypatch.setattr("export.fold.precision.choose.quantize_products", quantize)
    words = [str(adapter("bert")), "--out", str(no_leftovers / "b"), "--precision", "int8"]
    assert export([*words, "--calibration-file", str(calibration_file(no_leftovers / "texts.jsonl", 80))]) == 130
    assert quantize.call_count == 2
    assert [path.name for path in no_leftovers.iterdir()] == ["texts.jsonl"]


def test_texts_without_labels_say_what_int8_costs(
    adapter: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = calibration_file(tmp_path / "texts.jsonl", 80)
    out = tmp_path / "b"
    assert run_export(adapter("bert"), "--out", out, "--calibration-file", file) == 0
    printed = capsys.readouterr().out
    assert "compared with fp32 on 80 texts of texts.jsonl" in printed
    (graph,) = [graph for graph in load_bundle(out).graphs if graph.precision == "int8"] or [None]  # type: ignore[list-item]
    record = next(
        record
        for record in [*manifest_of(out)["graphs"], *manifest_of(out)["refused"]]
        if record["precision"] == "int8"
    )
    (fidelity,) = record["fidelity"]
    assert (fidelity["texts"], fidelity["n_texts"], record["gates"]) == ("texts.jsonl", 80, [])
    assert (graph is not None) == (fidelity["equal_labels"] >= 0.98 * 80)
    low, high = fidelity["interval"]
    assert low < fidelity["equal_labels"] / 80 <= high
    assert 0 < fidelity["rms_logit_difference"] < fidelity["max_logit_difference"]
    assert f"{fidelity['equal_labels']} of 80 labels equal" in printed
