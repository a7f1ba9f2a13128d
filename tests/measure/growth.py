"""``python -m tests.measure.growth BUNDLE``: what grows when more is asked of one bundle.

- Tasks: the bundle's graph with the constants of 1, 10, 100 and 1,000 tasks (`with_tasks`), each in a process of its
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
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from export.bench.config import Shape
from export.bench.engines import Plan
from export.bench.prepare import random_texts
from export.bench.worker import time_passes
from export.bundle.folder import BUNDLE, FILES, TASK_IDS, Bundle, load_bundle
from export.runtime.classifier import OnnxClassifier, best_precision
from export.runtime.tokenizer import bundle_tokenizer
from train.common.console import Parser, names, run_main, say
from train.common.errors import EngineError, UsageError
from train.common.folder_record import content_of, read_record, write_record
from train.common.machine import peak_memory_mib, usable_cores

if TYPE_CHECKING:
    from export.serve.service import Service

T = TypeVar("T")

LARGEST_GRAPH_BYTES = 2**31 - 1
"""Of one ONNX file, which is one message of protobuf."""

N_BATCHES = 8
"""Different ones in a burst: rows of many tasks shall not all lie in a cache."""

BATCH_SIZES = (1, 32)

N_BODIES = 64
"""Different requests."""

N_TOKENS = 60
"""Of a text, where the model reads as many."""

LOADS = (1, 100, 10_000)
"""Pairs per second for the arithmetic."""

BUSY_SHARE = 0.7
"""Of a core's time: beyond it, queues grow faster than the load."""


@dataclass(frozen=True)
class ScaleConfig:
    """What shall grow, and how it is timed.

    Attributes:
        bundle: folder that `python -m export` wrote.
        tasks: numbers of tasks; the bundle must hold several.
        replicas: numbers of them.
        waits_ms: how long a request waits for others, at most.
        clients: how many ask at the same time.
        pairs: how many each asks about in one request.
        seconds: of each burst over HTTP.
        threads: of the graph's process while tasks are counted; None for all usable cores.
        plan: of each burst without HTTP.
    """

    bundle: Path
    tasks: tuple[int, ...]
    replicas: tuple[int, ...]
    waits_ms: tuple[float, ...]
    clients: tuple[int, ...]
    pairs: tuple[int, ...]
    seconds: float
    threads: int | None
    plan: Plan

    def __post_init__(self) -> None:
        for flag, numbers in (
            ("tasks", self.tasks),
            ("replicas", self.replicas),
            ("clients", self.clients),
            ("pairs", self.pairs),
        ):
            if any(number < 1 for number in numbers):
                raise UsageError(f"--{flag}: give whole numbers of at least 1.")
        if not 0 < self.seconds < 3600:
            raise UsageError(f"--seconds {self.seconds:g}: give seconds, from above 0 to below 3600.")
        most = max(self.replicas, default=1)
        if most > usable_cores():
            raise UsageError(f"--replicas {most}: this machine has {usable_cores()} cores, one for each at least.")


@dataclass(frozen=True)
class TasksCell:
    """A bundle with so many tasks.

    Attributes:
        n_tasks: their number.
        file_mb: of the graph, in 10⁶ bytes.
        load_seconds: until it can answer, hashes included.
        memory_mib: largest resident size of its process.
        latencies_ms: median of one run, by shape.
    """

    n_tasks: int
    file_mb: float
    load_seconds: float
    memory_mib: float
    latencies_ms: dict[str, float]


@dataclass(frozen=True)
class ServingCell:
    """A bundle in Ray Serve under load.

    Attributes:
        replicas: their number, each with ``threads``.
        threads: of each.
        wait_ms: how long a request waits for others, at most.
        clients: how many ask at the same time.
        pairs: how many each asks about in one request.
        pairs_per_second: answered.
        p50_ms, p95_ms: from the question to the answer, as a client sees it.
        batch_size: mean over the requests: with how many texts each shared its run of the graph, at most.
        cpu_ms: of a pair, by kind of process: "replica", "api", "proxy".
        errors: requests without an answer.
    """

    replicas: int
    threads: int
    wait_ms: float
    clients: int
    pairs: int
    pairs_per_second: float
    p50_ms: float
    p95_ms: float
    batch_size: float
    cpu_ms: dict[str, float]
    errors: int


