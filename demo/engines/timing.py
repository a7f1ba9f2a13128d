"""How a burst of forward passes is timed, and what an engine reports."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from export.runtime.classifier import Execution

WARM_UP_RUNS = 3
"""Runs before a timed burst; the first ones after a pause are slower."""

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class BurstPlan:
    """How many timed runs: at least ``min_runs``, then up to ``max_runs`` while the time lasts."""

    min_runs: int
    max_runs: int
    budget_seconds: float


@dataclass(frozen=True)
class Burst:
    """The latencies of warm forward passes, in order, without tokenization."""

    runs_ms: tuple[float, ...]
    memory_mib: float
    """Largest resident size of the engine's process so far."""

    @property
    def median_ms(self) -> float:
        return float(np.median(self.runs_ms))

    @property
    def p95_ms(self) -> float:
        return float(np.percentile(self.runs_ms, 95))

    @property
    def p99_ms(self) -> float:
        return float(np.percentile(self.runs_ms, 99))


def join_bursts(bursts: Sequence[Burst]) -> Burst:
    """The runs of several bursts of one engine as one."""
    return Burst(tuple(run for burst in bursts for run in burst.runs_ms), max(burst.memory_mib for burst in bursts))


@dataclass(frozen=True)
class Served:
    """How many replicas an engine has, which one answered last, and how large the batch was that went through it."""

    replicas: int
    batch_size: int = 0
    """0 before the first request."""
    replica: str = ""


@dataclass(frozen=True)
class Loaded:
    """What an engine runs on, how long its process took to get ready, and its largest resident size so far."""

    execution: Execution
    load_seconds: float
    memory_mib: float


class Backend(Protocol):
    """What an engine runs inside its process."""

    execution: Execution

    def logits(self, arrays: Arrays) -> np.ndarray:
        """Token ids in (int64, shape = (n_batch, n_text)), logits out (float32, shape = (n_batch, n_labels))."""


def timed_runs(run: Callable[[], object], plan: BurstPlan) -> tuple[float, ...]:
    """The latency of each run in ms, after a warm-up."""
    for _ in range(WARM_UP_RUNS):
        run()
    runs_ms: list[float] = []
    end = time.perf_counter() + plan.budget_seconds
    while len(runs_ms) < plan.min_runs or (len(runs_ms) < plan.max_runs and time.perf_counter() < end):
        start = time.perf_counter()
        run()
        runs_ms.append(1000 * (time.perf_counter() - start))
    return tuple(runs_ms)
