"""PyTorch and ONNX Runtime behind one interface, each in a process of its own.

Two thread pools in one process, or two processes whose pools spin at once, slow each other down by 3–4
times. So each engine gets a process, the same number of threads, and nothing runs beside a timed burst:
`demo.compare` asks one engine at a time and pauses in between.

The page's process holds an `Engine`: a process, a pipe, and a time limit. The process answers requests
one by one; when it dies or hangs, the request fails with an `EngineError` and the next one starts it again.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from export.bench_engines import peak_memory_mib
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


EAGER, COMPILED, BF16 = "eager", "compiled", "bf16"

PYTORCH_MODES = {
    EAGER: "fp32, eager: as in PEFT's tutorial",
    COMPILED: "fp32, torch.compile",
    BF16: "bf16, eager",
}
"""How the PyTorch side may run, with words for people."""


@dataclass(frozen=True)
class PromptLogits:
    """A text with the prompt that was learned, and with others in its place.

    Attributes:
        learned: logits with the learned prompt; float32, shape = (n_batch, n_labels)
        random: the same with random prompts, of which every vector is as long as the learned one;
            float32, shape = (n_prompts, n_batch, n_labels)
        none: with no prompt at all, and the same head.
    """

    learned: np.ndarray
    random: np.ndarray
    none: np.ndarray


class Backend(Protocol):
    """What an engine does inside its process."""

    execution: Execution

    def logits(self, arrays: Arrays) -> np.ndarray:
        """Token ids in (int64, shape = (n_batch, n_text)), logits out (float32, shape = (n_batch, n_labels))."""


class PyTorchBackend:
    """The adapter as the PEFT tutorial runs it, `PeftModel.forward`; on request compiled, or in bf16."""

    def __init__(self, adapter_folder: Path, threads: int, *, mode: str = EAGER) -> None:
        """Load an adapter.

        Args:
            mode: one of `PYTORCH_MODES`.

        Raises:
            EngineError: `torch.compile` does not work on this machine.
            PromptfoldError: as `load_adapter` and `load_peft_model` do.
        """
        import torch

        from train.adapter import find_adapter_base, load_adapter, load_peft_model

        torch.set_num_threads(threads)
        self._adapter = load_adapter(adapter_folder)
        self._base = find_adapter_base(self._adapter)
        on_cuda = torch.cuda.is_available()
        self._device = torch.device("cuda" if on_cuda else "cpu")
        model: Any = load_peft_model(self._adapter.folder, self._base, self._adapter.labels)
        self._model = model.to(self._device, torch.bfloat16 if mode == BF16 else torch.float32)
        self._run = self._compiled() if mode == COMPILED else self._model
        self.execution = Execution(
            engine=f"PyTorch {torch.__version__.partition('+')[0]}",
            provider=torch.cuda.get_device_name() if on_cuda else "CPU",
            on_cuda=on_cuda,
            threads=threads,
            precision={EAGER: "fp32", COMPILED: "fp32, compiled", BF16: "bf16"}[mode],
            note="" if on_cuda else "PyTorch sees no GPU",
        )

    def _compiled(self) -> Any:
        """The model under `torch.compile`, for any length of text, compiled by a first run."""
        import torch

        # Beside two engines there is no core for a pool of compilers.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        run = torch.compile(self._model, dynamic=True)
        ones = torch.ones((1, 8), dtype=torch.long, device=self._device)
        inputs = {"input_ids": ones, "attention_mask": ones}
        if getattr(self._model.config, "type_vocab_size", 1) > 1:
            inputs["token_type_ids"] = torch.zeros_like(ones)
        try:
            with torch.inference_mode():
                run(**inputs)
        except Exception as cause:  # whatever the compiler, or the one that it calls, raises
            reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
            raise EngineError(
                f"torch.compile does not work here ({reason[:200]}). It needs a C++ compiler; choose another way for PyTorch."
            ) from cause
        return run

    def logits(self, arrays: Arrays) -> np.ndarray:
        """See `Backend`; the copy back to the CPU waits until the GPU is done."""
        return self._logits(self._run, arrays)

    def _logits(self, run: Any, arrays: Arrays) -> np.ndarray:
        import torch

        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
            return run(**tensors).logits.float().cpu().numpy()

    def prompt_logits(self, arrays: Arrays, n_random: int, seed: int) -> PromptLogits:
        """What the learned prompt does to a text: the same with random prompts, and with none.

        Args:
            n_random: how many random prompts.
            seed: of the random numbers.
        """
        import torch

        # The number of a prompt's parameters is the same in every setup of PEFT: one table.
        table: torch.Tensor = self._model.prompt_encoder["default"].embedding.weight
        learned = self.logits(arrays)
        before = table.detach().clone()
        # Of P-Tuning v2 a row holds a key and a value for each layer, and keys are longer than values.
        parts = before.view(len(before), -1, self._model.active_peft_config.token_dim)
        generator = torch.Generator().manual_seed(seed)
        randoms = []
        with torch.no_grad():
            try:
                for _ in range(n_random):
                    noise = torch.randn(parts.shape, generator=generator).to(parts)
                    noise *= parts.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
                    table.copy_(noise.view_as(before))
                    randoms.append(self.logits(arrays))
            finally:
                table.copy_(before)
        return PromptLogits(learned, np.stack(randoms), self._logits(self._model.base_model, arrays))


def make_pytorch_backend(folder: Path, threads: int, *, mode: str = EAGER) -> Backend:
    """Load an adapter folder into PyTorch."""
    return PyTorchBackend(folder, threads, mode=mode)


def make_onnx_backend(folder: Path, threads: int, *, task: str | None = None, precision: str | None = None) -> Backend:
    """Load a bundle folder into ONNX Runtime, for one task where it holds several."""
    from export.bundle import load_bundle
    from export.runtime import OnnxClassifier

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
            value = _burst(backend, *arguments) if work == "burst" else getattr(backend, work)(*arguments)
        except PromptfoldError as error:
            # Of the request, not of the engine: it goes on.
            connection.send(_Reply(error=error))
        else:
            connection.send(_Reply(value=value))


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


def _burst(backend: Backend, arrays: Arrays, plan: BurstPlan) -> Burst:
    """Time forward passes, after a warm-up."""
    return Burst(timed_runs(partial(backend.logits, arrays), plan), peak_memory_mib())


class AnyEngine(Protocol):
    """What the page asks of an engine, wherever that runs: `Engine`, or `demo.cluster.ClusterEngine`."""

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
