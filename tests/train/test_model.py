"""`PromptedClassifier` against `PeftModel.forward`, which shares no code with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import (
    DECODERS,
    ENCODERS,
    KINDS,
    POSITIONS,
    TOKEN_TYPES,
    VIRTUAL_TOKENS,
    family_of,
    peft_logits,
    random_batch,
)
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base, load_adapter_weights, load_prompted_classifier
from train.common.errors import ModelError
from train.model.classifier import load_classifier, prompted_classifier
from train.model.find import find_base_model, text_limit
from train.model.prompted import PooledRowLayer, PromptedClassifier
from train.model.tokenizer import base_tokenizer

Folders = Callable[[str], Path]

ENCODER_KINDS = [kind for kind in KINDS if family_of(kind) in ENCODERS]
DECODER_KINDS = [kind for kind in KINDS if family_of(kind) in DECODERS]


def build(adapter_folder: Path) -> PromptedClassifier:
    adapter = load_adapter(adapter_folder)
    return load_prompted_classifier(adapter, find_adapter_base(adapter))


def run(classifier: PromptedClassifier, batch: dict[str, np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        return classifier(**{name: torch.from_numpy(array) for name, array in batch.items()})["logits"].numpy()


def has_types(kind: str) -> bool:
    return family_of(kind) in TOKEN_TYPES


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_an_encoders_logits_equal_peft_with_any_right_padding(kind: str, adapter: Folders, base_model: Folders) -> None:
    generator = np.random.default_rng(0)
    classifier = build(adapter(kind))
    for batch_size, length in ((1, 1), (1, 9), (4, 17), (9, POSITIONS - VIRTUAL_TOKENS)):
        batch = random_batch(generator, batch_size, length, token_types=has_types(kind))
        expected = peft_logits(adapter(kind), base_model(family_of(kind)), batch)
        assert np.abs(run(classifier, batch) - expected).max() < 1e-5


@pytest.mark.parametrize("kind", DECODER_KINDS)
def test_a_decoders_logits_equal_peft_without_padding(kind: str, adapter: Folders, base_model: Folders) -> None:
    """PEFT takes the last row of embeddings, which is padding where there is some."""
    generator = np.random.default_rng(0)
    classifier = build(adapter(kind))
    for batch_size, length in ((1, 1), (1, 9), (4, 17), (3, POSITIONS - VIRTUAL_TOKENS)):
        batch = random_batch(generator, batch_size, length, token_types=False)
        batch["attention_mask"][:] = 1
        # Where PEFT gives ids to transformers, it finds the last token by looking for the padding token from behind.
        batch["input_ids"][:, -1] = 7
        expected = peft_logits(adapter(kind), base_model(family_of(kind)), batch)
        assert np.abs(run(classifier, batch) - expected).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_does_not_depend_on_its_batch(kind: str, adapter: Folders) -> None:
    generator = np.random.default_rng(1)
    classifier = build(adapter(kind))
    batch = random_batch(generator, 6, 20, token_types=has_types(kind))
    together = run(classifier, batch)
    order = generator.permutation(6)
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_turned_into_constants_gives_the_same_logits(kind: str, adapter: Folders) -> None:
    batch = random_batch(np.random.default_rng(3), 5, 20, token_types=has_types(kind))
    classifier = build(adapter(kind))
    before = run(classifier, batch)
    names = classifier.freeze_prompt()
    assert set(names) <= set(dict(classifier.named_buffers()))
    assert np.abs(run(classifier, batch) - before).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_limit_is_the_longest_text_that_the_positions_allow(kind: str, adapter: Folders) -> None:
    generator = np.random.default_rng(2)
    classifier = build(adapter(kind))
    limit = load_adapter(adapter(kind)).max_length
    types = has_types(kind)
    if kind == "bloom":
        assert limit == 2048 - VIRTUAL_TOKENS  # its positions have no end
        return
    assert limit == POSITIONS - VIRTUAL_TOKENS
    assert np.isfinite(run(classifier, random_batch(generator, 1, limit, token_types=types))).all()
    if not kind.startswith("llama"):  # rotary positions go on beyond what was trained
        with pytest.raises((IndexError, RuntimeError)):
            run(classifier, random_batch(generator, 1, limit + 1, token_types=types))


@pytest.mark.parametrize("family", ["bert", "electra", "roberta", "xlm-roberta"])
def test_the_last_layer_is_computed_for_the_pooled_row_alone(family: str, adapter: Folders) -> None:
    classifier = build(adapter(family))
    backbone: Any = classifier.model.base_model
    layers = backbone.encoder.layer
    assert isinstance(layers[-1], PooledRowLayer)
    seen: list[torch.Size] = []
    layers[-1].layer.intermediate.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    run(classifier, random_batch(np.random.default_rng(0), 3, 8, token_types=has_types(family)))
    assert seen == [(3, 1, 32)]


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoders_tokenizer_ends_each_sentence_and_says_so_in_its_file(
    family: str, adapter: Folders, bundle: Folders
) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    # However it is loaded: some classes put a template of their own into the file they are given.
    for folder in (adapter(family), bundle(family)):
        loaded = AutoTokenizer.from_pretrained(folder)
        ids = loaded("word1 word2", "word3")["input_ids"]
        assert loaded.convert_ids_to_tokens(ids) == ["<s>", "word1", "word2", "</s>", "word3", "</s>"]
        assert ids == Tokenizer.from_file(str(folder / "tokenizer.json")).encode("word1 word2", "word3").ids

    tokenizer = Tokenizer.from_file(str(adapter(family) / "tokenizer.json"))
    tokens = tokenizer.encode("word1 word2", "word3").tokens
    assert tokens == ["<s>", "word1", "word2", "</s>", "word3", "</s>"]
    assert tokenizer.encode("word1").tokens == ["<s>", "word1", "</s>"]
    base = find_adapter_base(load_adapter(adapter(family)))
    assert base_tokenizer(base, 30).padding_side == "right"


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
        prompted_classifier(load_classifier(base, folder.labels), base, folder.method, state)
    state = load_adapter_weights(folder) | {"base_model.classifier.weight": torch.zeros(7, 32)}
    with pytest.raises(ModelError, match="does not fit"):
        prompted_classifier(load_classifier(base, folder.labels), base, folder.method, state)
