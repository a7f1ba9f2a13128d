"""A function in a process of its own."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from train.common.errors import EngineError

T = TypeVar("T")


def in_child(work: Callable[..., T], *arguments: Any) -> T:
    """Do something in a process of its own, which takes its memory with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool as cause:
            raise EngineError("A process of the benchmark ended unexpectedly. Is there enough memory?") from cause
