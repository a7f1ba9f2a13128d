"""This machine: its name, how many cores may be used, and how much memory is taken."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path


def describe_machine() -> str:
    """The GPU, or the processor and how many of its cores torch uses."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")  # on Linux only
    found = re.search(r"^model name\s*:(.+)$", info.read_text(encoding="utf-8") if info.exists() else "", re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{threads} {'core' if threads == 1 else 'cores'} of {name}"


def usable_cores() -> int:
    """How many processors this process may use: the thread count of both engines, so that neither has more."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_mib() -> float:
    """The largest resident size of this process so far."""
    try:
        # getrusage on Linux starts from the parent's size at the fork; this figure starts with the program.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
    except (OSError, IndexError, ValueError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, others kilobytes


def gpu_memory_used_mib() -> float | None:
    """What all processes together have taken of the first GPU; None where NVIDIA's driver cannot say.

    The driver's management library counts ONNX Runtime's and PyTorch's allocators alike, and each process's context.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # nvmlMemory_t of nvml.h: total, free, used bytes
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
        or nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
    )
    return None if failed else memory[2] / 2**20
