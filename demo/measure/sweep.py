"""Latency over batch sizes and lengths: what is measured, and what comes of it as table, chart and file."""

import csv
import io
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from demo.engines.stage import Setup, Stage
from demo.engines.timing import AnyEngine, BurstPlan
from demo.measure.compare import DISTURBED, PAUSE_SECONDS
from export.bundle.folder import BUNDLE, FILES, Bundle
from export.runtime.classifier import Execution
from train.common.errors import BundleError, EngineError, PromptfoldError, UsageError
from train.common.folder_record import read_json_object
from train.model.find import DECODERS

ROUNDS = 3
"""Bursts of each engine and cell, in turn, so that there is a spread."""


MIN_RUNS, MAX_RUNS = 3, 20


BURST_BUDGET_SECONDS = 0.4
"""How long the first burst of a cell goes on, within these bounds; every other one gets the same number of runs."""


MAX_CELLS = 12
"""At once: others wait meanwhile."""


MAX_BATCH_SIZE = 64


MAX_CELL_TOKENS = 16_384
"""Of all texts of a batch together: a burst of more would take longer than an engine may."""


ONE_TEXT_ONLY = "PEFT runs a decoder one text at a time, so PyTorch has no latency for larger batches."


@dataclass(frozen=True)
class Cell:
    """A batch to measure: ``batch_size`` texts, each of ``tokens`` tokens without padding."""

    batch_size: int
    tokens: int

    def __str__(self) -> str:
        """For people."""
        return f"batch {self.batch_size}, {self.tokens} tokens"


@dataclass(frozen=True)
class Times:
    """Latencies of one engine in one cell, tokenisation excluded.

    Attributes:
        rounds_ms: for each round the latency of each forward pass of a warm burst.
    """

    rounds_ms: tuple[tuple[float, ...], ...]

    @property
    def all_ms(self) -> np.ndarray:
        """Those of all rounds, shape = (n_runs,)"""
        return np.concatenate(self.rounds_ms)

    @property
    def median_ms(self) -> float:
        """The middle one."""
        return float(np.median(self.all_ms))

    @property
    def p95_ms(self) -> float:
        """Below which 95 % lie."""
        return float(np.percentile(self.all_ms, 95))


@dataclass(frozen=True)
class Row:
    """What was measured in one cell.

    Attributes:
        onnx: of ONNX Runtime.
        pytorch: of PyTorch, as many runs; None where it does not run, or does not take this batch.
    """

    cell: Cell
    onnx: Times
    pytorch: Times | None

    @property
    def speedup(self) -> float | None:
        """PyTorch's median latency over ONNX Runtime's, over all rounds."""
        return self.pytorch.median_ms / self.onnx.median_ms if self.pytorch else None

    @property
    def round_speedups(self) -> tuple[float, ...]:
        """The same for each round."""
        slow = self.pytorch.rounds_ms if self.pytorch else ()
        return tuple(float(np.median(a) / np.median(b)) for a, b in zip(slow, self.onnx.rounds_ms, strict=False))

    def pairs_per_s(self, times: Times) -> float:
        """Texts (pairs of sentences, where the task has pairs) per second, at the median latency."""
        return 1000 * self.cell.batch_size / times.median_ms

    def record(self) -> dict[str, int | float | None]:
        """As the endpoint and the CSV file name it; None where there is no figure."""
        record: dict[str, int | float | None] = {
            "batch_size": self.cell.batch_size,
            "tokens": self.cell.tokens,
            "rounds": len(self.onnx.rounds_ms),
            "runs": len(self.onnx.all_ms),
        }
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
    """A walk over cells, as far as it has come.

    Attributes:
        setup: what was chosen.
        unit: what a text is: "pairs" or "texts".
        onnx, pytorch: on what they run; None where PyTorch does not.
        cells: all that were asked for.
        rows: of those that were measured, in the same order.
        doing: what runs now, for people; empty once nothing does.
        bursts_done, n_bursts: how far it has come.
        seconds_left: estimated from the bursts so far; None before the first.
    """

    setup: Setup
    unit: str
    onnx: Execution
    pytorch: Execution | None
    cells: tuple[Cell, ...]
    n_bursts: int
    rows: tuple[Row, ...] = ()
    doing: str = ""
    bursts_done: int = 0
    seconds_left: float | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every round of every cell was measured."""
        return self.bursts_done == self.n_bursts

    @property
    def notes(self) -> tuple[str, ...]:
        """What belongs beside the figures."""
        if self.pytorch is None:
            return ("This page runs ONNX Runtime alone; PyTorch was not measured.",)
        notes = []
        if self.pytorch.on_cuda != self.onnx.on_cuda:
            notes.append("The engines do not run on the same device: the speed-up compares devices, not engines.")
        if any(
            max(row.round_speedups, default=1) > DISTURBED * min(row.round_speedups, default=1) for row in self.rows
        ):
            notes.append("In some cells the rounds differ widely: something else used this machine meanwhile.")
        if any(row.pytorch is None for row in self.rows):
            notes.append(ONE_TEXT_ONLY)
        return tuple(notes)

    def as_json(self) -> dict[str, Any]:
        """For the endpoint ``/latency``; ``notes`` are there only when there is something to tell."""
        value: dict[str, Any] = {
            "adapter": self.setup.adapter,
            "pytorch": asdict(self.pytorch) if self.pytorch else None,
            "onnx": asdict(self.onnx),
            "cells": [row.record() for row in self.rows],
        }
        return value | {"notes": list(self.notes)} if self.notes else value

    def as_csv(self) -> str:
        """A line a cell, with units in the names of the columns, and on what it was measured in each line."""
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
    """Every batch size with every length, as they came from outside.

    Args:
        max_length: longest text in tokens.

    Raises:
        UsageError: they are no whole numbers within the limits, or too many.
    """
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
    """Sorted, each once; ``name`` is for complaints."""
    if not isinstance(values, list | tuple) or not values:
        raise UsageError(f"{name}: choose at least one number from 1 to {largest}.")
    if len(values) > MAX_CELLS:
        raise UsageError(f"{name}: these are {len(values):,} numbers; at most {MAX_CELLS} are measured at once.")
    for value in values:
        # True is a number to Python.
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise UsageError(f"{name}: {str(value)[:40]!r} is no whole number from 1 to {largest}.")
    return sorted(set(values))


def random_batch(bundle: Bundle, cell: Cell, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random token ids without padding, as `TextTokenizer` gives them; each int64, shape = (batch_size, tokens)"""
    shape = (cell.batch_size, cell.tokens)
    arrays = {
        "input_ids": np.random.default_rng(seed).integers(0, bundle.vocabulary_size, shape, dtype=np.int64),
        "attention_mask": np.ones(shape, dtype=np.int64),
        "token_type_ids": np.zeros(shape, dtype=np.int64),
    }
    return {name: arrays[name] for name in bundle.text_inputs}


