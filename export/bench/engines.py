"""The engines that `export.bench` compares, and what their processes are told and answer, in files by pickle.

NumPy alone is imported here: the worker may run in another environment's interpreter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CPU, CUDA = "cpu", "cuda"
GPU = (CUDA,)
PEFT, PLAIN, OPENVINO, OURS = "peft", "plain", "openvino", "ours"
"""Families: PEFT in PyTorch, the usual export in ONNX Runtime and in OpenVINO, and promptfold's bundle."""
TORCHAO = "torchao"
INSTALLS = {OPENVINO: "pip install openvino nncf", TORCHAO: "pip install -r requirements.txt torchao"}
"""By name of a library that is not among the requirements, what makes an environment with it."""
REFERENCE = "peft-eager"
"""The engine that every other one is compared with: PEFT's tutorial, as it stands."""
Batch = dict[str, np.ndarray]
"""Input arrays by name; each int64, shape = (n_batch, n_text)"""


@dataclass(frozen=True)
class Engine:
    """One way to run the same model."""

    name: str
    what: str
    family: str
    precision: str
    devices: tuple[str, ...] = (CPU, CUDA)
    compile_mode: str = ""
    """The mode of `torch.compile`; empty where it is not used."""
    cuda_graphs: bool = False
    """Whether each shape of a bundle is captured as a CUDA graph."""
    needs: str = ""
    """A library that is not among promptfold's requirements; its process runs in another environment's interpreter."""


_ENGINES = (
    Engine(REFERENCE, "the tutorial: PeftModel.forward, eager", PEFT, "fp32"),
    Engine("peft-eager-bf16", "the same in bfloat16", PEFT, "bf16"),
    Engine("peft-eager-fp16", "the same in float16", PEFT, "fp16", GPU),
    Engine("peft-compile", "the same under torch.compile", PEFT, "fp32", compile_mode="default"),
    Engine("peft-compile-bf16", "that in bfloat16", PEFT, "bf16", (CPU,), "default"),
    Engine("peft-compile-int8", "that in int8 by torchao, dynamic", PEFT, "int8", (CPU,), "default", needs=TORCHAO),
    Engine("peft-compile-fp16", "that in float16", PEFT, "fp16", GPU, "default"),
    Engine("peft-compile-graphs-fp16", "that with torch.compile's CUDA graphs", PEFT, "fp16", GPU, "reduce-overhead"),
    Engine("plain-fp32", "optimum's export of base and prompt, ONNX Runtime", PLAIN, "fp32"),
    Engine("plain-fp16", "that graph converted to float16, ONNX Runtime", PLAIN, "fp16", GPU),
    Engine("plain-int8", "that graph quantized by optimum's defaults, ONNX Runtime", PLAIN, "int8", (CPU,)),
    Engine("plain-static-int8", "that graph quantized by ONNX Runtime's quantize_static", PLAIN, "int8", (CPU,)),
    Engine("openvino-int8", "that graph quantized by NNCF, OpenVINO", OPENVINO, "int8", (CPU,), needs=OPENVINO),
    Engine("ours-fp32", "promptfold's bundle", OURS, "fp32"),
    Engine("ours-int8", "promptfold's bundle", OURS, "int8", (CPU,)),
    Engine("ours-fp16", "promptfold's bundle", OURS, "fp16"),
    Engine("ours-graphs-fp16", "that with a CUDA graph a shape", OURS, "fp16", GPU, cuda_graphs=True),
)
ENGINES = {engine.name: engine for engine in _ENGINES}


@dataclass(frozen=True)
class Plan:
    """How often a pass is timed: at least ``min_runs``, then up to ``max_runs`` while the time lasts."""

    pause_seconds: float
    min_runs: int
    max_runs: int
    budget_seconds: float


@dataclass(frozen=True)
class Job:
    """What every engine's process is told."""

    device: str
    threads: int
    plan: Plan
    adapter: str
    base_model: str
    bundle: str
    task: str
    """The name of the adapter's task in the bundle."""
    pad_token_id: int
    inputs: str
    """The file of `Inputs`."""

    @property
    def on_cuda(self) -> bool:
        return self.device == CUDA


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arrays that every engine is given."""

    cells: Mapping[str, Sequence[Batch]]
    """By name of a cell, the batches of one pass: one for a shape, many for a file."""
    rows: Mapping[str, np.ndarray]
    """By name of a cell that is a file, the row numbers in the order of its batches; int64, shape = (n_rows,)"""
    calibration: Sequence[Batch]
    """Texts for the quantizers with static scales, one a batch."""
    check: Batch
    """A small batch on which all engines are compared."""
    reference: np.ndarray
    """PEFT's logits of ``check``; float32, shape = (n_batch, n_labels)"""


@dataclass(frozen=True)
class Timed:
    """One cell of one engine in one round."""

    first_run_ms: float
    latencies_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Measured:
    """One engine in one round."""

    library: str
    note: str
    """The execution provider, and what else is worth knowing."""
    load_seconds: float
    peak_memory_mib: float
    gpu_memory_mib: float | None
    """GPU memory taken after all cells; None without a GPU."""
    file_mib: float
    """The size of the files that were loaded."""
    max_logit_difference: float
    """The largest one from PEFT's logits on `Inputs.check`."""
    cells: Mapping[str, Timed]
    predictions: Mapping[str, Sequence[int]]
    """By name of a cell that is a file, each row's most probable class."""


Rounds = Sequence[Mapping[str, Measured | str]]
"""For each round, by name of an engine, its measurements or the reason why there are none."""


@dataclass(frozen=True)
class Peak:
    """The fastest matrix product in a precision: the most that an engine could reach on this machine."""

    precision: str
    gflop_per_second: float
    """2 · multiply-adds / time, in 10⁹"""
    product: str
    """The library's function and the size."""