@dataclass(frozen=True)
class Line:
    """A straight line through measurements, by least squares.

    Attributes:
        at_zero: its value at 0.
        slope: what one more adds.
        r_squared: share of the variance that it explains.
    """

    at_zero: float
    slope: float
    r_squared: float

    @staticmethod
    def fit(xs: Sequence[float], ys: Sequence[float]) -> "Line":
        """The line through at least two points."""
        x, y = np.asarray(xs, float), np.asarray(ys, float)
        slope, at_zero = np.polyfit(x, y, 1)
        rest, spread = np.sum((y - at_zero - slope * x) ** 2), np.sum((y - y.mean()) ** 2)
        return Line(float(at_zero), float(slope), float(1 - rest / spread) if spread else 1.0)


@dataclass(frozen=True)
class Demand:
    """What so many pairs per second take.

    Attributes:
        pairs_per_second: of the load.
        pairs: in each request.
        cores: busy for `BUSY_SHARE` of the time.
        replicas: of the threads that were measured.
        apis: servers that check requests and ask the replicas, of one core at most each: they are Python.
        proxies: servers of HTTP; the same.
    """

    pairs_per_second: int
    pairs: int
    cores: float
    replicas: int
    apis: int
    proxies: int


def in_child(work: Callable[..., T], *arguments: Any) -> T:
    """Do something in a process of its own, which takes its memory with it.

    Raises:
        PromptfoldError: whatever it raises, or an EngineError when its process died.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool as cause:
            raise EngineError(
                "A process of the benchmark ended unexpectedly. Is there enough memory? Give fewer --tasks."
            ) from cause


# Tasks


def with_tasks(bundle: Bundle, n_tasks: int, folder: Path) -> Bundle:
    """A copy of a shared bundle whose fastest graph on a CPU holds the constants of so many tasks; others stay small.

    Those of the bundle's own tasks are repeated: neither memory nor latency depends on their values.

    Args:
        folder: is made.

    Raises:
        UsageError: the bundle is of one task, or so many do not fit into an ONNX file.
    """
    import onnx
    from onnx import numpy_helper

    if not bundle.has_many_tasks:
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


def measure_tasks(source: Path, n_tasks: int, folder: Path, threads: int, plan: Plan) -> TasksCell:
    """Time a bundle with so many tasks. In this process, whose memory is then the bundle's.

    Args:
        source: a shared bundle.
        folder: for its copy.
    """
    # The copy's own memory is not what a server has.
    in_child(_write_tasks, source, n_tasks, folder)
    start = time.perf_counter()
    bundle = load_bundle(folder)
    classifier = OnnxClassifier(bundle, task=bundle.tasks[0].name, threads=threads, use_cuda=False)
    load_seconds = time.perf_counter() - start
    generator = np.random.default_rng(0)
    latencies_ms = {}
    for shape in (Shape(size, min(N_TOKENS, bundle.max_length)) for size in BATCH_SIZES):
        batches = [
            random_texts(generator, shape, bundle) | {TASK_IDS: generator.integers(0, n_tasks, shape.batch_size)}
            for _ in range(N_BATCHES)
        ]
        timed, _ = time_passes(classifier.logits, batches, plan)
        latencies_ms[str(shape)] = statistics.median(timed.latencies_ms) / N_BATCHES
    file_mb = bundle.graph_path(classifier.execution.precision).stat().st_size / 1e6
    return TasksCell(n_tasks, file_mb, load_seconds, peak_memory_mib(), latencies_ms)


def _write_tasks(source: Path, n_tasks: int, folder: Path) -> None:
    with_tasks(load_bundle(source), n_tasks, folder)


# Replicas, waits and clients


@dataclass(frozen=True)
class Load:
    """What clients saw.

    Attributes:
        latencies_ms: of every answered request.
        batch_sizes: of the same, as the answers tell.
        errors: requests with another status than 200.
        seconds: from the first question to the last answer.
    """

    latencies_ms: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    errors: int
    seconds: float


def ask_for(url: str, bodies: Sequence[bytes], clients: int, seconds: float) -> Load:
    """Ask over HTTP from so many connections, each of which asks again as soon as it is answered.

    Args:
        url: of the endpoint, http://HOST:PORT/PATH
        bodies: taken in turn.
        seconds: no question begins later.
    """
    import asyncio

    return asyncio.run(_ask_for(url, bodies, clients, seconds))


async def _ask_for(url: str, bodies: Sequence[bytes], clients: int, seconds: float) -> Load:
    import asyncio

    host, _, path = url.removeprefix("http://").partition("/")
    name, _, port = host.rpartition(":")
    latencies_ms: list[float] = []
    batch_sizes: list[int] = []
    errors = 0
    start = time.perf_counter()

    async def client(number: int) -> None:
        nonlocal errors
        # A library for HTTP would take more of the shared cores than the proxy that is measured.
        reader, writer = await asyncio.open_connection(name, int(port))
        turn = number
        while time.perf_counter() - start < seconds:
            body = bodies[turn % len(bodies)]
            turn += clients
            asked = time.perf_counter()
            head = f"POST /{path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            status = await reader.readline()
            headers = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(headers.partition(b"content-length:")[2].partition(b"\r")[0])
            answer = await reader.readexactly(length)
            if b" 200 " in status:
                latencies_ms.append(1000 * (time.perf_counter() - asked))
                batch_sizes.append(json.loads(answer)["batch_size"])
            else:
                errors += 1
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*map(client, range(clients)))
    return Load(tuple(latencies_ms), tuple(batch_sizes), errors, time.perf_counter() - start)


KINDS = {
    "ray::ServeReplica:promptfold:Classifier": "replica",
    "ray::ServeReplica:promptfold:Api": "api",
    "ray::ProxyActor": "proxy",
}
"""Of processes, by the names that Ray gives them."""


def cpu_seconds() -> dict[str, float]:
    """The processor's time that each kind of process has had so far; nothing where there is no /proc."""
    seconds = dict.fromkeys(KINDS.values(), 0.0)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), None)
        if kind is not None:
            seconds[kind] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def measure_serving(
    service: "Service", bodies: Sequence[bytes], clients: int, pairs: int, config: ScaleConfig
) -> ServingCell:
    """Ask a bundle that is served.

    Args:
        bodies: requests of so many pairs each.
    """
    ask = (service.url, bodies, clients)
    in_child(ask_for, *ask, min(config.seconds, 2.0))  # a warm-up
    time.sleep(config.plan.pause_seconds)
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


