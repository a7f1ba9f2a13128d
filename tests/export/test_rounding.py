"""Weights in integers: rounded so that a product's error is small, in as many bits as the processor is fast and exact with."""

import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from export.bundle.folder import GRAPH_FILES, INT8, WeightBits
from export.fold.precision import choose, gate, integer, rounding
from export.fold.precision.calibration import TaskBatches, measure_grams, session_in_memory
from export.fold.precision.choose import Int8Chooser
from export.fold.precision.dense import dense_products
from export.fold.precision.rounding import round_by_gptq, round_to_nearest, round_weights
from export.runtime import session
from tests.conftest import Data, Folders, Precisions, random_batch
from tests.export.graphs import INTEGER, manifest_of, open_graph, run_export
from train.data.tasks import MRPC

N_IN, N_OUT = 24, 10


def correlated_inputs(n_rows: int = 400) -> np.ndarray:
    generator = np.random.default_rng(0)
    return (
        generator.normal(size=(n_rows, 6)) @ generator.normal(size=(6, N_IN))
        + generator.normal(size=(n_rows, N_IN)) / 10
    )


def matrix_of(n_in: int = N_IN) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(n_in, N_OUT)).astype(np.float32)


def by_least_squares(matrix: np.ndarray, gram: np.ndarray, largest: int) -> np.ndarray:
    """GPTQ as its paper derives it: after each channel is rounded, the others are solved for anew."""
    hessian = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    scales = np.abs(matrix).max(axis=0) / largest
    left, rounded = matrix.astype(np.float64), np.zeros(matrix.shape)
    channels = list(np.argsort(-np.diag(gram), kind="stable"))
    while channels:
        first, channels = channels[0], channels[1:]
        rounded[first] = np.rint(left[first] / scales).clip(-largest, largest)
        error = rounded[first] * scales - left[first]
        if channels:
            left[channels] -= np.linalg.solve(
                hessian[np.ix_(channels, channels)], np.outer(hessian[channels, first], error)
            )
    return rounded


