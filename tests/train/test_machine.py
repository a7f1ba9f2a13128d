"""What a container allows, by control groups of both versions as Linux shows them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from train.common.machine import GpuMemory, core_limit, usable_memory_bytes

V1 = "30 24 0:26 {top} {mount} rw,nosuid - cgroup cgroup rw,{controllers}\n"
V2 = "30 24 0:26 {top} {mount} rw,nosuid,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
QUOTA = "the container's CPU quota"


@pytest.fixture(autouse=True)
def sixty_four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def made(folder: Path, groups: str, mounts: str, **files: str) -> Path:
    """What /proc/self and the control groups' file system hold; the files' names have ``__`` for a slash."""
    (folder / "cgroup").write_text(groups, encoding="utf-8")
    (folder / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/vda rw\n" + mounts, encoding="utf-8")
    for name, content in files.items():
        path = folder / "fs" / name.replace("__", "/").replace("_of_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("group", "top", "files", "cores", "reason"),
    [
        # `docker --cpus=2` with a control group namespace of its own
        ("0::/", "/", {"cpu_of_max": "200000 100000"}, 2, QUOTA),
        ("0::/", "/", {"cpu_of_max": "150000 100000"}, 2, QUOTA),
        ("0::/", "/", {"cpu_of_max": "1000 100000"}, 1, QUOTA),
        ("0::/", "/", {"cpu_of_max": "max 100000"}, 64, "the processors that it may run on"),
        ("0::/", "/", {"cpu_of_max": "9900000 100000"}, 64, "the processors that it may run on"),
        # without one: the host's path, and the container's group mounted
        ("0::/docker/abc", "/docker/abc", {"cpu_of_max": "300000 100000"}, 3, QUOTA),
        # a service within a slice that has the lower limit
        (
            "0::/a.slice/b",
            "/",
            {"a.slice__cpu_of_max": "400000 100000", "a.slice__b__cpu_of_max": "800000 100000"},
            4,
            QUOTA,
        ),
        ("0::/", "/", {"cpu_of_max": "nonsense"}, 64, "the processors that it may run on"),
        ("0::/", "/", {}, 64, "the processors that it may run on"),
    ],
)
def test_a_quota_of_version_2_is_read(
    tmp_path: Path, group: str, top: str, files: dict[str, str], cores: int, reason: str
) -> None:
    proc = made(tmp_path, f"{group}\n", V2.format(top=top, mount=tmp_path / "fs"), **files)
    limit = core_limit(proc)
    assert (limit.cores, limit.reason) == (cores, reason)


@pytest.mark.parametrize(("quota", "cores"), [("200000", 2), ("-1", 64), ("50000", 1)])
def test_a_quota_of_version_1_is_read(tmp_path: Path, quota: str, cores: int) -> None:
    mounts = V1.format(top="/docker/abc", mount=tmp_path / "fs", controllers="cpu,cpuacct")
    mounts += V1.format(top="/docker/abc", mount=tmp_path / "other", controllers="cpuset")
    files = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"}
    proc = made(tmp_path, "5:cpuset:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n", mounts, **files)
    assert core_limit(proc).cores == cores


def test_the_least_limit_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc = made(tmp_path, "0::/\n", V2.format(top="/", mount=tmp_path / "fs"), cpu_of_max="400000 100000")
    for threads, cores, reason in (
        ("3", 3, "OMP_NUM_THREADS"),
        ("8", 4, QUOTA),
        ("0", 4, QUOTA),
        ("2,1", 2, "OMP_NUM_THREADS"),
    ):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert (core_limit(proc).cores, core_limit(proc).reason) == (cores, reason)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert core_limit(proc).cores == 1
    assert core_limit(tmp_path / "missing").cores == 1  # macOS has no such folder


def test_a_memory_limit_is_read(tmp_path: Path) -> None:
    physical = usable_memory_bytes(tmp_path / "missing")
    assert physical
    proc = made(tmp_path, "0::/\n", V2.format(top="/", mount=tmp_path / "fs"), memory_of_max="max")
    assert usable_memory_bytes(proc) == physical
    proc = made(tmp_path, "0::/\n", V2.format(top="/", mount=tmp_path / "fs"), memory_of_max="1048576")
    assert usable_memory_bytes(proc) == 2**20
    mounts = V1.format(top="/", mount=tmp_path / "fs", controllers="memory")
    proc = made(tmp_path, "3:memory:/\n", mounts, **{"memory.limit_in_bytes": "2097152"})
    assert usable_memory_bytes(proc) == 2**21


def test_torch_starts_as_many_threads_as_the_quota_allows(tmp_path: Path) -> None:
    """A library's own default is the number of processors; here the limit is 1 of them."""
    proc = made(tmp_path, "0::/\n", V2.format(top="/", mount=tmp_path / "fs"), cpu_of_max="100000 100000")
    code = (
        "import functools, pathlib, train.common.machine as machine\n"
        f"machine.core_limit = functools.partial(machine.core_limit, pathlib.Path({str(proc)!r}))\n"
        "machine.give_libraries_usable_cores()\n"
        "import torch\nprint(torch.get_num_threads(), machine.core_limit())"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == f'1 CoreLimit(cores=1, reason="{QUOTA}")\n'


NVML = """
#include <string.h>
#include <unistd.h>
typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
typedef struct { unsigned pid; unsigned long long usedGpuMemory; unsigned gpuInstanceId, computeInstanceId; } nvmlProcessInfo_t;
int nvmlInit_v2(void) { return INIT; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { return *device = device, 0; }
int nvmlDeviceGetMemoryInfo(void *device, nvmlMemory_t *memory) {
    *memory = (nvmlMemory_t){80ull << 30, 77ull << 30, 3ull << 30};
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, nvmlProcessInfo_t *found) {
    if (*count < 2) return 7;
    found[0] = (nvmlProcessInfo_t){1, 2ull << 30, ~0u, ~0u};
    found[1] = (nvmlProcessInfo_t){PID, OWN, ~0u, ~0u};
    *count = 2;
    return 0;
}
"""
"""The driver's management library, with the structs of NVIDIA's nvml.h."""


@pytest.mark.skipif(
    shutil.which("gcc") is None, reason="no gcc, which compiles a management library that needs no driver"
)
@pytest.mark.parametrize(
    ("defined", "expected"),
    [
        ({}, "GpuMemory(own_mib=1024.0, all_mib=3072.0)"),
        # In a container the driver names the host's processes, and some drivers count no process's bytes.
        ({"PID": "2"}, "GpuMemory(own_mib=None, all_mib=3072.0)"),
        ({"OWN": "~0ull"}, "GpuMemory(own_mib=None, all_mib=3072.0)"),
        ({"INIT": "9"}, "None"),
    ],
)
def test_the_drivers_library_tells_this_process_from_the_others(
    defined: dict[str, str], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "nvml.c").write_text(NVML, encoding="utf-8")
    names = {"PID": "getpid()", "OWN": "1ull << 30", "INIT": "0"} | defined
    library = tmp_path / "libnvidia-ml.so.1"
    options = [f"-D{name}={value}" for name, value in names.items()]
    subprocess.run(
        ["/usr/bin/env", "gcc", "-shared", "-fPIC", *options, "-o", library, tmp_path / "nvml.c"], check=True
    )
    command = [sys.executable, "-c", "from train.common.machine import gpu_memory; print(gpu_memory())"]
    found = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == expected


def test_memory_taken_is_this_processs_own_where_the_driver_tells() -> None:
    before, after = GpuMemory(None, 1000.0), GpuMemory(300.0, 9000.0)
    assert after.since(before) == 300
    assert GpuMemory(500.0, 9000.0).since(after) == 200
    assert GpuMemory(None, 9000.0).since(before) == 8000
    assert after.since(None) is None
