"""`OnnxClassifier`: a bundle in ONNX Runtime. Needs neither torch nor transformers."""

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.bundle import FP16, FP32, INT8, TASK_IDS, Bundle
from export.fixed_shapes import NOT_CAPTURED, FixedShapes
from export.strangers import check_graph
from train.errors import BundleError, TextError, first_line, is_of_tokenizers
from train.limits import MAX_TEXT_BYTES, check_file

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

NO_DEVICE = 100
"""``CUDA_ERROR_NO_DEVICE`` of NVIDIA's cuda.h."""

PADDING_TOLERANCE = 1e-3
"""By how much a logit may change with what is padding: it is hidden, so by nothing but another order of sums."""

_AGAIN = "Export the bundle again."


@dataclass(frozen=True)
class EncodedTexts:
    """A batch of texts as the graph takes it.

    Attributes:
        arrays: ``input_ids`` and ``attention_mask``, with ``token_type_ids`` where the model takes
            them; each int64, shape = (n_batch, n_text)
        cut: for each text, whether it was longer than the limit and lost its end.
    """

    arrays: dict[str, np.ndarray]
    cut: tuple[bool, ...]


class TextTokenizer:
    """tokenizer.json, set up for single texts and pairs: cut to a limit (longest sentence first), padded on the right."""

    def __init__(
        self, path: Path, *, max_length: int, pad_token_id: int, inputs: Sequence[str], token_types: bool = True
    ) -> None:
        """Load a tokenizer.

        Args:
            path: tokenizer.json
            max_length: longest text in tokens, special tokens included.
            pad_token_id: what fills the end of shorter texts.
            inputs: which of ``input_ids``, ``attention_mask``, ``token_type_ids`` to give.
            token_types: whether the second sentence is of another type than the first, where types are given.

        Raises:
            BundleError: it is no tokenizer, or has no such padding token.
        """
        from tokenizers import Tokenizer

        check_file(path, MAX_TEXT_BYTES, BundleError, _AGAIN)
        self._path = path
        with self._library_failures():
            self._tokenizer = Tokenizer.from_file(str(path))
        pad_token = self._tokenizer.id_to_token(pad_token_id)
        if pad_token is None:
            raise BundleError(f"{path} has no token {pad_token_id} to pad with. {_AGAIN}")
        self._tokenizer.enable_truncation(max_length, strategy="longest_first")
        self._tokenizer.enable_padding(pad_id=pad_token_id, pad_token=pad_token)
        self._inputs = tuple(inputs)
        self._token_types = token_types

    def __call__(self, texts: Sequence[tuple[str, ...]]) -> EncodedTexts:
        """Tokenise texts into one batch, padded to its longest.

        Args:
            texts: of each its one or two sentences; at least one text.
        """
        with self._library_failures():
            encodings = self._tokenizer.encode_batch([text if len(text) == 2 else text[0] for text in texts])
        arrays = {
            "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
            "token_type_ids": np.array([encoding.type_ids for encoding in encodings], dtype=np.int64),
        }
        if not self._token_types:
            arrays["token_type_ids"][:] = 0
        return EncodedTexts(
            arrays={name: arrays[name] for name in self._inputs},
            cut=tuple(bool(encoding.overflowing) for encoding in encodings),
        )

    @contextmanager
    def _library_failures(self) -> Iterator[None]:
        """Turn what the library makes of a file that only looks like a tokenizer into a `BundleError`."""
        try:
            yield
        except BaseException as cause:
            if not is_of_tokenizers(cause):
                raise
            raise BundleError(f"{self._path} is no tokenizer ({first_line(cause)}). {_AGAIN}") from cause

    def characters_read(self, text: tuple[str, ...]) -> tuple[int, ...]:
        """How far into each of its one or two sentences a text is read, in characters, when it is cut to the limit."""
        with self._library_failures():
            encoding = self._tokenizer.encode(*text)
        ends = [0] * len(text)
        for (_, end), sequence in zip(encoding.offsets, encoding.sequence_ids, strict=True):
            # Special tokens and padding are of no sentence.
            if sequence is not None:
                ends[sequence] = max(ends[sequence], end)
        return tuple(ends)


