"""A regression, and a task with several labels a text: from the adapter to the graph, a labelled file and an answer."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from export.__main__ import main as export
from export.bundle.folder import load_bundle
from export.runtime.classifier import OnnxClassifier
from export.score.__main__ import main as label_file
from export.serve.requests import ClassifyResponse, LogitsResponse
from export.triton import main as write_triton
from tests import task_kinds
from tests.conftest import Folders, MadeOnce, family_of, write_jsonl
from tests.task_kinds import COLUMNS, LABEL_COLUMNS, TAGS, TASK_KINDS, Rows, kind_adapter, kind_bundle
from train.data.tasks import count_pairs, custom_task, score, score_counts

pytestmark = pytest.mark.usefixtures("one_thread")
Capture = pytest.CaptureFixture[str]
ROWS = task_kinds.make_rows(30, seed=7)


@pytest.fixture(params=TASK_KINDS)
def task_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def golden_of(task_kind: str, made_once: MadeOnce, base_model: Folders, rows: Rows, kind: str = "bert") -> np.ndarray:
    """PEFT's logits alone."""
    folder, n_labels = (
        kind_adapter(made_once, base_model, kind, task_kind),
        1 if task_kind == "regression" else len(TAGS),
    )
    return task_kinds.golden_logits(folder, base_model(family_of(kind)), rows, n_labels)


