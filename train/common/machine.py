"""This machine: its name, how many cores and how much memory may be used, and how much memory is taken."""

import ctypes
import math
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from train.common.errors import PromptfoldError


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


_NO_MEMORY = re.compile(
    "can't allocate memory|cannot allocate memory|out of memory|failed to allocate|bad_alloc|bad allocation"
    "|size calculation overflowed|multiplication overflow",
    re.IGNORECASE,
)
"""How PyTorch, ONNX Runtime and the operating system say it."""


@dataclass(frozen=True)
class CoreLimit:
    """How many cores this process may use, and what says so."""

    cores: int
    reason: str


def core_limit(proc: Path = Path("/proc/self")) -> CoreLimit:
    """The least of the processors that this process may run on, its container's CPU quota and OMP_NUM_THREADS.

    A quota is rounded up: 1.5 processors are kept busy by two threads. ``proc`` is what Linux says of the process.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [CoreLimit(available, "the processors that it may run on")]
    limits += [
        CoreLimit(max(1, math.ceil(quota / period)), "the container's CPU quota") for quota, period in _cpu_quotas(proc)
    ]
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if threads.isdecimal() and int(threads):
        limits.append(CoreLimit(int(threads), "OMP_NUM_THREADS"))
    return min(limits, key=lambda limit: limit.cores)  # the first of equal ones


def usable_cores() -> int:
    """The cores of `core_limit`: the thread count of both engines, so that neither has more."""
    return core_limit().cores


def give_libraries_usable_cores() -> None:
    """Tell libraries that are loaded later, and child processes, how many threads to start: none of them reads a quota."""
    limit = core_limit()
    if "quota" in limit.reason:
        for variable in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
            os.environ[variable] = str(limit.cores)


def usable_memory_bytes(proc: Path = Path("/proc/self")) -> int | None:
    """The least of this machine's memory and the limit of this process's container; None where neither is known."""
    limits = []
    for folder, is_v2 in _cgroup_folders(proc, "memory"):
        with suppress(OSError, ValueError):  # "max", or the top group, which has no such file
            limits.append(int((folder / ("memory.max" if is_v2 else "memory.limit_in_bytes")).read_text("ascii")))
    with suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def memory_trouble(error: BaseException) -> str | None:
    """How a library said that it could not get memory, in an exception or in what caused it; None for any other."""
    cause: BaseException | None = error
    while cause is not None:
        is_ours = isinstance(cause, PromptfoldError)  # it may only quote what follows
        if not is_ours and (isinstance(cause, MemoryError) or _NO_MEMORY.search(str(cause))):
            return str(cause).strip().partition("\n")[0][:200] or type(cause).__name__
        cause = cause.__cause__
    return None


def _cpu_quotas(proc: Path) -> Iterator[tuple[int, int]]:
    """Microseconds of processor time, and the period in which they may be used, of each group that has such a limit."""
    for folder, is_v2 in _cgroup_folders(proc, "cpu"):
        with suppress(OSError, ValueError):  # "max" and missing files: no limit
            if is_v2:
                quota, period = map(int, (folder / "cpu.max").read_text("ascii").split())
            else:
                quota, period = (
                    int((folder / f"cpu.cfs_{name}_us").read_text("ascii")) for name in ("quota", "period")
                )
            if quota > 0 and period > 0:  # version 1 writes -1 for no limit
                yield quota, period


def _cgroup_folders(proc: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's control group and of those around it, and whether they are of version 2.

    Source: cgroups(7) and proc_pid_mountinfo(5). A container often sees its own group mounted as the top one, while
    /proc/self/cgroup names it by the host's path.
    """
    try:
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text("utf-8").splitlines()]
        mounts = [line.split() for line in (proc / "mountinfo").read_text("utf-8").splitlines()]
    except OSError:  # not Linux
        return
    for words in mounts:
        kind, options = words[words.index("-") + 1], words[-1].split(",")
        is_v2 = kind == "cgroup2"
        if not is_v2 and not (kind == "cgroup" and controller in options):
            continue
        top, mount = words[3], Path(words[4])
        own = next((path for _, names, path in groups if (not names if is_v2 else controller in names.split(","))), top)
        inside = Path(own).relative_to(top) if Path(own).is_relative_to(top) else Path()
        if ".." not in inside.parts:
            yield from ((mount / folder, is_v2) for folder in (inside, *inside.parents))


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


@dataclass(frozen=True)
class GpuMemory:
    """How much of the first GPU is taken, each process's context included."""

    own_mib: float | None
    """By this process; None where the driver cannot tell processes apart, as in most containers."""
    all_mib: float
    """By all processes together."""

    def since(self, before: "GpuMemory | None") -> float | None:
        """What was taken since an earlier count; None where there was none."""
        if before is None:
            return None
        if self.own_mib is not None:
            return self.own_mib - (before.own_mib or 0)
        return self.all_mib - before.all_mib


class _NvmlProcess(ctypes.Structure):
    """``nvmlProcessInfo_t`` of nvml.h."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


MAX_GPU_PROCESSES = 1024
"""The processes that there is room for: where more run, the driver's library lists none."""


def gpu_memory() -> GpuMemory | None:
    """Count the first GPU's memory; None where NVIDIA's driver cannot say.

    The driver's management library counts ONNX Runtime's and PyTorch's allocators alike.
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
    if failed:
        return None
    count, processes = ctypes.c_uint(MAX_GPU_PROCESSES), (_NvmlProcess * MAX_GPU_PROCESSES)()
    failed = nvml.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), processes)
    found = [] if failed else [one.used_bytes for one in processes[: count.value] if one.pid == os.getpid()]
    # All bits are set where the driver does not count a process's bytes.
    own = found[0] / 2**20 if found and found[0] < memory[0] else None
    return GpuMemory(own, memory[2] / 2**20)
