"""The engines that `export.bench` compares, and what passes between it and their processes.

Nothing is imported here but NumPy, so that the worker may run in another environment's interpreter.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CPU, CUDA = "cpu", "cuda"


PEFT, PLAIN, OPENVINO, OURS = "peft", "plain", "openvino", "ours"


REFERENCE = "peft-eager"
"""What every other engine is compared with: PEFT's tutorial, as it stands."""


CALIBRATION_ROWS = 300
"""Texts that OpenVINO's quantiser sees, which is its default: the first ones of ``--file``, even if they are scored too."""


Batch = dict[str, np.ndarray]
"""Input arrays by name; each int64, shape = (n_batch, n_text)"""


@dataclass(frozen=True)
class Engine:
    """One way to run the same model.

    Attributes:
        name: as in ``--engines``.
        what: for people.
        family: PEFT in PyTorch, the plain export in ONNX Runtime or in OpenVINO, or ours.
        precision: "fp32", "bf16", "fp16" or "int8".
        devices: where it can run.
        compile_mode: of `torch.compile`; empty where it does not go over it.
        cuda_graphs: whether each shape is captured as a CUDA graph.
    """

    name: str
    what: str
    family: str
    precision: str
    devices: tuple[str, ...] = (CPU, CUDA)
    compile_mode: str = ""
    cuda_graphs: bool = False


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(REFERENCE, "the tutorial: PeftModel.forward, eager", PEFT, "fp32"),
        Engine("peft-eager-bf16", "the same in bfloat16", PEFT, "bf16"),
        Engine("peft-eager-fp16", "the same in float16", PEFT, "fp16", (CUDA,)),
        Engine("peft-compile", "the same under torch.compile", PEFT, "fp32", compile_mode="default"),
        Engine("peft-compile-bf16", "that in bfloat16", PEFT, "bf16", (CPU,), compile_mode="default"),
        Engine("peft-compile-fp16", "that in float16", PEFT, "fp16", (CUDA,), compile_mode="default"),
        Engine(
            "peft-compile-graphs-fp16",
            "that with torch.compile's CUDA graphs",
            PEFT,
            "fp16",
            (CUDA,),
            compile_mode="reduce-overhead",
            cuda_graphs=True,
        ),
        Engine("plain-fp32", "optimum's export of base and prompt, ONNX Runtime", PLAIN, "fp32"),
        Engine("plain-fp16", "that graph converted to float16, ONNX Runtime", PLAIN, "fp16", (CUDA,)),
        Engine("plain-int8", "that graph quantised by optimum's defaults, ONNX Runtime", PLAIN, "int8", (CPU,)),
        Engine("openvino-int8", "that graph quantised by NNCF, OpenVINO", OPENVINO, "int8", (CPU,)),
        Engine("ours-fp32", "promptfold's bundle", OURS, "fp32"),
        Engine("ours-int8", "promptfold's bundle", OURS, "int8", (CPU,)),
        Engine("ours-fp16", "promptfold's bundle", OURS, "fp16"),
        Engine("ours-graphs-fp16", "that with a CUDA graph a shape", OURS, "fp16", (CUDA,), cuda_graphs=True),
    )
}


@dataclass(frozen=True)
class Plan:
    """How often a pass is timed: at least ``min_runs``, then up to ``max_runs`` while the time lasts."""

    pause_seconds: float
    min_runs: int
    max_runs: int
    budget_seconds: float


@dataclass(frozen=True)
class Job:
    """What a process shall do.

    Attributes:
        work: "measure" an engine, "calibrate" OpenVINO's graph, or find the machine's "peaks".
        engine: its name; empty for "peaks".
        device: `CPU` or `CUDA`.
        threads: within an operator, on the CPU.
        adapter, bundle: the folders.
        task: the adapter's in the bundle.
        graph: the file that the plain engines and OpenVINO load; "calibrate" writes OpenVINO's.
        source: the file that "calibrate" reads.
        pad_token_id: what fills the end of shorter texts.
        is_decoder: whether the model is causal.
        inputs: the file that `Inputs.save` wrote.
        cells: names of the cells to measure.
        plan: of each burst.
    """

    work: str
    device: str
    threads: int
    plan: Plan
    engine: str = ""
    adapter: str = ""
    bundle: str = ""
    task: str = ""
    graph: str = ""
    source: str = ""
    pad_token_id: int = 0
    is_decoder: bool = False
    inputs: str = ""
    cells: tuple[str, ...] = ()

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Job":
        """The inverse of `dataclasses.asdict`."""
        return Job(**{**value, "plan": Plan(**value["plan"]), "cells": tuple(value["cells"])})


