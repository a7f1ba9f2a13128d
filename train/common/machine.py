"""What this machine is, how many of its cores may be used, and how much memory is taken."""

import ctypes
import os
import platform
import sys
from pathlib import Path


def describe_machine() -> str:
    """Processor and count of cores, or the GPU, for the reader of a figure."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux; the general name has to do
    threads = torch.get_num_threads()
    return f"{threads} {'core' if threads == 1 else 'cores'} of {name}"


def peak_memory_mib() -> float:
    """The largest resident size of this process so far."""
    try:
        # Linux's getrusage begins with what the parent had when it forked; this figure begins with the program.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
    except (OSError, IndexError, ValueError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Kilobytes, but bytes on macOS.
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class _NvmlMemory(ctypes.Structure):
    """``nvmlMemory_t`` of NVIDIA's nvml.h, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def gpu_memory_used_mib() -> float | None:
    """What all processes together have taken of the first GPU; None where NVIDIA's driver cannot say.

    Asked of the driver's management library, so that ONNX Runtime's and PyTorch's allocators are counted alike, with
    the context that each process has on the GPU.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, memory = ctypes.c_void_p(), _NvmlMemory()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
        or nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
    )
    return None if failed else memory.used / 2**20


def usable_cores() -> int:
    """How many processors this process may use: the thread count of both engines, so that neither has more."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
