"""Several adapters in one bundle: one graph, each row by its own task, equal to each adapter alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.bundle.folder import load_bundle
from export.runtime.classifier import OnnxClassifier
from export.score.__main__ import main as score_main
from tests.conftest import VIRTUAL_TOKENS, Folders, Second, family_of, peft_logits, random_batch, write_three_labels
from tests.export.graphs import manifest_of, peft_batch, refusal, run_export
from train.common.atomic_folder import held_folder
from train.common.errors import TextError

USUAL_KINDS = ("bert",)


def test_a_batch_may_mix_tasks_and_each_row_gets_its_own_adapters_logits(
    kind: str, adapter: Folders, second: Second, base_model: Folders, tmp_path: Path
) -> None:
    """Two exported together, a third with more labels added later; the golden logits are PEFT's of each alone."""
    adapters = [adapter(kind), second(kind), second(kind, three=True)]
    assert run_export(*adapters[:2], "--out", tmp_path / "b") == 0
    before = onnx.load(tmp_path / "b" / "model.onnx")
    assert run_export(adapters[2], "--add", "--out", tmp_path / "b") == 0

    classifier = OnnxClassifier(load_bundle(tmp_path / "b"), task=kind, threads=1)
    batch = peft_batch(kind, 6, 17)
    tasks = np.array([2, 0, 1, 1, 2, 0])
    mixed = classifier.logits({**batch, "task_ids": tasks})
    for number, (folder, n_labels) in enumerate(zip(adapters, (2, 2, 3), strict=True)):
        golden = peft_logits(folder, base_model(family_of(kind)), batch, n_labels=n_labels)
        rows = tasks == number
        assert np.abs(mixed[rows, :n_labels] - golden[rows]).max() < 1e-4
        # A label that the task does not have can never be the most probable.
        assert (mixed[rows, n_labels:] < -1e30).all()
        alone = OnnxClassifier(load_bundle(tmp_path / "b"), task=folder.name, threads=1)
        assert alone.task.number == number
        assert np.abs(alone.logits(batch) - golden).max() < 1e-4

    # The third came without the backbone being exported again: every weight and every operator is what it was.
    after = onnx.load(tmp_path / "b" / "model.onnx")
    constants = set(manifest_of(tmp_path / "b")["prompt_initializers"])
    assert list(after.graph.node) == list(before.graph.node)
    weights = [
        {item.name: item.SerializeToString() for item in model.graph.initializer if item.name not in constants}
        for model in (before, after)
    ]
    assert weights[0] == weights[1]
    stacked = {item.name: item.dims[0] for item in after.graph.initializer if item.name in constants}
    assert stacked == dict.fromkeys(constants, 3)
    onnx.checker.check_model(after, full_check=True)


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory: pytest.TempPathFactory, adapter: Folders, second: Second) -> Path:
    """A bundle of the tasks "bert", with two labels, and "three"."""
    out = tmp_path_factory.mktemp("two") / "b"
    assert run_export(adapter("bert"), second("bert", three=True), "--out", out) == 0
    return out


def test_the_backbone_is_stored_once(bundle: Folders, two_tasks: Path) -> None:
    single, several = (folder / "model.onnx" for folder in (bundle("bert"), two_tasks))
    # A task of this width: five rows of the prompt, a dense layer and a head of three labels, in four bytes a number.
    constants = 4 * (VIRTUAL_TOKENS * 32 + 32 * 32 + 32 + 3 * 32 + 3)
    # And the few operators that pick each row's own.
    assert several.stat().st_size - single.stat().st_size < constants + 6000


def test_a_file_is_labelled_by_the_task_that_is_named(
    two_tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_three_labels(tmp_path / "rows.jsonl", 4)
    command = [str(two_tasks), "--in", str(file), "--out", str(tmp_path / "out.jsonl")]
    assert score_main(command) == 2
    assert "holds 2 tasks (bert, three). Name one of them with --task." in capsys.readouterr().err
    assert score_main([*command, "--task", "four"]) == 2
    assert "--task four:" in capsys.readouterr().err
    assert score_main([*command, "--task", "three"]) == 0
    labelled = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["prediction"] for row in labelled} <= {"a", "b", "c"}
    assert len(labelled) == 30


def test_numbers_of_tasks_that_cannot_be_are_refused(two_tasks: Path) -> None:
    classifier = OnnxClassifier(load_bundle(two_tasks), task="bert", threads=1)
    batch = random_batch(np.random.default_rng(1), 3, 9, token_types=True)
    outside = r"task_ids must be from 0 to 1: the bundle holds 2 tasks\."
    wrong_shape = r"task_ids has shape \(2,\)\. Give one number for each of 3 texts\."
    for task_ids, words in (([0, 2, 0], outside), ([0, -1, 0], outside), ([0, 1], wrong_shape)):
        with pytest.raises(TextError, match=words):
            classifier.logits({**batch, "task_ids": np.array(task_ids)})


def test_what_cannot_be_put_together_is_refused(
    adapter: Folders,
    second: Second,
    bundle: Folders,
    two_tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = {path.name: path.read_bytes() for path in two_tasks.iterdir()}
    twin, out = shutil.copytree(second("bert"), tmp_path / "bert"), ("--out", tmp_path / "b")
    for words, *command in (
        ("Two adapters are named bert", adapter("bert"), twin, *out),
        ("has a task bert already", twin, "--add", "--out", two_tasks),
        ("was exported for one task", second("bert"), "--add", "--out", bundle("bert")),
        ("names 1 files for 2", adapter("bert"), second("bert"), *out, "--validation-file", "one.jsonl"),
        ("has another base model with SHA-256", adapter("bert"), adapter("gpt2"), *out),
        ("has another base model with SHA-256", adapter("gpt2"), "--add", "--out", two_tasks),
    ):
        error = refusal(capsys, *command)
        assert words in error
        alone = "so one graph cannot serve both. Train it alike, or export it alone."
        assert (alone in error) == ("base model" in words)
    assert not (tmp_path / "b").exists()
    assert {path.name: path.read_bytes() for path in two_tasks.iterdir()} == content


def test_two_runs_never_add_to_one_bundle(
    two_tasks: Path, adapter: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    """The later one would drop the task that the other added."""
    before = manifest_of(two_tasks)
    with held_folder(two_tasks, "--out"):
        error = refusal(capsys, adapter("bert-v2"), "--add", "--out", two_tasks)
    assert f"--out {two_tasks}: another run is writing there (it holds {two_tasks}). Wait until" in error
    assert manifest_of(two_tasks) == before
