"""A regression and a task with several labels a text, from training to the graph, on an encoder and on a decoder."""

import json

import numpy as np
import pytest

from export.bundle.folder import load_bundle
from export.runtime.batches import classify
from export.runtime.classifier import OnnxClassifier
from tests import task_kinds
from tests.conftest import Folders, MadeOnce, family_of
from tests.export.test_task_kinds import check_gate
from tests.task_kinds import COLUMNS, TAGS, TASK_KINDS, kind_adapter, kind_bundle

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["roberta-v2", "gpt2"])
@pytest.mark.parametrize("task_kind", TASK_KINDS)
def test_the_graph_predicts_what_peft_does(task_kind: str, kind: str, made_once: MadeOnce, base_model: Folders) -> None:
    folder, n_labels = (
        kind_adapter(made_once, base_model, kind, task_kind),
        1 if task_kind == "regression" else len(TAGS),
    )
    file = task_kinds.validation_file(made_once)
    rows = task_kinds.read_rows(file)
    logits = task_kinds.golden_logits(folder, base_model(family_of(kind)), rows, n_labels)
    expected, predicted = task_kinds.truth(rows, task_kind), task_kinds.golden_answers(logits, task_kind)
    training = json.loads((folder / "training.json").read_text())
    golden = task_kinds.golden_scores(expected, predicted, task_kind)
    assert training["validation"] == pytest.approx(golden, abs=1e-5)
    bundle_folder = kind_bundle(made_once, base_model, kind, task_kind)
    check_gate(bundle_folder, file, task_kind, logits)
    classifier = OnnxClassifier(load_bundle(bundle_folder), precision="fp32", threads=1, use_cuda=False)
    found = classify(classifier, [tuple(str(row[column]) for column in COLUMNS) for row in rows])
    assert np.array_equal(found.predicted, predicted) or found.predicted == pytest.approx(predicted, abs=1e-4)
