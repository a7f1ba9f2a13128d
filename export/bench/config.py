"""Settings of a benchmark, and the cells that it times."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from export.bench.engines import CPU, CUDA, ENGINES, INSTALLS, OPENVINO, TORCHAO, Plan
from export.bench.random_model import SHAPES
from train.common.command_line import Words, check_counts
from train.common.errors import UsageError

FILE, TUTORIAL = "file", "file-as-tutorial"
"""Names of the cells that are a whole file: batches of like length, and batches in the file's own order."""


@dataclass(frozen=True)
class Shape:
    """A batch of texts that all have the same length in tokens, the prompt not counted."""

    batch_size: int
    length: int

    def __str__(self) -> str:
        """As in ``--shapes``: "8x60"."""
        return f"{self.batch_size}x{self.length}"

    @staticmethod
    def parse(text: str) -> "Shape":
        """The inverse of `__str__`; a UsageError for anything else."""
        first, separator, second = text.partition("x")
        if not (separator and first.isdecimal() and second.isdecimal() and int(first) and int(second)):
            raise UsageError(f"--shapes {text}: write texts×tokens, such as 8x60 for eight texts of 60 tokens.")
        return Shape(int(first), int(second))


@dataclass(frozen=True)
class BenchConfig:
    """Time every way to run one P-tuned model, side by side; the last line is JSON."""

    adapter: Path | None = None
    """folder that `python -m train` wrote; none with --shape-of"""
    bundle: Path | None = None
    """folder that `python -m export` wrote from it; none with --shape-of"""
    _: KW_ONLY
    base_model: str | None = None
    """folder of the adapter's base model, if it lies elsewhere than at the training"""
    shape_of: str | None = None
    """random weights instead of an adapter: roberta-large, or a folder with a config.json. Latency does not depend on
    the values"""
    file: Path | None = None
    """labelled rows (.csv, .jsonl or .parquet) to score as a whole, too"""
    text_columns: Words = ()
    """text columns of that file (default: the adapter's)"""
    label_column: str | None = None
    """label column of that file (default: the adapter's)"""
    shapes: Words = ("1x16", "1x60", "1x200", "8x60", "32x60")
    """texts×tokens, the prompt not counted"""
    engines: Annotated[Words, Parameter(help=f"some of {', '.join(ENGINES)} (default: all that the device runs)")] = ()
    rounds: int = 5
    """turns of each engine at each shape"""
    device: Annotated[str, Parameter(choices=(CPU, CUDA))] = CPU
    """processor that runs every engine"""
    threads: int | None = None
    """threads of every engine (default: all usable cores)"""
    openvino_python: Path | None = None
    """interpreter of an environment with openvino and nncf, whose requirements contradict ours"""
    torchao_python: Path | None = None
    """interpreter of an environment with requirements.txt and torchao"""
    png: Path | None = None
    """file for the chart"""
    pause: float = 0.5
    """seconds before each timed burst"""
    min_runs: int = 3
    """timed runs in a burst at least"""
    max_runs: int = 100
    """timed runs in a burst at most"""
    budget_seconds: float = 1.0
    """go on beyond --min-runs for so long"""

    def __post_init__(self) -> None:
        self._check_model()
        check_counts(self, "rounds", "threads", "min_runs", "max_runs")
        for name, seconds in (("pause", self.pause), ("budget-seconds", self.budget_seconds)):
            if not 0 <= seconds < 3600:
                raise UsageError(f"--{name} {seconds:g}: give seconds, from 0 to below 3600.")
        unknown = [name for name in self.engines if name not in ENGINES]
        if unknown:
            raise UsageError(f"--engines {unknown[0]}: there is no such engine. Choose from {', '.join(ENGINES)}.")
        if not self.all_shapes and self.file is None:
            raise UsageError("There is nothing to time. Give --shapes, such as 1x60, or --file.")
        for name, path in self.interpreters.items():
            if path is not None and not path.is_file():
                raise UsageError(
                    f"--{name}-python {path}: there is no such program. Give the interpreter of an environment in which "
                    f"`{INSTALLS[name]}` was run."
                )
        if self.png is not None and not (self.png.suffix == ".png" and self.png.absolute().parent.is_dir()):
            raise UsageError(f"--png {self.png}: give a name that ends in .png, in a folder that exists.")

    def _check_model(self) -> None:
        if self.shape_of is None:
            if self.adapter is None or self.bundle is None:
                raise UsageError("Give an ADAPTER and the BUNDLE that was exported from it, or --shape-of.")
            return
        if given := self.adapter or self.base_model:
            raise UsageError(f"--shape-of {self.shape_of} makes its own adapter. Leave {given} out.")
        if self.file is not None:
            raise UsageError(f"--shape-of {self.shape_of} has random weights, which score nothing. Leave --file out.")
        if self.shape_of not in SHAPES and not (Path(self.shape_of) / "config.json").is_file():
            raise UsageError(
                f"--shape-of {self.shape_of}: give {', '.join(SHAPES)}, or a folder that holds a model's config.json."
            )

    @property
    def interpreters(self) -> dict[str, Path | None]:
        """By name of a library that is not among the requirements, the interpreter that has it."""
        return {OPENVINO: self.openvino_python, TORCHAO: self.torchao_python}

    @property
    def plan(self) -> Plan:
        """How often each pass is timed."""
        return Plan(self.pause, self.min_runs, self.max_runs, self.budget_seconds)

    @property
    def all_shapes(self) -> list[Shape]:
        """The shapes to time beside a file, each once; a UsageError for what is no shape."""
        return list(dict.fromkeys(Shape.parse(text) for text in self.shapes))

    @property
    def all_engines(self) -> list[str]:
        """Names in the order of the turns; PEFT's is first, because all others are compared with it."""
        wanted = self.engines or [name for name, engine in ENGINES.items() if self.device in engine.devices]
        return [name for name in ENGINES if name in wanted]


@dataclass(frozen=True)
class Cell:
    """One thing that every engine does: a shape, or a whole file."""

    name: str
    """ "8x60", `FILE` or `TUTORIAL`."""
    what: str
    """Its description in the report."""
    texts: int
    shapes: tuple[Shape, ...]
    """The shape of each batch."""
