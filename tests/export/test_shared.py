"""Several adapters in one bundle: one graph, each row by its own task, equal to each adapter alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.__main__ import main
from export.bundle.folder import load_bundle
from export.runtime.classifier import OnnxClassifier
from export.score.__main__ import main as score_main
from tests.conftest import (
    DECODERS,
    TOKEN_TYPES,
    VIRTUAL_TOKENS,
    Data,
    family_of,
    peft_logits,
    random_batch,
    write_three_labels,
)
from train.common.errors import TextError, UsageError

Folders = Callable[[str], Path]

SHARED = ("bert", "bert-v2", "bloom", "distilbert", "electra-v2", "gpt2", "llama-v2", "mpnet", "opt", "roberta-v2")
"""Every kind of head, and every way in which a prompt is constant."""


def export(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize("kind", SHARED)
def test_a_batch_may_mix_tasks_and_each_row_gets_its_own_adapters_logits(
    kind: str, adapter: Folders, second: Callable[..., Path], base_model: Folders, tmp_path: Path
) -> None:
    """Two exported together, a third with more labels added later; the golden logits are PEFT's of each alone."""
    adapters = [adapter(kind), second(kind), second(kind, three=True)]
    assert export(*adapters[:2], "--out", tmp_path / "b") == 0
    before = onnx.load(tmp_path / "b" / "model.onnx")
    assert export(adapters[2], "--add", "--out", tmp_path / "b") == 0

    classifier = OnnxClassifier(load_bundle(tmp_path / "b"), task=kind, threads=1)
    batch = random_batch(np.random.default_rng(8), 6, 17, token_types=family_of(kind) in TOKEN_TYPES)
    if family_of(kind) in DECODERS:
        # PEFT reads the last row, be it padding, and takes a last padding token for padding.
        batch["attention_mask"][:] = 1
        batch["input_ids"][:, -1] = 7
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
    constants = set(json.loads((tmp_path / "b" / "manifest.json").read_text())["prompt_initializers"])
    assert [node.SerializeToString() for node in after.graph.node] == [
        node.SerializeToString() for node in before.graph.node
    ]
    weights = [
        {item.name: item.SerializeToString() for item in model.graph.initializer if item.name not in constants}
        for model in (before, after)
    ]
    assert weights[0] == weights[1]
    assert {item.name: item.dims[0] for item in after.graph.initializer if item.name in constants} == dict.fromkeys(
        constants, 3
    )
    onnx.checker.check_model(after, full_check=True)


def test_the_backbone_is_stored_once(
    adapter: Folders, second: Callable[..., Path], bundle: Folders, tmp_path: Path
) -> None:
    adapters = [adapter("bert"), second("bert")]
    assert export(*adapters, "--out", tmp_path / "b") == 0
    single, shared = (folder / "model.onnx" for folder in (bundle("bert"), tmp_path / "b"))
    # A task of this width: five rows of the prompt, a dense layer and a head of two labels, in four bytes a number.
    constants = 4 * (VIRTUAL_TOKENS * 32 + 32 * 32 + 32 + 2 * 32 + 2)
    # And the few operators that pick each row's own.
    assert shared.stat().st_size - single.stat().st_size < constants + 6000


def test_int8_is_gated_for_each_task(
    adapter: Folders, second: Callable[..., Path], data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [adapter("bert"), second("bert")]
    files = [data.validation_file, data.train_file]
    assert export(*adapters, "--precision", "int8", "--validation-file", *files, "--out", tmp_path / "b") == 0
    bundle = load_bundle(tmp_path / "b")
    assert [(gate.file, gate.n_rows) for gate in bundle.graphs[1].gates] == [
        ("validation.jsonl", 40),
        ("train.jsonl", 64),
    ]
    # A further one must be judged too.
    capsys.readouterr()
    third = shutil.copytree(second("bert"), tmp_path / "third")
    assert export(third, "--add", "--out", tmp_path / "b") == 2
    assert (
        "nobody knows what they cost this task. Give labelled rows with --validation-file." in capsys.readouterr().err
    )
    assert load_bundle(tmp_path / "b") == bundle
    assert export(third, "--add", "--validation-file", data.validation_file, "--out", tmp_path / "b") == 0
    bundle = load_bundle(tmp_path / "b")
    assert [task.name for task in bundle.tasks] == ["bert", "other", "third"]
    assert [gate.n_rows for gate in bundle.graphs[1].gates] == [40, 64, 40]
    batch = random_batch(np.random.default_rng(1), 4, 12, token_types=True)
    logits = {
        (task, precision): OnnxClassifier(bundle, task=task, precision=precision, threads=1).logits(batch)
        for task in ("other", "third")
        for precision in ("fp32", "int8")
    }
    # The third is the second under another name, also in the graph to which it was added.
    assert np.array_equal(logits["other", "int8"], logits["third", "int8"])
    assert 0 < np.abs(logits["third", "int8"] - logits["third", "fp32"]).max() < 0.2


@pytest.fixture(scope="module")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory, adapter: Folders, second: Callable[..., Path]) -> Path:
    out = tmp_path_factory.mktemp("shared") / "b"
    assert export(adapter("bert"), second("bert", three=True), "--out", out) == 0
    return out


