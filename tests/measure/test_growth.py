"""The benchmark of growth: a graph with more tasks answers as before, and its sums are right."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from export.__main__ import main as export_main
from export.bundle.folder import Bundle, load_bundle
from export.runtime.classifier import OnnxClassifier
from export.runtime.tokenizer import bundle_tokenizer
from tests.conftest import Folders
from tests.measure.growth import BUSY_SHARE, demands, fit_line, main, with_tasks
from tests.measure.http_load import request_bodies
from train.common.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread", "on_cpu")


def bundle_of_two_tasks(adapter: Folders, folder: Path) -> Bundle:
    # As another adapter of the same base model: a folder's name is its task's.
    other = shutil.copytree(adapter("bert"), folder / "other")
    assert export_main([str(adapter("bert")), str(other), "--out", str(folder / "bundle")]) == 0
    return load_bundle(folder / "bundle")


def test_a_graph_with_more_tasks_gives_each_its_own_logits(adapter: Folders, tmp_path: Path) -> None:
    shared = bundle_of_two_tasks(adapter, tmp_path)
    with_tasks(shared.folder, 7, tmp_path / "grown")
    grown, tokenize = load_bundle(tmp_path / "grown"), bundle_tokenizer(shared)
    assert len({task.name for task in grown.tasks}) == len(grown.tasks) == 7
    arrays = tokenize([("word1 word2", "word3"), ("word4", "word5 word6")]).arrays
    expected = OnnxClassifier(shared, task=shared.tasks[0].name, threads=1, use_cuda=False).logits(arrays)
    for task in grown.tasks:
        logits = OnnxClassifier(grown, task=task.name, threads=1, use_cuda=False).logits(arrays)
        np.testing.assert_array_equal(logits, expected)
    with pytest.raises(UsageError, match=r"an ONNX file holds 2\.1 at most"):
        with_tasks(shared.folder, 10**7, tmp_path / "most")
    assert not (tmp_path / "most").exists()
    for body in request_bodies(shared, 12, 2, 3):
        question = json.loads(body)
        assert question["task"] == shared.tasks[0].name
        assert tokenize([tuple(pair) for pair in question["pairs"]]).arrays["input_ids"].shape <= (2, 12)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tasks 0", "--tasks: give whole numbers of at least 1"),
        ("--replicas 1000", "--replicas 1000: this machine has"),
        ("--seconds 0", "--seconds 0: give seconds"),
        ("--tasks 1,2 --replicas 1", "was exported for one task. For --tasks export several adapters together"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: str, words: str, bundle: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(bundle("bert")), *flags.split()]) == 2
    assert words in capsys.readouterr().err


def test_the_sums_are_those_by_hand() -> None:
    """A line with slope Σ(x−2)(y−4)/Σ(x−2)² = 5/2, whose rest is 1.5, of a spread of 14; and the load's demands."""
    assert fit_line([1, 2, 3], [2, 3, 7]) == pytest.approx({"at_zero": -1, "slope": 2.5, "r_squared": 1 - 1.5 / 14})
    assert fit_line([1, 2], [3, 3])["r_squared"] == 1.0
    cpu_ms = {"replica": 6.9, "api": 2.0, "proxy": 0.6}
    one, _, most = demands({"replicas": 2, "threads": 1, "pairs": 1, "cpu_ms": cpu_ms})
    assert one == {"pairs_per_second": 1, "pairs": 1, "cores": one["cores"], "replicas": 1, "apis": 1, "proxies": 1}
    servers = {"replicas": 99, "apis": 29, "proxies": 9}
    assert most == pytest.approx({"pairs_per_second": 10_000, "pairs": 1, "cores": 95 / BUSY_SHARE} | servers)