def request_bodies(bundle: Bundle, n_tokens: int, pairs: int, n_bodies: int) -> list[bytes]:
    """Requests of so many pairs, or texts, each, of about so many tokens, of random numbers."""
    generator, task = np.random.default_rng(0), bundle.tasks[0]
    tokenize = bundle_tokenizer(bundle)
    n_texts = len(task.task.text_columns)

    def made_up() -> list[str]:
        words = [str(word) for word in generator.integers(0, 1000, n_tokens)]
        while True:
            texts = [" ".join(words[number::n_texts]) for number in range(n_texts)]
            if len(words) <= n_texts or tokenize([tuple(texts)]).arrays["input_ids"].shape[1] <= n_tokens:
                return texts
            words.pop()

    bodies = []
    for _ in range(n_bodies):
        many = [made_up() for _ in range(pairs)]
        question: dict[str, Any] = {"pairs": many} if n_texts > 1 else {"texts": [text for (text,) in many]}
        bodies.append(json.dumps(question | ({"task": task.name} if bundle.has_many_tasks else {})).encode())
    return bodies


def measure_all_serving(bundle: Bundle, config: ScaleConfig) -> list[ServingCell]:
    """The bundle in Ray Serve with every number of replicas, wait and number of clients.

    Raises:
        UsageError: Ray is not installed.
        EngineError: the cluster, or a replica, cannot start.
    """
    from export.serve.config import ServingConfig
    from export.serve.service import Service

    bodies = {pairs: request_bodies(bundle, N_TOKENS, pairs, N_BODIES) for pairs in config.pairs}
    cells = []
    for replicas in config.replicas:
        for wait_ms in config.waits_ms:
            serving = ServingConfig(replicas=replicas, batch_wait_ms=wait_ms, threads=1, queue_size=10_000)
            service = Service(serving)
            try:
                service.deploy(bundle)
                for clients in config.clients:
                    for pairs in config.pairs:
                        cells.append(measure_serving(service, bodies[pairs], clients, pairs, config))
                        say(_serving_row(cells[-1]))
            finally:
                service.close()
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
    """Measure, printing each figure as it comes.

    Returns:
        the JSON document

    Raises:
        PromptfoldError: what a user can mend.
    """
    bundle = load_bundle(config.bundle)
    threads = config.threads or usable_cores()
    result: dict[str, Any] = {"bundle": str(bundle.folder), "cores": usable_cores(), "threads": threads}
    if config.tasks:
        cells = []
        with tempfile.TemporaryDirectory(prefix="promptfold-scale-") as work:
            for n_tasks in config.tasks:
                folder = Path(work) / str(n_tasks)
                cells.append(in_child(measure_tasks, bundle.folder, n_tasks, folder, threads, config.plan))
                shutil.rmtree(folder)
                say(_tasks_row(cells[-1]))
        result["tasks"] = [asdict(cell) for cell in cells]
        if len(cells) > 1:
            numbers = [cell.n_tasks for cell in cells]
            columns = {
                "file_mb": [cell.file_mb for cell in cells],
                "memory_mib": [cell.memory_mib for cell in cells],
                "load_seconds": [cell.load_seconds for cell in cells],
                **{f"{at} ms": [cell.latencies_ms[at] for cell in cells] for at in cells[0].latencies_ms},
            }
            lines = {name: Line.fit(numbers, column) for name, column in columns.items()}
            for name, line in lines.items():
                say(f"{name}: {line.at_zero:.2f} + {line.slope:.5f} × tasks, R² {line.r_squared:.3f}")
            result["lines"] = {name: asdict(line) for name, line in lines.items()}
    if config.replicas:
        serving = measure_all_serving(bundle, config)
        result["serving"] = [asdict(cell) for cell in serving]
        result["demands"] = []
        for pairs in config.pairs:
            busiest = max((cell for cell in serving if cell.pairs == pairs), key=lambda cell: cell.pairs_per_second)
            for demand in demands(busiest):
                result["demands"].append(asdict(demand))
                say(
                    f"{demand.pairs_per_second:>6,} pairs/s, {pairs} a request: {demand.cores:.1f} cores, "
                    f"{demand.replicas:,} replicas, {demand.apis:,} Apis, {demand.proxies:,} proxies"
                )
    return result


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in names(text))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in names(text))


