"""``python -m tests.measure.growth BUNDLE``: what grows when more is asked of one bundle.

- Tasks: the bundle's graph with the constants of 1, 10, 100 and 1,000 tasks, each in a process of its
  own: file, load time, memory, and latency of batches whose rows belong to any of them. Straight lines are fitted.
- Replicas, waits, clients and pairs a request: the bundle in Ray Serve on this machine, asked over HTTP by clients that
  ask again as soon as they are answered: pairs per second, latency, how many texts shared a run of the graph, and the
  processor's time that a pair costs in each kind of process. Needs Ray; without it this part is left out.
- Then arithmetic: how many cores, replicas and servers of HTTP this comes to at 1, 100 and 10,000 pairs per second.

The clients use the same cores as the replicas, so pairs per second are a lower bound, while the processor's time of a
pair is each process's own. Run it on an idle machine. The last line is one JSON document.
"""

import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter

from export.bench.config import Shape
from export.bundle.folder import BUNDLE, FILES, TASK_IDS, Bundle, load_bundle
from export.runtime.classifier import OnnxClassifier, best_precision
from export.serve.config import ServingConfig
from export.serve.service import Service
from tests.measure.http_load import ask_for, cpu_seconds, request_bodies
from train.common.child import run_in_child
from train.common.command_line import Command, Numbers, WholeNumbers
from train.common.console import say
from train.common.errors import UsageError
from train.common.folder_record import content_of, read_record, write_record
from train.common.machine import peak_memory_mib, usable_cores

LARGEST_GRAPH_BYTES = 2**31 - 1
"""Size of one ONNX file, which is one message of protobuf."""
BATCH_SIZES, N_BATCHES = (1, 32), 8
"""Several batches in a burst, so that rows of many tasks do not all lie in a cache."""
LONGEST_TEXT = 60
"""Tokens of a text, where the model reads as many."""
PAUSE_SECONDS, MIN_RUNS, MAX_RUNS, BUDGET_SECONDS = 0.5, 5, 50, 4.0
"""How each burst without HTTP is timed."""
N_BODIES, LOADS = 64, (1, 100, 10_000)
"""Different requests; pairs per second for the arithmetic."""
BUSY_SHARE = 0.7
"""Part of a core's time that may be used: beyond it, queues grow faster than the load."""
Figures = dict[str, Any]
"""A part of the JSON document."""


@dataclass(frozen=True)
class ScaleConfig:
    """Time one bundle with more tasks and with more replicas; the last line is JSON."""

    bundle: Path
    """folder that `python -m export` wrote"""
    _: KW_ONLY
    tasks: WholeNumbers = (1, 10, 100, 1000)
    """numbers of tasks; the bundle must hold several"""
    replicas: WholeNumbers = (1, 2)
    """numbers of replicas"""
    waits_ms: Annotated[Numbers, Parameter(name="--batch-waits")] = (0.0, 2.0, 10.0)
    """milliseconds for which a request waits for others, at most"""
    clients: WholeNumbers = (1, 32)
    """numbers of clients that ask at the same time"""
    pairs: WholeNumbers = (1, 32)
    """numbers of pairs in each request"""
    seconds: float = 8.0
    """length of each burst over HTTP"""
    threads: int | None = None
    """threads of the graph while tasks are counted (default: all usable cores)"""

    def __post_init__(self) -> None:
        for flag in ("tasks", "replicas", "clients", "pairs"):
            if any(number < 1 for number in getattr(self, flag)):
                raise UsageError(f"--{flag}: give whole numbers of at least 1.")
        if not 0 < self.seconds < 3600:
            raise UsageError(f"--seconds {self.seconds:g}: give seconds, from above 0 to below 3600.")
        most = max(self.replicas, default=1)
        if most > usable_cores():
            raise UsageError(f"--replicas {most}: this machine has {usable_cores()} cores, one for each at least.")