def sweep(stage: Stage, setup: Setup, cells: Sequence[Cell], *, stop: threading.Event) -> Iterator[Sweep]:
    """Measure cell by cell, in each both engines in turn, an idle pause before each burst.

    Args:
        cells: from `choose_cells`, for the adapter's longest text.
        stop: once it is set, no further burst begins. Whole rounds that were measured are kept.

    Yields:
        the sweep before each burst, and at the end.

    Raises:
        EngineError: an engine died, did not answer or refused a batch; in which cell, the message says.
        PromptfoldError: as `Stage.open`.
    """
    opened = stage.open(setup)
    config = read_json_object(opened.bundle.folder / FILES.config, BundleError, BUNDLE.remedy)
    # See `train.adapter.peft.load_peft_model`; a larger batch would end the engine's process.
    largest_for_pytorch = 1 if config.get("model_type") in DECODERS else MAX_BATCH_SIZE

    def engines_of(cell: Cell) -> list[AnyEngine]:
        if opened.pytorch is None or cell.batch_size > largest_for_pytorch:
            return [opened.onnx]
        return [opened.pytorch, opened.onnx]

    now = Sweep(
        setup=setup,
        unit="pairs" if opened.task.is_pair else "texts",
        onnx=opened.onnx.wait_until_ready().execution,
        pytorch=opened.pytorch.wait_until_ready().execution if opened.pytorch else None,
        cells=tuple(cells),
        n_bursts=ROUNDS * sum(len(engines_of(cell)) for cell in cells),
    )
    start = time.perf_counter()
    for number, cell in enumerate(cells, start=1):
        engines = engines_of(cell)
        arrays = random_batch(opened.bundle, cell)
        bursts: list[tuple[float, ...]] = []
        # The same number of runs for both, or the rarest runs of the faster one would be rarer.
        plan = BurstPlan(MIN_RUNS, MAX_RUNS, BURST_BUDGET_SECONDS)
        for index in range(ROUNDS * len(engines)):
            engine, where = engines[index % len(engines)], f"cell {number} of {len(cells)} ({cell})"
            doing = f"{where}: {engine.name}, round {1 + index // len(engines)} of {ROUNDS}"
            yield replace(now, doing=doing[0].upper() + doing[1:])
            # Not over a yield: whoever takes what comes may never ask for more.
            with stage.measuring:
                if stop.wait(PAUSE_SECONDS):
                    break
                try:
                    bursts.append(engine.burst(arrays, plan).latencies_ms)
                except PromptfoldError as error:
                    raise EngineError(f"In {where}: {error}") from error
            plan = BurstPlan(len(bursts[0]), len(bursts[0]), BURST_BUDGET_SECONDS)
            done = now.bursts_done + 1
            seconds_left = (time.perf_counter() - start) / done * (now.n_bursts - done)
            now = replace(now, bursts_done=done, seconds_left=seconds_left)
        if rounds := len(bursts) // len(engines):
            *others, onnx = (Times(tuple(bursts[side :: len(engines)][:rounds])) for side in range(len(engines)))
            now = replace(now, rows=(*now.rows, Row(cell, onnx, others[0] if others else None)))
        if stop.is_set():
            break
    yield now
