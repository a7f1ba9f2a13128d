"""Runs the engines in turn, each in a process of its own."""

import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from export.bench.chart import draw
from export.bench.config import TUTORIAL, BenchConfig
from export.bench.engines import ENGINES, OPENVINO, REFERENCE, Job, Measured, Peak, environment
from export.bench.prepare import Prepared, prepare
from export.bench.report import compare, document, summarise, table
from train.common.console import say
from train.common.errors import EngineError, PromptfoldError
from train.common.machine import usable_cores

ROOT = Path(__file__).parents[2]
"""The repository, from which the engines' processes import."""


class Engines:
    """The processes of the engines, one at a time.

    A process that cannot do what it should is no error of the benchmark's: its answer is the reason, as text.
    """

    def __init__(self, config: BenchConfig, prepared: Prepared, work: Path, threads: int) -> None:
        """Remember what every process is told."""
        self._prepared = prepared
        self._work = work
        self._openvino = str(config.openvino_python)
        self._job = Job(
            work="measure",
            device=config.device,
            threads=threads,
            plan=config.plan,
            adapter=str(prepared.adapter),
            bundle=str(prepared.bundle),
            task=prepared.task_name,
            pad_token_id=prepared.pad_token_id,
            is_decoder=prepared.is_decoder,
            inputs=str(prepared.inputs),
        )
        self._graphs = {name: str(path) for name, path in prepared.graphs.items()}

    def peaks(self) -> list[Peak]:
        """The machine's fastest matrix products; none where they cannot be measured."""
        answer = self._run(replace(self._job, work="peaks"), sys.executable)
        if isinstance(answer, str):
            say(f"the machine's peak could not be measured: {answer}")
            return []
        return [Peak(**peak) for peak in answer["peaks"]]

    def calibrate(self, name: str) -> str:
        """Quantise the plain graph for OpenVINO; the reason where it fails, else nothing."""
        target = str(self._work / f"{name}.xml")
        answer = self._run(
            replace(self._job, work="calibrate", source=self._graphs[name], graph=target), self._openvino
        )
        self._graphs[name] = target
        return answer if isinstance(answer, str) else ""

    def measure(self, name: str) -> Measured | str:
        """Load and time an engine."""
        if name in self._prepared.absent:
            return self._prepared.absent[name]
        interpreter = self._openvino if ENGINES[name].family == OPENVINO else sys.executable
        cells = tuple(cell.name for cell in self._prepared.cells if cell.name != TUTORIAL or name == REFERENCE)
        job = replace(self._job, engine=name, graph=self._graphs.get(name, ""), cells=cells)
        answer = self._run(job, interpreter)
        return answer if isinstance(answer, str) else Measured.from_json(answer["measured"])

    def _run(self, job: Job, interpreter: str) -> dict[str, Any] | str:
        job_file, answer_file = self._work / "job.json", self._work / "answer.json"
        job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
        answer_file.unlink(missing_ok=True)
        # What the process before still writes or frees is done by then.
        time.sleep(job.plan.pause_seconds)
        # -P: what lies in the current folder is not what shall be imported.
        command = [interpreter, "-P", "-m", "export.bench.worker", str(job_file), str(answer_file)]
        try:
            process = subprocess.run(
                command,
                env=environment(job.threads, self._work / "compiled", ROOT),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as cause:
            return f"{interpreter} cannot be started ({cause.strerror})"
        if not answer_file.is_file():
            lines = process.stdout.strip().splitlines()
            return f"its process ended with exit code {process.returncode}" + (f" ({lines[-1]})" if lines else "")
        answer: dict[str, Any] = json.loads(answer_file.read_text(encoding="utf-8"))
        return str(answer["error"]) if "error" in answer else answer


def _prepare_in_child(config: BenchConfig, work: Path, threads: int) -> Prepared:
    """Prepare in a process of its own, which takes torch and its memory with it.

    Raises:
        PromptfoldError: whatever `prepare` raises, or an EngineError when its process died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(sender, config, work, threads), name="promptfold-bench-prepare")
    process.start()
    sender.close()
    try:
        reply: Prepared | PromptfoldError = receiver.recv()
    except (KeyboardInterrupt, SystemExit):
        process.terminate()
        raise
    except EOFError as cause:
        process.join()
        raise EngineError(
            f"Preparing the benchmark ended unexpectedly (exit code {process.exitcode}). Is there enough memory?"
        ) from cause
    finally:
        process.join()
    if isinstance(reply, PromptfoldError):
        raise reply
    return reply


def _in_child(sender: Connection, config: BenchConfig, work: Path, threads: int) -> None:
    try:
        sender.send(prepare(config, work, threads))
    except PromptfoldError as error:
        sender.send(error)
    except KeyboardInterrupt:
        return  # the parent had it too and says so


def run_bench(config: BenchConfig) -> dict[str, Any]:
    """Compare the engines, printing the table and drawing the chart.

    Returns:
        the JSON document

    Raises:
        PromptfoldError: what a user can mend; an EngineError when no engine could be measured.
    """
    threads = config.threads or usable_cores()
    with tempfile.TemporaryDirectory(prefix="promptfold-bench-") as folder:
        work = Path(folder)
        return time_engines(config, _prepare_in_child(config, work, threads), work, threads)


def time_engines(config: BenchConfig, prepared: Prepared, work: Path, threads: int) -> dict[str, Any]:
    """The part of `run_bench` that wants the machine to itself.

    Args:
        prepared: of the same settings.
        work: the folder in which it was prepared.
        threads: of every engine.
    """
    engines = Engines(config, prepared, work, threads)
    say("measuring the machine's peak")
    peaks = engines.peaks()
    for name in config.all_engines:
        if ENGINES[name].family == OPENVINO and name not in prepared.absent:
            say("quantising the plain graph for OpenVINO")
            reason = engines.calibrate(name)
            if reason:
                prepared.absent[name] = reason
    rounds: list[dict[str, Measured | str]] = []
    for number in range(1, config.rounds + 1):
        rounds.append({})
        for name in config.all_engines:
            measured = rounds[-1][name] = engines.measure(name)
            say(f"round {number}/{config.rounds}  {name}: {_progress(measured)}")
    results = summarise(prepared, rounds, peaks)
    if not any(result.cells for result in results):
        raise EngineError(f"No engine could be measured. {results[0].engine}: {results[0].reason}.")
    best = compare(prepared, rounds, results)
    for line in table(prepared, results, best, peaks):
        say(line)
    if config.png is not None:
        draw(config.png, prepared, results)
        say(f"chart: {config.png}")
    return {
        "device": config.device,
        "threads": threads,
        "rounds": config.rounds,
        "plan": asdict(config.plan),
        **document(prepared, results, best, peaks),
    }


def _progress(measured: Measured | str) -> str:
    if isinstance(measured, str):
        return f"not run: {measured}"
    medians = (f"{name} {statistics.median(cell.latencies_ms):.1f} ms" for name, cell in measured.cells.items())
    return ", ".join(medians)
