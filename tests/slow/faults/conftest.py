"""Command lines of promptfold on tiny inputs, and what each makes when nothing goes wrong."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from export.bundle.folder import load_bundle
from tests.conftest import Folders, make_pairs, write_jsonl
from tests.faults import Ended, Launcher, launcher
from train.adapter.folder import load_adapter
from train.common.folder_record import sha256_of_file

Result = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A command line, and what it makes."""

    program: str
    """One of `tests.faults.PROGRAMS`."""
    words: tuple[str, ...]
    """All words but those for the output."""
    out: str
    """Name of the output."""
    older: Path
    """Another result of the same kind."""
    expected: Result
    """The result of the unbroken run."""
    unbroken: Ended

    def at(self, place: Path) -> list[str]:
        """The whole command line, for an output in a folder."""
        return [*self.words, "--out", str(place if self.program == "triton" else place / self.out)]

    def new_place(self, folder: Path, *, older: bool) -> Path:
        """Make a folder for the output; ``older`` puts the older result where the new one shall go."""
        folder.mkdir()
        if older:
            copy: Callable[[Path, Path], object] = shutil.copytree if self.older.is_dir() else shutil.copyfile
            copy(self.older, folder / self.out)
        return folder

    def result(self, out: Path) -> Result:
        return result_in(self.program, out)


def result_in(program: str, out: Path) -> Result:
    """What has to come out the same, to the last bit; a PromptfoldError where it is not whole."""
    if program == "train":
        load_adapter(out)
        training = json.loads((out / "training.json").read_text())
        # Not the seconds that it took.
        return {name: training[name] for name in ("sha256", "epochs", "best_epoch", "validation")}
    if program == "export":
        load_bundle(out)
    if out.is_file():
        return {"": sha256_of_file(out)}
    return {str(path.relative_to(out)): sha256_of_file(path) for path in out.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Inputs:
    """What the command lines read."""

    base: Path
    train_file: Path
    validation_file: Path
    long_file: Path

    @classmethod
    def write(cls, folder: Path, base: Path) -> "Inputs":
        sizes = {"train": 32, "validation": 24, "long": 400}
        files = (
            write_jsonl(folder / f"{name}.jsonl", make_pairs(n_rows, seed=seed))
            for seed, (name, n_rows) in enumerate(sizes.items(), start=1)
        )
        return cls(base, *files)

    def words(self, program: str, source: Path) -> tuple[str, ...]:
        """The words of a program that reads the base model, adapter or bundle at ``source``."""
        if program == "score":
            sizes = "--threads 1 --chunk-rows 50 --batch-size 4"
            return (str(source), "--in", str(self.long_file), *sizes.split())
        if program == "export":
            return (str(source), "--validation-file", str(self.validation_file))
        files = ("--train-file", str(self.train_file), "--validation-file", str(self.validation_file))
        sizes = "--virtual-tokens 4 --encoder-hidden-size 16 --batch-size 8 --learning-rate 1e-2"
        return ("--model", str(source), *files, *sizes.split(), "--epochs", "2", "--checkpoint-steps", "3")


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> int:
    """How many times as much is tried as by default."""
    return 10 if request.config.getoption("--soak") else 1


@pytest.fixture(scope="session")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with launcher(tmp_path_factory.mktemp("scratch")) as running:
        yield running


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, base_model: Folders) -> Inputs:
    return Inputs.write(tmp_path_factory.mktemp("inputs"), base_model("bert"))


@pytest.fixture(scope="session")
def works(tool: Launcher, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Work]:
    """One of each program, run once without any fault."""
    older, whole = tmp_path_factory.mktemp("older"), tmp_path_factory.mktemp("whole")

    def run(program: str, words: tuple[str, ...], out: Path) -> Ended:
        ended = tool.run(program, [*words, "--out", str(out)])
        assert ended.status == 0, ended.errors
        return ended

    run("train", (*inputs.words("train", inputs.base), "--seed", "1", "--epochs", "1"), older / "adapter")
    run("export", (str(older / "adapter"), "--precision", "fp32"), older / "bundle")
    run("triton", (str(older / "bundle"), "--name", "served"), older)
    (older / "out.csv").write_text("older\n")
    made = {}
    for program, words, out in (
        ("train", inputs.words("train", inputs.base), "adapter"),
        ("export", inputs.words("export", whole / "adapter"), "bundle"),
        ("score", inputs.words("score", whole / "bundle"), "out.csv"),
        ("triton", (str(whole / "bundle"), "--name", "served"), "served"),
    ):
        ended = run(program, words, whole if program == "triton" else whole / out)
        expected = result_in(program, whole / out)
        assert expected != result_in(program, older / out)
        made[program] = Work(program, words, out, older / out, expected, ended)
    return made
