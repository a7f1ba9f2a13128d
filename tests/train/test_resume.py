"""A killed run, taken up again, ends with the very same weights as one that nothing stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import train.fit.loop
from tests.conftest import ON_CPU, ROOT, Data, flip_bit, make_pairs, write_jsonl
from train.__main__ import main
from train.adapter.folder import load_adapter
from train.data.token_ids import LengthGroupedSampler

pytestmark = pytest.mark.usefixtures("one_thread", "on_cpu")

Folders = Callable[[str], Path]

STEPS_PER_EPOCH = 8
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


@dataclass(frozen=True)
class Learned:
    """What must come out the same: the adapter's bytes, and every epoch's losses and scores, to the last bit."""

    weights: bytes
    epochs: list[dict[str, Any]]
    best_epoch: int

    @staticmethod
    def read(out: Path) -> "Learned":
        training = json.loads((out / "training.json").read_text())
        return Learned((out / "adapter_model.safetensors").read_bytes(), training["epochs"], training["best_epoch"])


@dataclass(frozen=True)
class Runs:
    """Command lines for runs that differ in a setting alone."""

    common: list[str]
    folder: Path

    def flags(self, setting: str, out: Path) -> list[str]:
        return [*self.common, *SETTINGS[setting], "--out", str(out)]

    def unbroken(self, setting: str) -> Learned:
        """The golden result; made once."""
        out = self.folder / setting
        if not out.exists():
            assert main(self.flags(setting, out)) == 0
        return Learned.read(out)

    def interrupted(self, setting: str, step: int, out: Path) -> Path:
        """Leave at `out` what a run leaves that dies right after the checkpoint of a step; its checkpoints' folder."""
        kept = self.folder / f"{setting}-{step}.checkpoints"
        if not kept.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train.fit.loop, "complete_checkpoint", dies_after(f"checkpoint-{step}"))
                with pytest.raises(Killed):
                    main(self.flags(setting, kept.with_suffix("")))
            assert not kept.with_suffix("").exists()
        return Path(shutil.copytree(kept, out.with_name(f"{out.name}.checkpoints")))


def dies_after(checkpoint: str) -> Callable[[Path], None]:
    """The function that completes a checkpoint, and the end after the one of this name."""
    complete = train.fit.loop.complete_checkpoint

    def complete_and_die(folder: Path) -> None:
        complete(folder)
        if folder.name == checkpoint:
            raise Killed

    return complete_and_die


@pytest.fixture(scope="module")
def runs(base_model: Folders, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    sizes = ["--virtual-tokens", "4", "--encoder-hidden-size", "16", "--batch-size", "8", "--learning-rate", "1e-2"]
    return Runs(
        common=[
            *("--model", str(base_model("bert"))),
            *data.flags,
            *sizes,
            *("--epochs", str(EPOCHS), "--checkpoint-steps", "5"),
        ],
        folder=tmp_path_factory.mktemp("runs"),
    )


def checkpoints_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("checkpoint-")}


