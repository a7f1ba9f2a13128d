"""A killed run, taken up again, ends with the very same weights as one that nothing stopped."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import train.fit.trainer
from tests.conftest import Data, Folders, make_pairs, write_jsonl
from tests.test_untrusted import Trap
from tests.train.test_evaluate import Capture
from train.__main__ import main
from train.fit.checkpoint import checkpoints_held, complete_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread", "on_cpu")

EPOCHS = 3
"""64 rows in batches of 8: a checkpoint after every fifth step, and one at the end of every epoch."""

SETTINGS = {
    "mlp": [],
    "lstm": ["--reparameterization", "lstm", "--early-stopping", "2"],
    "v2": ["--method", "p-tuning-v2", "--swap-sentences", "--checkpoint-steps", "4"],
    "average": ["--reparameterization", "residual", "--average", "0.9"],
    "max-steps": ["--max-steps", "11"],
}


class Killed(BaseException):
    """Ends a run in this process where a signal would end another one: nothing of ours catches it."""


def learned(out: Path) -> tuple[bytes, list[dict[str, Any]], int]:
    """What must come out the same to the last bit: the adapter's bytes, every epoch's losses and scores, the best one."""
    training = json.loads((out / "training.json").read_text())
    return (out / "adapter_model.safetensors").read_bytes(), training["epochs"], training["best_epoch"]


@dataclass(frozen=True)
class Runs:
    """Command lines for runs that differ in a setting alone."""

    common: list[str]
    folder: Path

    def flags(self, setting: str, out: Path) -> list[str]:
        return [*self.common, *SETTINGS[setting], "--out", str(out)]

    def unbroken(self, setting: str) -> tuple[bytes, list[dict[str, Any]], int]:
        """The golden result; made once."""
        out = self.folder / setting
        if not out.exists():
            assert main(self.flags(setting, out)) == 0
        return learned(out)

    def interrupted(self, setting: str, step: int, out: Path) -> Path:
        """Leave at `out` what a run leaves that dies right after the checkpoint of a step; its checkpoints' folder."""
        kept = self.folder / f"{setting}-{step}.checkpoints"
        if not kept.exists():
            run_and_die(self.flags(setting, kept.with_suffix("")), f"checkpoint-{step}")
            assert not kept.with_suffix("").exists()
        return Path(shutil.copytree(kept, out.with_name(f"{out.name}.checkpoints")))


def run_and_die(flags: list[str], checkpoint: str) -> None:
    """Train until the checkpoint whose path ends so is complete."""
    complete = train.fit.trainer.complete_checkpoint

    def complete_and_die(folder: Path) -> None:
        complete(folder)
        if folder.as_posix().endswith(f"/{checkpoint}"):
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.fit.trainer, "complete_checkpoint", complete_and_die)
        main(flags)


@pytest.fixture(scope="module")
def runs(base_model: Folders, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    sizes = ["--virtual-tokens", "4", "--encoder-hidden-size", "16", "--batch-size", "8", "--learning-rate", "1e-2"]
    length = ["--epochs", str(EPOCHS), "--checkpoint-steps", "5"]
    common = ["--model", str(base_model("bert")), *data.flags, *sizes, *length]
    return Runs(common, tmp_path_factory.mktemp("runs"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def checkpoints_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("checkpoint-")}


# Step 8 is an epoch's end where a checkpoint is due anyway: the epoch has to be scored before.
@pytest.mark.parametrize(("setting", "step"), [("v2", 8)])
def test_resuming_gives_the_same_weights(setting: str, step: int, runs: Runs, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "adapter"
    folder = runs.interrupted(setting, step, out)
    assert main([*runs.flags(setting, out), "--resume"]) == 0
    assert f"going on from {folder / 'seed-0' / f'checkpoint-{step}'}\n" in capsys.readouterr().out
    assert learned(out) == runs.unbroken(setting)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--learning-rate", "0.02"], "had --learning-rate 0.01, now it is 0.02"),
        (["--method", "p-tuning-v2"], "had --method p-tuning, now it is p-tuning-v2"),
        (["--seeds", "0,1"], "had --seeds [], now it is [0, 1]"),
        (["--train-file", "{other}"], "had data with SHA-256"),
        (["--model", "{roberta}"], "had --model"),
    ],
)
def test_another_run_than_the_interrupted_one_is_refused(
    changed: list[str], words: str, runs: Runs, data: Data, base_model: Folders, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "other").mkdir()
    # The same name, so that the content decides.
    other = write_jsonl(tmp_path / "other" / data.train_file.name, make_pairs(64, seed=77))
    out = tmp_path / "adapter"
    folder = runs.interrupted("mlp", 8, out)
    places = {"{other}": str(other), "{roberta}": str(base_model("roberta"))}
    flags = [places.get(word, word) for word in changed]
    assert main([*runs.flags("mlp", out), *flags, "--resume"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --resume: the interrupted run in {folder} ")
    assert words in error
    assert "start anew with --overwrite" in error
    assert checkpoints_in(folder / "seed-0") == {"checkpoint-5", "checkpoint-8"}  # nothing was lost


def test_an_interrupted_run_is_neither_continued_nor_lost_unless_asked(
    runs: Runs, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "adapter"
    folder = runs.interrupted("mlp", 8, out)
    assert main(runs.flags("mlp", out)) == 2
    error = capsys.readouterr().err
    assert f"{folder} holds an interrupted run. Add --resume to go on with it, or --overwrite" in error
    monkeypatch.setenv("WORLD_SIZE", "2")  # two processes would add up the gradients in another order
    assert main([*runs.flags("mlp", out), "--resume"]) == 2
    assert "had a number of processes of 1, now it is 2" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    cut(folder / "run.json")
    assert main([*runs.flags("mlp", out), "--resume"]) == 2
    assert "run.json is damaged. Start anew" in capsys.readouterr().err
    assert checkpoints_in(folder / "seed-0") == {"checkpoint-5", "checkpoint-8"}

    assert main([*runs.flags("v2", out), "--overwrite"]) == 0
    assert "going on" not in capsys.readouterr().out
    assert learned(out) == runs.unbroken("v2")
    assert not folder.exists()


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_two_runs_never_write_one_adapter(flags: list[str], runs: Runs, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "deep" / "adapter"
    folder = out.with_name("adapter.checkpoints")
    with checkpoints_held(out):
        assert main([*runs.flags("mlp", out), *flags]) == 2
        assert f"error: --out {out}: another run is writing there (it holds {folder})." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["rng_state.pth", "optimizer.pt", "scheduler.pt"])
def test_a_checkpoints_pickles_are_never_run(name: str, runs: Runs, tmp_path: Path, capsys: Capture) -> None:
    """Not though their hashes fit; `training_args.bin`, which the Trainer writes into some, is not even looked at."""
    out, canary = tmp_path / "out", tmp_path / "hostile-code-was-here"
    (checkpoint,) = (runs.interrupted("mlp", 5, out) / "seed-0").glob("checkpoint-*")
    torch.save(Trap(canary), checkpoint / name)
    torch.save(Trap(canary), checkpoint / "training_args.bin")
    complete_checkpoint(checkpoint)
    assert main([*runs.flags("mlp", out), "--resume"]) == 2
    assert re.search(
        rf"error: {re.escape(str(checkpoint))} holds a file that is no state.*\n$", capsys.readouterr().err
    )
    assert not canary.exists()
