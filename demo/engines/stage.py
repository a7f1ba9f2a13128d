"""The adapters of a page, their bundles, and the engines that run them.

A visitor's `Setup` is an adapter, a precision for ONNX Runtime and a mode for PyTorch; `Stage.open` makes `OpenedEngines`
of it. Each engine has a process of its own, started when it is first wanted; when there are too many, the one unused for
longest is stopped. Hold `Stage.measuring` while an engine runs, so that no two bursts overlap.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from demo.engines.adapters import Choice
from demo.engines.bundle_cache import cached_bundle
from demo.engines.engine_process import EngineProcess, make_onnx_backend
from demo.engines.on_ray import ClusterEngine
from demo.engines.pytorch import EAGER, PYTORCH_MODES, PyTorchBackend
from export.bundle.folder import FP16, FP32, GRAPH_FILES, Bundle, BundleTask, GraphFile, load_bundle
from export.runtime.classifier import best_precision
from export.runtime.session import cuda_absence
from export.runtime.tokenizer import TextTokenizer, bundle_tokenizer
from export.runtime.trial import try_bundle
from export.serve.service import Service
from train.common.errors import BundleError, PromptfoldError, UsageError
from train.common.machine import usable_cores
from train.data.tasks import Task

MAX_ENGINES = 4
"""Processes kept at once: the pairs of two setups."""

PYTORCH, ONNX_RUNTIME = "PyTorch", "ONNX Runtime"

AnyEngine = EngineProcess | ClusterEngine


@dataclass(frozen=True)
class Setup:
    """What a visitor chose."""

    adapter: str
    """Its `Choice.name`."""
    onnx: str = FP32
    """Precision of the graph: "fp32", "fp16" or "int8"."""
    pytorch: str = EAGER
    """One of `PYTORCH_MODES`."""


@dataclass(frozen=True)
class OpenedEngines:
    """A setup with both engines, ready to run."""

    setup: Setup
    choice: Choice
    bundle: Bundle
    bundle_task: BundleTask
    tokenize: TextTokenizer
    """Both engines get the very same token ids from it."""
    onnx: AnyEngine
    pytorch: EngineProcess | None
    """None where the page runs without PyTorch."""

    @property
    def task(self) -> Task:
        return self.bundle_task.task

    @property
    def graph(self) -> GraphFile:
        """The graph in the chosen precision; its gates say what that costs."""
        return next(graph for graph in self.bundle.graphs if graph.precision == self.setup.onnx)


class _EngineKey(NamedTuple):
    library: str
    adapter: str
    mode: str
    """Precision of the ONNX graph, or one of `PYTORCH_MODES`."""


class Stage:
    """The adapters of a page and the engines that are running."""

    def __init__(
        self,
        choices: Sequence[Choice],
        *,
        bundles: Sequence[Path] = (),
        has_pytorch: bool = True,
        threads: int | None = None,
        max_engines: int = MAX_ENGINES,
        service: Service | None = None,
    ) -> None:
        """Make a stage; nothing is started or exported yet.

        Args:
            choices: at least one; the page starts with the first.
            bundles: folders that hold the adapters' graphs; an adapter in none of them is exported into the cache.
            threads: for each engine; by default all usable cores.
            service: a cluster that runs the ONNX side, with ``threads`` for each replica; the caller closes it.
        """
        self.choices = {choice.name: choice for choice in choices}
        self.has_pytorch = has_pytorch
        self.threads = threads or usable_cores()
        self.measuring = threading.Lock()
        self.service = service
        self._max_engines = max_engines
        self._lock = threading.RLock()
        self._bundles: dict[str, Bundle] = {}
        self._engines: OrderedDict[_EngineKey, AnyEngine] = OrderedDict()
        for folder in bundles:
            bundle = load_bundle(folder)
            self._take_bundle(bundle)
            # The folder is untrusted: its graph is tried in a process of its own before an engine keeps it.
            try_bundle(bundle)

    def _take_bundle(self, bundle: Bundle) -> None:
        names = [name for name, choice in self.choices.items() if bundle.task_of(choice.adapter.sha256) is not None]
        if not names:
            adapter = next(iter(self.choices.values())).adapter
            raise BundleError(
                f"{bundle.folder} was exported from another adapter than {adapter.folder}, so the two engines would "
                "run different models. Give the --adapter it was made from, or export this one: "
                f"python -m export {adapter.folder} --out BUNDLE"
            )
        for name in names:
            self._bundles.setdefault(name, bundle)

    def default(self) -> Setup:
        """What the page starts with: the first adapter, in the fastest graph that passed, as soon as its bundle is there."""
        name = next(iter(self.choices))
        bundle = self.bundle_if_there(name)
        if bundle is None:
            return Setup(name)
        return Setup(name, best_precision(bundle, on_cuda=FP16 in bundle.precisions and not cuda_absence()))

    def setup(self, adapter: object, onnx: object, pytorch: object) -> Setup:
        """Check what a visitor chose; an empty text stands for what the page starts with."""
        default, chosen = self.default(), []
        for what, value, initial, allowed in (
            ("adapter", adapter, default.adapter, self.choices),
            ("precision", onnx, default.onnx, GRAPH_FILES),
            ("way for PyTorch", pytorch, default.pytorch, PYTORCH_MODES),
        ):
            if not isinstance(value, str) or value not in {"", *allowed}:
                raise UsageError(f"There is no {what} {str(value)[:80]!r} here. Choose one of {', '.join(allowed)}.")
            chosen.append(value or initial)
        return Setup(*chosen)

    def bundle(self, name: str) -> Bundle:
        """The bundle of the adapter with a `Choice.name`; one that is in no bundle is exported, which takes a while."""
        with self._lock:
            if name not in self._bundles:
                self._bundles[name] = cached_bundle(self.choices[name].adapter)
            return self._bundles[name]

    def bundle_if_there(self, name: str) -> Bundle | None:
        """The bundle of an adapter if this page has used it already; nothing is exported."""
        return self._bundles.get(name)

    def start(self, setup: Setup) -> list[_EngineKey]:
        """Start both engines where they do not run yet; returns their keys, ONNX Runtime's first, while they load."""
        with self._lock:
            bundle = self.bundle(setup.adapter)
            bundle.graph_path(setup.onnx)  # refuses a precision that is not there
            keys = [_EngineKey(ONNX_RUNTIME, setup.adapter, setup.onnx)]
            if self.has_pytorch:
                keys.append(_EngineKey(PYTORCH, setup.adapter, setup.pytorch))
            for key in keys:
                self._start_engine(key, bundle)
            return keys

    def open(self, setup: Setup) -> OpenedEngines:
        """Start both engines where they do not run yet, and wait until they can answer."""
        with self._lock:
            keys = self.start(setup)
            engines = [self._engines[key] for key in keys]
            try:
                for engine in engines:
                    engine.wait_until_ready()
            except PromptfoldError:
                for key in keys:
                    self._engines.pop(key).close()
                raise
            onnx, pytorch = engines if self.has_pytorch else (engines[0], None)
            assert pytorch is None or isinstance(pytorch, EngineProcess)
            choice, bundle = self.choices[setup.adapter], self.bundle(setup.adapter)
            task = _task_of(bundle, choice)
            return OpenedEngines(setup, choice, bundle, task, bundle_tokenizer(bundle), onnx, pytorch)

    def _start_engine(self, key: _EngineKey, bundle: Bundle) -> None:
        if key in self._engines:
            self._engines.move_to_end(key)
            return
        if self.service is not None and key.library == ONNX_RUNTIME:
            # The cluster serves one bundle at a time.
            for other in [other for other in self._engines if other.library == ONNX_RUNTIME]:
                self._engines.pop(other).close()
        while len(self._engines) >= self._max_engines:
            self._engines.popitem(last=False)[1].close()
        self._engines[key] = self._new_engine(key, bundle)

    def _new_engine(self, key: _EngineKey, bundle: Bundle) -> AnyEngine:
        choice = self.choices[key.adapter]
        if key.library == PYTORCH:
            make_pytorch = partial(PyTorchBackend, mode=key.mode, base_model=choice.adapter.model)
            return EngineProcess(key.library, make_pytorch, choice.adapter.folder, threads=self.threads)
        task = _task_of(bundle, choice).name
        if self.service is not None:
            return ClusterEngine(key.library, self.service, bundle, task=task, precision=key.mode)
        make_onnx = partial(make_onnx_backend, task=task, precision=key.mode)
        return EngineProcess(key.library, make_onnx, bundle.folder, threads=self.threads)

    def close(self) -> None:
        """Stop every engine."""
        # Without the lock: a start that is under way must not delay the end.
        for engine in list(self._engines.values()):
            engine.close()


def _task_of(bundle: Bundle, choice: Choice) -> BundleTask:
    task = bundle.task_of(choice.adapter.sha256)
    assert task is not None, "a bundle of this adapter"
    return task
