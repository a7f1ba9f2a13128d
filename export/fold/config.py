"""What an export is told."""

from dataclasses import dataclass
from pathlib import Path

from export.bundle.folder import FP16, FP32, INT8
from train.common.errors import UsageError

AUTO = "auto"
PRECISIONS = (FP32, FP16, INT8, AUTO)
"""Choices of ``--precision``. Every bundle holds fp32; ``auto`` adds int8, and fp16 where there is a GPU for it."""


@dataclass(frozen=True)
class ExportConfig:
    """What an export is told, or a UsageError where a value cannot be used."""

    adapters: tuple[Path, ...]
    """Folders that `python -m train` wrote; several of one base model become one graph for all."""
    out: Path
    """Appears when everything was measured, or not at all."""
    add: bool = False
    """Whether to add the adapters to the bundle at ``out``."""
    precision: str = AUTO
    validation_files: tuple[Path, ...] = ()
    """Labelled rows for each adapter, on which other precisions than fp32 are gated; by default the file that an adapter
    was validated with, where it still lies unchanged."""
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    """Both of the validation files, where columns are not named as in training."""
    ungated: bool = False
    """Whether to make other precisions also where no labelled rows can say what they cost. Such a graph has no gate in
    the manifest and runs only where it is asked for by name."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"--precision {self.precision}: choose one of {', '.join(PRECISIONS)}.")
        if self.validation_files and len(self.validation_files) != len(self.adapters):
            raise UsageError(
                f"--validation-file names {len(self.validation_files)} files for {len(self.adapters)} adapters. "
                "Give one for each, in their order."
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
