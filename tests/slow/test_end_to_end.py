"""The whole path on a real model, minilm: train → export → page, each through its command."""

from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client

from demo.page.controls import EXAMPLES
from export.__main__ import main as export_main
from export.bundle.folder import load_bundle
from export.runtime.classifier import OnnxClassifier
from tests.conftest import Data, peft_logits
from tests.demo.server import serve
from train.__main__ import main as train_main
from train.model.find import find_base_model

REDWOODS = EXAMPLES["Coast redwoods"]


@pytest.mark.parametrize("method", ["p-tuning", "p-tuning-v2"])
def test_minilm_is_trained_exported_and_served(method: str, data: Data, tmp_path: Path) -> None:
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
