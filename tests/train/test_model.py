"""`PromptedClassifier` against `PeftModel.forward`, which shares no code with it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import (
    MAIN_KINDS,
    POSITIONS,
    TOKEN_TYPES,
    Folders,
    family_of,
    is_decoder,
    peft_logits,
    random_batch,
)
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base, load_prompted_classifier, read_weights
from train.common.errors import ModelError
from train.model.classifier import load_classifier, prompted_classifier
from train.model.find import find_base_model, text_limit
from train.model.prompted import PooledRowLayer, PromptedClassifier

LIMIT = POSITIONS - 5
"""Tokens that a text may have beside the five virtual ones."""


def build(adapter_folder: Path) -> PromptedClassifier:
    adapter = load_adapter(adapter_folder)
    return load_prompted_classifier(adapter, find_adapter_base(adapter))


def run(classifier: PromptedClassifier, batch: dict[str, np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        return classifier(**{name: torch.from_numpy(array) for name, array in batch.items()})["logits"].numpy()


def batch_for(kind: str, seed: int, batch_size: int, length: int) -> dict[str, np.ndarray]:
    return random_batch(np.random.default_rng(seed), batch_size, length, token_types=family_of(kind) in TOKEN_TYPES)


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_the_logits_equal_pefts(kind: str, adapter: Folders, base_model: Folders) -> None:
    """An encoder's with any right padding; a decoder's without, as PEFT takes the last row, which may be padding.

    So do those of a prompt that is turned into constants.
    """
    family, classifier = family_of(kind), build(adapter(kind))
    given: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
    for batch_size, length in ((1, 1), (1, 9), (4, 17), (9, LIMIT)):
        batch = batch_for(kind, length, batch_size, length)
        if is_decoder(kind):
            batch["attention_mask"][:] = 1
            # Where PEFT gives ids to transformers, it finds the last token by looking for the padding token from behind.
            batch["input_ids"][:, -1] = 7
        expected = peft_logits(adapter(kind), base_model(family), batch)
        logits = run(classifier, batch)
        assert np.abs(logits - expected).max() < 1e-5
        given.append((batch, logits))
    assert set(classifier.freeze_prompt()) <= set(dict(classifier.named_buffers()))
    for batch, logits in given:
        assert np.abs(run(classifier, batch) - logits).max() < 1e-6


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_a_prediction_does_not_depend_on_its_batch(kind: str, adapter: Folders) -> None:
    classifier = build(adapter(kind))
    batch = batch_for(kind, 1, 6, 20)
    together = run(classifier, batch)
    order = [3, 0, 5, 1, 4, 2]
    assert np.abs(run(classifier, {name: array[order] for name, array in batch.items()}) - together[order]).max() < 1e-5
    # Other padding, and more of it.
    padded = {name: np.pad(array, ((0, 0), (0, 7))) for name, array in batch.items()}
    padded["input_ids"] = np.where(padded["attention_mask"] == 1, padded["input_ids"], 3)
    assert np.abs(run(classifier, padded) - together).max() < 1e-5
    for row, length in enumerate(batch["attention_mask"].sum(axis=1)):
        alone = {name: array[row : row + 1, :length] for name, array in batch.items()}
        assert np.abs(run(classifier, alone) - together[row]).max() < 1e-5
    # And texts do differ, or all of this shows nothing.
    assert np.abs(together - together[0]).max() > 1e-3


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_the_text_limit_is_the_longest_text_that_the_positions_allow(kind: str, adapter: Folders) -> None:
    classifier = build(adapter(kind))
    limit = load_adapter(adapter(kind)).max_length
    if kind == "bloom":
        assert limit == 2048 - 5  # its positions have no end
        return
    assert limit == LIMIT
    assert np.isfinite(run(classifier, batch_for(kind, 2, 1, limit))).all()
    if family_of(kind) not in {"llama", "qwen3"}:  # rotary positions go on beyond what was trained
        with pytest.raises((IndexError, RuntimeError)):
            run(classifier, batch_for(kind, 2, 1, limit + 1))


@pytest.mark.parametrize("kind", ["bert", "roberta-v2"])
def test_the_last_layer_is_for_the_pooled_row_alone(kind: str, adapter: Folders) -> None:
    classifier = build(adapter(kind))
    backbone: Any = classifier.model.base_model
    layers = backbone.encoder.layer
    assert isinstance(layers[-1], PooledRowLayer)
    seen: list[torch.Size] = []
    layers[-1].layer.intermediate.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    run(classifier, batch_for(kind, 0, 3, 8))
    assert seen == [(3, 1, 32)]


def test_minilm_is_found_in_its_package_and_leaves_492_tokens_beside_20_virtual_ones() -> None:
    base = find_base_model("minilm")
    assert base.sha256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert (base.hub_name, base.hidden_size) == ("sentence-transformers/all-MiniLM-L6-v2", 384)
    assert text_limit(base, 20) == 492


def test_a_tensor_too_many_or_of_another_shape_is_refused(adapter: Folders) -> None:
    read = load_adapter(adapter("bert"))
    base = find_adapter_base(read)
    for name, words in (("bert.extra", r"no place for: bert\.extra"), ("classifier.weight", "does not fit")):
        state = read_weights(read.folder, read.virtual_tokens) | {f"base_model.{name}": torch.zeros(7, 32)}
        with pytest.raises(ModelError, match=words):
            prompted_classifier(load_classifier(base, read.labels), base, read.method, state)
