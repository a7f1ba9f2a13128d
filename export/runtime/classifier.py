"""`OnnxClassifier`: a bundle in ONNX Runtime. Needs neither torch nor transformers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.bundle.folder import FP16, FP32, INT8, TASK_IDS, Bundle
from export.runtime.check_batch import check_batch
from export.runtime.cuda_graphs import CudaGraphRunner
from export.runtime.session import (
    CPU,
    EXPORT_AGAIN,
    cuda_absence,
    open_session,
    run_on_cuda,
    run_session,
    runtime_failures,
)
from export.runtime.tokenizer import bundle_tokenizer
from train.common.errors import BundleError
from train.common.machine import usable_cores

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PADDING_TOLERANCE = 1e-3
"""By how much a logit may change when hidden padding changes: only the order of sums may differ."""


@dataclass(frozen=True)
class Execution:
    """What an engine runs on."""

    engine: str
    """Name and version of the library."""
    provider: str
    """The execution provider (ONNX Runtime) or device (PyTorch) really in use."""
    on_cuda: bool
    """Whether that is an NVIDIA GPU."""
    threads: int
    """Threads within an operator, on the CPU."""
    precision: str
    note: str
    """Why it is not on a GPU, or not in the bundle's best precision; else empty."""


class OnnxClassifier:
    """A bundle, loaded: token ids in, logits out."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        task: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        use_cuda: bool | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        """Load a bundle that `load_bundle` checked.

        Args:
            task: its name, needed where the bundle has several.
            precision: by default the fastest that can be loaded (`open_graph`).
            threads: threads within an operator, on a CPU; by default all usable cores.
            use_cuda: whether to try CUDA; by default wherever the NVIDIA driver and the provider are.
            cuda_graphs: whether, on CUDA, each shape of a batch is captured as a CUDA graph when it comes first: for
                batches of few shapes, whose kernels are so short that launching them costs more.

        Raises:
            BundleError: there is no graph in that precision, ONNX Runtime cannot load it, or its inputs are not the
                manifest's.
            UsageError: there is no such task, or several and none is named.
        """
        import onnxruntime

        self.bundle, self.task = bundle, bundle.find_task(task)
        self.tokenize = bundle_tokenizer(bundle)
        threads = threads or usable_cores()
        absence = cuda_absence()
        if use_cuda is None:
            use_cuda = not absence
        notes = [] if use_cuda else [absence or "CUDA is switched off"]
        opened = open_graph(bundle, precision, threads=threads, use_cuda=use_cuda, cuda_graphs=cuda_graphs and use_cuda)
        if use_cuda and opened.session.get_providers()[0] == CPU:
            notes.append("ONNX Runtime fell back from CUDA to the CPU")
            # What is fastest on a GPU is slow here.
            opened = open_graph(bundle, precision, threads=threads, use_cuda=False)
        self.session = opened.session
        self._path = bundle.graph_path(opened.precision)
        _check_interface(self.session, self._path, bundle)
        provider = self.session.get_providers()[0]
        note = "; ".join(filter(None, [*notes, opened.note]))
        engine = f"ONNX Runtime {onnxruntime.__version__}"
        self.execution = Execution(engine, provider, provider != CPU, threads, opened.precision, note)
        self.cuda_graphs = None
        if self.execution.on_cuda and opened.cuda_graphs:
            self.cuda_graphs = CudaGraphRunner(self.session, device="cuda", n_labels=bundle.n_labels)

    def logits(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run the graph on arrays as from ``tokenize``; each int64, shape = (n_batch, n_text)

        A bundle of many tasks also takes ``task_ids``, int64, shape = (n_batch,), the number of each row's task.

        Returns:
            float32, shape = (n_batch, n_labels); with ``task_ids``, as many labels as the task with the most has

        Raises:
            TextError: the arrays are no batch of texts that this model can read.
            BundleError: ONNX Runtime cannot run the graph, or what it gives are no logits of these texts.
        """
        check_batch(self.bundle, arrays)
        if TASK_IDS in arrays or not self.bundle.has_many_tasks:
            return self._run(arrays)
        return self._run(with_task(arrays, self.task.number))[:, : len(self.task.task.labels)]

    def _run(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        # A tokenizer may give more than this kind of model takes.
        wanted = {name: arrays[name] for name in self.bundle.inputs}
        with runtime_failures(f"ONNX Runtime cannot run {self._path}"):
            if self.cuda_graphs is not None:
                logits = self.cuda_graphs.run(wanted)
            else:
                logits = (run_on_cuda if self.execution.on_cuda else run_session)(self.session, wanted)
        expected = (len(wanted["input_ids"]), self.bundle.n_labels)
        if logits.shape != expected:
            raise BundleError(
                f"{self._path} gives logits of shape {logits.shape} instead of {expected}. {EXPORT_AGAIN}"
            )
        return logits


def with_task(arrays: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """A batch for a graph of many tasks, with the same task in every row."""
    return {**arrays, TASK_IDS: np.full(len(arrays["input_ids"]), number, np.int64)}


def best_precision(bundle: Bundle, *, on_cuda: bool) -> str:
    """The precision of the fastest graph that passed its gate: fp16 on a GPU, int8 on a CPU, else fp32."""
    best = FP16 if on_cuda else INT8
    return best if any(graph.precision == best and graph.is_judged for graph in bundle.graphs) else FP32


@dataclass(frozen=True)
class OpenedGraph:
    session: "InferenceSession"
    precision: str
    cuda_graphs: bool
    note: str
    """Why it is not as fast as was asked; empty where it is."""


def open_graph(
    bundle: Bundle, precision: str | None, *, threads: int, use_cuda: bool, cuda_graphs: bool = False
) -> OpenedGraph:
    """Open a bundle's graph in a precision, or by default `best_precision`, and fp32 where that cannot be loaded."""
    wanted = precision or best_precision(bundle, on_cuda=use_cuda)
    path = bundle.graph_path(wanted)
    try:
        session = open_session(path, threads=threads, use_cuda=use_cuda, cuda_graphs=cuda_graphs)
        _check_padding(session, path, bundle)
        return OpenedGraph(session, wanted, cuda_graphs, "")
    except BundleError as cause:
        if cuda_graphs:
            other, why = precision, f"no CUDA graphs, which this graph cannot be captured in: {cause}"
        elif precision is None and wanted != FP32:
            other, why = FP32, f"fp32 instead of {wanted}, which cannot be loaded here: {cause}"
        else:
            raise
    opened = open_graph(bundle, other, threads=threads, use_cuda=use_cuda)
    return replace(opened, note="; ".join(filter(None, [opened.note, why])))


def _check_interface(session: "InferenceSession", path: Path, bundle: Bundle) -> None:
    """Refuse a graph whose inputs are not the manifest's, or that has no logits."""
    inputs = tuple(item.name for item in session.get_inputs())
    if inputs != bundle.inputs:
        raise BundleError(
            f"{path} takes {', '.join(inputs)}; its manifest says {', '.join(bundle.inputs)}. {EXPORT_AGAIN}"
        )
    if "logits" not in [item.name for item in session.get_outputs()]:
        raise BundleError(f"{path} gives no logits. {EXPORT_AGAIN}")


def _check_padding(session: "InferenceSession", path: Path, bundle: Bundle) -> None:
    """Refuse a graph that, on a GPU, does not read a text beside a longer one to its end and no further.

    Which kernel computes attention depends on the GPU, on variables of the environment and on ONNX Runtime's version, and
    not all of them read the same numbers of keys. A wrong one would answer without an error.
    """
    if session.get_providers()[0] == CPU:
        return
    length = min(9, bundle.max_length)
    short = -(-length // 2)
    ids = np.random.default_rng(0).integers(0, bundle.vocabulary_size, (2, length))
    mask = (np.arange(length) < [[length], [short]]).astype(np.int64)
    arrays = {"attention_mask": mask, "token_type_ids": 0 * ids, TASK_IDS: 0 * ids[:, 0]}

    def logits(*, changed: slice) -> np.ndarray:
        others = ids.copy()
        others[1, changed] = (ids[1, changed] + 1) % bundle.vocabulary_size
        batch = {"input_ids": others, **arrays}
        return run_on_cuda(session, {name: batch[name] for name in bundle.inputs})[1]

    with runtime_failures(f"ONNX Runtime cannot run {path} on this GPU"):
        as_it_is = logits(changed=slice(0))
        other_padding, other_end = logits(changed=slice(short, None)), logits(changed=slice(short - 1, short))
    if not np.abs(other_padding - as_it_is).max() < PADDING_TOLERANCE or np.array_equal(other_end, as_it_is):
        raise BundleError(f"{path} misreads padding on this GPU.")
