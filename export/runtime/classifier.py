"""`OnnxClassifier`: a bundle in ONNX Runtime. Needs neither torch nor transformers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.bundle.folder import FP16, FP32, INT8, TASK_IDS, Bundle
from export.runtime.cuda_graphs import NOT_CAPTURED, FixedShapes
from export.runtime.session import CPU, EXPORT_AGAIN, cuda_absence, is_of_onnxruntime, open_session, run_session
from export.runtime.tokenizer import bundle_tokenizer
from train.common.errors import BundleError, TextError, first_line
from train.common.machine import usable_cores

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


PADDING_TOLERANCE = 1e-3
"""By how much a logit may change with what is padding: it is hidden, so by nothing but another order of sums."""


@dataclass(frozen=True)
class Execution:
    """On what an engine runs.

    Attributes:
        engine: name and version of the library.
        provider: the execution provider (ONNX Runtime) or device (PyTorch) really in use.
        on_cuda: whether that is an NVIDIA GPU.
        threads: threads within an operator, on the CPU.
        precision: "fp32", "fp16" or "int8".
        note: why it is not on a GPU, and where the precision is not the best one in the bundle, why; else empty.
    """

    engine: str
    provider: str
    on_cuda: bool
    threads: int
    precision: str
    note: str


class OnnxClassifier:
    """A bundle, loaded: token ids in, logits out.

    Attributes:
        bundle: what was loaded.
        task: which of its tasks.
        execution: on what it runs.
    """

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
            task: name of the task, where the bundle has several.
            precision: which of the bundle's graphs; by default the fastest on what it runs on, which is fp16 on a
                GPU and int8 on a CPU, and fp32 where there is no such graph or it cannot be loaded.
            threads: threads within an operator, on CPU; by default all usable cores.
            use_cuda: whether to try CUDA; by default wherever the NVIDIA driver and the provider are.
            cuda_graphs: whether, on CUDA, each shape of a batch is captured as a CUDA graph when it comes first
                (`FixedShapes`): for batches of few shapes, whose kernels are so short that launching them costs more.

        Raises:
            BundleError: there is no graph in that precision, ONNX Runtime cannot load it, or its inputs are not the
                manifest's.
            UsageError: there is no such task, or several and none is named.
        """
        import onnxruntime

        self.bundle = bundle
        self.task = bundle.find_task(task)
        threads = threads or usable_cores()
        absence = cuda_absence()
        if use_cuda is None:
            use_cuda = not absence
        notes = [] if use_cuda else [absence or "CUDA is switched off"]
        cuda_graphs = cuda_graphs and use_cuda
        opened = _open_graph(bundle, precision, threads=threads, use_cuda=use_cuda, cuda_graphs=cuda_graphs)
        if use_cuda and opened.session.get_providers()[0] == CPU:
            notes.append("ONNX Runtime fell back from CUDA to the CPU")
            # What is fastest on a GPU is slow here.
            opened = _open_graph(bundle, precision, threads=threads, use_cuda=False)
        self._session = opened.session
        self._path = bundle.graph_path(opened.precision)
        inputs = tuple(item.name for item in self._session.get_inputs())
        if inputs != bundle.inputs:
            raise BundleError(
                f"{self._path} takes {', '.join(inputs)}; its manifest says {', '.join(bundle.inputs)}. {EXPORT_AGAIN}"
            )
        if "logits" not in [item.name for item in self._session.get_outputs()]:
            raise BundleError(f"{self._path} gives no logits. {EXPORT_AGAIN}")
        provider = self._session.get_providers()[0]
        self._on_cuda = provider != CPU
        self._n_labels = max(len(task.task.labels) for task in bundle.tasks)
        self._fixed_shapes = None
        if self._on_cuda and opened.cuda_graphs:
            self._fixed_shapes = FixedShapes(self._session, device="cuda", n_labels=self._n_labels)
        self.execution = Execution(
            engine=f"ONNX Runtime {onnxruntime.__version__}",
            provider=provider,
            on_cuda=self._on_cuda,
            threads=threads,
            precision=opened.precision,
            note="; ".join(filter(None, [*notes, opened.why])),
        )
        self.tokenize = bundle_tokenizer(bundle)

    def logits(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run the graph.

        Args:
            arrays: as from ``tokenize``; each int64, shape = (n_batch, n_text). Where the bundle is shared,
                ``task_ids`` beside them, int64, shape = (n_batch,), make each row one of its own task.

        Returns:
            float32, shape = (n_batch, n_labels); with ``task_ids``, as many labels as the task with the most has

        Raises:
            TextError: the arrays are no batch of texts that this model can read.
            BundleError: ONNX Runtime cannot run the graph, or what it gives are no logits of these texts.
        """
        self._check(arrays)
        if TASK_IDS in arrays or not self.bundle.is_shared:
            return self._run(arrays)
        return self._run(with_task(arrays, self.task.number))[:, : len(self.task.task.labels)]

    def _run(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        # A tokenizer may give more than this kind of model takes.
        wanted = {name: arrays[name] for name in self.bundle.inputs}
        try:
            logits = self._run_session(wanted)
        except Exception as cause:
            if not is_of_onnxruntime(cause):
                raise
            raise BundleError(f"ONNX Runtime cannot run {self._path} ({first_line(cause)}). {EXPORT_AGAIN}") from cause
        expected = (len(wanted["input_ids"]), self._n_labels)
        if logits.shape != expected:
            raise BundleError(
                f"{self._path} gives logits of shape {logits.shape} instead of {expected}. {EXPORT_AGAIN}"
            )
        return logits

    def _check(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Refuse what the graph would answer with a crash, or with somebody else's row of a table."""
        missing = [name for name in self.bundle.text_inputs if name not in arrays]
        if missing:
            raise TextError(f"The batch lacks {', '.join(missing)}. Make it with the bundle's own tokenizer.")
        for name in {*self.bundle.text_inputs, *({TASK_IDS} & set(arrays))}:
            if arrays[name].dtype != np.int64:
                raise TextError(
                    f"{name} holds {arrays[name].dtype}, not int64. Make it with the bundle's own tokenizer."
                )
        ids = arrays["input_ids"]
        if ids.ndim != 2 or not ids.size:
            raise TextError(f"input_ids of shape {ids.shape} hold no text. Give at least one text of one token.")
        if ids.shape[1] > self.bundle.max_length:
            raise TextError(
                f"input_ids hold texts of {ids.shape[1]} tokens; this model reads {self.bundle.max_length}. Cut them."
            )
        for name in self.bundle.text_inputs:
            if arrays[name].shape != ids.shape:
                raise TextError(f"{name} has shape {arrays[name].shape}, input_ids {ids.shape}. Give both alike.")
        if TASK_IDS in arrays:
            self._check_tasks(arrays[TASK_IDS], len(ids))
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest >= self.bundle.vocabulary_size:
            wrong = smallest if smallest < 0 else largest
            raise TextError(
                f"input_ids hold {wrong}, outside the vocabulary of {self.bundle.vocabulary_size} tokens. Make the "
                "batch with the bundle's own tokenizer."
            )
        for name in self.bundle.text_inputs:
            # A mask of 2 shifts the scores, and a type of -1 is the last row of its table: neither would be an error.
            if name != "input_ids" and (arrays[name].min() < 0 or arrays[name].max() > 1):
                raise TextError(
                    f"{name} holds other numbers than 0 and 1. Make the batch with the bundle's own tokenizer."
                )
        # Positions, a decoder's last token and a GPU's attention are found by each text's length.
        if (np.diff(arrays["attention_mask"], axis=1) > 0).any():
            raise TextError("attention_mask has a 1 behind a 0. Pad texts on the right.")

    def _check_tasks(self, task_ids: np.ndarray, n_batch: int) -> None:
        n_tasks = len(self.bundle.tasks)
        if not self.bundle.is_shared:
            raise TextError(f"{self.bundle.folder} holds one task and takes no {TASK_IDS}. Leave them out.")
        if task_ids.shape != (n_batch,):
            raise TextError(f"{TASK_IDS} has shape {task_ids.shape}. Give one number for each of {n_batch} texts.")
        if task_ids.min() < 0 or task_ids.max() >= n_tasks:
            raise TextError(f"{TASK_IDS} must be from 0 to {n_tasks - 1}: the bundle holds {n_tasks} tasks.")

    def _run_session(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        if self._fixed_shapes is not None:
            return self._fixed_shapes.run(arrays)
        return _run_on_cuda(self._session, arrays) if self._on_cuda else run_session(self._session, arrays)


def with_task(arrays: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """A batch for a shared graph, all of whose rows are of one task."""
    return {**arrays, TASK_IDS: np.full(len(arrays["input_ids"]), number, np.int64)}


@dataclass(frozen=True)
class _Opened:
    """A graph in ONNX Runtime, and why it is not as fast as was asked; ``why`` is empty where it is."""

    session: "InferenceSession"
    precision: str
    why: str
    cuda_graphs: bool = False


def _open_graph(
    bundle: Bundle, precision: str | None, *, threads: int, use_cuda: bool, cuda_graphs: bool = False
) -> _Opened:
    """Open a bundle's graph in a precision, or the fastest one that can be loaded."""
    wanted = precision or best_precision(bundle, on_cuda=use_cuda)
    path = bundle.graph_path(wanted)
    if cuda_graphs:
        try:
            session = open_session(path, threads=threads, use_cuda=True, cuda_graphs=True)
            _check_padding(session, path, bundle)
            return _Opened(session, wanted, "", cuda_graphs=True)
        except BundleError as cause:
            opened = _open_graph(bundle, precision, threads=threads, use_cuda=use_cuda)
            why = f"no CUDA graphs, which this graph cannot be captured in: {cause}"
            return replace(opened, why="; ".join(filter(None, [opened.why, why])))
    try:
        session = open_session(path, threads=threads, use_cuda=use_cuda)
        _check_padding(session, path, bundle)
        return _Opened(session, wanted, "")
    except BundleError as cause:
        if precision is not None or wanted == FP32:
            raise
        session = open_session(bundle.graph_path(FP32), threads=threads, use_cuda=use_cuda)
        return _Opened(session, FP32, f"fp32 instead of {wanted}, which cannot be loaded here: {cause}")


def _check_padding(session: "InferenceSession", path: Path, bundle: Bundle) -> None:
    """Try on a GPU whether a text beside a longer one is read to its end and no further.

    Which kernel computes attention depends on the GPU, on variables of the environment and on ONNX Runtime's version, and
    not all of them read the same numbers of keys. A wrong one would answer without an error.

    Raises:
        BundleError: it is not.
    """
    if session.get_providers()[0] == CPU:
        return
    length = min(9, bundle.max_length)
    short = -(-length // 2)
    ids = np.random.default_rng(0).integers(0, bundle.vocabulary_size, (2, length))
    ones = np.ones_like(ids)
    mask = (np.arange(length) < [[length], [short]]).astype(np.int64)
    arrays = {"attention_mask": mask, "token_type_ids": 0 * ids, TASK_IDS: ones[:, 0] * 0}

    def logits(*, changed: slice) -> np.ndarray:
        others = ids.copy()
        others[1, changed] = (ids[1, changed] + 1) % bundle.vocabulary_size
        of_both = {"input_ids": others, **arrays}
        return _run_on_cuda(session, {name: of_both[name] for name in bundle.inputs})[1]

    try:
        as_it_is = logits(changed=slice(0))
        other_padding, other_end = logits(changed=slice(short, None)), logits(changed=slice(short - 1, short))
    except Exception as cause:
        if not is_of_onnxruntime(cause):
            raise
        raise BundleError(f"ONNX Runtime cannot run {path} on this GPU ({first_line(cause)}).") from cause
    if not np.abs(other_padding - as_it_is).max() < PADDING_TOLERANCE or np.array_equal(other_end, as_it_is):
        raise BundleError(f"{path} misreads padding on this GPU.")


def _run_on_cuda(session: "InferenceSession", arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Run through IO binding: one copy up, one down, the rest stays on the device.

    Not from pinned memory: 32 texts of 512 tokens are 393 kB of ids, masks and types, some tens of microseconds over
    PCIe either way, where the graph takes milliseconds.
    """
    import onnxruntime

    options = onnxruntime.RunOptions()
    # Of a session that captures CUDA graphs, too.
    options.add_run_config_entry("gpu_graph_id", NOT_CAPTURED)
    binding = session.io_binding()
    for name, array in arrays.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    binding.bind_output("logits", "cuda")
    session.run_with_iobinding(binding, options)
    logits: np.ndarray = binding.copy_outputs_to_cpu()[0]
    return logits


def best_precision(bundle: Bundle, *, on_cuda: bool) -> str:
    """The fastest of a bundle's graphs that passed its gate: fp16 on a GPU, int8 on a CPU, fp32 where there is none."""
    best = FP16 if on_cuda else INT8
    return best if any(graph.precision == best and graph.gates for graph in bundle.graphs) else FP32
