"""Latency over batch sizes and lengths: which cells are measured, the measurement, and its figures as JSON and CSV."""

import csv
import io
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from demo.engines.stage import AnyEngine, OpenedEngines, Setup, Stage
from demo.engines.timing import Burst, BurstPlan, join_bursts
from demo.measure.compare import PAUSE_SECONDS, is_disturbed
from export.runtime.batches import random_batch
from export.runtime.classifier import Execution
from train.common.errors import EngineError, PromptfoldError, UsageError

ROUNDS = 3
"""Bursts of each engine in a cell, in turn, so that the spread is known."""

MIN_RUNS, MAX_RUNS = 3, 20
BURST_BUDGET_SECONDS = 0.4
"""How long the first burst of a cell goes on, within these bounds; the others get the same number of runs."""

MAX_CELLS = 12
"""Cells in one sweep: other visitors wait meanwhile."""

MAX_BATCH_SIZE = 64
MAX_CELL_TOKENS = 16_384
"""Tokens of a whole batch: a burst of more would exceed an engine's time limit."""

ONE_TEXT_ONLY = "PEFT runs a decoder one text at a time, so PyTorch has no latency for larger batches."


@dataclass(frozen=True)
class Cell:
    """A batch to measure: ``batch_size`` texts, each of ``tokens`` tokens without padding."""

    batch_size: int
    tokens: int


@dataclass(frozen=True)
class Row:
    """What was measured in one cell: a burst of each engine in each round, all with the same number of runs."""

    cell: Cell
    onnx_rounds: tuple[Burst, ...]
    pytorch_rounds: tuple[Burst, ...]
    """Empty where PyTorch does not run, or does not take this batch."""

    @property
    def onnx(self) -> Burst:
        return join_bursts(self.onnx_rounds)

    @property
    def pytorch(self) -> Burst | None:
        return join_bursts(self.pytorch_rounds) if self.pytorch_rounds else None

    @property
    def speedup(self) -> float | None:
        """PyTorch's median latency over ONNX Runtime's, over all rounds."""
        return self.pytorch.median_ms / self.onnx.median_ms if self.pytorch else None

    @property
    def round_speedups(self) -> tuple[float, ...]:
        pairs = zip(self.pytorch_rounds, self.onnx_rounds, strict=False)
        return tuple(slow.median_ms / fast.median_ms for slow, fast in pairs)

    def pairs_per_s(self, times: Burst) -> float:
        """Texts (pairs of sentences, where the task has pairs) per second, at the median latency."""
        return 1000 * self.cell.batch_size / times.median_ms

    def record(self) -> dict[str, int | float | None]:
        """The figures by their names in JSON and CSV; None where there is none."""
        record: dict[str, int | float | None] = asdict(self.cell)
        record |= {"rounds": len(self.onnx_rounds), "runs": len(self.onnx.runs_ms)}
        for name, times in (("pytorch", self.pytorch), ("onnx", self.onnx)):
            record[f"{name}_median_ms"] = times.median_ms if times else None
            record[f"{name}_p95_ms"] = times.p95_ms if times else None
            record[f"{name}_pairs_per_s"] = self.pairs_per_s(times) if times else None
        rounds = self.round_speedups
        return record | {
            "speedup": self.speedup,
            "speedup_lowest_round": min(rounds, default=None),
            "speedup_highest_round": max(rounds, default=None),
        }


