"""The page of a regression, and of a task with several labels a text: both engines' answers, a file, the prompt's effect."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from demo.engines.stage import Stage
from demo.measure.compare import compare
from demo.measure.label_file import Scored, label_upload, write_labelled
from demo.measure.prompt import prompt_effect
from demo.measure.upload import read_upload
from demo.page.app import model_facts
from demo.page.tab_compare import _engine_facts, _results
from demo.page.tab_prompt import effect_html
from demo.page.tab_score import results_html
from tests import task_kinds
from tests.conftest import Folders, MadeOnce, write_jsonl
from tests.demo.engines import PAIR, stage_of
from tests.task_kinds import COLUMNS, TAGS, TASK_KINDS, kind_adapter, kind_bundle
from train.common.errors import DataError

pytestmark = pytest.mark.usefixtures("one_thread", "short_pauses")
ROWS = task_kinds.make_rows(12, seed=8)


@pytest.fixture(scope="module", params=TASK_KINDS)
def task_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def stage(task_kind: str, made_once: MadeOnce, base_model: Folders) -> Iterator[Stage]:
    adapter = kind_adapter(made_once, base_model, "bert", task_kind)
    with stage_of(adapter, bundles=(kind_bundle(made_once, base_model, "bert", task_kind, "fp32"),)) as stage:
        yield stage


def golden_of(task_kind: str, made_once: MadeOnce, base_model: Folders, rows: task_kinds.Rows) -> np.ndarray:
    folder = kind_adapter(made_once, base_model, "bert", task_kind)
    return task_kinds.golden_logits(folder, base_model("bert"), rows, 1 if task_kind == "regression" else len(TAGS))


def test_both_engines_show_a_number_or_a_bar_for_each_label(
    stage: Stage, task_kind: str, made_once: MadeOnce, base_model: Folders
) -> None:
    opened = stage.open(stage.default())
    *_, last = compare(stage, opened, *PAIR, stopped=lambda: True)
    (logits,) = golden_of(task_kind, made_once, base_model, [dict(zip(COLUMNS, PAIR, strict=True))])
    assert last.pytorch is not None
    value = json.loads(json.dumps(last.as_json()))
    speedup, _, *shown = map(str, _results(last, opened, is_over=True)[:4])
    for number, (side, answer) in enumerate({"pytorch": last.pytorch, "onnx": last.onnx}.items()):
        if task_kind == "regression":
            assert value[side] == {"value": pytest.approx(logits[0], abs=1e-5)}
            assert float(shown[number]) == pytest.approx(logits[0], abs=1e-3)
        else:
            golden = dict(zip(TAGS, expit(logits), strict=True))
            assert value[side]["probabilities"] == pytest.approx(golden, abs=1e-5)
            assert value[side]["labels"] == [tag for tag, logit in zip(TAGS, logits, strict=True) if logit >= 0]
            assert eval(shown[number], {}) == pytest.approx(golden, abs=1e-5)  # noqa: S307 -- a dict of our own
            assert answer.label == ",".join(value[side]["labels"])
    words = "the numbers differ by" if task_kind == "regression" else "both give the same labels"
    assert words in speedup
    assert last.agrees is (None if task_kind == "regression" else True)
    model = model_facts(opened)
    words = (
        "pairs of sentences: a number<" if task_kind == "regression" else "any number of <code>long</code>, <code>near"
    )
    assert words in model
    facts = _engine_facts(opened, [last.pytorch, last.onnx], is_over=True)[1]
    assert ("from a probability of 0.5" in facts) == (task_kind == "multi_label")


def test_a_file_is_scored_by_both_engines(
    stage: Stage, task_kind: str, made_once: MadeOnce, base_model: Folders, tmp_path: Path
) -> None:
    setup = stage.default()
    task = stage.choices[setup.adapter].adapter.task

    def run(rows: task_kinds.Rows, name: str) -> Scored:
        upload = read_upload(write_jsonl(tmp_path / name, rows), task)
        *_, last = label_upload(stage, setup, upload, cancelled=threading.Event())
        assert last.result is not None
        return last.result

    scored = run(ROWS, "in.jsonl")
    summary, shown = json.loads(json.dumps(scored.as_json())), results_html(scored)
    logits = golden_of(task_kind, made_once, base_model, ROWS)
    expected, predicted = task_kinds.truth(ROWS, task_kind), task_kinds.golden_answers(logits, task_kind)
    written = task_kinds.read_rows(write_labelled(scored, tmp_path))
    golden = task_kinds.golden_scores(expected, predicted, task_kind)
    for side in ("pytorch", "onnx"):
        assert summary[side]["scores"] == pytest.approx(golden, abs=1e-5)
        if task_kind == "regression":
            assert [row[f"prediction_{side}"] for row in written] == pytest.approx(logits[:, 0], abs=1e-5)
        else:
            assert [row[f"prediction_{side}"] for row in written] == [
                ",".join(np.array(TAGS)[row]) for row in predicted
            ]
            found = np.array([[row[f"probability_{tag}_{side}"] for tag in TAGS] for row in written])
            assert found == pytest.approx(expit(logits), abs=1e-5)
            assert summary[side]["counts"] == dict(zip(TAGS, predicted.sum(axis=0).tolist(), strict=True))
    if task_kind == "regression":
        assert "numbers are at most" in shown
        assert summary["largest_difference"] < 1e-4
        assert "agree" not in written[0]
        equal = run([row | {"score": 1.5} for row in ROWS[:3]], "equal.jsonl")
        assert "holds the same number in every row" in results_html(equal)
        assert equal.as_json()["onnx"]["scores"] is None
    else:
        assert "Both engines give the same labels to each of the 12 rows." in shown
        assert "recall of long" in shown
        assert "Confusion matrix" not in shown
        assert all(row["agree"] for row in written)
        taken = [row | {"probability_long_onnx": 1} for row in ROWS]
        with pytest.raises(DataError, match="has a column 'probability_long_onnx' already"):
            run(taken, "taken.jsonl")


def test_the_effect_of_the_prompt_is_of_the_kind(
    stage: Stage, task_kind: str, made_once: MadeOnce, base_model: Folders
) -> None:
    effect = prompt_effect(stage, stage.default(), *PAIR)
    (logits,) = golden_of(task_kind, made_once, base_model, [dict(zip(COLUMNS, PAIR, strict=True))])
    shown, value = effect_html(effect), effect.as_json()["learned"]
    if task_kind == "regression":
        assert value == {"value": pytest.approx(logits[0], abs=1e-5)}
        assert f"<td>{effect.learned[0]:.4f}</td>" in shown
    else:
        assert list(effect.learned) == pytest.approx(expit(logits), abs=1e-5)
        assert value["label"] == ",".join(tag for tag, logit in zip(TAGS, logits, strict=True) if logit >= 0)
        assert f"{100 * effect.learned[0]:.1f} %" in shown
