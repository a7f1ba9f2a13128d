"""The interface of an engine, and how a burst of passes is timed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from export.runtime.classifier import Execution
from train.common.machine import peak_memory_mib

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
    """What a burst measured, inside the engine's process.

    Attributes:
        latencies_ms: of each forward pass, in order.
        memory_mib: largest resident size of the process so far, libraries included.
    """

    latencies_ms: tuple[float, ...]
    memory_mib: float


@dataclass(frozen=True)
class Served:
    """Who answered last, where that was one of several replicas.

    Attributes:
        replicas: how many are running.
        batch_size: with how many texts the last one asked went through the graph at most, itself included; 0 before.
        replica: the name of the one that answered; empty before.
    """

    replicas: int
    batch_size: int = 0
    replica: str = ""


@dataclass(frozen=True)
class Loaded:
    """An engine that can answer.

    Attributes:
        execution: on what it runs.
        load_seconds: from the start of its process to that moment, libraries included.
        memory_mib: largest resident size of the process so far.
    """

    execution: Execution
    load_seconds: float
    memory_mib: float


class Backend(Protocol):
    """What an engine does inside its process."""

    execution: Execution

    def logits(self, arrays: Arrays) -> np.ndarray:
        """Token ids in (int64, shape = (n_batch, n_text)), logits out (float32, shape = (n_batch, n_labels))."""


def timed_runs(run: Callable[[], object], plan: BurstPlan) -> tuple[float, ...]:
    """The latency of each run in ms, after a warm-up."""
    for _ in range(WARM_UP_RUNS):
        run()
    latencies_ms: list[float] = []
    end = time.perf_counter() + plan.budget_seconds
    while len(latencies_ms) < plan.min_runs or (len(latencies_ms) < plan.max_runs and time.perf_counter() < end):
        start = time.perf_counter()
        run()
        latencies_ms.append(1000 * (time.perf_counter() - start))
    return tuple(latencies_ms)


def time_burst(backend: Backend, arrays: Arrays, plan: BurstPlan) -> Burst:
    """Time forward passes, after a warm-up."""
    return Burst(timed_runs(partial(backend.logits, arrays), plan), peak_memory_mib())


class AnyEngine(Protocol):
    """What the page asks of an engine, wherever that runs: `Engine`, or `demo.engines.on_ray.ClusterEngine`."""

    name: str

    @property
    def pid(self) -> int | None:
        """The process's number; None where there are several."""

    @property
    def served(self) -> Served | None:
        """Who answered last; None where there is only one."""

    def wait_until_ready(self) -> Loaded:
        """Wait until it can answer and return on what it runs."""

    def logits(self, arrays: Arrays) -> np.ndarray:
        """One forward pass, as `Backend.logits`."""

    def burst(self, arrays: Arrays, plan: BurstPlan) -> Burst:
        """Latency of each forward pass of a burst, after a warm-up."""

    def close(self) -> None:
        """Stop it; harmless when it is stopped already."""
