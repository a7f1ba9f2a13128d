"""What an export is told, which are the flags of ``python -m export``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from export.bundle.folder import FP16, FP32, INT8
from train.common.command_line import Words
from train.common.errors import UsageError

GATE_TOLERANCE = 0.005
"""By how much a metric may fall in another precision: half a point."""
AUTO = "auto"
PRECISIONS = (FP32, FP16, INT8, AUTO)
"""Choices of ``--precision``. Every bundle holds fp32; ``auto`` adds int8, and fp16 where there is a GPU for it."""


@dataclass(frozen=True)
class ExportConfig:
    """Fold an adapter's learned prompt and head into one static ONNX graph, and prove it equal. Several adapters of one
    base model become one graph, which is told the task of each row.
    """

    adapters: tuple[Path, ...]
    """folders that `python -m train` wrote; several of one base model become one graph for all"""
    _: KW_ONLY
    out: Path
    """folder for the bundle; it appears when everything was measured, or not at all"""
    base_model: str | None = None
    """folder of the adapters' base model, if it lies elsewhere than at the training"""
    add: bool = False
    """add the adapters to the bundle at --out, which holds several already"""
    precision: Annotated[str, Parameter(choices=PRECISIONS)] = AUTO
    """fp32, fp16 (for CUDA), int8, or auto: whatever is fastest and passes the gate"""
    validation_files: Annotated[tuple[Path, ...], Parameter(name="--validation-file", consume_multiple=1)] = ()
    """labelled rows, a file for each adapter, that decide whether a precision is kept: no metric may fall by more than
    half a point (default: the file the adapter was validated with, where it still lies unchanged; without one, 98 % of
    the labels must be those of fp32 on texts without labels)"""
    text_columns: Words = ()
    """text columns of that file (default: the adapter's)"""
    label_column: str | None = None
    """label column of that file (default: the adapter's)"""
    calibration_files: Annotated[tuple[Path, ...], Parameter(name="--calibration-file", consume_multiple=1)] = ()
    """texts without labels, a file for each adapter, on which int8 is calibrated and compared with fp32 (default: the
    training's file, where it still lies unchanged, else 300 pairs of everyday English that come with the program)"""
    ungated: bool = False
    """keep other precisions also where nothing can say what they cost: neither labelled rows nor texts in the model's
    language; they run only where they are named"""
    overwrite: bool = False
    """replace an older bundle at --out"""

    def __post_init__(self) -> None:
        for flag, files in (("validation", self.validation_files), ("calibration", self.calibration_files)):
            if files and len(files) != len(self.adapters):
                raise UsageError(
                    f"--{flag}-file names {len(files)} files for {len(self.adapters)} adapters. Give one for each, in "
                    "their order."
                )
        names = [task_name(folder) for folder in self.adapters]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(
                f"Two adapters are named {twice[0]}; in a bundle the folder's name is the task's. Rename one."
            )


def task_name(adapter_folder: Path) -> str:
    """The name of an adapter's task in a bundle."""
    return adapter_folder.resolve().name
