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
from dataclasses import KW_ONLY, asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from cyclopts import Parameter

from export.bundle.folder import Bundle, load_bundle
from tests.measure.child import in_child
from tests.measure.http_load import ask_for, cpu_seconds, request_bodies
from tests.measure.many_tasks import LONGEST_TEXT, PAUSE_SECONDS, TasksCell, measure_tasks
from train.common.command_line import Command, Numbers, WholeNumbers
from train.common.console import say
from train.common.errors import EngineError, UsageError
from train.common.machine import usable_cores

if TYPE_CHECKING:
    from export.serve.service import Service

T = TypeVar("T")

N_BODIES = 64
"""Different requests."""
LOADS = (1, 100, 10_000)
"""Pairs per second for the arithmetic."""
BUSY_SHARE = 0.7
"""Part of a core's time that may be used: beyond it, queues grow faster than the load."""


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


@dataclass(frozen=True)
class ServingCell:
    """A bundle in Ray Serve under load."""

    replicas: int
    threads: int
    """Threads of each replica."""
    wait_ms: float
    """How long a request waits for others, at most."""
    clients: int
    pairs: int
    """Pairs in one request."""
    pairs_per_second: float
    p50_ms: float
    p95_ms: float
    batch_size: float
    """Mean over the requests: how many texts shared their run of the graph, at most."""
    cpu_ms: dict[str, float]
    """Processor's time of a pair, by kind of process: "replica", "api", "proxy"."""
    errors: int
    """Requests without an answer."""


@dataclass(frozen=True)
class Line:
    """A straight line through measurements, by least squares."""

    at_zero: float
    slope: float
    r_squared: float
    """Share of the variance that it explains."""

    @staticmethod
    def fit(xs: Sequence[float], ys: Sequence[float]) -> "Line":
        """The line through at least two points."""
        x, y = np.asarray(xs, float), np.asarray(ys, float)
        slope, at_zero = np.polyfit(x, y, 1)
        rest, spread = np.sum((y - at_zero - slope * x) ** 2), np.sum((y - y.mean()) ** 2)
        return Line(float(at_zero), float(slope), float(1 - rest / spread) if spread else 1.0)


@dataclass(frozen=True)
class Demand:
    """What so many pairs per second take, with cores that are busy for `BUSY_SHARE` of the time."""

    pairs_per_second: int
    pairs: int
    """Pairs in each request."""
    cores: float
    replicas: int
    apis: int
    """Servers that check requests and ask the replicas, of one core at most each: they are Python."""
    proxies: int
    """Servers of HTTP; the same."""


def measure_serving(
    service: "Service", bodies: Sequence[bytes], clients: int, pairs: int, config: ScaleConfig
) -> ServingCell:
    """Ask a bundle that is served; the bodies are requests of so many pairs each."""
    ask = (service.url, bodies, clients)
    in_child(ask_for, *ask, min(config.seconds, 2.0))  # a warm-up
    time.sleep(PAUSE_SECONDS)
    before = cpu_seconds()
    load = in_child(ask_for, *ask, config.seconds)
    after = cpu_seconds()
    if not load.latencies_ms:
        raise EngineError(f"None of {clients} clients was answered within {config.seconds:g} s. Give more --seconds.")
    n_pairs = pairs * len(load.latencies_ms)
    p50_ms, p95_ms = np.percentile(load.latencies_ms, [50, 95])
    return ServingCell(
        replicas=service.config.replicas,
        threads=service.config.threads_per_replica,
        wait_ms=service.config.batch_wait_ms,
        clients=clients,
        pairs=pairs,
        pairs_per_second=n_pairs / load.seconds,
        p50_ms=float(p50_ms),
        p95_ms=float(p95_ms),
        batch_size=statistics.fmean(load.batch_sizes),
        cpu_ms={kind: 1000 * (after[kind] - before[kind]) / n_pairs for kind in after},
        errors=load.errors,
    )


def measure_all_serving(bundle: Bundle, config: ScaleConfig) -> list[ServingCell]:
    """The bundle in Ray Serve with every number of replicas, wait, number of clients and pairs."""
    from export.serve.config import ServingConfig
    from export.serve.service import Service

    bodies = {pairs: request_bodies(bundle, LONGEST_TEXT, pairs, N_BODIES) for pairs in config.pairs}
    cells = []
    for replicas, wait_ms in product(config.replicas, config.waits_ms):
        serving = ServingConfig(replicas=replicas, batch_wait_ms=wait_ms, threads=1, queue_size=10_000)
        with closing(Service(serving)) as service:
            service.deploy(bundle)
            for clients, pairs in product(config.clients, config.pairs):
                cells.append(measure_serving(service, bodies[pairs], clients, pairs, config))
                say(_serving_row(cells[-1]))
    return cells


