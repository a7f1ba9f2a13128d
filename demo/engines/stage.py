"""What every tab of the page stands on: the adapters, their bundles, and the engines that run them.

The visitor chooses an adapter, a precision for ONNX Runtime and a way for PyTorch: a `Setup`. `Stage.open` makes
an `Opened` of it: bundle, tokenizer, and both engines, each in its process, started when first wanted and kept until
others are wanted more. Whoever runs anything on an engine holds `Stage.measuring`, so that no two bursts overlap.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from demo.engines.adapters import Choice
from demo.engines.bundle_cache import cached_bundle
from demo.engines.engine_process import Engine, make_onnx_backend
from demo.engines.on_ray import ClusterEngine
from demo.engines.pytorch import EAGER, PYTORCH_MODES, make_pytorch_backend
from demo.engines.timing import AnyEngine
from export.bundle.folder import FP32, GRAPH_FILES, Bundle, BundleTask, GraphFile, load_bundle
from export.runtime.tokenizer import TextTokenizer, bundle_tokenizer
from export.runtime.trial import try_bundle
from export.serve.service import Service
from train.common.errors import BundleError, PromptfoldError, UsageError
from train.common.machine import usable_cores
from train.data.tasks import Task

MAX_ENGINES = 4
"""Processes kept at once: a pair for one choice and one more for a second."""


@dataclass(frozen=True)
class Setup:
    """What a visitor chose.

    Attributes:
        adapter: `Choice.name` of one.
        onnx: the precision of ONNX Runtime's graph: "fp32", "fp16" or "int8".
        pytorch: one of `demo.engines.pytorch.PYTORCH_MODES`.
    """

    adapter: str
    onnx: str = FP32
    pytorch: str = EAGER


@dataclass(frozen=True)
class Opened:
    """A setup with everything that it takes, ready to run.

    Attributes:
        setup: what was chosen.
        choice: the adapter and its rivals.
        bundle: exported from it.
        bundle_task: the adapter's in that bundle.
        tokenize: both engines get the very same token ids from it.
        onnx: the engine of the bundle.
        pytorch: the engine of the adapter; None where the page runs without PyTorch.
    """

    setup: Setup
    choice: Choice
    bundle: Bundle
    bundle_task: BundleTask
    tokenize: TextTokenizer
    onnx: AnyEngine
    pytorch: Engine | None

    @property
    def task(self) -> Task:
        """What the adapter learned."""
        return self.bundle_task.task

    @property
    def graph(self) -> GraphFile:
        """The graph in the precision that was chosen; its gates say what that costs."""
        return next(graph for graph in self.bundle.graphs if graph.precision == self.setup.onnx)


PYTORCH, ONNX_RUNTIME = "PyTorch", "ONNX Runtime"


@dataclass(frozen=True)
class _Key:
    """Which process: of which library, for which adapter, in which of its modes."""

    library: str
    adapter: str
    mode: str


class Stage:
    """The adapters of a page and the engines that are running.

    Attributes:
        choices: the adapters, by name; the page starts with the first.
        has_pytorch: whether there is a PyTorch side.
        threads: of each engine.
        measuring: to be held by whoever runs anything on an engine.
        service: the cluster of the ONNX side; None where that is a process of the page's.
    """

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
            choices: at least one.
            bundles: folders that hold the adapters' graphs; what is in none of them comes from the cache.
            has_pytorch: whether there is a PyTorch side.
            threads: of each engine; by default all usable cores.
            max_engines: how many processes are kept at once.
            service: a cluster that runs the ONNX side, whose threads are then those of each replica; None where that
                is a process as PyTorch's is. Whoever made it closes it.

        Raises:
            BundleError: one of the bundles cannot be loaded, or is of none of the adapters.
        """
        self.choices = {choice.name: choice for choice in choices}
        self.has_pytorch = has_pytorch
        self.threads = threads or usable_cores()
        self.measuring = threading.Lock()
        self.service = service
        self._max_engines = max_engines
        self._lock = threading.RLock()
        self._bundles: dict[str, Bundle] = {}
        self._engines: OrderedDict[_Key, AnyEngine] = OrderedDict()
        for folder in bundles:
            bundle = load_bundle(folder)
            self._take_bundle(bundle)
            # Whoever made it: its graph is tried where it can harm nobody, before an engine keeps it.
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
        """What the page starts with."""
        return Setup(next(iter(self.choices)))

    def setup(self, adapter: object, onnx: object, pytorch: object) -> Setup:
        """What a visitor chose, as it came from outside.

        Raises:
            UsageError: there is no such choice.
        """
        for value, allowed, what in (
            (adapter, self.choices, "adapter"),
            (onnx, GRAPH_FILES, "precision"),
            (pytorch, PYTORCH_MODES, "way for PyTorch"),
        ):
            if not isinstance(value, str) or value not in allowed:
                raise UsageError(f"There is no {what} {str(value)[:80]!r} here. Choose one of {', '.join(allowed)}.")
        return Setup(str(adapter), str(onnx), str(pytorch))

    def setup_or_default(self, adapter: str, onnx: str, pytorch: str) -> Setup:
        """The same of an endpoint's caller, for whom an empty text is what the page starts with.

        Raises:
            UsageError: there is no such choice.
        """
        default = self.default()
        return self.setup(adapter or default.adapter, onnx or default.onnx, pytorch or default.pytorch)

    def bundle(self, name: str) -> Bundle:
        """The bundle of an adapter, exported into the cache where there is none yet, which takes a while.

        Args:
            name: `Choice.name`

        Raises:
            PromptfoldError: whatever the export raises.
        """
        with self._lock:
            if name not in self._bundles:
                self._bundles[name] = cached_bundle(self.choices[name].adapter)
            return self._bundles[name]

    def start(self, setup: Setup) -> None:
        """Start both engines where they do not run yet; they load while the caller goes on.

        Raises:
            PromptfoldError: whatever the export raises, or the bundle has no graph in that precision.
        """
        self._start(setup)

    def bundle_if_there(self, name: str) -> Bundle | None:
        """The bundle of an adapter where this page has used it already; nothing is exported."""
        return self._bundles.get(name)

    def open(self, setup: Setup) -> Opened:
        """Start both engines where they do not run yet, and wait until they can answer.

        Raises:
            PromptfoldError: whatever the export or an engine raises while it loads.
        """
        with self._lock:
            engines = self._start(setup)
            try:
                for engine in engines.values():
                    engine.wait_until_ready()
            except PromptfoldError:
                for key in engines:
                    self._engines.pop(key).close()
                raise
            choice = self.choices[setup.adapter]
            bundle = self.bundle(setup.adapter)
            onnx, *rest = engines.values()
            pytorch = rest[0] if rest else None
            assert pytorch is None or isinstance(pytorch, Engine)
            return Opened(
                setup=setup,
                choice=choice,
                bundle=bundle,
                bundle_task=_task_of(bundle, choice),
                tokenize=bundle_tokenizer(bundle),
                onnx=onnx,
                pytorch=pytorch,
            )

    def _start(self, setup: Setup) -> dict[_Key, AnyEngine]:
        """Both engines, ONNX Runtime's first."""
        with self._lock:
            bundle = self.bundle(setup.adapter)
            bundle.graph_path(setup.onnx)  # refuses a precision that is not there
            keys = [_Key(ONNX_RUNTIME, setup.adapter, setup.onnx)]
            if self.has_pytorch:
                keys.append(_Key(PYTORCH, setup.adapter, setup.pytorch))
            return {key: self._engine(key, bundle) for key in keys}

    def _engine(self, key: _Key, bundle: Bundle) -> AnyEngine:
        if key in self._engines:
            self._engines.move_to_end(key)
            return self._engines[key]
        if self.service is not None and key.library == ONNX_RUNTIME:
            # The cluster serves one bundle at a time: there is room for its replicas, and for no others.
            for other in [other for other in self._engines if other.library == ONNX_RUNTIME]:
                self._engines.pop(other).close()
        while len(self._engines) >= self._max_engines:
            self._engines.popitem(last=False)[1].close()
        self._engines[key] = self._new_engine(key, bundle)
        return self._engines[key]

    def _new_engine(self, key: _Key, bundle: Bundle) -> AnyEngine:
        choice = self.choices[key.adapter]
        if key.library == PYTORCH:
            make = partial(make_pytorch_backend, mode=key.mode)
            return Engine(key.library, make, choice.adapter.folder, threads=self.threads)
        name = _task_of(bundle, choice).name
        if self.service is not None:
            return ClusterEngine(key.library, self.service, bundle, task=name, precision=key.mode)
        make = partial(make_onnx_backend, task=name, precision=key.mode)
        return Engine(key.library, make, bundle.folder, threads=self.threads)

    def close(self) -> None:
        """Stop every engine."""
        # No lock: a start that is under way must not hold up the end.
        for engine in list(self._engines.values()):
            engine.close()


def _task_of(bundle: Bundle, choice: Choice) -> BundleTask:
    task = bundle.task_of(choice.adapter.sha256)
    assert task is not None, "a bundle of this adapter"
    return task
