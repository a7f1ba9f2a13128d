"""Runs the engines in turn, each in a process of its own."""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from export.bench.config import TUTORIAL, BenchConfig
from export.bench.engines import ENGINES, OPENVINO, REFERENCE, Job, Measured, Rounds
from export.bench.peaks import find_peaks
from export.bench.prepare import Prepared, prepare
from export.bench.worker import calibrate, start_engine, time_burst
from train.common.child import run_in_child
from train.common.console import say
from train.common.errors import EngineError
from train.common.machine import usable_cores

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
"""The repository, from which the engines' processes import."""


class _Started(NamedTuple):
    """An engine that can be timed."""

    worker: "Worker"
    measured: Measured
    """All but the latencies."""


Engines = Mapping[str, _Started | str]
"""By name, the engines that can be timed, and why the others cannot."""


def run_bench(config: BenchConfig) -> dict[str, Any]:
    """Compare the engines, print the tables, draw the chart, and return the JSON document."""
    with tempfile.TemporaryDirectory(prefix="promptfold-bench-") as folder:
        work, threads = Path(folder), config.threads or usable_cores()
        name = "Preparing the benchmark"
        prepared = run_in_child(prepare, config, work, threads, name=name, remedy="Is there enough memory?")
        with ExitStack() as at_end:
            engines = {name: start_one(config, prepared, name, work, at_end) for name in config.all_engines}
            return time_engines(config, prepared, work, engines)


def time_engines(config: BenchConfig, prepared: Prepared, work: Path, engines: Engines) -> dict[str, Any]:
    """The part of `run_bench` that wants the machine to itself; ``work`` is the folder of `prepare`."""
    from export.bench.report import document, draw, tables

    say("measuring the machine's peak")
    with Worker(sys.executable, prepared.job, work) as worker:
        peaks = worker.call(partial(find_peaks, prepared.job))
    if isinstance(peaks, str):
        say(f"the machine's peak could not be measured: {peaks}")
        peaks = []
    rounds = _time_in_turn(config, prepared, engines)
    if all(isinstance(found, str) for one in rounds for found in one.values()):
        name, reason = next(iter(rounds[0].items()))
        raise EngineError(f"No engine could be measured. {name}: {reason}.")
    report = document(prepared, rounds, peaks)
    for part in tables(prepared, report):
        say(part)
    if config.png is not None:
        draw(config.png, prepared, report)
        say(f"chart: {config.png}")
    settings = {"device": config.device, "threads": prepared.job.threads, "rounds": config.rounds}
    return {**settings, "plan": asdict(config.plan), **report}


def _time_in_turn(config: BenchConfig, prepared: Prepared, engines: Engines) -> Rounds:
    """Time the engines in turn, cell by cell: what slows a shared machine down then meets all alike."""
    rounds: list[dict[str, Measured | str]] = []
    for number in range(1, config.rounds + 1):
        found = {name: one if isinstance(one, str) else one.measured for name, one in engines.items()}
        for cell in prepared.cells:
            for name, one in engines.items():
                measured = found[name]
                if isinstance(one, _Started) and isinstance(measured, Measured) and cell.name in measured.cells:
                    found[name] = _with_burst(measured, one.worker, cell.name)
        rounds.append(found)
        say(f"round {number} of {config.rounds} is done")
    return rounds


def _with_burst(measured: Measured, worker: "Worker", cell: str) -> Measured | str:
    latencies_ms = worker.call(partial(time_burst, cell))
    if isinstance(latencies_ms, str):
        return latencies_ms
    return replace(measured, cells={**measured.cells, cell: replace(measured.cells[cell], latencies_ms=latencies_ms)})


def start_one(config: BenchConfig, prepared: Prepared, name: str, work: Path, at_end: ExitStack) -> _Started | str:
    """Load an engine in a process of its own, which ``at_end`` ends; where it cannot run, the reason."""
    started = _start(config, prepared, name, work, at_end)
    say(f"{name} {f'is not run: {started}' if isinstance(started, str) else 'is ready'}")
    return started


def _start(config: BenchConfig, prepared: Prepared, name: str, work: Path, at_end: ExitStack) -> _Started | str:
    job, graph, needs = prepared.job, prepared.graphs.get(name, Path()), ENGINES[name].needs
    interpreter = str(config.interpreters[needs]) if needs else sys.executable
    if isinstance(graph, str):
        return graph
    cells = [cell.name for cell in prepared.cells if cell.name != TUTORIAL or name == REFERENCE]
    try:
        if needs == OPENVINO:
            # Paths go as strings: Python 3.13 pickles them as no earlier version reads them.
            plain, graph = str(graph), work / f"{name}.xml"
            say("quantizing the plain graph for OpenVINO")
            with Worker(interpreter, job, work) as quantizer:
                failure = quantizer.call(partial(calibrate, job, plain, str(graph)))
            if failure:
                return failure
        worker = at_end.enter_context(Worker(interpreter, job, work))
    except OSError as cause:
        return f"{interpreter} cannot be started ({cause.strerror})"
    measured = worker.call(partial(start_engine, job, name, cells, str(graph)))
    return measured if isinstance(measured, str) else _Started(worker, measured)


class Worker:
    """A process of `export.bench.worker`, which lives as long as the context."""

    def __init__(self, interpreter: str, job: Job, work: Path) -> None:
        # Without -P the current folder could hide what shall be imported.
        command = [interpreter, "-P", "-m", "export.bench.worker"]
        variables = {
            "PYTHONPATH": str(ROOT),
            # Kernels that torch.compile writes start OpenMP's own number of threads.
            "OMP_NUM_THREADS": str(job.threads),
            # An earlier benchmark's compiled kernels shall not be found.
            "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled"),
        }
        self._printed = tempfile.TemporaryFile(dir=work)  # noqa: SIM115 -- closed with the process
        self._process = subprocess.Popen(
            command, env=os.environ | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed
        )

    def call(self, call: Callable[[], T]) -> T | str:
        """Make a call there; where it fails, the reason."""
        assert self._process.stdin and self._process.stdout
        try:
            pickle.dump(call, self._process.stdin)
            self._process.stdin.flush()
            answer: T | str = pickle.load(self._process.stdout)  # noqa: S301 -- a process of ours sent it
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            self._printed.seek(0)
            lines = self._printed.read().decode(errors="replace").strip().splitlines()
            return f"its process ended with exit code {code}" + (f" ({lines[-1]})" if lines else "")
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # an interrupt, which shall not wait for a call
            self._process.kill()
        self._process.communicate()  # the end of its input ends it
        self._printed.close()