def bundle_tokenizer(bundle: Bundle) -> TextTokenizer:
    """The tokenizer of a bundle, set up for its graph."""
    return TextTokenizer(
        bundle.tokenizer_path,
        max_length=bundle.max_length,
        pad_token_id=bundle.pad_token_id,
        inputs=bundle.text_inputs,
        token_types=bundle.token_types,
    )


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


def usable_cores() -> int:
    """How many processors this process may use: the thread count of both engines, so that neither has more."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
                f"{self._path} takes {', '.join(inputs)}; its manifest says {', '.join(bundle.inputs)}. {_AGAIN}"
            )
        if "logits" not in [item.name for item in self._session.get_outputs()]:
            raise BundleError(f"{self._path} gives no logits. {_AGAIN}")
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
            if not _is_of_onnxruntime(cause):
                raise
            raise BundleError(f"ONNX Runtime cannot run {self._path} ({first_line(cause)}). {_AGAIN}") from cause
        expected = (len(wanted["input_ids"]), self._n_labels)
        if logits.shape != expected:
            raise BundleError(f"{self._path} gives logits of shape {logits.shape} instead of {expected}. {_AGAIN}")
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
        if not _is_of_onnxruntime(cause):
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


def open_session(
    path: Path, *, threads: int, use_cuda: bool | None = None, cuda_graphs: bool = False
) -> "InferenceSession":
    """Open a graph in ONNX Runtime with CUDA before CPU where CUDA can be used, ready for CUDA graphs if asked.

    Raises:
        BundleError: it holds what no graph of ours does (`check_graph`), or ONNX Runtime cannot load it.
    """
    import onnxruntime

    check_graph(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if use_cuda is None:
        use_cuda = not cuda_absence()
    if use_cuda:
        # The provider's libraries come from NVIDIA's wheels, which no loader path names.
        onnxruntime.preload_dlls()
    wanted = providers(use_cuda=use_cuda, cuda_graphs=cuda_graphs)
    try:
        return onnxruntime.InferenceSession(path, options, providers=wanted)
    except Exception as cause:
        if not _is_of_onnxruntime(cause):
            raise
        raise BundleError(f"ONNX Runtime cannot load {path} ({cause}). {_AGAIN}") from cause


def _is_of_onnxruntime(cause: Exception) -> bool:
    """Whether ONNX Runtime raised it; its exceptions share no base but Exception."""
    return type(cause).__module__.startswith("onnxruntime")


def providers(*, use_cuda: bool, cuda_graphs: bool = False) -> list[tuple[str, dict[str, str]]]:
    """Execution providers and their options, the preferred one first: TensorRT where it is installed, CUDA, CPU.

    ``cuda_graphs`` are the CUDA provider's, which must then have every kernel of the graph to itself.
    """
    wanted: list[tuple[str, dict[str, str]]] = [(CPU, {})]
    if use_cuda:
        # TF32 is on by default; it rounds fp32's 23 bits of mantissa to 10, and parity with PyTorch would be lost.
        options = {"use_tf32": "0"} | ({"enable_cuda_graph": "1"} if cuda_graphs else {})
        wanted.insert(0, (CUDA, options))
        if not cuda_graphs and has_tensorrt():
            wanted.insert(0, (TENSORRT, {"trt_fp16_enable": "0"}))
    return wanted


def has_tensorrt() -> bool:
    """Whether ONNX Runtime has the provider and TensorRT's library is installed (``pip install tensorrt``)."""
    import onnxruntime

    if TENSORRT not in onnxruntime.get_available_providers():
        return False
    try:
        # The package names its library's folder to the loader.
        import tensorrt  # type: ignore[import-not-found]  # noqa: F401

        ctypes.CDLL("libnvinfer.so.10")
    except (ImportError, OSError):
        return False
    return True


def run_session(session: "InferenceSession", arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Run a graph on the CPU; arrays by name → logits, float32, shape = (n_batch, n_labels)."""
    return np.asarray(session.run(["logits"], dict(arrays))[0])


def cuda_absence() -> str:
    """Why ONNX Runtime cannot use CUDA here, in words for the page; empty where it can."""
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        return "this ONNX Runtime has no CUDA provider"
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver on this machine"
    # A container without its GPU, or CUDA_VISIBLE_DEVICES: ONNX Runtime would print a warning and take the CPU.
    count = ctypes.c_int()
    failure = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if failure or not count.value:
        return f"the NVIDIA driver shows no GPU (CUDA error {failure or NO_DEVICE})"
    return ""
