"""Runs the fp32 graph on calibration texts, to learn what its dense products read: how large channels are, how correlated."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.bundle.folder import FILES, TEXT_INPUTS
from export.fold.graphs.files import save_graph
from export.fold.precision.dense import dense_products
from export.runtime.batches import in_batches
from export.runtime.classifier import with_task
from export.runtime.session import session_options
from export.runtime.tokenizer import TextTokenizer
from train.common.machine import usable_cores
from train.data.tasks import Task

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from export.fold.read import Sources

BATCH_SIZE = 16


@dataclass(frozen=True)
class TaskBatches:
    """The texts of a task, tokenized once for every candidate."""

    name: str
    """Where they come from, for people."""
    number: int
    """The task's place in the graph, for ``task_ids``."""
    task: Task
    batches: tuple[dict[str, np.ndarray], ...]
    """Text inputs by name."""

    @property
    def n_texts(self) -> int:
        return sum(len(batch["input_ids"]) for batch in self.batches)


@dataclass(frozen=True)
class Activations:
    """The tensor that dense products read, over all calibration texts."""

    low: np.ndarray
    """The smallest number of each channel; float64, shape = (n_channels,)"""
    high: np.ndarray
    """The largest, likewise."""
    n_rows: int
    """How many vectors it had: a product's time grows with them."""

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest number of all channels."""
        return float(self.low.min()), float(self.high.max())

    @property
    def largest(self) -> np.ndarray:
        """The largest absolute value of each channel, shape = (n_channels,)"""
        return np.asarray(np.maximum(np.abs(self.low), np.abs(self.high)))


def batch_texts(folder: Path, sources: "Sources") -> list[TaskBatches]:
    """Tokenize the calibration texts of all tasks into batches of similar length."""
    tokenize = text_tokenizer(folder, sources)
    found = []
    for task in sources.tasks:
        if task.texts is not None:
            rows = task.texts.rows
            batches = tuple(tokenize([rows[row] for row in group]).arrays for group in in_batches(rows, BATCH_SIZE))
            found.append(TaskBatches(task.texts.name, task.number, task.adapter.task, batches))
    return found


def text_tokenizer(folder: Path, sources: "Sources") -> TextTokenizer:
    """The tokenizer of a bundle that has no manifest yet. Adapters in one graph have one tokenizer and one limit."""
    return TextTokenizer(
        folder / FILES.tokenizer,
        max_length=sources.adapters[0].max_length,
        pad_token_id=sources.tokenizer.pad_token_id,
        token_types=sources.has_token_types,
        inputs=TEXT_INPUTS,
    )


def measure_activations(model: onnx.ModelProto, tasks: Sequence[TaskBatches]) -> dict[str, Activations]:
    """The sizes of each tensor that dense products read, by its name.

    Only the smallest and the largest numbers leave the graph: the tensors themselves would take gigabytes.
    """
    widths = source_widths(model.graph)
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    first_axis = "calibration_axis"
    watched.graph.initializer.append(numpy_helper.from_array(np.array([0]), first_axis))
    names: list[str] = []
    for number, (source, width) in enumerate(widths.items()):
        rows = _add_rows(watched.graph, source, width)
        nodes = []
        for operator in ("ReduceMin", "ReduceMax"):
            output = f"calibration_{operator}_{number}"
            nodes.append(helper.make_node(operator, [rows, first_axis], [output], keepdims=0, name=output))
            names.append(output)
        count = f"calibration_count_{number}"
        nodes.append(helper.make_node("Shape", [rows], [count], name=count))
        names.append(count)
        watched.graph.node.extend(nodes)
    found: dict[str, Activations] = {}
    for values in _run(watched, tasks, names):
        for number, source in enumerate(widths):
            low, high, shape_found = values[3 * number : 3 * number + 3]
            new = Activations(low.astype(np.float64), high.astype(np.float64), int(shape_found[0]))
            found[source] = _joined(found[source], new) if source in found else new
    return found


def measure_grams(
    model: onnx.ModelProto, tasks: Sequence[TaskBatches], groups: Sequence[tuple[str, ...]]
) -> dict[tuple[str, ...], np.ndarray]:
    """Xᵀ·X of what dense products read, summed over the tensors of each group; float64, shape = (n_channels, n_channels)"""
    widths = source_widths(model.graph)
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    names: dict[str, str] = {}
    for source in dict.fromkeys(source for group in groups for source in group):
        rows = _add_rows(watched.graph, source, widths[source])
        columns, names[source] = f"{rows}_columns", f"{rows}_gram"
        watched.graph.node.append(helper.make_node("Transpose", [rows], [columns], perm=[1, 0], name=columns))
        watched.graph.node.append(helper.make_node("MatMul", [columns, rows], [names[source]], name=names[source]))
    found = {group: np.zeros((widths[group[0]], widths[group[0]])) for group in groups}
    for values in _run(watched, tasks, list(names.values())):
        grams = dict(zip(names, values, strict=True))
        for group in groups:
            for source in group:
                found[group] += grams[source]
    return found


def _add_rows(graph: onnx.GraphProto, source: str, width: int) -> str:
    """The name of a new tensor: a dense product's source with one row for each vector."""
    shape, rows = f"{source}_calibration_shape", f"{source}_calibration_rows"
    graph.initializer.append(numpy_helper.from_array(np.array([-1, width]), shape))
    graph.node.append(helper.make_node("Reshape", [source, shape], [rows], name=rows))
    return rows


def _joined(one: Activations, other: Activations) -> Activations:
    return Activations(np.fmin(one.low, other.low), np.fmax(one.high, other.high), one.n_rows + other.n_rows)


def source_widths(graph: onnx.GraphProto) -> dict[str, int]:
    """The number of channels of each tensor that dense products read, by its name."""
    shapes = {item.name: list(item.dims) for item in graph.initializer}
    return {product.source: shapes[product.weight][int(product.transposed)] for product in dense_products(graph)}


def _run(model: onnx.ModelProto, tasks: Sequence[TaskBatches], outputs: Sequence[str]) -> Iterator[list[np.ndarray]]:
    """These outputs of a graph that is in memory, batch by batch."""
    have = {item.name for item in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs if name not in have)
    session = session_in_memory(model)
    inputs = [item.name for item in session.get_inputs()]
    for task in tasks:
        for batch in task.batches:
            arrays: Mapping[str, np.ndarray] = with_task(batch, task.number)
            yield [np.asarray(value) for value in session.run(list(outputs), {name: arrays[name] for name in inputs})]


def session_in_memory(model: onnx.ModelProto) -> "InferenceSession":
    """A session of a graph that is in no file, on the CPU."""
    import onnxruntime

    options = session_options(usable_cores())
    # ONNX Runtime has the numbers in memory when the file goes, and one message of protobuf holds 2 GB.
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        save_graph(model, path)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
