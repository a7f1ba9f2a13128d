"""More ways to interrupt a run than in tests/train, and none that changes its weights."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Folders, flip_bit
from tests.train import test_resume
from tests.train.test_evaluate import Capture
from tests.train.test_resume import EPOCHS, SETTINGS, Runs, checkpoints_in, cut, learned, run_and_die
from train.__main__ import main
from train.adapter.folder import load_adapter
from train.data.token_ids import LengthGroupedSampler

runs = test_resume.runs
pytestmark = pytest.mark.usefixtures("one_thread", "on_cpu")


def test_the_settings_do_learn_different_things(runs: Runs) -> None:
    assert len({runs.unbroken(setting)[0] for setting in SETTINGS}) == len(SETTINGS)
    assert [len(runs.unbroken(setting)[1]) for setting in ("mlp", "max-steps")] == [EPOCHS, 2]


def test_each_epoch_has_its_own_order(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


# "mlp" in the middle and at the end of the first epoch, and when everything is learned and nothing written yet;
# "max-steps" also ends in the middle of an epoch.
MORE = {"mlp": (5, 8, 24), "lstm": (16, 20), "v2": (12,), "average": (5, 20), "max-steps": (10, 11)}


@pytest.mark.parametrize(("setting", "step"), [(setting, step) for setting, steps in MORE.items() for step in steps])
def test_more_checkpoints(setting: str, step: int, runs: Runs, tmp_path: Path, capsys: Capture) -> None:
    test_resume.test_resuming_gives_the_same_weights(setting, step, runs, tmp_path, capsys)


@pytest.mark.parametrize("left", ["only damaged ones", "run.json", "half of run.json", "an empty folder", "nothing"])
def test_without_a_whole_checkpoint_a_run_begins_anew(left: str, runs: Runs, tmp_path: Path, capsys: Capture) -> None:
    folder = runs.interrupted("mlp", 8, out := tmp_path / "adapter")
    if left == "only damaged ones":
        for path in folder.glob("seed-0/checkpoint-*/complete.json"):
            path.unlink()
    else:
        shutil.rmtree(folder / "seed-0")
        if left == "half of run.json":
            (folder / "run.json").rename(half := folder / ".run.json.a1b2c3_4.partial")
            cut(half)
        elif left != "run.json":
            (folder / "run.json").unlink()
        if left == "nothing":
            folder.rmdir()
    assert main([*runs.flags("mlp", out), "--resume"]) == 0
    assert "going on" not in capsys.readouterr().out
    assert learned(out) == runs.unbroken("mlp")
    assert not folder.exists()


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "half": ("trainable.safetensors", cut),
    "a bit": ("optimizer.pt", lambda path: flip_bit(path, 1500)),
    "no list of hashes": ("complete.json", Path.unlink),
    "half a list": ("complete.json", cut),
    "a file less": ("rng_state.pth", Path.unlink),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage: str, runs: Runs, tmp_path: Path, capsys: Capture) -> None:
    folder = runs.interrupted("mlp", 20, out := tmp_path / "adapter") / "seed-0"
    name, spoil = DAMAGES[damage]
    spoil(folder / "checkpoint-20" / name)
    assert main([*runs.flags("mlp", out), "--resume"]) == 0
    assert f"going on from {folder / 'checkpoint-16'}\n" in capsys.readouterr().out
    assert learned(out) == runs.unbroken("mlp")


def test_a_damaged_checkpoint_does_not_count_as_one_of_the_two_that_are_kept(runs: Runs, tmp_path: Path) -> None:
    folder = runs.interrupted("mlp", 20, out := tmp_path / "adapter") / "seed-0"
    cut(folder / "checkpoint-20" / "optimizer.pt")
    run_and_die([*runs.flags("mlp", out), "--resume"], "checkpoint-20")
    assert checkpoints_in(folder) == {"checkpoint-16", "checkpoint-20"}
    flip_bit(folder / "checkpoint-20" / "scheduler.pt", 99)
    assert main([*runs.flags("mlp", out), "--resume"]) == 0
    assert learned(out) == runs.unbroken("mlp")


def test_changed_weights_are_refused(runs: Runs, base_model: Folders, tmp_path: Path, capsys: Capture) -> None:
    base = Path(shutil.copytree(base_model("bert"), tmp_path / "base"))
    out = tmp_path / "adapter"
    flags = [*runs.flags("mlp", out), "--model", str(base)]
    run_and_die(flags, "checkpoint-5")
    flip_bit(base / "model.safetensors", -5)
    assert main([*flags, "--resume"]) == 2
    assert "had a base model with SHA-256" in capsys.readouterr().err


def test_a_death_during_the_second_seed_does_not_cost_the_first(runs: Runs, tmp_path: Path, capsys: Capture) -> None:
    more = ["--seeds", "0,1", "--method", "p-tuning-v2", "--average", "0.9", "--epochs", "6"]
    unbroken, out = tmp_path / "unbroken", tmp_path / "adapter"
    assert main([*runs.flags("mlp", unbroken), *more]) == 0
    flags = [*runs.flags("mlp", out), *more]
    folder = tmp_path / "adapter.checkpoints"
    run_and_die(flags, "seed-1/checkpoint-5")
    assert load_adapter(folder / "seed-0" / "adapter").method == "p-tuning-v2"
    capsys.readouterr()
    assert main([*flags, "--resume"]) == 0
    output = capsys.readouterr().out
    assert "parameters, seed 0" not in output
    assert "parameters, seed 1" in output
    assert learned(out) == learned(unbroken)
    summaries = [json.loads((path / "training.json").read_text())["seed_summary"] for path in (out, unbroken)]
    assert summaries[0] == summaries[1]
    assert not folder.exists()
