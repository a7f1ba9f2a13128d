"""`PromptedClassifier` against `PeftModel.forward`, which shares no code with it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import FAMILIES, POSITIONS, VIRTUAL_TOKENS, peft_logits, random_batch
from train.adapter import find_adapter_base, load_adapter, load_adapter_weights
from train.errors import ModelError
from train.model import find_base_model, load_classifier, prompted_classifier, text_limit
from train.prompted import PromptedClassifier

Folders = Callable[[str], Path]


def build(adapter_folder: Path) -> PromptedClassifier:
    adapter = load_adapter(adapter_folder)
    return prompted_classifier(
        load_classifier(find_adapter_base(adapter), adapter.labels), load_adapter_weights(adapter)
    )


def run(classifier: PromptedClassifier, batch: dict[str, np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        return classifier(**{name: torch.from_numpy(array) for name, array in batch.items()})["logits"].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_peft_with_any_right_padding(family: str, adapter: Folders, base_model: Folders) -> None:
    generator = np.random.default_rng(0)
    classifier = build(adapter(family))
    for batch_size, length in ((1, 1), (1, 9), (4, 17), (9, POSITIONS - VIRTUAL_TOKENS)):
        batch = random_batch(generator, batch_size, length, token_types=family in {"bert", "electra"})
        expected = peft_logits(adapter(family), base_model(family), batch)
        assert np.abs(run(classifier, batch) - expected).max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prediction_does_not_depend_on_its_batch(family: str, adapter: Folders) -> None:
    generator = np.random.default_rng(1)
    classifier = build(adapter(family))
    batch = random_batch(generator, 6, 20, token_types=family in {"bert", "electra"})
    together = run(classifier, batch)
    order = generator.permutation(6)
    assert np.abs(run(classifier, {name: array[order] for name, array in batch.items()}) - together[order]).max() < 1e-5
    for row, length in enumerate(batch["attention_mask"].sum(axis=1)):
        alone = {name: array[row : row + 1, :length] for name, array in batch.items()}
        assert np.abs(run(classifier, alone) - together[row]).max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_limit_is_the_longest_text_that_the_positions_allow(family: str, adapter: Folders) -> None:
    generator = np.random.default_rng(2)
    classifier = build(adapter(family))
    limit = load_adapter(adapter(family)).max_length
    assert limit == POSITIONS - VIRTUAL_TOKENS
    types = family in {"bert", "electra"}
    assert np.isfinite(run(classifier, random_batch(generator, 1, limit, token_types=types))).all()
    with pytest.raises((IndexError, RuntimeError)):
        run(classifier, random_batch(generator, 1, limit + 1, token_types=types))


def test_minilm_is_found_in_its_package_and_leaves_492_tokens_beside_20_virtual_ones() -> None:
    base = find_base_model("minilm")
    assert base.sha256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert (base.hub_name, base.hidden_size) == ("sentence-transformers/all-MiniLM-L6-v2", 384)
    assert text_limit(base, 20) == 492


def test_an_adapter_with_a_tensor_too_many_is_refused(adapter: Folders) -> None:
    folder = load_adapter(adapter("bert"))
    base = find_adapter_base(folder)
    state = load_adapter_weights(folder) | {"base_model.bert.extra": torch.zeros(1)}
    with pytest.raises(ModelError, match=r"no place for: bert\.extra"):
        prompted_classifier(load_classifier(base, folder.labels), state)
    state = load_adapter_weights(folder) | {"base_model.classifier.weight": torch.zeros(7, 32)}
    with pytest.raises(ModelError, match="does not fit"):
        prompted_classifier(load_classifier(base, folder.labels), state)
