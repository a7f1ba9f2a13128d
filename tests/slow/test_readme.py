"""Commands and code of the READMEs that take long."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Data, make_pairs
from tests.demo.server import serve
from tests.measure.training import main as training_main
from tests.test_readme import command, python_block, run_block


def test_the_worked_example_goes_from_rows_of_ones_own_to_the_page(tmp_path: Path) -> None:
    """Train, export and label as the README says, in a folder with just these files; then the page with the result."""
    for name, rows, seed in (("train", 32, 1), ("validation", 16, 2), ("new", 8, 3)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows((pair["sentence1"], pair["label"]) for pair in make_pairs(rows, seed=seed))
    for module, having in (("train", "train.csv"), ("export", "adapters/mine"), ("export.score", "new.csv")):
        subprocess.run(
            [sys.executable, "-m", module, *command(module, having)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
        )
    with (tmp_path / "labelled.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 8
    flags = [str(tmp_path / word) if "/" in word else word for word in command("demo", "--adapter")]
    with serve(flags, tmp_path / "cache") as server:
        server.wait_for_url()


def test_the_python_runs_against_the_page(tmp_path: Path) -> None:
    with serve([], tmp_path) as server:
        printed = run_block(python_block("gradio_client"), {"http://127.0.0.1:7860/": server.wait_for_url()})
    assert re.search(r"^equivalent \d+\.\d+ \d\S+$", printed)


def test_the_measurement_of_training_runs(
    data: Data, base_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = command("tests.measure.training")
    places = {"--model": str(base_model("bert")), "--rounds": "1", "--epochs": "1"}
    places |= dict(zip(data.flags[::2], data.flags[1::2], strict=True))
    for flag, value in places.items():
        words[words.index(flag) + 1] = value
    assert training_main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples_per_second_ratio"] > 0