@pytest.mark.parametrize(
    ("setting", "step"),
    [
        ("mlp", 5),  # in the middle of the first epoch
        ("mlp", 8),  # its end
        ("mlp", 24),  # everything is learned and nothing written yet
        ("lstm", 16),
        ("lstm", 20),
        ("v2", 8),  # an epoch's end where a checkpoint is due anyway: the epoch has to be scored before
        ("v2", 12),
        ("average", 5),
        ("average", 20),
        ("max-steps", 10),
        ("max-steps", 11),  # the end, in the middle of an epoch
    ],
)
def test_a_run_goes_on_from_any_checkpoint_to_the_same_weights(
    setting: str, step: int, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    folder = runs.interrupted(setting, step, out)
    assert main([*runs.flags(setting, out), "--resume"]) == 0
    assert f"going on from {folder / 'seed-0' / f'checkpoint-{step}'}\n" in capsys.readouterr().out
    assert Learned.read(out) == runs.unbroken(setting)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_the_settings_do_learn_different_things(runs: Runs) -> None:
    """Or the same weights above would show little."""
    assert len({runs.unbroken(setting).weights for setting in SETTINGS}) == len(SETTINGS)
    assert [len(runs.unbroken(setting).epochs) for setting in ("mlp", "max-steps")] == [EPOCHS, 2]


def test_each_epoch_has_an_order_of_its_own_also_after_a_resume(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []
    draw = LengthGroupedSampler.__iter__

    def draw_and_tell(sampler: LengthGroupedSampler) -> Iterator[int]:
        epochs.append(sampler.epoch)
        return draw(sampler)

    monkeypatch.setattr(LengthGroupedSampler, "__iter__", draw_and_tell)
    assert main(runs.flags("mlp", tmp_path / "whole")) == 0
    assert epochs == [0, 1, 2]
    runs.interrupted("mlp", 10, tmp_path / "adapter")
    epochs.clear()
    assert main([*runs.flags("mlp", tmp_path / "adapter"), "--resume"]) == 0
    assert epochs == [1, 2]


def test_a_checkpoint_holds_the_prompt_encoder_the_optimiser_the_scheduler_and_the_random_state(
    runs: Runs, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    folder = runs.interrupted("average", 20, tmp_path / "adapter") / "seed-0"
    assert checkpoints_in(folder) == {"checkpoint-16", "checkpoint-20"}  # an epoch's end counts as well
    newest = folder / "checkpoint-20"
    assert {path.name for path in newest.iterdir()} >= {
        "average.safetensors",
        "best.safetensors",
        "complete.json",
        "optimizer.pt",
        "progress.json",
        "rng_state.pth",
        "scheduler.pt",
        "trainable.safetensors",
        "trainer_state.json",
    }
    states = [load_file(newest / f"{name}.safetensors") for name in ("trainable", "best", "average")]
    for state in states:
        encoder = {name for name in state if name.startswith("prompt_encoder.")}
        assert "prompt_encoder.embedding.weight" in encoder
        assert len(encoder) == 7  # the table and three layers of the MLP
        assert len(state) == 11  # and pooler and classifier
    assert set(json.loads((newest / "complete.json").read_text())) == {
        path.name for path in newest.iterdir() if path.name != "complete.json"
    }


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("trainable.safetensors", cut),
        ("optimizer.pt", lambda path: flip_bit(path, 1500)),
        ("complete.json", Path.unlink),
        ("complete.json", cut),
        ("rng_state.pth", Path.unlink),
    ],
    ids=["cut", "one bit", "no mark", "half a mark", "a file gone"],
)
def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_it_is_used(
    name: str, damage: Callable[[Path], None], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    folder = runs.interrupted("mlp", 20, out) / "seed-0"
    damage(folder / "checkpoint-20" / name)
    assert main([*runs.flags("mlp", out), "--resume"]) == 0
    assert f"going on from {folder / 'checkpoint-16'}\n" in capsys.readouterr().out
    assert Learned.read(out) == runs.unbroken("mlp")


def test_a_damaged_checkpoint_does_not_count_as_one_of_the_two_that_are_kept(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "adapter"
    folder = runs.interrupted("mlp", 20, out) / "seed-0"
    cut(folder / "checkpoint-20" / "optimizer.pt")
    monkeypatch.setattr(train.fit.loop, "complete_checkpoint", dies_after("checkpoint-20"))
    with pytest.raises(Killed):
        main([*runs.flags("mlp", out), "--resume"])
    assert checkpoints_in(folder) == {"checkpoint-16", "checkpoint-20"}
    flip_bit(folder / "checkpoint-20" / "scheduler.pt", 99)
    monkeypatch.undo()
    assert main([*runs.flags("mlp", out), "--resume"]) == 0
    assert Learned.read(out) == runs.unbroken("mlp")


@pytest.mark.parametrize("left", ["only damaged ones", "run.json", "half of run.json", "an empty folder", "nothing"])
def test_without_a_whole_checkpoint_a_run_starts_from_the_beginning(
    left: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    folder = runs.interrupted("mlp", 8, out)
    if left == "only damaged ones":
        for name in checkpoints_in(folder / "seed-0"):
            (folder / "seed-0" / name / "complete.json").unlink()
    else:
        shutil.rmtree(folder / "seed-0")
        if left == "half of run.json":
            (folder / "run.json").rename(folder / "run.json.partial")
            cut(folder / "run.json.partial")
        elif left != "run.json":
            (folder / "run.json").unlink()
        if left == "nothing":
            folder.rmdir()
    assert main([*runs.flags("mlp", out), "--resume"]) == 0
    assert "going on" not in capsys.readouterr().out
    assert Learned.read(out) == runs.unbroken("mlp")
    assert not folder.exists()


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
    changed: list[str],
    words: str,
    runs: Runs,
    data: Data,
    base_model: Folders,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "other").mkdir()
    # The same name, so that the content decides.
    other = write_jsonl(tmp_path / "other" / data.train_file.name, make_pairs(64, seed=77))
    out = tmp_path / "adapter"
    folder = runs.interrupted("mlp", 8, out)
    places = {"{other}": str(other), "{roberta}": str(base_model("roberta"))}
    flags = [places.get(word, word) for word in changed]
    assert main([*runs.flags("mlp", out), *flags, "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --resume: the interrupted run in {folder} ")
    assert words in error
    assert "start anew with --overwrite" in error
    # Nothing was lost: the right command still goes on.
    assert checkpoints_in(folder / "seed-0") == {"checkpoint-5", "checkpoint-8"}
    if changed[0] == "--learning-rate":
        assert main([*runs.flags("mlp", out), "--resume"]) == 0
        assert Learned.read(out) == runs.unbroken("mlp")


def test_a_base_model_whose_weights_changed_under_its_name_is_refused(
    runs: Runs, base_model: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(base_model("bert"), tmp_path / "base"))
    out = tmp_path / "adapter"
    flags = [*runs.flags("mlp", out), "--model", str(base)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.fit.loop, "complete_checkpoint", dies_after("checkpoint-5"))
        with pytest.raises(Killed):
            main(flags)
    flip_bit(base / "model.safetensors", -5)
    assert main([*flags, "--resume"]) == 2
    assert "had a base model with SHA-256" in capsys.readouterr().err


def test_another_number_of_processes_is_refused(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would add up the gradients in another order."""
    out = tmp_path / "adapter"
    runs.interrupted("mlp", 8, out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main([*runs.flags("mlp", out), "--resume"]) == 2
    assert "had a number of processes of 1, now it is 2" in capsys.readouterr().err


def test_an_interrupted_run_is_neither_continued_nor_lost_unless_asked(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    folder = runs.interrupted("mlp", 8, out)
    assert main(runs.flags("mlp", out)) == 2
    error = capsys.readouterr().err
    assert f"{folder} holds an interrupted run. Add --resume to go on with it, or --overwrite" in error
    assert checkpoints_in(folder / "seed-0") == {"checkpoint-5", "checkpoint-8"}

    assert main([*runs.flags("average", out), "--overwrite"]) == 0
    assert "going on" not in capsys.readouterr().out
    assert Learned.read(out) == runs.unbroken("average")
    assert not folder.exists()


def test_a_foreign_folder_in_the_checkpoints_place_is_left_alone(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "adapter.checkpoints" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    for flag in ("--resume", "--overwrite"):
        assert main([*runs.flags("mlp", tmp_path / "adapter"), flag]) == 2
        assert "holds something that is no interrupted run. Move it away." in capsys.readouterr().err
    assert mine.read_text() == "years of work"


def test_a_damaged_record_of_the_run_is_named(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs.interrupted("mlp", 8, tmp_path / "adapter")
    cut(folder / "run.json")
    assert main([*runs.flags("mlp", tmp_path / "adapter"), "--resume"]) == 2
    assert "run.json is damaged. Start anew" in capsys.readouterr().err


def test_a_run_that_replaces_an_older_adapter_can_be_taken_up_too(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    assert main(runs.flags("average", out)) == 0
    older = load_adapter(out)
    runs.interrupted("mlp", 8, out)
    assert load_adapter(out) == older
    assert main([*runs.flags("mlp", out), "--resume", "--overwrite"]) == 0
    assert Learned.read(out) == runs.unbroken("mlp")


# From here on with a real process and a real signal.


def kill_when(flags: list[str], log: Path, seen: Callable[[], bool]) -> None:
    """Start a training in a process of its own and kill it, uncatchably, at the moment that something is seen."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "train", *flags],
            cwd=ROOT,
            env=os.environ | ON_CPU,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            while not seen() and process.poll() is None:
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == -signal.SIGKILL, log.read_text()


def has_checkpoint(folder: Path, first: int, mark: str = "") -> Callable[[], bool]:
    """Whether a checkpoint of a step from `first` on is there, whole or, without a mark, just begun."""

    def seen() -> bool:
        return any(
            int(path.name.removeprefix("checkpoint-")) >= first and (path / mark).exists()
            for path in folder.glob("checkpoint-*")
        )

    return seen


def test_a_process_killed_again_and_again_still_ends_with_the_same_weights(runs: Runs, tmp_path: Path) -> None:
    many = ["--epochs", "12", "--checkpoint-steps", "3"]
    unbroken, out = tmp_path / "unbroken", tmp_path / "adapter"
    assert main([*runs.flags("mlp", unbroken), *many]) == 0
    flags = [*runs.flags("mlp", out), *many]
    folder = tmp_path / "adapter.checkpoints" / "seed-0"
    # Once a checkpoint is whole; then as the next ones are being written.
    kill_when(flags, tmp_path / "1.log", has_checkpoint(folder, 3, "complete.json"))
    kill_when([*flags, "--resume"], tmp_path / "2.log", has_checkpoint(folder, 40))
    assert "going on from" in (tmp_path / "2.log").read_text()
    assert not out.exists()
    assert main([*flags, "--resume"]) == 0
    assert Learned.read(out) == Learned.read(unbroken)
    assert not folder.parent.exists()


def test_a_kill_during_the_second_seed_does_not_cost_the_first(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--seeds", "0,1", "--method", "p-tuning-v2", "--average", "0.9", "--epochs", "6"]
    unbroken, out = tmp_path / "unbroken", tmp_path / "adapter"
    assert main([*runs.flags("mlp", unbroken), *more]) == 0
    flags = [*runs.flags("mlp", out), *more]
    folder = tmp_path / "adapter.checkpoints"
    kill_when(flags, tmp_path / "log", has_checkpoint(folder / "seed-1", 5, "complete.json"))
    assert load_adapter(folder / "seed-0" / "adapter").method == "p-tuning-v2"
    capsys.readouterr()
    assert main([*flags, "--resume"]) == 0
    output = capsys.readouterr().out
    assert "parameters, seed 0" not in output
    assert "parameters, seed 1" in output
    assert Learned.read(out) == Learned.read(unbroken)
    summaries = [json.loads((path / "training.json").read_text())["seed_summary"] for path in (out, unbroken)]
    assert summaries[0] == summaries[1]
    assert not folder.exists()