def check_gate(folder: Path, file: Path, task_kind: str, logits: np.ndarray) -> None:
    """The gate of int8, kept or refused: its fp32 scores are those of PEFT's logits, its own those of its graph."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (gate,) = [record["gates"][0] for record in [*manifest["graphs"], *manifest["refused"]] if record["gates"]]
    rows = task_kinds.read_rows(file)
    expected, predicted = task_kinds.truth(rows, task_kind), task_kinds.golden_answers(logits, task_kind)
    assert gate["fp32"] == pytest.approx(task_kinds.golden_scores(expected, predicted, task_kind), abs=1e-5)
    assert set(gate["scores"]) == set(gate["fp32"])
    assert gate["n_rows"] == len(rows)
    assert 0 < gate["max_probability_difference"] < 0.3
    if task_kind == "regression":
        assert gate["label_flips"] == 0


def test_int8_is_judged_by_the_metrics_of_the_kind(task_kind: str, made_once: MadeOnce, base_model: Folders) -> None:
    folder, file = kind_bundle(made_once, base_model, "bert", task_kind), task_kinds.validation_file(made_once)
    check_gate(folder, file, task_kind, golden_of(task_kind, made_once, base_model, task_kinds.read_rows(file)))
    bundle = load_bundle(folder)
    assert bundle.find_task().task.kind == task_kind
    for graph in bundle.graphs:
        for gate in graph.gates:
            assert ("numbers at most" if task_kind == "regression" else "of 40 labels changed") in str(gate)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_gets_numbers_or_labels_with_their_probabilities(
    suffix: str, task_kind: str, made_once: MadeOnce, base_model: Folders, tmp_path: Path, capsys: Capture
) -> None:
    folder = kind_bundle(made_once, base_model, "bert", task_kind, "fp32")
    source, out = write_jsonl(tmp_path / "in.jsonl", ROWS), tmp_path / f"out{suffix}"
    capsys.readouterr()
    # Chunks, whose counts are added up; and a run that goes on with them.
    words = [str(folder), "--in", str(source), "--out", str(out), "--chunk-rows", "7", "--threads", "1"]
    assert label_file(words) == 0
    *printed, document = capsys.readouterr().out.splitlines()
    logits = golden_of(task_kind, made_once, base_model, ROWS)
    expected, predicted = task_kinds.truth(ROWS, task_kind), task_kinds.golden_answers(logits, task_kind)
    assert json.loads(document)["scores"] == pytest.approx(
        task_kinds.golden_scores(expected, predicted, task_kind), abs=1e-5
    )
    assert json.loads(document)["recalls"] == pytest.approx(task_kinds.golden_recalls(expected, predicted, task_kind))
    assert ("recall long" in printed[-1]) == (task_kind == "multi_label")
    rows = read(out)
    added = [name for name in rows[0] if name not in ROWS[0]]
    if task_kind == "regression":
        assert added == ["prediction"]
        assert [float(row["prediction"]) for row in rows] == pytest.approx(logits[:, 0], abs=1e-5)
    else:
        assert added == ["prediction", *(f"probability_{tag}" for tag in TAGS)]
        found = np.array([[float(row[name]) for name in added[1:]] for row in rows])
        assert found == pytest.approx(expit(logits), abs=1e-5)
        assert [row["prediction"] for row in rows] == [",".join(np.array(TAGS)[row]) for row in predicted]


def test_a_chunk_of_bad_rows_alone_has_columns_of_the_same_types(
    task_kind: str, made_once: MadeOnce, base_model: Folders, tmp_path: Path
) -> None:
    folder, out = kind_bundle(made_once, base_model, "bert", task_kind, "fp32"), tmp_path / "out.parquet"
    bad = [row | {task_kinds.COLUMNS[0]: " "} for row in ROWS[:2]]
    for rows in ([*bad, *ROWS[:2]], [*ROWS[:2], *bad]):
        source = write_jsonl(tmp_path / "in.jsonl", rows)
        words = [
            str(folder),
            "--in",
            str(source),
            "--out",
            str(out),
            "--skip-bad-rows",
            "--chunk-rows",
            "2",
            "--overwrite",
        ]
        assert label_file([*words, "--threads", "1"]) == 0
        found = read(out)
        types = {type(row["prediction"]) for row in found if not row["problem"]}
        assert types == {float if task_kind == "regression" else str}
        assert [row["prediction"] is None for row in found] == [row in bad for row in rows]


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_what_cannot_be_scored_or_asked_is_said(
    made_once: MadeOnce, base_model: Folders, tmp_path: Path, capsys: Capture
) -> None:
    folder, out = kind_bundle(made_once, base_model, "bert", "regression", "fp32"), tmp_path / "out.jsonl"
    source = write_jsonl(tmp_path / "in.jsonl", [row | {"score": 2} for row in ROWS])
    words = [str(folder), "--in", str(source), "--out", str(out)]
    assert label_file([*words, "--all-probabilities"]) == 2
    assert "predicts a number. Leave it out." in capsys.readouterr().err
    assert label_file(words) == 0, "every row has its number all the same"
    output = capsys.readouterr().out
    assert "against the file's labels there is no score. The labels are all equal" in output
    assert json.loads(output.splitlines()[-1])["scores"] is None
    assert len(read(out)) == len(ROWS)
    bad = write_jsonl(tmp_path / "bad.jsonl", [*ROWS[:3], ROWS[3] | {"score": "high"}])
    assert label_file([str(folder), "--in", str(bad), "--out", str(tmp_path / "none.csv")]) == 2
    error = capsys.readouterr().err
    assert "bad.jsonl, row 4 (line 4): label 'high' in column 'score' is no finite number" in error
    assert "or add --no-labels to leave labels unread" in error
    assert not (tmp_path / "none.csv").exists()


def test_answers_over_http_are_of_the_kind(task_kind: str, made_once: MadeOnce, base_model: Folders) -> None:
    bundle = load_bundle(kind_bundle(made_once, base_model, "bert", task_kind, "fp32"))
    classifier = OnnxClassifier(bundle, threads=1, use_cuda=False)
    encoded = classifier.tokenize([tuple(str(row[column]) for column in COLUMNS) for row in ROWS])
    facts: dict[str, Any] = {"task": "x", "bundle_sha256": "0", "batch_size": 30, "replica": "r", "memory_mib": 1.0}
    response = LogitsResponse(
        logits=classifier.logits(encoded.arrays), cut=tuple(encoded.cut), meaning=bundle.find_task().task, **facts
    )
    answers = json.loads(ClassifyResponse.model_validate(response).model_dump_json())["answers"]
    logits = golden_of(task_kind, made_once, base_model, ROWS)
    for answer, row in zip(answers, logits, strict=True):
        if task_kind == "regression":
            assert answer == {"value": pytest.approx(row[0], abs=1e-5), "cut": False}
        else:
            probabilities = dict(zip(TAGS, pytest.approx(expit(row), abs=1e-5).expected, strict=True))
            labels = [tag for tag, logit in zip(TAGS, row, strict=True) if logit >= 0]
            assert answer == {"labels": labels, "probabilities": pytest.approx(probabilities, abs=1e-5), "cut": False}


def test_a_transformers_pipeline_says_the_same(task_kind: str, made_once: MadeOnce, base_model: Folders) -> None:
    """It reads the kind from the bundle's configuration."""
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    folder = kind_bundle(made_once, base_model, "bert", task_kind, "fp32")
    model = ORTModelForSequenceClassification.from_pretrained(folder, file_name="model.onnx")
    says: Any = pipeline(
        "text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder), top_k=None
    )
    logits = golden_of(task_kind, made_once, base_model, ROWS[:5])
    for row, golden in zip(ROWS, logits, strict=False):
        said = {
            item["label"]: item["score"] for item in says({"text": row["sentence1"], "text_pair": row["sentence2"]})
        }
        if task_kind == "regression":
            assert list(said.values()) == pytest.approx(golden, abs=1e-5)
        else:
            assert said == pytest.approx(dict(zip(TAGS, expit(golden), strict=True)), abs=1e-5)


