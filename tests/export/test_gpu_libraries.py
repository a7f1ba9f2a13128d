"""Can the CUDA provider load where there is a GPU? Every library it needs comes from the requirements.

ONNX Runtime falls back to the CPU without a word when one is missing, and no machine without a GPU would show it.
"""

import ctypes.util
import platform
import sysconfig
from collections import deque
from pathlib import Path

import pytest
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux", reason="the CUDA wheels whose libraries are followed here are Linux's"
)

SITE_PACKAGES = Path(sysconfig.get_path("platlib"))

DRIVER = "libcuda.so.1"
"""Comes with the NVIDIA driver, never with a package."""

SYSTEM = {"c", "m", "dl", "rt", "pthread", "stdc++", "gcc_s", "z", "util"}
"""glibc and the compiler's runtime, which every Linux brings; by name without ``lib`` and ``.so``."""


def needed_libraries(path: Path) -> list[str]:
    """The names of a shared library's NEEDED entries."""
    with path.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".dynamic")
        assert isinstance(section, DynamicSection)
        # pyelftools sets the attribute by the tag's kind.
        return [tag.needed for tag in section.iter_tags() if tag.entry.d_tag == "DT_NEEDED"]  # type: ignore[attr-defined]


def is_system_library(name: str) -> bool:
    if name.startswith("ld-linux"):
        return True
    stem = name.removeprefix("lib").partition(".so")[0]
    return stem in SYSTEM and ctypes.util.find_library(stem) is not None


def test_every_library_that_the_cuda_provider_links_is_installed() -> None:
    shipped = {path.name: path for path in (SITE_PACKAGES / "nvidia").rglob("lib*.so*")}
    provider = SITE_PACKAGES / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
    assert provider.is_file()

    # cuDNN, cuFFT and NVRTC are not linked but opened at run time, by these names.
    queue = deque([*needed_libraries(provider), "libcudnn.so.9", "libcufft.so.12", "libnvrtc.so.13"])
    seen: set[str] = set()
    missing: set[str] = set()
    while queue:
        name = queue.popleft()
        if name in seen or name == DRIVER:
            continue
        seen.add(name)
        if name in shipped:
            queue.extend(needed_libraries(shipped[name]))
        elif not is_system_library(name):
            missing.add(name)
    assert missing == set()
    # The walk went through CUDA itself, not past it.
    assert {"libcublas.so.13", "libcublasLt.so.13", "libcudart.so.13", "libcurand.so.10", "libcudnn.so.9"} <= seen


def test_onnxruntime_preloads_what_its_provider_links() -> None:
    """`preload_dlls` looks in these very places: each file it names is there."""
    import onnxruntime

    names = {
        Path(*parts)
        for parts in onnxruntime._get_nvidia_dll_paths(is_windows=False)  # no public list exists
    }
    assert {path for path in names if not (SITE_PACKAGES / path).is_file()} == set()
