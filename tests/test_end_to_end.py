"""The whole path on a real model, minilm: train → export → page, each through its command."""

import json
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client

from demo.app import EXAMPLES
from export.__main__ import main as export_main
from export.bundle import load_bundle
from export.runtime import OnnxClassifier
from tests.conftest import SHIPPED_ADAPTER, Data, make_pairs, peft_logits, write_jsonl
from tests.server import serve
from train.__main__ import main as train_main
from train.adapter import load_adapter
from train.model import find_base_model

REDWOODS = EXAMPLES[0]


def test_minilm_is_trained_exported_and_served(tmp_path: Path) -> None:
    data = Data(
        write_jsonl(tmp_path / "train.jsonl", make_pairs(32, seed=1)),
        write_jsonl(tmp_path / "validation.jsonl", make_pairs(16, seed=2)),
    )
    adapter, bundle = tmp_path / "adapter", tmp_path / "bundle"
    assert train_main(["--model", "minilm", *data.flags, "--epochs", "1", "--out", str(adapter)]) == 0
    assert export_main([str(adapter), "--out", str(bundle)]) == 0

    classifier = OnnxClassifier(load_bundle(bundle))
    encoded = classifier.tokenize([(REDWOODS.sentence1, REDWOODS.sentence2), ("A short one.", "Another.")])
    expected = peft_logits(adapter, find_base_model("minilm").folder, encoded.arrays)
    assert np.abs(classifier.logits(encoded.arrays) - expected).max() < 1e-4

    with serve(["--adapter", str(adapter), "--bundle", str(bundle)], tmp_path / "cache") as server:
        client = Client(server.wait_for_url(), verbose=False)
        answer = client.predict(REDWOODS.sentence1, REDWOODS.sentence2, api_name="/compare")
        client.close()
    exponentials = np.exp(expected[0])
    for engine in ("pytorch", "onnx"):
        probabilities = list(answer[engine]["probabilities"].values())
        assert probabilities == pytest.approx(exponentials / exponentials.sum(), abs=1e-4)


def test_the_adapter_that_ships_is_intact_and_says_how_it_was_made() -> None:
    adapter = load_adapter(SHIPPED_ADAPTER)
    assert (adapter.model, adapter.task, adapter.labels) == ("minilm", "mrpc", ("not_equivalent", "equivalent"))
    training = json.loads((SHIPPED_ADAPTER / "training.json").read_text())
    assert (training["n_train"], training["n_validation"], training["seed"]) == (3668, 408, 0)
    assert training["command"].startswith("python -m train --model minilm --task mrpc --train-file ")
    card = (SHIPPED_ADAPTER / "README.md").read_text()
    assert training["command"] in card
    for scores in (adapter.scores, adapter.always_positive):
        assert f"| {100 * scores['accuracy']:.1f} | {100 * scores['f1']:.1f} |" in card
    # Better than an answer that needs no model, or it would not be worth showing.
    assert adapter.scores["accuracy"] > adapter.always_positive["accuracy"]


def test_the_adapter_that_ships_calls_the_redwood_pair_equivalent() -> None:
    """By PEFT alone; that both engines on the page say so too is the browser test's."""
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(SHIPPED_ADAPTER)(REDWOODS.sentence1, REDWOODS.sentence2, return_tensors="np")
    logits = peft_logits(SHIPPED_ADAPTER, find_base_model("minilm").folder, dict(batch))
    assert load_adapter(SHIPPED_ADAPTER).labels[int(logits.argmax())] == "equivalent"
