"""An engine in a process of its own, asked over a pipe."""

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from demo.engines.pytorch import PromptLogits
from demo.engines.timing import Arrays, Backend, Burst, BurstPlan, Loaded, time_burst
from train.common.errors import EngineError, PromptfoldError
from train.common.machine import peak_memory_mib

START_TIMEOUT_SECONDS = 300.0
"""A large base model has to be read, hashed and loaded first."""


REQUEST_TIMEOUT_SECONDS = 60.0
"""Far beyond what any request may take: a burst is bounded by the number of its runs."""


def make_onnx_backend(folder: Path, threads: int, *, task: str | None = None, precision: str | None = None) -> Backend:
    """Load a bundle folder into ONNX Runtime, for one task where it holds several."""
    from export.bundle.folder import load_bundle
    from export.runtime.classifier import OnnxClassifier

    return OnnxClassifier(load_bundle(folder), task=task, precision=precision, threads=threads)


@dataclass(frozen=True)
class _Reply:
    """An answer from an engine's process: a value, or what went wrong."""

    value: Any = None
    error: Exception | None = None


def _serve(connection: Connection, make_backend: Callable[[Path, int], Backend], folder: Path, threads: int) -> None:
    """The engine's process: load, report, then answer until the page's end of the pipe is closed."""
    # Ctrl-C reaches the whole process group; the page decides when its engines stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        backend = make_backend(folder, threads)
    except PromptfoldError as error:
        connection.send(_Reply(error=error))
        return
    connection.send(_Reply(value=(backend.execution, peak_memory_mib())))
    while True:
        try:
            work, arguments = connection.recv()
        except EOFError:
            return
        try:
            value = time_burst(backend, *arguments) if work == "burst" else getattr(backend, work)(*arguments)
        except PromptfoldError as error:
            # Of the request, not of the engine: it goes on.
            connection.send(_Reply(error=error))
        else:
            connection.send(_Reply(value=value))


class Engine:
    """A backend in a process of its own, as the page sees it."""

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
        """Start the process; it loads while the caller goes on.

        Args:
            name: for messages.
            make_backend: a function of a module, which the process can import.
            folder: what it loads.
            threads: how many threads the backend may use.
            request_timeout_seconds: after this long without an answer the process is taken for hung.
        """
        self.name = name
        self._arguments = (make_backend, folder, threads)
        self._request_timeout_seconds = request_timeout_seconds
        self._lock = threading.Lock()
        self._is_closed = False
        self._start()

    def _start(self) -> None:
        # "spawn": a fork would copy the page's threads and locks in whatever state they are.
        context = multiprocessing.get_context("spawn")
        self._connection, remote = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(remote, *self._arguments), name=f"promptfold-{self.name}", daemon=True
        )
        self._started = time.perf_counter()
        self._process.start()
        # Only the process holds its end now, so its death is seen as an end of file.
        remote.close()
        self._loaded: Loaded | None = None

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return self._process.pid

    def wait_until_ready(self) -> Loaded:
        """Wait until the backend is loaded and return on what it runs.

        Raises:
            PromptfoldError: whatever the backend raised while it loaded, or an EngineError.
        """
        with self._lock:
            return self._wait_until_ready()

    def _wait_until_ready(self) -> Loaded:
        if self._loaded is None:
            execution, memory_mib = self._receive(START_TIMEOUT_SECONDS)
            self._loaded = Loaded(execution, time.perf_counter() - self._started, memory_mib)
        return self._loaded

    def logits(self, arrays: Arrays) -> np.ndarray:
        """One forward pass: token ids in, logits out, as `Backend.logits`.

        Raises:
            EngineError: the process died or did not answer in time.
            PromptfoldError: the backend refuses the arrays.
        """
        logits: np.ndarray = self._request("logits", dict(arrays))
        return logits

    def burst(self, arrays: Arrays, plan: BurstPlan) -> Burst:
        """Latency of each forward pass of a burst, measured inside the engine's process after a warm-up.

        Raises:
            EngineError: the process died or did not answer in time.
        """
        burst: Burst = self._request("burst", dict(arrays), plan)
        return burst

    def prompt_logits(self, arrays: Arrays, n_random: int, seed: int) -> PromptLogits:
        """As `PyTorchBackend.prompt_logits`; of a PyTorch engine only.

        Raises:
            EngineError: the process died or did not answer in time.
        """
        value: PromptLogits = self._request("prompt_logits", dict(arrays), n_random, seed)
        return value

    def _request(self, work: str, *arguments: Any) -> Any:
        with self._lock:
            if self._is_closed:
                raise EngineError(f"The {self.name} engine was stopped to make room for others. Try again.")
            if self._is_dead():
                self._stop()
                self._start()
            self._wait_until_ready()
            try:
                self._connection.send((work, arguments))
            except OSError as cause:
                raise self._dead() from cause
            return self._receive(self._request_timeout_seconds)

    def _is_dead(self) -> bool:
        """Whether the process has ended since the last request."""
        if not self._process.is_alive():
            return True
        # A process that was killed may still be counted as alive; the end of its pipe is seen first.
        return self._loaded is not None and self._connection.poll()

    def _receive(self, timeout_seconds: float) -> Any:
        try:
            if not self._connection.poll(timeout_seconds):
                self._stop()
                raise EngineError(
                    f"The {self.name} engine did not answer within {timeout_seconds:.0f} s and was stopped. "
                    "Try again: it is started anew."
                )
            reply: _Reply = self._connection.recv()
        except (EOFError, OSError) as cause:
            raise self._dead() from cause
        if reply.error is not None:
            raise reply.error
        return reply.value

    def _dead(self) -> EngineError:
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
        # No lock: a burst that is still running must not hold up the end.
        self._is_closed = True
        self._stop()
