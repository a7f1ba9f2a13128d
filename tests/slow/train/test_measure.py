"""``python -m tests.measure.training`` through its entry point."""

import json
from pathlib import Path

import pytest

from tests.conftest import Data, Folders
from tests.measure.training import main


def test_the_bench_trains_both_loops_and_ends_with_their_ratio(
    base_model: Folders, data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(base_model("bert")), *data.flags, "--epochs", "1", "--rounds", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    loops = [item["loop"] for item in result["trainings"]]
    assert loops == ["tutorial", "promptfold", "tutorial", "promptfold"]
    for item in result["trainings"]:
        assert item["samples_per_second"] == pytest.approx(64 / item["seconds"])
        assert 0 <= item["scores"]["accuracy"] <= 1
    assert len(result["ratio_per_round"]) == 2
    assert min(*result["ratio_per_round"], result["samples_per_second_ratio"]) > 0


def test_the_bench_refuses_what_it_cannot_train(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path), *data.flags]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert main(["--rounds", "0"]) == 2
    assert "--rounds 0" in capsys.readouterr().err
