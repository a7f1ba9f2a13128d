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
from tests.measure.growth import BUSY_SHARE, Line, ServingCell, demands, main
from tests.measure.http_load import request_bodies
from tests.measure.many_tasks import with_tasks
from train.common.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread", "on_cpu")


def bundle_of_two_tasks(adapter: Folders, folder: Path) -> Bundle:
    # As another adapter of the same base model: a folder's name is its task's.
    other = shutil.copytree(adapter("bert"), folder / "other")
    assert export_main([str(adapter("bert")), str(other), "--out", str(folder / "bundle")]) == 0
    return load_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def shared(adapter: Folders, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of_two_tasks(adapter, tmp_path_factory.mktemp("shared"))


def test_a_graph_with_more_tasks_gives_each_its_own_logits(shared: Bundle, tmp_path: Path) -> None:
    grown = with_tasks(shared, 7, tmp_path / "grown")
    assert len(grown.tasks) == 7
    assert len({task.name for task in grown.tasks}) == 7
    arrays = bundle_tokenizer(shared)([("word1 word2", "word3"), ("word4", "word5 word6")]).arrays
    expected = OnnxClassifier(shared, task=shared.tasks[0].name, threads=1, use_cuda=False).logits(arrays)
    for task in grown.tasks:
        logits = OnnxClassifier(grown, task=task.name, threads=1, use_cuda=False).logits(arrays)
        np.testing.assert_array_equal(logits, expected)


def test_more_tasks_than_a_file_holds_are_refused(shared: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"an ONNX file holds 2\.1 at most"):
        with_tasks(shared, 10**7, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_a_bundle_of_one_task_is_refused(bundle: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundle("bert")), "--tasks", "1,2", "--replicas", ""]) == 2
    assert "was exported for one task. For --tasks export several adapters together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks", "0"], "--tasks: give whole numbers of at least 1"),
        (["--replicas", "1000"], "--replicas 1000: this machine has"),
        (["--seconds", "0"], "--seconds 0: give seconds"),
        (["--tasks", "one"], "--tasks"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    flags: list[str], words: str, bundle: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(bundle("bert")), *flags]) == 2
    assert words in capsys.readouterr().err


def test_the_line_is_that_of_least_squares() -> None:
    """By hand: slope Σ(x−2)(y−4)/Σ(x−2)² = 5/2; the rest is 1.5, of a spread of 14."""
    line = Line.fit([1, 2, 3], [2, 3, 7])
    assert (line.at_zero, line.slope, line.r_squared) == pytest.approx((-1, 2.5, 1 - 1.5 / 14))
    assert Line.fit([1, 2], [3, 3]).r_squared == 1.0


def test_the_arithmetic_of_a_load() -> None:
    cell = ServingCell(2, 1, 2.0, 32, 1, 100.0, 10.0, 20.0, 8.0, {"replica": 6.9, "api": 2.0, "proxy": 0.6}, 0)
    one, _, most = demands(cell)
    assert (one.pairs_per_second, one.replicas, one.apis, one.proxies) == (1, 1, 1, 1)
    assert (most.pairs_per_second, most.replicas, most.apis, most.proxies) == (10_000, 99, 29, 9)
    assert most.cores == pytest.approx(10_000 * 0.0095 / BUSY_SHARE)


def test_the_requests_have_the_length_that_is_measured(shared: Bundle) -> None:
    tokenize = bundle_tokenizer(shared)
    for body in request_bodies(shared, 12, 2, 3):
        question = json.loads(body)
        assert question["task"] == shared.tasks[0].name
        assert tokenize([tuple(pair) for pair in question["pairs"]]).arrays["input_ids"].shape <= (2, 12)