@dataclass(frozen=True)
class Sweep:
    """The measurement of several cells, as far as it has come."""

    setup: Setup
    unit: str
    """What a text is: "pairs" or "texts"."""
    onnx: Execution
    pytorch: Execution | None
    cells: tuple[Cell, ...]
    n_bursts: int
    rows: tuple[Row, ...] = ()
    """The cells measured so far, in the same order."""
    doing: str = ""
    """What runs now, for people; empty at the end."""
    bursts_done: int = 0
    seconds_left: float | None = None
    """Estimated from the bursts so far."""

    @property
    def is_complete(self) -> bool:
        return self.bursts_done == self.n_bursts

    @property
    def notes(self) -> tuple[str, ...]:
        """What belongs beside the figures."""
        if self.pytorch is None:
            return ("This page runs ONNX Runtime alone; PyTorch was not measured.",)
        notes = []
        if self.pytorch.on_cuda != self.onnx.on_cuda:
            notes.append("The engines do not run on the same device: the speed-up compares devices, not engines.")
        if any(is_disturbed(row.round_speedups) for row in self.rows):
            notes.append("In some cells the rounds differ widely: something else used this machine meanwhile.")
        if any(row.pytorch is None for row in self.rows):
            notes.append(ONE_TEXT_ONLY)
        return tuple(notes)

    def as_json(self) -> dict[str, Any]:
        """For the endpoint ``/latency``; ``notes`` is there only if there are any."""
        pytorch = asdict(self.pytorch) if self.pytorch else None
        value: dict[str, Any] = {"adapter": self.setup.adapter, "pytorch": pytorch, "onnx": asdict(self.onnx)}
        value["cells"] = [row.record() for row in self.rows]
        return value | {"notes": list(self.notes)} if self.notes else value

    def as_csv(self) -> str:
        """A line a cell, with units in the names of the columns; each line says what it was measured on."""
        ran_on = {
            f"{name}_{what}": getattr(execution, what) if execution else None
            for name, execution in (("pytorch", self.pytorch), ("onnx", self.onnx))
            for what in ("engine", "provider", "threads", "precision")
        }
        records = [{"adapter": self.setup.adapter} | row.record() | ran_on for row in self.rows]
        file = io.StringIO()
        writer = csv.DictWriter(file, list(records[0]) if records else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return file.getvalue()


def choose_cells(batch_sizes: object, lengths: object, *, max_length: int) -> tuple[Cell, ...]:
    """Every batch size with every length; they come from a visitor, so a wrong one raises a UsageError."""
    sizes = _numbers("Batch sizes", batch_sizes, MAX_BATCH_SIZE)
    tokens = _numbers("Lengths in tokens", lengths, max_length)
    cells = tuple(Cell(size, length) for size in sizes for length in tokens)
    if len(cells) > MAX_CELLS:
        raise UsageError(
            f"{len(sizes)} batch sizes with {len(tokens)} lengths are {len(cells)} cells; at most {MAX_CELLS} are "
            "measured at once. Choose fewer."
        )
    for cell in cells:
        if cell.batch_size * cell.tokens > MAX_CELL_TOKENS:
            raise UsageError(
                f"A batch of {cell.batch_size} texts of {cell.tokens} tokens is too large: at most "
                f"{MAX_CELL_TOKENS:,} tokens are measured together. Choose a smaller batch or shorter texts."
            )
    return cells


def _numbers(name: str, values: object, largest: int) -> list[int]:
    """The whole numbers that a visitor chose, sorted, each once."""
    if not isinstance(values, list | tuple) or not values:
        raise UsageError(f"{name}: choose at least one number from 1 to {largest}.")
    if len(values) > MAX_CELLS:
        raise UsageError(f"{name}: these are {len(values):,} numbers; at most {MAX_CELLS} are measured at once.")
    for value in values:
        # bool is a subclass of int.
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise UsageError(f"{name}: {str(value)[:40]!r} is no whole number from 1 to {largest}.")
    return sorted(set(values))


def sweep(stage: Stage, setup: Setup, cells: Sequence[Cell], *, stop: threading.Event) -> Iterator[Sweep]:
    """Measure cell by cell, in each both engines in turn, with an idle pause before each burst.

    Yields the sweep before each burst and at the end. Once ``stop`` is set no further burst begins; whole rounds that
    were measured are kept. An EngineError says in which cell an engine failed.
    """
    opened = stage.open(setup)
    engines = {cell: _engines(opened, cell) for cell in cells}
    now = Sweep(
        setup=setup,
        unit="pairs" if opened.task.is_pair else "texts",
        onnx=opened.onnx.wait_until_ready().execution,
        pytorch=opened.pytorch.wait_until_ready().execution if opened.pytorch else None,
        cells=tuple(cells),
        n_bursts=ROUNDS * sum(map(len, engines.values())),
    )
    start = time.perf_counter()
    for number, cell in enumerate(cells, start=1):
        where = f"cell {number} of {len(cells)} (batch {cell.batch_size}, {cell.tokens} tokens)"
        arrays = random_batch(
            np.random.default_rng(0),
            (cell.batch_size, cell.tokens),
            inputs=opened.bundle.text_inputs,
            vocabulary_size=opened.bundle.vocabulary_size,
        )
        bursts: list[Burst] = []
        plan = BurstPlan(MIN_RUNS, MAX_RUNS, BURST_BUDGET_SECONDS)
        for index, engine in enumerate(ROUNDS * engines[cell]):
            doing = f"{engine.name}, round {1 + index // len(engines[cell])} of {ROUNDS}"
            yield replace(now, doing=f"{where.capitalize()}: {doing}")
            # The lock is not held over a yield: the caller may never ask for more.
            with stage.measuring:
                if stop.wait(PAUSE_SECONDS):
                    break
                try:
                    bursts.append(engine.burst(arrays, plan))
                except PromptfoldError as error:
                    raise EngineError(f"In {where}: {error}") from error
            # The same number of runs for both: with more runs the faster engine would show rarer outliers.
            plan = replace(plan, min_runs=len(bursts[0].runs_ms), max_runs=len(bursts[0].runs_ms))
            done = now.bursts_done + 1
            seconds_left = (time.perf_counter() - start) / done * (now.n_bursts - done)
            now = replace(now, bursts_done=done, seconds_left=seconds_left)
        now = replace(now, rows=(*now.rows, *_rows(cell, bursts, len(engines[cell]))))
        if stop.is_set():
            break
    yield now


def _engines(opened: OpenedEngines, cell: Cell) -> tuple[AnyEngine, ...]:
    """The engines that take this batch, ONNX Runtime last."""
    # See `train.adapter.peft.load_peft_model`: a larger batch would end PyTorch's process.
    if opened.pytorch is None or (cell.batch_size > 1 and opened.bundle.is_decoder):
        return (opened.onnx,)
    return opened.pytorch, opened.onnx


def _rows(cell: Cell, bursts: Sequence[Burst], n_engines: int) -> list[Row]:
    """The row of a cell from its bursts, which the engines took in turn; none without a whole round."""
    n_rounds = len(bursts) // n_engines
    *others, onnx = (tuple(bursts[side::n_engines][:n_rounds]) for side in range(n_engines))
    return [Row(cell, onnx, others[0] if others else ())] if n_rounds else []