def measure_serving(service: Service, bodies: Sequence[bytes], clients: int, pairs: int, seconds: float) -> Figures:
    """Ask a bundle that is served; the bodies are requests of so many pairs each.

    ``cpu_ms`` is the processor's time of a pair, by kind of process: "replica", "api", "proxy".
    """
    name, config = f"The process of {clients} clients", service.config
    run_in_child(ask_for, service.url, bodies, clients, min(seconds, 2.0), name=name)  # a warm-up
    time.sleep(PAUSE_SECONDS)
    before = cpu_seconds()
    load = run_in_child(ask_for, service.url, bodies, clients, seconds, name=name)
    after, n_pairs = cpu_seconds(), pairs * load.pop("answers")
    cell: Figures = {"replicas": config.replicas, "threads": config.threads_per_replica}
    cell |= {"wait_ms": config.batch_wait_ms, "clients": clients, "pairs": pairs}
    cell |= {"pairs_per_second": n_pairs / load.pop("seconds"), **load}
    cell["cpu_ms"] = {kind: 1000 * (after[kind] - before[kind]) / n_pairs for kind in after}
    cpu = " + ".join(f"{milliseconds:.2f} {kind}" for kind, milliseconds in cell["cpu_ms"].items())
    row = (
        "{replicas} replicas × {threads} threads  wait {wait_ms:g} ms  {clients:>3} clients × {pairs} pairs  "
        "{pairs_per_second:6.1f} pairs/s  p50 {p50_ms:.1f} ms  p95 {p95_ms:.1f} ms  batch {batch_size:.1f}"
    )
    errors = f"  {cell['errors']} errors" * bool(cell["errors"])
    say(f"{row.format_map(cell)}  ms of processor a pair: {cpu}{errors}")
    return cell


def measure_all_serving(bundle: Bundle, config: ScaleConfig) -> Figures:
    """The bundle in Ray Serve with every number of replicas, wait, number of clients and pairs; and the arithmetic."""
    bodies = {pairs: request_bodies(bundle, LONGEST_TEXT, pairs, N_BODIES) for pairs in config.pairs}
    cells: list[Figures] = []
    for replicas, wait_ms in product(config.replicas, config.waits_ms):
        serving = ServingConfig(replicas=replicas, batch_wait_ms=wait_ms, threads=1, queue_size=10_000)
        with closing(Service(serving)) as service:
            service.deploy(bundle)
            for clients, pairs in product(config.clients, config.pairs):
                cells.append(measure_serving(service, bodies[pairs], clients, pairs, config.seconds))
    wanted: list[Figures] = []
    for pairs in config.pairs:
        wanted += demands(max((c for c in cells if c["pairs"] == pairs), key=lambda c: float(c["pairs_per_second"])))
    for demand in wanted:
        say(
            "{pairs_per_second:>6,} pairs/s, {pairs} a request: {cores:.1f} cores, {replicas:,} replicas, {apis:,} Apis, "
            "{proxies:,} proxies".format_map(demand)
        )
    return {"serving": cells, "demands": wanted}


def demands(cell: Figures) -> list[Figures]:
    """What the `LOADS` take, from the processor's time of a pair, with cores that are busy for `BUSY_SHARE` of it.

    An Api and a proxy are Python, and use one core at most each.
    """
    replica, api, proxy = (cell["cpu_ms"][kind] / 1000 / BUSY_SHARE for kind in ("replica", "api", "proxy"))
    return [
        {
            "pairs_per_second": load,
            "pairs": cell["pairs"],
            "cores": load * (replica + api + proxy),
            "replicas": math.ceil(load * replica / cell["threads"]),
            "apis": math.ceil(load * api),
            "proxies": math.ceil(load * proxy),
        }
        for load in LOADS
    ]


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """The straight line through at least two points by least squares, and its share of their variance."""
    x, y = np.asarray(xs, float), np.asarray(ys, float)
    slope, at_zero = np.polyfit(x, y, 1)
    rest, spread = np.sum((y - at_zero - slope * x) ** 2), np.sum((y - y.mean()) ** 2)
    return {"at_zero": float(at_zero), "slope": float(slope), "r_squared": float(1 - rest / spread) if spread else 1.0}


def with_tasks(source: Path, n_tasks: int, folder: Path) -> None:
    """Copy a bundle for many tasks, so that its fastest graph on a CPU holds the constants of so many.

    Those of the bundle's own tasks are repeated: neither memory nor latency depends on their values.
    """
    import onnx
    from onnx import numpy_helper

    bundle = load_bundle(source)
    if TASK_IDS not in bundle.inputs:
        raise UsageError(
            f"{bundle.folder} was exported for one task. For --tasks export several adapters together; a copy of one "
            "will do: python -m export A COPY --out BUNDLE"
        )
    graph = bundle.graph_path(best_precision(bundle, on_cuda=False))
    model = onnx.load(graph, load_external_data=False)
    tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather" and node.input[1] == TASK_IDS}
    own = [item for item in model.graph.initializer if item.name in tables]
    n_bytes = graph.stat().st_size + sum(len(item.raw_data) for item in own) * (n_tasks / len(bundle.tasks) - 1)
    if n_bytes > LARGEST_GRAPH_BYTES:
        raise UsageError(
            f"{n_tasks:,} tasks would make a graph of {n_bytes / 1e9:.1f} GB, and an ONNX file holds 2.1 at most. Give "
            "fewer --tasks."
        )
    for item in own:
        array = numpy_helper.to_array(item)
        item.CopyFrom(numpy_helper.from_array(np.resize(array, (n_tasks, *array.shape[1:])), item.name))
    shutil.copytree(bundle.folder, folder, ignore=shutil.ignore_patterns(graph.name, FILES.manifest))
    onnx.save(model, folder / graph.name)
    content = content_of(read_record(bundle.folder, BUNDLE))
    tasks = [content["tasks"][number % len(bundle.tasks)] | {"name": f"task-{number}"} for number in range(n_tasks)]
    write_record(folder, BUNDLE, content | {"tasks": tasks})


