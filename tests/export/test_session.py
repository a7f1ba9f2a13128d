"""Which execution providers ONNX Runtime is given, and why CUDA is not among them."""

import sys
from typing import Any

import onnxruntime
import pytest

import export.runtime.session
from export.runtime.session import CPU, CUDA, TENSORRT, cuda_absence, has_tensorrt, providers


@pytest.mark.parametrize(
    ("use_cuda", "tensorrt", "expected"),
    [
        (False, True, [CPU]),
        (False, False, [CPU]),
        (True, False, [CUDA, CPU]),
        (True, True, [TENSORRT, CUDA, CPU]),
    ],
)
def test_providers_are_tried_from_the_fastest_down(
    use_cuda: bool, tensorrt: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.runtime.session, "has_tensorrt", lambda: tensorrt)
    found = providers(use_cuda=use_cuda)
    assert [name for name, _ in found] == expected
    # fp32 stays fp32 on a GPU, or the logits would not be PyTorch's.
    options = dict(found)
    if use_cuda:
        assert options[CUDA]["use_tf32"] == "0"
    if TENSORRT in options:
        assert options[TENSORRT]["trt_fp16_enable"] == "0"
    # A CUDA graph is CUDA's own: no kernel of it may be TensorRT's.
    captured = providers(use_cuda=use_cuda, cuda_graphs=True)
    assert [name for name, _ in captured] == [name for name in expected if name != TENSORRT]
    assert dict(captured).get(CUDA, {}).get("enable_cuda_graph") == ("1" if use_cuda else None)
    assert "enable_cuda_graph" not in dict(found).get(CUDA, {})


def test_tensorrt_is_there_only_with_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as if it were not installed
    assert not has_tensorrt()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    assert not has_tensorrt()
    assert cuda_absence() == "this ONNX Runtime has no CUDA provider"


class Driver:
    """NVIDIA's driver as far as it is asked how many GPUs there are."""

    def __init__(self, status: int, n_devices: int) -> None:
        self.status, self.n_devices = status, n_devices

    def cuInit(self, flags: int) -> int:  # noqa: N802 -- the driver's name
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802 -- the same
        count._obj.value = self.n_devices
        return 0


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
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(export.runtime.session.ctypes, "CDLL", lambda _: Driver(status, n_devices))
    assert cuda_absence() == expected
