"""Settings of a benchmark, and the cells that it times."""

from dataclasses import dataclass
from pathlib import Path

from export.bench.engines import CPU, CUDA, ENGINES, Plan
from export.bench.random_model import SHAPES
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
        """The inverse of `__str__`.

        Raises:
            UsageError: it is no shape.
        """
        first, separator, second = text.partition("x")
        if not (separator and first.isdecimal() and second.isdecimal() and int(first) and int(second)):
            raise UsageError(f"--shapes {text}: write texts×tokens, such as 8x60 for eight texts of 60 tokens.")
        return Shape(int(first), int(second))


@dataclass(frozen=True)
class BenchConfig:
    """What shall be compared, and how.

    Attributes:
        adapter: folder that `python -m train` wrote; None with ``shape_of``.
        bundle: folder that `python -m export` wrote from it; None with ``shape_of``.
        shape_of: a name of `SHAPES`, or a folder with config.json: of what size random weights shall be.
        file: labelled rows to score as a whole.
        text_columns: that file's, where they are not named as in training.
        label_column: the same of its labels.
        shapes: as `Shape.parse` takes them.
        engines: names of `ENGINES`; none for all that can run on the device.
        rounds: how often every engine has its turn.
        device: `CPU` or `CUDA`.
        threads: for every engine; None for all usable cores.
        openvino_python: the interpreter of an environment with OpenVINO and NNCF.
        png: where the chart goes.
        plan: of each burst.

    Raises:
        UsageError: a value cannot be used.
    """

    adapter: Path | None
    bundle: Path | None
    plan: Plan
    shape_of: str | None = None
    file: Path | None = None
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    shapes: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    rounds: int = 2
    device: str = CPU
    threads: int | None = None
    openvino_python: Path | None = None
    png: Path | None = None

    def __post_init__(self) -> None:
        self._check_model()
        for name, number in (
            ("rounds", self.rounds),
            ("threads", 1 if self.threads is None else self.threads),
            ("min-runs", self.plan.min_runs),
            ("max-runs", self.plan.max_runs),
        ):
            if number < 1:
                raise UsageError(f"--{name} {number}: give a whole number of at least 1.")
        for name, seconds in (("pause", self.plan.pause_seconds), ("budget-seconds", self.plan.budget_seconds)):
            if not 0 <= seconds < 3600:
                raise UsageError(f"--{name} {seconds:g}: give seconds, from 0 to below 3600.")
        if self.device not in {CPU, CUDA}:
            raise UsageError(f"--device {self.device}: choose {CPU} or {CUDA}.")
        unknown = [name for name in self.engines if name not in ENGINES]
        if unknown:
            raise UsageError(f"--engines {unknown[0]}: there is no such engine. Choose from {', '.join(ENGINES)}.")
        if not self.all_shapes and self.file is None:
            raise UsageError("There is nothing to time. Give --shapes, such as 1x60, or --file.")
        if self.openvino_python is not None and not self.openvino_python.is_file():
            raise UsageError(
                f"--openvino-python {self.openvino_python}: there is no such program. Give the interpreter of an "
                "environment in which `pip install openvino nncf` was run."
            )
        if self.png is not None and not (self.png.suffix == ".png" and self.png.absolute().parent.is_dir()):
            raise UsageError(f"--png {self.png}: give a name that ends in .png, in a folder that exists.")

    def _check_model(self) -> None:
        if self.shape_of is None:
            if self.adapter is None or self.bundle is None:
                raise UsageError("Give an ADAPTER and the BUNDLE that was exported from it, or --shape-of.")
            return
        if self.adapter is not None:
            raise UsageError(f"--shape-of {self.shape_of} makes its own adapter. Leave {self.adapter} out.")
        if self.file is not None:
            raise UsageError(f"--shape-of {self.shape_of} has random weights, which score nothing. Leave --file out.")
        if self.shape_of not in SHAPES and not (Path(self.shape_of) / "config.json").is_file():
            raise UsageError(
                f"--shape-of {self.shape_of}: give {', '.join(SHAPES)}, or a folder that holds a model's config.json."
            )

    @property
    def all_shapes(self) -> list[Shape]:
        """What is to be timed beside a file, each once.

        Raises:
            UsageError: one of them is no shape.
        """
        return list(dict.fromkeys(Shape.parse(text) for text in self.shapes))

    @property
    def all_engines(self) -> list[str]:
        """Names, in the order in which they take turns; PEFT's comes first, as all others are held against it."""
        return [
            name
            for name, engine in ENGINES.items()
            if (name in self.engines if self.engines else self.device in engine.devices)
        ]


@dataclass(frozen=True)
class Cell:
    """One thing that every engine does: a shape, or a whole file.

    Attributes:
        name: "8x60", `FILE` or `TUTORIAL`.
        what: for people.
        texts: how many it answers.
        shapes: of its batches.
    """

    name: str
    what: str
    texts: int
    shapes: tuple[Shape, ...]