def _command(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m tests.measure.growth",
        description="Time one bundle with more tasks and with more replicas; the last line is JSON.",
        epilog="an empty list leaves a part out: --tasks '' needs no bundle of several tasks, --replicas '' no Ray",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that `python -m export` wrote")
    parser.add_argument(
        "--tasks", type=_whole_numbers, default=(1, 10, 100, 1000), help="numbers of tasks (default: 1,10,100,1000)"
    )
    parser.add_argument("--replicas", type=_whole_numbers, default=(1, 2), help="numbers of replicas (default: 1,2)")
    parser.add_argument(
        "--batch-waits",
        dest="waits_ms",
        type=_numbers,
        default=(0.0, 2.0, 10.0),
        metavar="MS",
        help="milliseconds for which a request waits for others, at most (default: 0,2,10)",
    )
    parser.add_argument(
        "--clients", type=_whole_numbers, default=(1, 32), help="who ask at the same time (default: 1,32)"
    )
    parser.add_argument(
        "--pairs", type=_whole_numbers, default=(1, 32), help="of which each request asks (default: 1,32)"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of each burst over HTTP (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of the graph while tasks are counted (default: all usable cores)")
    options = vars(parser.parse_args(argv))
    plan = Plan(pause_seconds=0.5, min_runs=5, max_runs=50, budget_seconds=4.0)
    say(json.dumps(run_scale(ScaleConfig(plan=plan, **options))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
