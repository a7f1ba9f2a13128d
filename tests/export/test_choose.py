"""Which int8 is chosen: by the logits' error for α, by what fp32 wins for its time for single products."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from export.fold.precision import choose
from export.fold.precision.calibration import TaskBatches, measure_activations
from export.fold.precision.choose import Int8Chooser
from export.fold.precision.dense import load_graph
from export.fold.precision.gate import Cost
from export.fold.precision.integer import quantize_products
from export.fold.precision.smooth import smooth
from tests.conftest import Folders, random_batch
from tests.export.graphs import open_graph
from train.data.tasks import MRPC


def test_the_smoothing_is_chosen_that_makes_the_least_error_of_the_logits(bundle: Folders, tmp_path: Path) -> None:
    model = load_graph(bundle("bert") / "model.onnx")
    onnx.save(model, tmp_path / "model.onnx")
    batches = [random_batch(np.random.default_rng(seed), 6, 12, token_types=True) for seed in range(3)]
    texts = [TaskBatches("made up", 0, MRPC, tuple(batches))]
    largest = {name: found.largest for name, found in measure_activations(model, texts).items()}

    def logits(graph: onnx.ModelProto) -> np.ndarray:
        session = open_graph(graph.SerializeToString())
        return np.concatenate([session.run(["logits"], batch)[0] for batch in batches])

    errors = {
        alpha: np.square(
            logits(quantize_products(model if alpha is None else smooth(model, largest, alpha, wide=False)))
            - logits(model)
        ).mean()
        for alpha in (None, 0.4, 0.5, 0.6, 0.7)
    }
    chooser = Int8Chooser(tmp_path, texts)
    form, _ = chooser.choose(lambda _: Cost((), ()), may_be_static=False)
    assert form.alpha == min(errors, key=lambda alpha: errors[alpha])
    assert min(errors.values()) < 0.9 * max(errors.values())


def small_graph(folder: Path, largest: float) -> list[TaskBatches]:
    """Three dense products, of which the first reads token 1, whose embedding is so large; and texts that have it."""
    model: onnx.ModelProto = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]> g (int64[b, t] input_ids) => (float[b, 2] logits) {
            h = Gather(table, input_ids) p = MatMul(h, w) r = Tanh(p) q = MatMul(r, u) s = Tanh(q)
            axis = Constant<value_ints = [1]>() m = ReduceMean<keepdims = 0>(s, axis) logits = MatMul(m, v)
        }"""
    )
    generator = np.random.default_rng(3)
    for name, shape in (("table", (20, 8)), ("w", (8, 8)), ("u", (8, 8)), ("v", (8, 2))):
        array = generator.normal(size=shape).astype(np.float32)
        if name == "table":
            array[1] *= largest / np.abs(array[1]).max()
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for node in model.graph.node:
        node.name = f"makes_{node.output[0]}"
    onnx.save(model, folder / "model.onnx")
    ids = generator.integers(2, 20, (48, 6))
    ids[:, 0] = 1
    return [TaskBatches("made up", 0, MRPC, tuple({"input_ids": part} for part in np.split(ids, 3)))]


def test_the_product_goes_back_to_fp32_first_that_wins_most_for_its_time(tmp_path: Path) -> None:
    """One token's numbers take the whole range, which no smoothing of channels can change; the last product is cheap."""
    texts = small_graph(tmp_path, 1000.0)

    def judge(path: Path) -> SimpleNamespace:
        return SimpleNamespace(passed="MatMul" in {node.op_type for node in onnx.load(path).graph.node})

    form, cost = Int8Chooser(tmp_path, texts).choose(judge, may_be_static=False)  # type: ignore[arg-type]
    assert cost.passed
    assert form.kept_fp32 == ("makes_p",)


@pytest.mark.parametrize(("largest", "activations"), [(0.0, "static"), (1e4, "static"), (1e38, "dynamic")])
def test_ranges_without_end_get_no_static_scale(
    largest: float, activations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "SLOWER", 1e9)  # static scales are taken wherever there are some
    texts = small_graph(tmp_path, largest)
    model = onnx.load(tmp_path / "model.onnx")
    # Without what bounds it, the second product reads what the first one makes of the largest numbers.
    del model.graph.node[2]
    model.graph.node[2].input[0] = "p"
    (weight,) = (item for item in model.graph.initializer if item.name == "w")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 10, "w"))
    onnx.save(model, tmp_path / "model.onnx")
    form, _ = Int8Chooser(tmp_path, texts).choose(lambda _: Cost((), ()), may_be_static=True)
    assert form.activations == activations
