"""ONNX Runtime sessions: which execution providers there are, and how a graph is opened and run."""

import ctypes
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.bundle.graph_outline import check_graph
from export.runtime.cuda_graphs import NOT_CAPTURED
from train.common.errors import BundleError, first_line

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue, SessionOptions

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
NO_DEVICE = 100
"""``CUDA_ERROR_NO_DEVICE`` of NVIDIA's cuda.h."""
CAPABILITY_MAJOR = 75
"""``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`` of cuda.h."""
HOPPER = 9
"""The compute capability from which on ONNX Runtime prefers cuDNN's attention wherever that reads the mask."""
KEY_STARTS_END = "key_starts_end"
"""The initializer of a graph for GPUs that says how many of the places where each text's rows begin attention is given.

cuDNN's attention takes none of them, ONNX Runtime's memory-efficient kernel wants all, as the file has it.
"""
EXPORT_AGAIN = "Export the bundle again."
SPIN_DURATION_US = 100
"""How long a thread without work spins before it sleeps: longer than most gaps between a graph's parallel operators.

By default ONNX Runtime's threads spin for 40 ms after each run. On cores that other processes use too, that takes their
time, and a thread that spun has to wait for its turn when there is work again.
"""


def open_session(
    path: Path, *, threads: int, use_cuda: bool | None = None, cuda_graphs: bool = False
) -> "InferenceSession":
    """Open a graph in ONNX Runtime with CUDA before CPU where CUDA can be used, ready for CUDA graphs if asked.

    Raises:
        BundleError: it holds what no graph of ours does (`check_graph`), or ONNX Runtime cannot load it.
    """
    import onnxruntime

    check_graph(path)
    options = session_options(threads)
    if use_cuda is None:
        use_cuda = not cuda_absence()
    if use_cuda:
        # The provider's libraries come from NVIDIA's wheels, which no loader path names.
        onnxruntime.preload_dlls()
        if takes_cudnn_attention(cuda_graphs=cuda_graphs):
            options.add_initializer(KEY_STARTS_END, _no_key_starts())
    wanted = providers(use_cuda=use_cuda, cuda_graphs=cuda_graphs)
    with runtime_failures(f"ONNX Runtime cannot load {path}"):
        return onnxruntime.InferenceSession(path, options, providers=wanted)


def session_options(threads: int) -> "SessionOptions":
    """The options of every session, whose graph comes from a file or is only tried."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_DURATION_US))
    if overflows():
        # Makes 8-bit weights unsigned, which is slower and exact. Not elsewhere: it does so on every processor. The key is
        # from onnxruntime_session_options_config_keys.h.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def overflows() -> bool:
    """Whether ONNX Runtime sums two products of 8 bits in 16 on this processor: too few unless the weights have 7 bits."""
    if platform.machine().lower() in {"arm64", "aarch64"}:
        return False
    return not {"avx512_vnni", "avx_vnni"} & cpu_flags()


def cpu_flags() -> frozenset[str]:
    """The processor's instruction sets, as Linux lists them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


@contextmanager
def runtime_failures(what: str) -> Iterator[None]:
    """Turn an error of ONNX Runtime into a `BundleError` that begins with ``what`` failed."""
    try:
        yield
    except Exception as cause:
        # Its exceptions share no base but Exception.
        if not type(cause).__module__.startswith("onnxruntime"):
            raise
        raise BundleError(f"{what} ({first_line(cause)}). {EXPORT_AGAIN}") from cause


def providers(*, use_cuda: bool, cuda_graphs: bool = False) -> list[tuple[str, dict[str, str]]]:
    """Execution providers and their options, the preferred one first: TensorRT where it is installed, CUDA, CPU.

    For ``cuda_graphs`` the CUDA provider must run every node of the graph, so TensorRT is left out.
    """
    wanted: list[tuple[str, dict[str, str]]] = [(CPU, {})]
    if use_cuda:
        # TF32 is on by default; it rounds fp32's 23 bits of mantissa to 10, and parity with PyTorch would be lost.
        wanted.insert(0, (CUDA, {"use_tf32": "0"} | ({"enable_cuda_graph": "1"} if cuda_graphs else {})))
        if not cuda_graphs and has_tensorrt():
            wanted.insert(0, (TENSORRT, {"trt_fp16_enable": "0"}))
    return wanted


def takes_cudnn_attention(*, cuda_graphs: bool) -> bool:
    """Whether attention is left to cuDNN: faster on Hopper and later GPUs, but it plans each shape of a batch anew."""
    return cuda_graphs and _capability() >= HOPPER


@cache
def _no_key_starts() -> "OrtValue":
    """Made once, since sessions read it for as long as they live."""
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(np.zeros(1, np.int64))


def _capability() -> int:
    """The major number of the first GPU's compute capability; 0 where the driver does not say."""
    try:
        driver = _driver()
    except OSError:
        return 0
    major = ctypes.c_int()
    failed = driver.cuInit(0) or driver.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, 0)
    return 0 if failed else major.value


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


def cuda_absence() -> str:
    """Why ONNX Runtime cannot use CUDA here, in words for the page; empty where it can."""
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        return "this ONNX Runtime has no CUDA provider"
    try:
        driver = _driver()
    except OSError:
        return "no NVIDIA driver on this machine"
    # In a container without its GPU, or with CUDA_VISIBLE_DEVICES empty, ONNX Runtime would warn and take the CPU.
    count = ctypes.c_int()
    failure = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if failure or not count.value:
        return f"the NVIDIA driver shows no GPU (CUDA error {failure or NO_DEVICE})"
    return ""


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def run_session(session: "InferenceSession", arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Run a graph on the CPU; arrays by name → logits, float32, shape = (n_batch, n_labels)."""
    return np.asarray(session.run(["logits"], dict(arrays))[0])


def run_on_cuda(session: "InferenceSession", arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """`run_session` through IO binding: one copy to the device, one back, the rest stays there.

    Not from pinned memory: 32 texts of 512 tokens are 393 kB, some tens of microseconds over PCIe either way, where the
    graph takes milliseconds.
    """
    import onnxruntime

    options = onnxruntime.RunOptions()
    # This also holds in a session that captures CUDA graphs.
    options.add_run_config_entry("gpu_graph_id", NOT_CAPTURED)
    binding = session.io_binding()
    for name, array in arrays.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    binding.bind_output("logits", "cuda")
    session.run_with_iobinding(binding, options)
    logits: np.ndarray = binding.copy_outputs_to_cpu()[0]
    return logits