def measure_tasks(source: Path, n_tasks: int, folder: Path, threads: int) -> Figures:
    """Time a copy of a bundle with so many tasks, in this process, whose memory is then the bundle's.

    ``file_mb`` are 10⁶ bytes, ``load_seconds`` the time until it can answer, hashes included, ``memory_mib`` the largest
    resident size, ``latencies_ms`` medians of one run, by shape.
    """
    run_in_child(with_tasks, source, n_tasks, folder, name=f"The copy with {n_tasks} tasks")
    start = time.perf_counter()
    bundle = load_bundle(folder)
    classifier = OnnxClassifier(bundle, task=bundle.tasks[0].name, threads=threads, use_cuda=False)
    load_seconds = time.perf_counter() - start
    shapes = [Shape(size, min(LONGEST_TEXT, bundle.max_length)) for size in BATCH_SIZES]
    latencies_ms = {str(shape): _median_ms(classifier, shape, n_tasks) for shape in shapes}
    file_mb = bundle.graph_path(classifier.execution.precision).stat().st_size / 1e6
    cell = {"n_tasks": n_tasks, "file_mb": file_mb, "load_seconds": load_seconds}
    return cell | {"memory_mib": peak_memory_mib(), "latencies_ms": latencies_ms}


def _median_ms(classifier: OnnxClassifier, shape: Shape, n_tasks: int) -> float:
    """The median of a pass over random batches whose rows belong to any task, for one batch."""
    bundle, generator, size = classifier.bundle, np.random.default_rng(0), (shape.batch_size, shape.length)
    batches = []
    for _ in range(N_BATCHES):
        batch = {"attention_mask": np.ones(size, np.int64), "token_type_ids": np.zeros(size, np.int64)}
        batch["input_ids"] = generator.integers(0, bundle.vocabulary_size, size)
        batch[TASK_IDS] = generator.integers(0, n_tasks, shape.batch_size)
        batches.append({name: batch[name] for name in bundle.inputs})

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


def measure_all_tasks(bundle: Bundle, numbers: Sequence[int], threads: int) -> Figures:
    """The bundle with every number of tasks, and lines through the figures."""
    cells = []
    with tempfile.TemporaryDirectory(prefix="promptfold-scale-") as work:
        for n_tasks in numbers:
            folder, name = Path(work) / str(n_tasks), f"The measurement of {n_tasks} tasks"
            remedy = "Is there enough memory?"
            cell = run_in_child(measure_tasks, bundle.folder, n_tasks, folder, threads, name=name, remedy=remedy)
            shutil.rmtree(folder)
            latencies = "  ".join(f"{shape}: {latency_ms:.2f} ms" for shape, latency_ms in cell["latencies_ms"].items())
            row = "{n_tasks:>6,} tasks  {file_mb:8.1f} MB  loaded in {load_seconds:5.2f} s  {memory_mib:7.0f} MiB"
            say(f"{row.format_map(cell)}  {latencies}")
            cells.append(cell)
    lines = {}
    if len(cells) > 1:
        columns = {name: [cell[name] for cell in cells] for name in ("file_mb", "memory_mib", "load_seconds")}
        columns |= {f"{at} ms": [cell["latencies_ms"][at] for cell in cells] for at in cells[0]["latencies_ms"]}
        lines = {name: fit_line(numbers, column) for name, column in columns.items()}
    for name, line in lines.items():
        say(f"{name}: {line['at_zero']:.2f} + {line['slope']:.5f} × tasks, R² {line['r_squared']:.3f}")
    return {"tasks": cells, "lines": lines}


def _run(config: ScaleConfig) -> None:
    bundle, threads = load_bundle(config.bundle), config.threads or usable_cores()
    result: Figures = {"bundle": str(bundle.folder), "cores": usable_cores(), "threads": threads}
    if config.tasks:
        result |= measure_all_tasks(bundle, config.tasks, threads)
    if config.replicas:
        result |= measure_all_serving(bundle, config)
    say(json.dumps(result))


main = Command(
    ScaleConfig,
    _run,
    "python -m tests.measure.growth",
    example="an empty list leaves a part out: --tasks '' needs no bundle of several tasks, --replicas '' no Ray",
)

if __name__ == "__main__":
    sys.exit(main())
