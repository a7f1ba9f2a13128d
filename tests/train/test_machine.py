"""What a container allows, by control groups of both versions as Linux shows them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from train.common.machine import core_limit, usable_memory_bytes

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
