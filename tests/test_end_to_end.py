"""The whole path on a real model, minilm: train → export → page, each through its command."""

import json
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client
from transformers import AutoTokenizer

from demo.engines.adapters import SHIPPED
from demo.page.controls import EXAMPLES
from export.__main__ import main as export_main
from export.bundle.folder import load_bundle
from export.runtime.classifier import OnnxClassifier
from tests.conftest import Data, peft_logits
from tests.demo.server import serve
from train.__main__ import main as train_main
from train.adapter.folder import load_adapter
from train.data.tasks import MRPC
from train.model.find import find_base_model

REDWOODS = EXAMPLES["Coast redwoods"]
SHIPPED_METHODS = {"minilm-mrpc": "p-tuning", "minilm-mrpc-v2": "p-tuning-v2"}


def test_minilm_is_trained_exported_and_served(data: Data, tmp_path: Path) -> None:
    """With P-Tuning v2: tests/slow/test_end_to_end.py."""
    check_the_whole_path("p-tuning", data, tmp_path)


def check_the_whole_path(method: str, data: Data, tmp_path: Path) -> None:
    adapter, bundle = tmp_path / "adapter", tmp_path / "bundle"
    flags = ["--model", "minilm", "--method", method, *data.flags, "--epochs", "1"]
    assert train_main([*flags, "--out", str(adapter)]) == 0
    assert export_main([str(adapter), "--out", str(bundle)]) == 0

    classifier = OnnxClassifier(load_bundle(bundle))
    encoded = classifier.tokenize([REDWOODS, ("A short one.", "Another.")])
    expected = peft_logits(adapter, find_base_model("minilm").folder, encoded.arrays)
    assert np.abs(classifier.logits(encoded.arrays) - expected).max() < 1e-4

    with serve(["--adapter", str(adapter), "--bundle", str(bundle)], tmp_path / "cache") as server:
        client = Client(server.wait_for_url(), verbose=False)
        answer = client.predict(*REDWOODS, api_name="/compare")
        client.close()
    exponentials = np.exp(expected[0])
    for engine in ("pytorch", "onnx"):
        probabilities = list(answer[engine]["probabilities"].values())
        assert probabilities == pytest.approx(exponentials / exponentials.sum(), abs=1e-4)


@pytest.mark.parametrize("name", SHIPPED_METHODS)
def test_an_adapter_that_ships_is_intact_and_works(name: str) -> None:
    adapter = load_adapter(SHIPPED / name)
    assert (adapter.model, adapter.task, adapter.method) == ("minilm", MRPC, SHIPPED_METHODS[name])
    training = json.loads((SHIPPED / name / "training.json").read_text())
    assert (training["n_train"], training["n_validation"]) == (3668, 408)
    assert training["seed"] in training["seeds"]
    assert training["command"].startswith("python -m train --model minilm ")
    assert "--train-file" in training["command"]
    card = (SHIPPED / name / "README.md").read_text()
    assert training["command"] in card
    for scores in (adapter.scores, *adapter.baselines.values()):
        assert f"| {100 * scores.values['accuracy']:.1f} | {100 * scores.values['f1']:.1f} |" in card
    # Better than an answer that needs no model, or it would not be worth showing.
    assert adapter.scores.key > adapter.baselines["always `equivalent`"].key
    # By PEFT alone; that both engines on the page say so too is the browser test's.
    batch = AutoTokenizer.from_pretrained(SHIPPED / name)(*REDWOODS, return_tensors="np")
    logits = peft_logits(SHIPPED / name, find_base_model("minilm").folder, dict(batch))
    assert adapter.labels[int(logits.argmax())] == "equivalent"