@pytest.mark.parametrize(("bits", "largest"), [(7, 64), (8, 127)])
def test_gptq_is_that_of_its_paper_and_spares_the_products(
    bits: WeightBits, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, matrix = correlated_inputs(), matrix_of()
    gram = inputs.T @ inputs
    monkeypatch.setattr(rounding, "BLOCK", 7)  # four blocks, the last one shorter
    found = round_by_gptq(matrix, gram, bits)
    assert (found.values == by_least_squares(matrix, gram, largest)).mean() > 0.99
    assert found.values.dtype.name == "int8"
    assert np.abs(found.values.astype(int)).max() == largest
    nearest = round_to_nearest(matrix, bits)

    def error(weight: rounding.IntegerWeight) -> float:
        return float(np.square(inputs @ (weight.values * weight.scales.astype(np.float64) - matrix)).mean())

    assert error(found) < error(nearest) / 3


@pytest.mark.parametrize(
    "gram",
    [
        np.diag(np.arange(1.0, N_IN + 1)),
        np.zeros((N_IN, N_IN)),
        np.full((N_IN, N_IN), np.nan),
        np.full((N_IN, N_IN), np.inf),
    ],
    ids=["not correlated", "never used", "no numbers", "infinite"],
)
def test_where_inputs_say_nothing_weights_are_rounded_to_nearest(gram: np.ndarray) -> None:
    found, nearest = round_by_gptq(matrix_of(), gram, 8), round_to_nearest(matrix_of(), 8)
    assert np.array_equal(found.values, nearest.values)
    assert np.array_equal(found.scales, nearest.scales)


def test_dead_channels_and_outliers_leave_weights_that_are_in_range() -> None:
    inputs, matrix = correlated_inputs(), matrix_of()
    inputs[:, 3], inputs[:, 5] = 0, inputs[:, 5] * 1e4
    matrix[:, 2] = 0
    found = round_by_gptq(matrix, inputs.T @ inputs, 8)
    assert np.abs(found.values.astype(int)).max() == 127
    assert (found.values[:, 2] == 0).all()
    assert np.isfinite(found.scales).all()
    assert (found.scales > 0).all()


def shared_graph() -> onnx.ModelProto:
    """Two layers that share a matrix, and one of its own, stored the other way round."""
    model: onnx.ModelProto = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]> g (int64[b, t] input_ids) => (float[n, 8] logits) {
        e = Gather(table, input_ids) a = MatMul(e, w) r = Relu(a) s = MatMul(r, w)
        rows = Reshape(s, shape) logits = Gemm<transB = 1>(rows, v) }"""
    )
    generator = np.random.default_rng(3)
    for name, shape in {"table": (50, 8), "w": (8, 8), "v": (8, 8)}.items():
        model.graph.initializer.append(numpy_helper.from_array(generator.normal(size=shape).astype(np.float32), name))
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 8]), "shape"))
    for number, node in enumerate(model.graph.node):
        node.name = f"node{number}"
    return model


def token_batches() -> list[TaskBatches]:
    ids = np.random.default_rng(5).integers(0, 50, size=(3, 4, 9))
    return [TaskBatches("made up", 0, MRPC, tuple({"input_ids": batch} for batch in ids))]


@pytest.mark.parametrize("memory", [1e9, 1])
def test_a_matrix_that_layers_share_is_rounded_for_all_that_they_read(
    memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "GRAM_BYTES", memory)
    model, texts = shared_graph(), token_batches()
    arrays = {item.name: numpy_helper.to_array(item).astype(np.float64) for item in model.graph.initializer}
    first = arrays["table"][np.concatenate([batch["input_ids"].ravel() for batch in texts[0].batches])]
    second = np.maximum(first @ arrays["w"], 0)
    last = second @ arrays["w"]
    gram = first.T @ first + second.T @ second
    (found,) = measure_grams(model, texts, [("e", "r")]).values()
    assert np.abs(found - gram).max() < 1e-5 * gram.max()
    weights = round_weights(model, texts, 8)
    assert np.array_equal(weights["w"].values, round_by_gptq(arrays["w"], gram, 8).values)
    assert np.array_equal(weights["v"].values, round_by_gptq(arrays["v"].T, last.T @ last, 8).values)


@pytest.mark.parametrize("ranges", [None, {"e": (-4.0, 4.0), "r": (0.0, 20.0), "rows": (-60.0, 60.0)}])
def test_products_that_share_a_matrix_are_not_fused(ranges: dict[str, integer.Range] | None) -> None:
    model, texts = shared_graph(), token_batches()
    quantized = integer.quantize_products(model, weights=round_weights(model, texts, 7), ranges=ranges)
    kinds = [node.op_type for node in quantized.graph.node if node.op_type in INTEGER]
    assert kinds == ["MatMulInteger", "MatMulInteger", "MatMulIntegerToFloat"]
    (exact,), (found,) = (
        open_graph(one.SerializeToString()).run(["logits"], texts[0].batches[0]) for one in (model, quantized)
    )
    assert 0 < np.abs(found - exact).max() < 0.1 * np.abs(exact).max()


def test_a_matrix_that_is_read_in_both_directions_stays_in_fp32() -> None:
    model = shared_graph()
    model.graph.node[-1].input[1] = "w"
    assert dense_products(model.graph) == []
    assert INTEGER.isdisjoint(node.op_type for node in integer.quantize_products(model).graph.node)


def test_a_matrix_too_wide_for_its_gram_is_left_to_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "WIDEST", 7)
    assert round_weights(shared_graph(), token_batches(), 8) == {}


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "expected"),
    [
        ("x86_64", "processor\t: 0\nmodel name\t: X\nflags\t\t: avx2 avx512f avx512_vnni\nbugs\t\t: a b\n", False),
        ("x86_64", "flags\t: avx2 avx_vnni\n", False),
        ("x86_64", "model name\t: avx_vnni\nflags\t: avx2 avx512f\n", True),
        ("AMD64", None, True),  # not Linux
        ("aarch64", "processor\t: 0\nFeatures\t: fp asimd\n", False),
    ],
)
def test_a_processor_that_sums_in_16_bits_is_known_by_its_flags(
    machine: str, cpuinfo: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    monkeypatch.setattr(session, "Path", lambda path: file if path == "/proc/cpuinfo" else Path(path))
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert session.overflows() is expected


def largest_weights(path: Path) -> set[int]:
    """The largest absolute weight of each dense product of a graph."""
    model = onnx.load(path)
    arrays = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    weights = [arrays[node.input[1]] for node in model.graph.node if node.op_type in INTEGER]
    return {int(np.abs(weight.astype(int)).max()) for weight in weights}


@pytest.mark.parametrize(("overflows", "largest", "bits"), [(True, 64, 7), (False, 127, 8)])
def test_a_bundle_has_weights_of_as_many_bits_as_are_fast_where_it_was_exported(
    overflows: bool,
    largest: int,
    bits: int,
    adapter: Folders,
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two products of 8 bits with 7 fit into 16: 2 · 255 · 64 is at most 32,767, 2 · 255 · 127 is more."""
    monkeypatch.setattr(choose, "overflows", lambda: overflows)
    monkeypatch.setattr(gate, "GATE_TOLERANCE", 2.0)  # no metric can fall by more
    out = tmp_path / "b"
    words = [adapter("bert"), "--out", out, "--precision", "int8", "--validation-file", data.validation_file]
    assert run_export(*words) == 0
    assert largest_weights(out / GRAPH_FILES[INT8]) == {largest}
    (record,) = [graph for graph in manifest_of(out)["graphs"] if graph["precision"] == "int8"]
    assert record["int8"]["weight_bits"] == bits
    assert ("7-bit weights" in capsys.readouterr().out) == overflows


