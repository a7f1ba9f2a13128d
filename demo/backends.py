"""PyTorch and ONNX Runtime behind one interface, each in a process of its own.

Two thread pools in one process, or two processes whose pools spin at once, slow each other down by 3–4
times. So each engine gets a process, the same number of threads, and nothing runs beside a timed burst:
`demo.compare` asks one engine at a time and pauses in between.

The page's process holds an `Engine`: a process, a pipe, and a time limit. The process answers requests
one by one; when it dies or hangs, the request fails with an `EngineError` and the next one starts it again.
"""

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from export.runtime import Execution
from train.errors import EngineError, PromptfoldError

START_TIMEOUT_SECONDS = 300.0
"""A large base model has to be read, hashed and loaded first."""

REQUEST_TIMEOUT_SECONDS = 60.0
"""Far beyond what any request may take: a burst is bounded by the number of its runs."""

WARM_UP_RUNS = 3
"""Runs before a timed burst; the first ones after a pause are slower."""

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class BurstPlan:
    """How many timed runs: at least ``min_runs``, then up to ``max_runs`` while the time lasts."""

    min_runs: int
    max_runs: int
    budget_seconds: float


class Backend(Protocol):
    """What an engine does inside its process."""

    execution: Execution

    def logits(self, arrays: Arrays) -> np.ndarray:
        """Token ids in (int64, shape = (n_batch, n_text)), logits out (float32, shape = (n_batch, n_labels))."""


class PyTorchBackend:
    """The adapter as the PEFT tutorial runs it: `PeftModel.forward`, eager, fp32."""

    def __init__(self, adapter_folder: Path, threads: int) -> None:
        import torch

        from train.adapter import find_adapter_base, load_adapter, load_peft_model

        torch.set_num_threads(threads)
        adapter = load_adapter(adapter_folder)
        on_cuda = torch.cuda.is_available()
        self._device = torch.device("cuda" if on_cuda else "cpu")
        self._model = load_peft_model(adapter.folder, find_adapter_base(adapter), adapter.labels).to(self._device)
        self.execution = Execution(
            engine=f"PyTorch {torch.__version__.partition('+')[0]}",
            provider=torch.cuda.get_device_name() if on_cuda else "CPU",
            on_cuda=on_cuda,
            threads=threads,
            precision="fp32",
            note="" if on_cuda else "PyTorch sees no GPU",
        )

    def logits(self, arrays: Arrays) -> np.ndarray:
        """See `Backend`; the copy back to the CPU waits until the GPU is done."""
        import torch

        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
            return self._model(**tensors).logits.float().cpu().numpy()


def make_pytorch_backend(folder: Path, threads: int) -> Backend:
    """Load an adapter folder into PyTorch."""
    return PyTorchBackend(folder, threads)


def make_onnx_backend(folder: Path, threads: int, *, task: str | None = None) -> Backend:
    """Load a bundle folder into ONNX Runtime, for one task where it holds several."""
    from export.bundle import load_bundle
    from export.runtime import OnnxClassifier

    return OnnxClassifier(load_bundle(folder), task=task, threads=threads)


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
    connection.send(_Reply(value=backend.execution))
    while True:
        try:
            arrays, plan = connection.recv()
        except EOFError:
            return
        connection.send(_Reply(value=_burst(backend, arrays, plan) if plan else backend.logits(arrays)))


def _burst(backend: Backend, arrays: Arrays, plan: BurstPlan) -> tuple[float, ...]:
    """Latency of each forward pass of a burst in ms, after a warm-up."""
    for _ in range(WARM_UP_RUNS):
        backend.logits(arrays)
    latencies_ms: list[float] = []
    end = time.perf_counter() + plan.budget_seconds
    while len(latencies_ms) < plan.min_runs or (len(latencies_ms) < plan.max_runs and time.perf_counter() < end):
        start = time.perf_counter()
        backend.logits(arrays)
        latencies_ms.append(1000 * (time.perf_counter() - start))
    return tuple(latencies_ms)


class Engine:
    """A backend in a process of its own, as the page sees it."""

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
        self._start()

    def _start(self) -> None:
        # "spawn": a fork would copy the page's threads and locks in whatever state they are.
        context = multiprocessing.get_context("spawn")
        self._connection, remote = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(remote, *self._arguments), name=f"promptfold-{self.name}", daemon=True
        )
        self._process.start()
        # Only the process holds its end now, so its death is seen as an end of file.
        remote.close()
        self._execution: Execution | None = None

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return self._process.pid

    def wait_until_ready(self) -> Execution:
        """Wait until the backend is loaded and return on what it runs.

        Raises:
            PromptfoldError: whatever the backend raised while it loaded, or an EngineError.
        """
        with self._lock:
            return self._wait_until_ready()

    def _wait_until_ready(self) -> Execution:
        if self._execution is None:
            self._execution = self._receive(START_TIMEOUT_SECONDS)
        return self._execution

    def logits(self, arrays: Arrays) -> np.ndarray:
        """One forward pass: token ids in, logits out, as `Backend.logits`.

        Raises:
            EngineError: the process died or did not answer in time.
        """
        return self._request(arrays, None)

    def burst(self, arrays: Arrays, plan: BurstPlan) -> tuple[float, ...]:
        """Latency of each forward pass of a burst in ms, measured inside the engine's process after a warm-up.

        Raises:
            EngineError: the process died or did not answer in time.
        """
        return self._request(arrays, plan)

    def _request(self, arrays: Arrays, plan: BurstPlan | None) -> Any:
        with self._lock:
            if not self._process.is_alive():
                self._stop()
                self._start()
            self._wait_until_ready()
            try:
                self._connection.send((dict(arrays), plan))
            except OSError as cause:
                raise self._dead() from cause
            return self._receive(self._request_timeout_seconds)

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
        self._stop()
