"""Runs the engines in turn, each in a process of its own."""

import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from export.bench.config import TUTORIAL, BenchConfig
from export.bench.engines import ENGINES, OPENVINO, REFERENCE, Job, Measured
from export.bench.peaks import find_peaks
from export.bench.prepare import Prepared, prepare
from export.bench.worker import calibrate, measure
from train.common.child import run_in_child
from train.common.console import say
from train.common.errors import EngineError
from train.common.machine import usable_cores

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
"""The repository, from which the engines' processes import."""


def run_bench(config: BenchConfig) -> dict[str, Any]:
    """Compare the engines, print the tables, draw the chart, and return the JSON document."""
    with tempfile.TemporaryDirectory(prefix="promptfold-bench-") as folder:
        work, threads = Path(folder), config.threads or usable_cores()
        name = "Preparing the benchmark"
        prepared = run_in_child(prepare, config, work, threads, name=name, remedy="Is there enough memory?")
        return time_engines(config, prepared, work)


def time_engines(config: BenchConfig, prepared: Prepared, work: Path) -> dict[str, Any]:
    """The part of `run_bench` that wants the machine to itself; ``work`` is the folder of `prepare`."""
    from export.bench.report import document, draw, tables

    say("measuring the machine's peak")
    peaks = _in_worker(partial(find_peaks, prepared.job), sys.executable, prepared.job, work)
    if isinstance(peaks, str):
        say(f"the machine's peak could not be measured: {peaks}")
        peaks = []
    rounds: list[dict[str, Measured | str]] = []
    for number in range(1, config.rounds + 1):
        rounds.append({})
        for name in config.all_engines:
            found = rounds[-1][name] = _measure(config, prepared, name, work)
            cells = {} if isinstance(found, str) else found.cells
            medians = [f"{cell} {statistics.median(timed.latencies_ms):.1f} ms" for cell, timed in cells.items()]
            say(f"round {number}/{config.rounds}  {name}: {', '.join(medians) or f'not run: {found}'}")
    if all(isinstance(found, str) for engines in rounds for found in engines.values()):
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


def _measure(config: BenchConfig, prepared: Prepared, name: str, work: Path) -> Measured | str:
    """Load and time an engine; where it cannot run, the reason."""
    job, graph, needs = prepared.job, prepared.graphs.get(name, Path()), ENGINES[name].needs
    interpreter = str(config.interpreters[needs]) if needs else sys.executable
    if isinstance(graph, str):
        return graph
    if needs == OPENVINO:
        # Paths go as strings: Python 3.13 pickles them as no earlier version reads them.
        plain, graph = str(graph), work / f"{name}.xml"
        if not graph.is_file():
            say("quantizing the plain graph for OpenVINO")
            failure = _in_worker(partial(calibrate, job, plain, str(graph)), interpreter, job, work)
            if failure:
                return failure
    cells = [cell.name for cell in prepared.cells if cell.name != TUTORIAL or name == REFERENCE]
    return _in_worker(partial(measure, job, name, cells, str(graph)), interpreter, job, work)


def _in_worker(call: Callable[[], T], interpreter: str, job: Job, work: Path) -> T | str:
    """Make a call in a process of its own (`export.bench.worker`); where it fails, the reason."""
    call_file, answer_file = work / "call", work / "answer"
    call_file.write_bytes(pickle.dumps(call))
    answer_file.unlink(missing_ok=True)
    # The process before still writes and frees memory for a moment.
    time.sleep(job.plan.pause_seconds)
    # Without -P the current folder could hide what shall be imported.
    command = [interpreter, "-P", "-m", "export.bench.worker", str(call_file), str(answer_file)]
    variables = {
        "PYTHONPATH": str(ROOT),
        # Kernels that torch.compile writes start OpenMP's own number of threads.
        "OMP_NUM_THREADS": str(job.threads),
        # An earlier benchmark's compiled kernels shall not be found.
        "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled"),
    }
    try:
        process = subprocess.run(
            command, env=os.environ | variables, input="", capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as cause:
        return f"{interpreter} cannot be started ({cause.strerror})"
    if not answer_file.is_file():
        lines = (process.stdout + process.stderr).strip().splitlines()
        return f"its process ended with exit code {process.returncode}" + (f" ({lines[-1]})" if lines else "")
    answer: T | str = pickle.loads(answer_file.read_bytes())  # noqa: S301 -- a process of ours wrote it
    return answer