def fits_eight_bits_alone(path: Path) -> bool:
    return largest_weights(path) == {127}


def has_static_scales(path: Path) -> bool:
    return "QuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}


def is_smoothed_between_layers(path: Path) -> bool:
    """The feed-forward layers of the tiny BERT meet in 64 channels; all else is 32 wide."""
    constants = onnx.load(path).graph.initializer
    return any(item.name.endswith("_inverse_scales") and list(item.dims) == [64] for item in constants)


@pytest.mark.parametrize(
    ("passes", "bits", "activations", "wide", "n_refused"),
    [
        (fits_eight_bits_alone, 8, "dynamic", False, 4),
        (has_static_scales, 7, "static", False, 1),
        (is_smoothed_between_layers, 7, "dynamic", True, 2),
    ],
)
def test_where_the_first_graph_costs_too_much_the_next_is_tried_before_any_product_goes_back_to_fp32(
    passes: Callable[[Path], bool],
    bits: int,
    activations: str,
    wide: bool,
    n_refused: int,
    bundle: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(choose, "overflows", lambda: True)
    monkeypatch.setattr(choose, "SLOWER", 0.0)  # where dynamic scales pass, they stay
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "model.onnx").write_bytes((bundle("bert") / "model.onnx").read_bytes())
    batches = [random_batch(np.random.default_rng(seed), 6, 12, token_types=True) for seed in range(3)]
    chooser = Int8Chooser(folder, [TaskBatches("made up", 0, MRPC, tuple(batches))])

    def judge(path: Path) -> SimpleNamespace:
        return SimpleNamespace(passed=passes(path))

    form, cost = chooser.choose(judge, may_be_static=True)  # type: ignore[arg-type]
    assert cost.passed
    assert (form.weight_bits, form.activations, form.wide, form.kept_fp32) == (bits, activations, wide, ())
    assert passes(folder / GRAPH_FILES[INT8])
    assert capsys.readouterr().out.count("7-bit weights") == n_refused


@pytest.mark.parametrize("overflows", [True, False])
def test_sessions_are_exact_with_eight_bits_and_pay_for_it_only_where_sums_overflow(
    overflows: bool, bundle_in: Precisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's option makes weights unsigned on every processor, which halves the speed where there is VNNI."""
    model: onnx.ModelProto = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (uint8[m, 64] x) => (int32[m, 16] y) { y = MatMulInteger(x, w) }'
    )
    model.graph.initializer.append(numpy_helper.from_array(np.full((64, 16), 127, np.int8), "w"))
    (found,) = session_in_memory(model).run(None, {"x": np.full((4, 64), 255, np.uint8)})
    assert (np.asarray(found) == 64 * 127 * 255).all()
    monkeypatch.setattr(session, "overflows", lambda: overflows)
    for each in (
        session_in_memory(model),
        session.open_session(bundle_in("bert", "int8") / GRAPH_FILES[INT8], threads=1, use_cuda=False),
    ):
        options, key = each.get_session_options(), "session.x64quantprecision"
        if overflows:
            assert options.get_session_config_entry(key) == "1"
        else:
            with pytest.raises(RuntimeError, match=key):
                options.get_session_config_entry(key)
