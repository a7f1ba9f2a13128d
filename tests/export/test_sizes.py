"""`export.fold.graphs.sizes`: shapes that are computed once, and graphs that stay as they are."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from export.fold.graphs.sizes import share_sizes
from tests.conftest import Folders
from tests.export.graphs import run_file

LAYER = """
    keys_{n} = Concat<axis = 1>(prompt_{n}, x_{n})
    shape_{n} = Shape(keys_{n})
    tokens_{n} = Gather(shape_{n}, one)
    tokens_axis_{n} = Unsqueeze(tokens_{n}, zero_axis)
    batch_{n} = Gather(shape_{n}, zero)
    batch_axis_{n} = Unsqueeze(batch_{n}, zero_axis)
    wide_{n} = Concat<axis = 0>(batch_axis_{n}, tokens_axis_{n}, four)
    flat_{n} = Reshape(keys_{n}, wide_{n})
    read_{n} = {operator}(flat_{n})
    x_{m} = Slice(read_{n}, three_axis, end, one_axis)
    rows_{n} = Shape(x_{m})
    first_{n} = Gather(rows_{n}, zero)
    first_axis_{n} = Unsqueeze(first_{n}, zero_axis)
    many_{n} = Concat<axis = 0>(first_axis_{n}, three_axis, four)
    prompt_{m} = Expand(learned, many_{n})
"""


def layered_graph(path: Path, operator: str = "Relu", n_layers: int = 8) -> Path:
    """Layers with a prompt of three rows before the tokens, as exporters write them."""
    layers = "".join(LAYER.format(n=n, m=n + 1, operator=operator) for n in range(n_layers))
    text = f"""
    <ir_version: 10, opset_import: ["" : 18, "own" : 1]>
    layered (float[batch, tokens, 4] x) => (float[batch, tokens, 4] logits)
    <int64 zero = {{0}}, int64 one = {{1}}, int64[1] zero_axis = {{0}}, int64[1] one_axis = {{1}},
     int64[1] three_axis = {{3}}, int64[1] four = {{4}}, int64[1] end = {{9223372036854775807}}, float[1, 3, 4] learned = {{1, 2, 3, 4, 5,
     6, 7, 8, 9, 10, 11, 12}}>
    {{
    x_0 = Identity(x)
    zeros = Shape(x)
    first = Gather(zeros, zero)
    first_axis = Unsqueeze(first, zero_axis)
    many = Concat<axis = 0>(first_axis, three_axis, four)
    prompt_0 = Expand(learned, many)
    {layers}
    logits = Add(x_{n_layers}, x_0)
    }}
    """
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def shapes_read(path: Path) -> list[str]:
    return [node.input[0] for node in onnx.load(path).graph.node if node.op_type == "Shape"]


def test_each_shape_is_computed_once(tmp_path: Path) -> None:
    before, after = layered_graph(tmp_path / "before.onnx"), layered_graph(tmp_path / "after.onnx")
    share_sizes(after)
    assert (len(shapes_read(before)), shapes_read(after)) == (17, ["x", "x"])
    generator = np.random.default_rng(0)
    for shape in ((1, 1, 4), (3, 7, 4), (2, 1, 4)):
        batch = {"x": generator.normal(size=shape).astype(np.float32)}
        assert np.array_equal(run_file(after, batch), run_file(before, batch))


def test_a_graph_of_unknown_shapes_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = layered_graph(tmp_path / "graph.onnx", operator="own.Unknown")
    before = path.read_bytes()
    share_sizes(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]  # the inference leaves a file where it fails


@pytest.mark.parametrize("kind", ["llama-v2", "qwen3"])
def test_a_decoder_reads_the_sizes_of_its_inputs_alone(kind: str, bundle: Folders) -> None:
    path = bundle(kind) / "model.onnx"
    inputs = {item.name for item in onnx.load(path).graph.input}
    assert set(shapes_read(path)) <= inputs
