"""An engine in a process of its own, which the page asks over a pipe."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from demo.engines.pytorch import PromptLogits
from demo.engines.timing import Arrays, Backend, Burst, BurstPlan, Loaded, timed_runs
from train.common.child import new_child, start_child
from train.common.errors import EngineError, PromptfoldError
from train.common.machine import peak_memory_mib

START_TIMEOUT_SECONDS = 300.0
"""A large base model has to be read, hashed and loaded first."""

REQUEST_TIMEOUT_SECONDS = 60.0
"""Far beyond what any request takes: a burst is bounded by the number of its runs."""


def make_onnx_backend(folder: Path, threads: int, *, task: str | None = None, precision: str | None = None) -> Backend:
    """Load a bundle folder into ONNX Runtime, for one task where it holds several."""
    from export.bundle.folder import load_bundle
    from export.runtime.classifier import OnnxClassifier

    return OnnxClassifier(load_bundle(folder), task=task, precision=precision, threads=threads)


def _serve(connection: Connection, make_backend: Callable[[Path, int], Backend], folder: Path, threads: int) -> None:
    """The engine's process. Sends what it loaded, then answers requests: (value, None) or (None, error)."""

    def send(value: object, error: PromptfoldError | None = None) -> None:
        # The page may have ended; then the next request is no request either.
        with suppress(OSError):
            connection.send((value, error))

    try:
        backend = make_backend(folder, threads)
    except PromptfoldError as error:
        send(None, error)
        return
    send((backend.execution, peak_memory_mib()))
    while True:
        try:
            method, arguments = connection.recv()
        except (EOFError, OSError):  # the page has ended; OSError: before it took the last reply
            return
        try:
            if method == "burst":
                arrays, plan = arguments
                value = Burst(timed_runs(partial(backend.logits, arrays), plan), peak_memory_mib())
            else:
                value = getattr(backend, method)(*arguments)
        except PromptfoldError as error:
            # The request was wrong, not the engine: it goes on.
            send(None, error)
        else:
            send(value)


class EngineProcess:
    """A backend in a process of its own. A process that died is started again by the next request."""

    served = None

    def __init__(
        self,
        name: str,
        make_backend: Callable[[Path, int], Backend],
        folder: Path,
        *,
        threads: int,
        request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
    ) -> None:
        """Start the process, which makes the backend from a folder and a number of threads while the caller goes on."""
        self.name = name
        self._arguments = (make_backend, folder, threads)
        self._request_timeout_seconds = request_timeout_seconds
        self._lock = threading.RLock()
        self._is_closed = False
        self._start()

    def _start(self) -> None:
        self._connection, remote = multiprocessing.Pipe()
        self._process = new_child(_serve, remote, *self._arguments, name=f"promptfold-{self.name}", daemon=True)
        self._started = time.perf_counter()
        start_child(self._process)
        # Only the process holds its end now, so its death is seen as an end of file.
        remote.close()
        self._loaded: Loaded | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def wait_until_ready(self) -> Loaded:
        """Wait until the backend is loaded and return on what it runs. Raises what the backend raised as it loaded."""
        with self._lock:
            if self._loaded is None:
                execution, memory_mib = self._receive(START_TIMEOUT_SECONDS)
                self._loaded = Loaded(execution, time.perf_counter() - self._started, memory_mib)
            return self._loaded

    def logits(self, arrays: Arrays) -> np.ndarray:
        """One forward pass, as `Backend.logits`; an EngineError where the process died or did not answer in time."""
        return self._request("logits", dict(arrays))

    def burst(self, arrays: Arrays, plan: BurstPlan) -> Burst:
        """Time a burst of forward passes inside the process, after a warm-up."""
        return self._request("burst", dict(arrays), plan)

    def prompt_logits(self, arrays: Arrays, n_random: int, seed: int) -> PromptLogits:
        """As `PyTorchBackend.prompt_logits`; only a PyTorch engine has it."""
        return self._request("prompt_logits", dict(arrays), n_random, seed)

    def _request(self, method: str, *arguments: Any) -> Any:
        with self._lock:
            if self._is_closed:
                raise EngineError(f"The {self.name} engine was stopped to make room for others. Try again.")
            # A process that was just killed may still count as alive; the end of its pipe is seen first.
            if not self._process.is_alive() or (self._loaded is not None and self._connection.poll()):
                self._stop()
                self._start()
            self.wait_until_ready()
            try:
                self._connection.send((method, arguments))
            except OSError as cause:
                raise self._ended() from cause
            return self._receive(self._request_timeout_seconds)

    def _receive(self, timeout_seconds: float) -> Any:
        try:
            if not self._connection.poll(timeout_seconds):
                self._stop()
                raise EngineError(
                    f"The {self.name} engine did not answer within {timeout_seconds:.0f} s and was stopped. "
                    "Try again: it is started anew."
                )
            value, error = self._connection.recv()
        except (EOFError, OSError) as cause:
            raise self._ended() from cause
        if error is not None:
            raise error
        return value

    def _ended(self) -> EngineError:
        self._process.join(timeout=5)
        code = self._process.exitcode
        self._stop()
        return EngineError(
            f"The {self.name} engine's process ended unexpectedly (exit code {code}). Try again: it is started anew."
        )

    def _stop(self) -> None:
        self._connection.close()
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def close(self) -> None:
        """Stop the process; harmless when it is stopped already."""
        # Without the lock: a burst that is still running must not delay the end.
        self._is_closed = True
        self._stop()