def test_counts_of_labels_add_up_to_the_scores_of_scikit_learn() -> None:
    task = custom_task(("text",), "tags", ["a", "b", "c"], "multi_label")
    expected, predicted = np.random.default_rng(3).integers(0, 2, (2, 50, 3)).astype(bool)
    expected[:, 2] = predicted[:, 2] = False  # a label that is nowhere
    halves = [count_pairs(task, expected[part], predicted[part]) for part in (slice(20), slice(20, 50))]
    found, golden = score_counts(task, halves[0] + halves[1]), score(task, predicted, expected)
    assert found.values == pytest.approx(golden.values)
    assert found.values == pytest.approx(task_kinds.golden_scores(expected, predicted, "multi_label"))
    assert found.recalls == pytest.approx(golden.recalls)
    assert set(found.recalls) == {"a", "b"}
    assert count_pairs(task, [], []).sum() == 0


def test_tasks_of_all_kinds_share_a_graph(
    made_once: MadeOnce, base_model: Folders, adapter: Folders, tmp_path: Path
) -> None:
    folders = [adapter("bert"), *(kind_adapter(made_once, base_model, "bert", name) for name in TASK_KINDS)]
    copies = [tmp_path / name for name in ("classes", *TASK_KINDS)]
    for copy, folder in zip(copies, folders, strict=True):
        shutil.copytree(folder, copy)
    assert export([*map(str, copies), "--out", str(tmp_path / "b"), "--precision", "fp32"]) == 0
    bundle = load_bundle(tmp_path / "b")
    assert [task.task.kind for task in bundle.tasks] == ["classification", *TASK_KINDS]
    assert write_triton([str(tmp_path / "b"), "--out", str(tmp_path / "t"), "--name", "b"]) == 0
    told = {task["name"]: task for task in json.loads(next(tmp_path.glob("t/**/tasks.json")).read_text())}
    assert "kind" not in told["classes"]
    assert told["multi_label"]["kind"] == "multi_label"
    assert told["multi_label"]["threshold"] == 0.5
    assert "threshold" not in told["regression"]
    texts = [tuple(str(row[column]) for column in COLUMNS) for row in ROWS[:4]]
    for name in TASK_KINDS:
        classifier = OnnxClassifier(bundle, task=name, threads=1, use_cuda=False)
        logits = classifier.logits(classifier.tokenize(texts).arrays)
        assert logits == pytest.approx(golden_of(name, made_once, base_model, ROWS[:4]), abs=1e-4)
        assert bundle.find_task(name).task.label_column == LABEL_COLUMNS[name]
