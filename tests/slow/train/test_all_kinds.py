"""Tests of tests/train again for every kind of model, and the tokenizers of all decoders."""

import inspect
from collections.abc import Callable

import pytest

from tests.conftest import DECODERS, KINDS, P_TUNED_V2, Folders, family_of
from tests.train import test_model, test_train
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base
from train.model.find import BERT_LIKE
from train.model.tokenizer import base_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

OF_KINDS: dict[Callable[..., None], list[str]] = {
    test_train.test_the_reported_scores_are_those_of_peft_on_the_validation_file: [*KINDS],
    test_train.test_p_tuning_v2_writes_pefts_prefix_tuning_of_one_key_and_value_a_layer: [
        f"{family}-v2" for family in P_TUNED_V2
    ],
    test_model.test_the_logits_equal_pefts: [*KINDS],
    test_model.test_a_prediction_does_not_depend_on_its_batch: [*KINDS],
    test_model.test_a_prompt_turned_into_constants_gives_the_same_logits: [*KINDS],
    test_model.test_the_text_limit_is_the_longest_text_that_the_positions_allow: [*KINDS],
    test_model.test_the_last_layer_is_computed_for_the_pooled_row_alone: [
        kind for kind in KINDS if family_of(kind) in BERT_LIKE
    ],
}


@pytest.mark.parametrize(
    ("check", "kind"),
    [pytest.param(check, kind, id=f"{check.__name__}-{kind}") for check, kinds in OF_KINDS.items() for kind in kinds],
)
def test_again(check: Callable[..., None], kind: str, request: pytest.FixtureRequest) -> None:
    fixtures = [name for name in inspect.signature(check).parameters if name != "kind"]
    check(kind, **{name: request.getfixturevalue(name) for name in fixtures})


@pytest.mark.parametrize("kind", [*DECODERS, "llama-v2"])
def test_a_decoders_tokenizer_ends_each_sentence_and_says_so_in_its_file(
    kind: str, adapter: Folders, bundle: Folders
) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    # However it is loaded: some classes put a template of their own into the file they are given.
    for folder in (adapter(kind), bundle(kind)):
        loaded = AutoTokenizer.from_pretrained(folder)
        ids = loaded("word1 word2", "word3")["input_ids"]
        assert loaded.convert_ids_to_tokens(ids) == ["<s>", "word1", "word2", "</s>", "word3", "</s>"]
        assert ids == Tokenizer.from_file(str(folder / "tokenizer.json")).encode("word1 word2", "word3").ids
    tokenizer = Tokenizer.from_file(str(adapter(kind) / "tokenizer.json"))
    assert tokenizer.encode("word1").tokens == ["<s>", "word1", "</s>"]
    base = find_adapter_base(load_adapter(adapter(kind)))
    assert base_tokenizer(base, 30).padding_side == "right"