@dataclass(frozen=True)
class Inputs:
    """What every engine is given: the same arrays.

    Attributes:
        cells: by name, the batches of one pass: one for a shape, many for a file.
        rows: by name of a cell that is a file, of each batch the numbers of its rows; int64, shape = (n_batch,)
        calibration: texts for OpenVINO's quantiser, one a batch.
        check: a small batch on which all engines are compared.
        reference: what PEFT says of it; float32, shape = (n_batch, n_labels)
    """

    cells: dict[str, list[Batch]]
    rows: dict[str, list[np.ndarray]]
    calibration: list[Batch]
    check: Batch
    reference: np.ndarray

    def save(self, path: Path) -> None:
        """Write one .npz file, which needs nothing but NumPy to be read."""
        arrays: dict[str, np.ndarray] = {"reference": self.reference}
        groups = {
            **{f"cell|{name}": batches for name, batches in self.cells.items()},
            **{f"rows|{name}": [{"rows": row} for row in rows] for name, rows in self.rows.items()},
            "calibration|": self.calibration,
            "check|": [self.check],
        }
        for group, batches in groups.items():
            for number, batch in enumerate(batches):
                arrays |= {f"{group}|{number}|{name}": array for name, array in batch.items()}
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy types its flag, not the arrays

    @staticmethod
    def load(path: Path) -> "Inputs":
        """Read what `save` wrote."""
        groups: dict[str, dict[str, dict[int, Batch]]] = {}
        with np.load(path) as arrays:
            reference = arrays["reference"]
            for key in arrays.files:
                if key == "reference":
                    continue
                kind, group, number, name = key.split("|")
                groups.setdefault(kind, {}).setdefault(group, {}).setdefault(int(number), {})[name] = arrays[key]
        lists = {
            kind: {group: [batches[number] for number in sorted(batches)] for group, batches in named.items()}
            for kind, named in groups.items()
        }
        return Inputs(
            cells=lists.get("cell", {}),
            rows={name: [batch["rows"] for batch in batches] for name, batches in lists.get("rows", {}).items()},
            calibration=lists.get("calibration", {}).get("", []),
            check=lists["check"][""][0],
            reference=reference,
        )


@dataclass(frozen=True)
class Timed:
    """One cell of one engine in one round.

    Attributes:
        first_run_ms: the first pass, with what is compiled or planned then.
        latencies_ms: of each timed pass.
    """

    first_run_ms: float
    latencies_ms: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """One engine in one round.

    Attributes:
        library: name and version.
        note: on what it ran, and what is worth knowing of it.
        load_seconds: from files to an engine that can answer, imports left out.
        peak_memory_mib: largest resident size of the process.
        gpu_memory_mib: what it has taken of the GPU after all cells; None without one.
        file_bytes: of what it loaded.
        max_logit_difference: the largest one from PEFT's logits on `Inputs.check`.
        cells: by name.
        predictions: by name of a cell that is a file, of each row the number of its most probable class.
    """

    library: str
    note: str
    load_seconds: float
    peak_memory_mib: float
    gpu_memory_mib: float | None
    file_bytes: int
    max_logit_difference: float
    cells: dict[str, Timed]
    predictions: dict[str, list[int]]

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Measured":
        """The inverse of `dataclasses.asdict`."""
        cells = {
            name: Timed(cell["first_run_ms"], tuple(cell["latencies_ms"])) for name, cell in value["cells"].items()
        }
        return Measured(**{**value, "cells": cells})


@dataclass(frozen=True)
class Peak:
    """The fastest matrix product found in a precision: a machine's roof.

    Attributes:
        precision: of the factors.
        gflop_per_second: 2 · multiply-adds / time, in 10⁹
        product: by which library's function and at which size.
    """

    precision: str
    gflop_per_second: float
    product: str


def environment(threads: int, cache: Path, root: Path, before: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for the process of an engine.

    Args:
        cache: folder for what `torch.compile` keeps, so that an earlier benchmark's is not found.
        root: the repository, from which this module is imported.
    """
    return {
        **before,
        "PYTHONPATH": str(root),
        # Kernels that torch.compile writes start OpenMP's own number of threads.
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
    }
