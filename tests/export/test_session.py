"""Which execution providers ONNX Runtime is given, why CUDA is not among them, and whether it could load where there is a GPU."""

import os
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest

import export.runtime.session
from export.bundle.folder import FP32, GRAPH_FILES
from export.runtime.session import (
    CPU,
    CUDA,
    TENSORRT,
    cuda_absence,
    has_tensorrt,
    open_session,
    providers,
    takes_cudnn_attention,
)
from tests.conftest import Folders

ON_LINUX = pytest.mark.skipif(platform.system() != "Linux", reason="the CUDA wheels that are checked here are Linux's")
SITE_PACKAGES = Path(sysconfig.get_path("platlib"))


@pytest.mark.parametrize("use_cuda", [False, True])
@pytest.mark.parametrize("tensorrt", [False, True])
def test_providers_are_tried_from_the_fastest_down(
    use_cuda: bool, tensorrt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.runtime.session, "has_tensorrt", lambda: tensorrt)
    # fp32 stays fp32 on a GPU, or the logits would not be PyTorch's.
    trt = {TENSORRT: {"trt_fp16_enable": "0"}} if tensorrt else {}
    expected = [*trt.items(), (CUDA, {"use_tf32": "0"})] if use_cuda else []
    assert providers(use_cuda=use_cuda) == [*expected, (CPU, {})]
    # A CUDA graph is CUDA's own: no kernel of it may be TensorRT's.
    captured = [(CUDA, {"use_tf32": "0", "enable_cuda_graph": "1"})] if use_cuda else []
    assert providers(use_cuda=use_cuda, cuda_graphs=True) == [*captured, (CPU, {})]


def test_idle_threads_sleep_soon(bundle: Folders) -> None:
    """By default they would take 40 ms of a core after each run from whatever else runs there."""
    session = open_session(bundle("bert") / GRAPH_FILES[FP32], threads=2, use_cuda=False)
    assert session.get_session_options().get_session_config_entry("session.intra_op.spin_duration_us") == "100"


def test_tensorrt_is_there_only_with_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as if it were not installed
    assert not has_tensorrt()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    assert not has_tensorrt()
    assert cuda_absence() == "this ONNX Runtime has no CUDA provider"


@pytest.mark.parametrize(
    ("status", "n_devices", "expected"),
    [
        (100, 0, "the NVIDIA driver shows no GPU (CUDA error 100)"),
        (0, 0, "the NVIDIA driver shows no GPU (CUDA error 100)"),
        (803, 0, "the NVIDIA driver shows no GPU (CUDA error 803)"),
        (0, 1, ""),
    ],
)
def test_a_driver_without_a_gpu_is_told_from_one_with(
    status: int, n_devices: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(reference: SimpleNamespace) -> int:
        reference._obj.value = n_devices
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: status, cuDeviceGetCount=count)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(export.runtime.session.ctypes, "CDLL", lambda _: driver)
    assert cuda_absence() == expected


@pytest.mark.parametrize(("major", "status", "expected"), [(8, 0, False), (9, 0, True), (12, 0, True), (9, 100, False)])
def test_attention_is_left_to_cudnn_from_hopper_on_and_for_cuda_graphs_alone(
    major: int, status: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attribute(reference: SimpleNamespace, number: int, device: int) -> int:
        assert (number, device) == (75, 0)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR of NVIDIA's cuda.h
        reference._obj.value = major
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: status, cuDeviceGetAttribute=attribute)
    monkeypatch.setattr(export.runtime.session.ctypes, "CDLL", lambda _: driver)
    assert takes_cudnn_attention(cuda_graphs=True) is expected
    # Each shape of a batch would be planned anew.
    assert not takes_cudnn_attention(cuda_graphs=False)


def test_attention_is_not_left_to_cudnn_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(export.runtime.session.ctypes, "CDLL", absent)
    assert not takes_cudnn_attention(cuda_graphs=True)


@ON_LINUX
def test_every_library_that_the_cuda_provider_needs_comes_from_the_requirements() -> None:
    """ONNX Runtime falls back to the CPU without a word when one is missing, and no machine without a GPU would show it."""
    shipped = {path.name: path for path in (SITE_PACKAGES / "nvidia").rglob("lib*.so*")}
    # cuDNN, cuFFT and NVRTC are not linked but opened at run time, by these names.
    opened = [shipped[name] for name in ("libcudnn.so.9", "libcufft.so.12", "libnvrtc.so.13")]
    provider = SITE_PACKAGES / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
    places = ":".join(sorted({str(path.parent) for path in shipped.values()}))
    command = ["/usr/bin/env", "ldd", *map(str, (provider, *opened))]
    printed = subprocess.run(
        command, env=os.environ | {"LD_LIBRARY_PATH": places}, capture_output=True, text=True, check=True
    )
    found = dict(re.findall(r"^\t(\S+) => (.+?)(?: \(0x.*)?$", printed.stdout, re.MULTILINE))
    # This one comes with NVIDIA's driver, never with a package.
    assert {name for name, path in found.items() if path == "not found"} <= {"libcuda.so.1"}
    linked = {"libcublas.so.13", "libcublasLt.so.13", "libcudart.so.13", "libcurand.so.10"}
    assert {name for name, path in found.items() if Path(path) == shipped.get(name)} == linked


@ON_LINUX
def test_onnxruntime_preloads_what_its_provider_links() -> None:
    """`preload_dlls` looks in these very places: each file it names is there. No public list exists."""
    names = {Path(*parts) for parts in onnxruntime._get_nvidia_dll_paths(is_windows=False)}
    assert {path for path in names if not (SITE_PACKAGES / path).is_file()} == set()
