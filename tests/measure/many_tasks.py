"""A bundle's graph with the constants of any number of tasks, and what such a graph costs."""

import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.bench.config import Shape
from export.bundle.folder import BUNDLE, FILES, TASK_IDS, Bundle, load_bundle
from export.runtime.classifier import OnnxClassifier, best_precision
from tests.measure.child import in_child
from train.common.errors import UsageError
from train.common.folder_record import content_of, read_record, write_record
from train.common.machine import peak_memory_mib

LARGEST_GRAPH_BYTES = 2**31 - 1
"""Size of one ONNX file, which is one message of protobuf."""
BATCH_SIZES, N_BATCHES = (1, 32), 8
"""Several batches in a burst, so that rows of many tasks do not all lie in a cache."""
LONGEST_TEXT = 60
"""Tokens of a text, where the model reads as many."""
PAUSE_SECONDS, MIN_RUNS, MAX_RUNS, BUDGET_SECONDS = 0.5, 5, 50, 4.0
"""How each burst without HTTP is timed."""


@dataclass(frozen=True)
class TasksCell:
    """A bundle with so many tasks."""

    n_tasks: int
    file_mb: float
    """Size of the graph, in 10⁶ bytes."""
    load_seconds: float
    """Time until it can answer, hashes included."""
    memory_mib: float
    """Largest resident size of its process."""
    latencies_ms: dict[str, float]
    """Median of one run, by shape."""


def with_tasks(bundle: Bundle, n_tasks: int, folder: Path) -> Bundle:
    """A copy of a bundle for many tasks whose fastest graph on a CPU holds the constants of so many.

    Those of the bundle's own tasks are repeated: neither memory nor latency depends on their values. A UsageError where
    the bundle is for one task, or so many do not fit into an ONNX file.
    """
    import onnx
    from onnx import numpy_helper

    if TASK_IDS not in bundle.inputs:
        raise UsageError(
            f"{bundle.folder} was exported for one task. For --tasks export several adapters together; a copy of one "
            "will do: python -m export A COPY --out BUNDLE"
        )
    manifest = read_record(bundle.folder, BUNDLE)
    precision = best_precision(bundle, on_cuda=False)
    source = bundle.graph_path(precision)
    model = onnx.load(source, load_external_data=False)
    tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather" and node.input[1] == TASK_IDS}
    own = [item for item in model.graph.initializer if item.name in tables]
    n_bytes = source.stat().st_size + sum(len(item.raw_data) for item in own) * (n_tasks / len(bundle.tasks) - 1)
    if n_bytes > LARGEST_GRAPH_BYTES:
        raise UsageError(
            f"{n_tasks:,} tasks would make a graph of {n_bytes / 1e9:.1f} GB, and an ONNX file holds 2.1 at most. Give "
            "fewer --tasks."
        )
    for item in own:
        array = numpy_helper.to_array(item)
        item.CopyFrom(numpy_helper.from_array(np.resize(array, (n_tasks, *array.shape[1:])), item.name))
    shutil.copytree(bundle.folder, folder, ignore=shutil.ignore_patterns(source.name, FILES.manifest))
    onnx.save(model, folder / source.name)
    tasks = [manifest["tasks"][number % len(bundle.tasks)] | {"name": f"task-{number}"} for number in range(n_tasks)]
    write_record(folder, BUNDLE, content_of(manifest) | {"tasks": tasks})
    return load_bundle(folder)


def measure_tasks(source: Path, n_tasks: int, folder: Path, threads: int) -> TasksCell:
    """Time a copy of a bundle with so many tasks, in this process, whose memory is then the bundle's."""
    # The copy's own memory is not what a server has.
    in_child(_write_tasks, source, n_tasks, folder)
    start = time.perf_counter()
    bundle = load_bundle(folder)
    classifier = OnnxClassifier(bundle, task=bundle.tasks[0].name, threads=threads, use_cuda=False)
    load_seconds = time.perf_counter() - start
    latencies_ms = {
        str(shape): _median_ms(classifier, _random_batches(bundle, shape, n_tasks))
        for shape in (Shape(size, min(LONGEST_TEXT, bundle.max_length)) for size in BATCH_SIZES)
    }
    file_mb = bundle.graph_path(classifier.execution.precision).stat().st_size / 1e6
    return TasksCell(n_tasks, file_mb, load_seconds, peak_memory_mib(), latencies_ms)


def _random_batches(bundle: Bundle, shape: Shape, n_tasks: int) -> list[dict[str, np.ndarray]]:
    generator, size = np.random.default_rng(0), (shape.batch_size, shape.length)
    fixed = {"attention_mask": np.ones(size, np.int64), "token_type_ids": np.zeros(size, np.int64)}
    batches = []
    for _ in range(N_BATCHES):
        batch = fixed | {"input_ids": generator.integers(0, bundle.vocabulary_size, size)}
        batch[TASK_IDS] = generator.integers(0, n_tasks, shape.batch_size)
        batches.append({name: batch[name] for name in bundle.inputs})
    return batches


def _median_ms(classifier: OnnxClassifier, batches: Sequence[dict[str, np.ndarray]]) -> float:
    """The median of a pass over the batches, for one batch."""

    def one_pass() -> float:
        start = time.perf_counter()
        for batch in batches:
            classifier.logits(batch)
        return 1000 * (time.perf_counter() - start) / len(batches)

    one_pass()
    time.sleep(PAUSE_SECONDS)
    one_pass()
    latencies_ms: list[float] = []
    end = time.perf_counter() + BUDGET_SECONDS
    while len(latencies_ms) < MIN_RUNS or (len(latencies_ms) < MAX_RUNS and time.perf_counter() < end):
        latencies_ms.append(one_pass())
    return statistics.median(latencies_ms)


def _write_tasks(source: Path, n_tasks: int, folder: Path) -> None:
    with_tasks(load_bundle(source), n_tasks, folder)
