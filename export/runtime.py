"""`OnnxClassifier`: a bundle in ONNX Runtime. Needs neither torch nor transformers."""

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.bundle import Bundle
from train.errors import BundleError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


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

    def __init__(self, path: Path, *, max_length: int, pad_token_id: int, inputs: Sequence[str]) -> None:
        """Load a tokenizer.

        Args:
            path: tokenizer.json
            max_length: longest text in tokens, special tokens included.
            pad_token_id: what fills the end of shorter texts.
            inputs: which of ``input_ids``, ``attention_mask``, ``token_type_ids`` to give.

        Raises:
            BundleError: it is no tokenizer, or has no such padding token.
        """
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as cause:  # the library raises a bare Exception, nothing narrower
            raise BundleError(f"{path} is no tokenizer ({cause}). Export the bundle again.") from cause
        pad_token = self._tokenizer.id_to_token(pad_token_id)
        if pad_token is None:
            raise BundleError(f"{path} has no token {pad_token_id} to pad with. Export the bundle again.")
        self._tokenizer.enable_truncation(max_length, strategy="longest_first")
        self._tokenizer.enable_padding(pad_id=pad_token_id, pad_token=pad_token)
        self._inputs = tuple(inputs)

    def __call__(self, texts: Sequence[tuple[str, ...]]) -> EncodedTexts:
        """Tokenise texts into one batch, padded to its longest.

        Args:
            texts: of each its one or two sentences; at least one text.
        """
        encodings = self._tokenizer.encode_batch([text if len(text) == 2 else text[0] for text in texts])
        arrays = {
            "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
            "token_type_ids": np.array([encoding.type_ids for encoding in encodings], dtype=np.int64),
        }
        return EncodedTexts(
            arrays={name: arrays[name] for name in self._inputs},
            cut=tuple(bool(encoding.overflowing) for encoding in encodings),
        )


def bundle_tokenizer(bundle: Bundle) -> TextTokenizer:
    """The tokenizer of a bundle, set up for its graph."""
    return TextTokenizer(
        bundle.tokenizer_path,
        max_length=bundle.max_length,
        pad_token_id=bundle.pad_token_id,
        inputs=bundle.inputs,
    )


@dataclass(frozen=True)
class Execution:
    """On what an engine runs.

    Attributes:
        engine: name and version of the library.
        provider: the execution provider (ONNX Runtime) or device (PyTorch) really in use.
        on_cuda: whether that is an NVIDIA GPU.
        threads: threads within an operator, on the CPU.
        precision: "fp32" …
        note: why it is not on a GPU; empty where it is.
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
        execution: on what it runs.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, use_cuda: bool | None = None) -> None:
        """Load a bundle that `load_bundle` checked.

        Args:
            threads: threads within an operator, on CPU; by default all usable cores.
            use_cuda: whether to try CUDA; by default wherever the NVIDIA driver and the provider are.

        Raises:
            BundleError: ONNX Runtime cannot load the graph, or its inputs are not the manifest's.
        """
        import onnxruntime

        self.bundle = bundle
        threads = threads or usable_cores()
        self._session = open_session(bundle.model_path, threads=threads, use_cuda=use_cuda)
        inputs = tuple(item.name for item in self._session.get_inputs())
        if inputs != bundle.inputs:
            raise BundleError(
                f"{bundle.model_path} takes {', '.join(inputs)}; its manifest says {', '.join(bundle.inputs)}. "
                "Export the bundle again."
            )
        provider = self._session.get_providers()[0]
        self._on_cuda = provider == CUDA
        self.execution = Execution(
            engine=f"ONNX Runtime {onnxruntime.__version__}",
            provider=provider,
            on_cuda=self._on_cuda,
            threads=threads,
            precision=bundle.precision,
            note="" if self._on_cuda else cuda_absence(),
        )
        self.tokenize = bundle_tokenizer(bundle)

    def logits(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run the graph.

        Args:
            arrays: as from ``tokenize``; each int64, shape = (n_batch, n_text)

        Returns:
            float32, shape = (n_batch, n_labels)
        """
        if self._on_cuda:
            return self._logits_on_cuda(arrays)
        return run_session(self._session, arrays)

    def _logits_on_cuda(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The same through IO binding: one copy up, one down, the rest stays on the device."""
        binding = self._session.io_binding()
        for name, array in arrays.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits", "cuda")
        self._session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]


def open_session(path: Path, *, threads: int, use_cuda: bool | None = None) -> "InferenceSession":
    """Open a graph in ONNX Runtime with CUDA before CPU where CUDA can be used.

    Raises:
        BundleError: ONNX Runtime cannot load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if use_cuda is None:
        use_cuda = not cuda_absence()
    if use_cuda:
        # The provider's libraries come from NVIDIA's wheels, which no loader path names.
        onnxruntime.preload_dlls()
    # TF32 is on by default; it rounds fp32's 23 bits of mantissa to 10, and parity with PyTorch would be lost.
    cuda = [(CUDA, {"use_tf32": "0"})] if use_cuda else []
    try:
        return onnxruntime.InferenceSession(path, options, providers=[*cuda, CPU])
    except Exception as cause:
        # ORT's exceptions share no base but Exception.
        if not type(cause).__module__.startswith("onnxruntime"):
            raise
        raise BundleError(f"ONNX Runtime cannot load {path} ({cause}). Export the bundle again.") from cause


def run_session(session: "InferenceSession", arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Run a graph on the CPU; arrays by name → logits, float32, shape = (n_batch, n_labels)."""
    return np.asarray(session.run(["logits"], dict(arrays))[0])


def cuda_absence() -> str:
    """Why ONNX Runtime cannot use CUDA here, in words for the page; empty where it can."""
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        return "this ONNX Runtime has no CUDA provider"
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver on this machine"
    return ""