# Arithmetic


def demands(cell: ServingCell) -> list[Demand]:
    """What the `LOADS` take, from the processor's time of a pair."""
    replica, api, proxy = (cell.cpu_ms[kind] / 1000 for kind in ("replica", "api", "proxy"))
    return [
        Demand(
            pairs_per_second=load,
            pairs=cell.pairs,
            cores=load * (replica + api + proxy) / BUSY_SHARE,
            replicas=math.ceil(load * replica / cell.threads / BUSY_SHARE),
            apis=math.ceil(load * api / BUSY_SHARE),
            proxies=math.ceil(load * proxy / BUSY_SHARE),
        )
        for load in LOADS
    ]


# The command line


def _tasks_row(cell: TasksCell) -> str:
    latencies = "  ".join(f"{shape}: {latency_ms:.2f} ms" for shape, latency_ms in cell.latencies_ms.items())
    return (
        f"{cell.n_tasks:>6,} tasks  {cell.file_mb:8.1f} MB  loaded in {cell.load_seconds:5.2f} s  "
        f"{cell.memory_mib:7.0f} MiB  {latencies}"
    )


def _serving_row(cell: ServingCell) -> str:
    cpu = " + ".join(f"{milliseconds:.2f} {kind}" for kind, milliseconds in cell.cpu_ms.items())
    return (
        f"{cell.replicas} replicas × {cell.threads} threads  wait {cell.wait_ms:g} ms  {cell.clients:>3} clients × {cell.pairs} pairs  "
        f"{cell.pairs_per_second:6.1f} pairs/s  p50 {cell.p50_ms:.1f} ms  p95 {cell.p95_ms:.1f} ms  "
        f"batch {cell.batch_size:.1f}  ms of processor a pair: {cpu}" + f"  {cell.errors} errors" * bool(cell.errors)
    )


def run_scale(config: ScaleConfig) -> dict[str, Any]:
    """Measure, printing each figure as it comes; the JSON document."""
    bundle = load_bundle(config.bundle)
    threads = config.threads or usable_cores()
    result: dict[str, Any] = {"bundle": str(bundle.folder), "cores": usable_cores(), "threads": threads}
    if config.tasks:
        result |= _measure_all_tasks(bundle, config.tasks, threads)
    if config.replicas:
        serving = measure_all_serving(bundle, config)
        wanted: list[Demand] = []
        for pairs in config.pairs:
            cells = (cell for cell in serving if cell.pairs == pairs)
            wanted += demands(max(cells, key=lambda cell: cell.pairs_per_second))
        for demand in wanted:
            say(
                f"{demand.pairs_per_second:>6,} pairs/s, {demand.pairs} a request: {demand.cores:.1f} cores, "
                f"{demand.replicas:,} replicas, {demand.apis:,} Apis, {demand.proxies:,} proxies"
            )
        result |= {"serving": list(map(asdict, serving)), "demands": list(map(asdict, wanted))}
    return result


def _measure_all_tasks(bundle: Bundle, numbers: Sequence[int], threads: int) -> dict[str, Any]:
    cells = []
    with tempfile.TemporaryDirectory(prefix="promptfold-scale-") as work:
        for n_tasks in numbers:
            folder = Path(work) / str(n_tasks)
            cells.append(in_child(measure_tasks, bundle.folder, n_tasks, folder, threads))
            shutil.rmtree(folder)
            say(_tasks_row(cells[-1]))
    lines = {}
    if len(cells) > 1:
        columns = {name: [getattr(cell, name) for cell in cells] for name in ("file_mb", "memory_mib", "load_seconds")}
        columns |= {f"{at} ms": [cell.latencies_ms[at] for cell in cells] for at in cells[0].latencies_ms}
        lines = {name: Line.fit(numbers, column) for name, column in columns.items()}
    for name, line in lines.items():
        say(f"{name}: {line.at_zero:.2f} + {line.slope:.5f} × tasks, R² {line.r_squared:.3f}")
    return {"tasks": list(map(asdict, cells)), "lines": {name: asdict(line) for name, line in lines.items()}}


def _run(config: ScaleConfig) -> None:
    say(json.dumps(run_scale(config)))


main = Command(
    ScaleConfig,
    _run,
    "python -m tests.measure.growth",
    example="an empty list leaves a part out: --tasks '' needs no bundle of several tasks, --replicas '' no Ray",
)

if __name__ == "__main__":
    sys.exit(main())
