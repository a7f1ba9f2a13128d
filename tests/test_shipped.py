"""The adapters that ship: intact, described, better than no model, and right about the page's first example."""

import json

import pytest
from transformers import AutoTokenizer

from demo.engines.adapters import SHIPPED
from demo.page.controls import EXAMPLES
from tests.conftest import peft_logits
from train.adapter.folder import load_adapter
from train.data.tasks import MRPC
from train.model.find import find_base_model

SHIPPED_METHODS = {"minilm-mrpc": "p-tuning", "minilm-mrpc-v2": "p-tuning-v2"}


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
    batch = AutoTokenizer.from_pretrained(SHIPPED / name)(*EXAMPLES["Coast redwoods"], return_tensors="np")
    logits = peft_logits(SHIPPED / name, find_base_model("minilm").folder, dict(batch))
    assert adapter.labels[int(logits.argmax())] == "equivalent"