def test_a_file_is_labelled_by_the_task_that_is_named(
    shared_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_three_labels(tmp_path / "rows.jsonl", 4)
    command = [str(shared_bundle), "--in", str(file), "--out", str(tmp_path / "out.jsonl")]
    assert score_main(command) == 2
    assert "holds 2 tasks (bert, three). Name one of them with --task." in capsys.readouterr().err
    assert score_main([*command, "--task", "four"]) == 2
    assert "--task four:" in capsys.readouterr().err
    assert score_main([*command, "--task", "three"]) == 0
    labelled = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["prediction"] for row in labelled} <= {"a", "b", "c"}
    assert len(labelled) == 30


@pytest.mark.parametrize(
    ("task_ids", "words"),
    [
        ([0, 2, 0], "task_ids must be from 0 to 1: the bundle holds 2 tasks."),
        ([0, -1, 0], "task_ids must be from 0 to 1: the bundle holds 2 tasks."),
        ([0, 1], "task_ids has shape (2,). Give one number for each of 3 texts."),
    ],
)
def test_numbers_of_tasks_that_cannot_be_are_refused(shared_bundle: Path, task_ids: list[int], words: str) -> None:
    classifier = OnnxClassifier(load_bundle(shared_bundle), task="bert", threads=1)
    batch = random_batch(np.random.default_rng(1), 3, 9, token_types=True)
    with pytest.raises(TextError) as caught:
        classifier.logits({**batch, "task_ids": np.array(task_ids)})
    assert words in str(caught.value)


def test_a_bundle_of_one_task_takes_no_numbers_of_tasks(bundle: Folders) -> None:
    classifier = OnnxClassifier(load_bundle(bundle("bert")), threads=1)
    batch = random_batch(np.random.default_rng(1), 3, 9, token_types=True)
    with pytest.raises(TextError, match="holds one task and takes no task_ids"):
        classifier.logits({**batch, "task_ids": np.zeros(3, np.int64)})


def test_a_task_must_be_named_where_there_are_several(shared_bundle: Path) -> None:
    with pytest.raises(UsageError, match="Name one of them with --task"):
        OnnxClassifier(load_bundle(shared_bundle), threads=1)


@pytest.mark.parametrize(
    ("flags", "kind", "words"),
    [
        ("--virtual-tokens 3", "bert", "has another number of virtual tokens (3)"),
        ("--max-length 20", "bert", "has another longest text (20)"),
        ("", "bert-v2", "has another method (p-tuning-v2)"),
        ("", "electra", "has another base model with SHA-256"),
    ],
)
def test_adapters_that_one_graph_cannot_serve_are_refused(
    flags: str,
    kind: str,
    words: str,
    adapter: Folders,
    second: Callable[..., Path],
    shared_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    misfit = second(kind, flags=flags)
    content = {path.name: path.read_bytes() for path in shared_bundle.iterdir()}
    capsys.readouterr()
    for command in (
        [adapter("bert"), misfit, "--out", tmp_path / "b"],
        [misfit, "--add", "--out", shared_bundle],
    ):
        assert export(*command) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "so one graph cannot serve both. Train it alike, or export it alone." in error
    assert not (tmp_path / "b").exists()
    assert {path.name: path.read_bytes() for path in shared_bundle.iterdir()} == content


def test_what_else_cannot_be_put_together_is_refused(
    adapter: Folders,
    second: Callable[..., Path],
    bundle: Folders,
    shared_bundle: Path,
    data: Data,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    twin = shutil.copytree(second("bert"), tmp_path / "bert")
    commands = {
        "Two adapters are named bert": [adapter("bert"), twin, "--out", tmp_path / "b"],
        "has a task bert already": [twin, "--add", "--out", shared_bundle],
        "was exported for one task": [second("bert"), "--add", "--out", bundle("bert")],
        "names 1 files for 2 adapters": [
            *(adapter("bert"), second("bert"), "--out", tmp_path / "b"),
            *("--validation-file", data.validation_file),
        ],
    }
    capsys.readouterr()
    for words, command in commands.items():
        assert export(*command) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
