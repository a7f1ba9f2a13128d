"""Builds the libraries of `fake_cuda.c`, and asks ONNX Runtime's CUDA provider about a graph on a machine without a GPU.

    python -m tests.gpu.fake_cuda GRAPH.onnx [GRAPH.onnx …]

needs gcc. It prints one JSON object for each graph: whether all compute nodes are the provider's, so that the graph can be
captured as a CUDA graph (``captured``, else a ``reason``), and what one request launches: ``kernels`` of the provider's own,
``products`` by cuBLAS, and ``copies_to_device`` by kernels that read arrays of the host, and of inputs; and which kernels
compute ``attention`` on a Hopper GPU, with CUDA graphs and without.
"""

import argparse
import ctypes
import json
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".c")
CUDNN_VERSION = 91900
"""That of the requirements; without cuDNN's attention where launches are counted, since no plan of it can be made here."""

LIBRARIES = {
    "libcuda.so.1": ("cuTensorMap",),
    "libcudart.so.13": ("cuda", "__cuda"),
    "libcublas.so.13": ("cublas",),
    "libcublasLt.so.13": ("cublasLt",),
    "libcurand.so.10": ("curand",),
    "libcudnn.so": ("cudnn",),
}
"""What the provider is linked against or opens, and how the names in each begin; of two that fit, the longer one counts."""


def _wanted() -> dict[str, list[str]]:
    """By library, the names that ONNX Runtime's CUDA provider takes from it."""
    import onnxruntime
    from elftools.elf.elffile import ELFFile

    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    wanted: dict[str, list[str]] = defaultdict(list)
    with provider.open("rb") as file:
        elf: Any = ELFFile(file)
        symbols = elf.get_section_by_name(".dynsym").iter_symbols()
        names = {symbol.name for symbol in symbols if symbol["st_shndx"] == "SHN_UNDEF"}
        # cuDNN's functions are looked up by their names.
        looked_up = re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", elf.get_section_by_name(".rodata").data())
        names |= {text.decode() for text in looked_up}
    for name in sorted(names):
        starts = ((start, library) for library, starts in LIBRARIES.items() for start in starts)
        fitting = [(len(start), library) for start, library in starts if name.startswith(start)]
        if fitting:
            wanted[max(fitting)[1]].append(name)
    return wanted


def build(folder: Path) -> dict[str, Path]:
    """Compile one library for each of `LIBRARIES` into a folder, by name."""
    wanted, built = _wanted(), {}
    written = SOURCE.read_text(encoding="utf-8")
    for library in LIBRARIES:
        names = [name for name in wanted[library] if f"{name}(" not in written]
        counted = {name: "fake_cuda_products++;" if "emm" in name else "" for name in names}
        stubs = "".join(f"int {name}() {{ {count} return 0; }}\n" for name, count in counted.items())
        code, script, path = folder / f"{library}.c", folder / f"{library}.map", folder / library
        code.write_text(f"{written}\nunsigned long fake_cuda_products;\n{stubs}", encoding="utf-8")
        script.write_text(f"{library} {{ global: *; }};\n", encoding="utf-8")
        # Of the file, what is this library's.
        options = ["-w", "-shared", "-fPIC", f"-D{library.partition('.')[0]}"]
        link = f"-Wl,-soname,{library},--version-script,{script}"
        subprocess.run(["/usr/bin/env", "gcc", *options, link, "-o", path, code], check=True)
        built[library] = path
    return built


def ask(graph: Path, libraries: Mapping[str, ctypes.CDLL], printed: int) -> dict[str, object]:
    """Open a graph for CUDA graphs and without, and run a batch.

    ``libraries`` are loaded, by the names of `LIBRARIES`; to the file ``printed`` goes what ONNX Runtime prints.
    """
    import numpy as np
    import onnxruntime

    from export.runtime.session import CUDA, open_session
    from train.common.errors import BundleError

    onnxruntime.preload_dlls = lambda: None  # NVIDIA's own libraries
    onnxruntime.set_default_logger_severity(4)  # what it would say of a refused graph is in its exception
    counts = (ctypes.c_uint64 * 4).in_dll(libraries["libcudart.so.13"], "fake_cuda_counts")
    cublas = (libraries[name] for name in ("libcublas.so.13", "libcublasLt.so.13"))
    products = [ctypes.c_ulong.in_dll(library, "fake_cuda_products") for library in cublas]

    def opened(*, cuda_graphs: bool) -> Any:
        session = open_session(graph, threads=1, use_cuda=True, cuda_graphs=cuda_graphs)
        assert session.get_providers()[0] == CUDA
        return session

    session = opened(cuda_graphs=False)
    shapes = {item.name: (3, 24)[: len(item.shape)] for item in session.get_inputs()}
    arrays = {name: np.full(shape, name != "task_ids", np.int64) for name, shape in shapes.items()}
    for _ in range(2):
        counts[:] = [0, 0, 0, 0]
        for product in products:
            product.value = 0
        session.run(["logits"], arrays)
    launches = {"kernels": counts[0], "products": sum(product.value for product in products)}
    launches["copies_to_device"] = counts[1]
    reason, sessions = "", {"without": session}
    try:
        sessions["with CUDA graphs"] = opened(cuda_graphs=True)
    except BundleError as cause:
        reason = str(cause)
    cudnn_version = ctypes.c_size_t.in_dll(libraries["libcudnn.so"], "fake_cudnn_version")
    cudnn_version.value = CUDNN_VERSION
    attention = {name: _attention_kernels(one, arrays, printed) for name, one in sessions.items()}
    cudnn_version.value = 0
    return {"captured": not reason, "reason": reason, **launches, "attention": attention}


def _attention_kernels(session: Any, arrays: Mapping[str, Any], printed: int) -> list[str]:
    """Which kernels a run takes for attention, as ONNX Runtime prints them."""
    os.ftruncate(printed, 0)
    os.lseek(printed, 0, os.SEEK_SET)
    # cuDNN's attention fails, and which kernel is taken was printed by then.
    with suppress(Exception):
        session.run(["logits"], dict(arrays))
    text = os.pread(printed, os.fstat(printed).st_size, 0).decode()
    return sorted(set(re.findall(r"SdpaKernel=(\w+)", text)))


def main() -> None:
    """Nothing that has loaded CUDA may be in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", type=Path, nargs="+", metavar="GRAPH.onnx")
    graphs = parser.parse_args().graphs
    with tempfile.TemporaryDirectory() as folder:
        built = build(Path(folder))
        os.environ["ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"] = "1"
        libraries = {name: ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for name, path in built.items()}
        answers, printed = os.fdopen(os.dup(1), "w"), os.memfd_create("printed")
        os.dup2(printed, 1)
        for graph in graphs:
            print(json.dumps(ask(graph, libraries, printed)), file=answers, flush=True)


if __name__ == "__main__":
    main()
