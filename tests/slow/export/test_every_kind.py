"""The tests of tests/export that take a kind of model, for the other kinds; and models that are out of the ordinary."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from export.bundle.folder import load_bundle
from export.runtime.classifier import OnnxClassifier
from tests.conftest import KINDS, VIRTUAL_TOKENS, Data, Folders, Precisions, Second, make_base_model, peft_logits
from tests.export.graphs import manifest_of, padded_batch, parametrize_kinds, refusal, run_export, run_file
from tests.export.test_export import (  # noqa: F401
    test_a_prediction_of_the_graph_does_not_depend_on_its_batch,
    test_in_an_encoders_graph_the_last_layer_is_computed_for_row_0_alone,
    test_the_graph_gives_pefts_logits_on_shapes_that_were_not_traced,
    test_the_graph_takes_any_batch_and_holds_the_learned_prompt_under_the_names_of_the_manifest,
)
from tests.export.test_gpu_graph import (  # noqa: F401
    test_cuda_takes_every_node_and_a_request_copies_its_inputs_alone,
    test_every_operator_that_can_be_fused_is_and_the_logits_are_pefts,
)
from tests.export.test_many_tasks import (  # noqa: F401
    test_a_batch_may_mix_tasks_and_each_row_gets_its_own_adapters_logits,
)
from tests.export.test_precision import (  # noqa: F401
    test_dense_layers_and_token_embeddings_are_integer_and_nothing_else,
)
from tests.export.test_runtime import (  # noqa: F401
    test_a_transformers_pipeline_says_the_same_of_a_pair_and_of_many,
)
from train.__main__ import main as train_main

Capture = pytest.CaptureFixture[str]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    usual = metafunc.function.__globals__.get("USUAL_KINDS", ())
    parametrize_kinds(metafunc, [kind for kind in KINDS if kind not in usual])


@pytest.fixture
def gpu_bundles(bundle_in: Precisions, adapter: Folders, second: Second, tmp_path: Path) -> list[Path]:
    kinds = ("bert-v2", "roberta-v2", "distilbert", "mpnet", "gpt2", "llama-v2", "opt-v2", "bloom")
    folders = [bundle_in(kind, "fp16") for kind in kinds]
    for kind in ("bert", "llama-v2"):
        flags = ("--out", tmp_path / kind, "--precision", "fp16", "--ungated")
        assert run_export(adapter(kind), second(kind, three=True), *flags) == 0
        folders.append(tmp_path / kind)
    return folders


def train_and_export(base: Path, folder: Path, data: Data, *flags: str) -> tuple[Path, Path]:
    """An adapter of a base model, and its bundle."""
    adapter, bundle = folder / "adapter", folder / "b"
    command = ["--model", str(base), "--virtual-tokens", str(VIRTUAL_TOKENS), "--epochs", "1", *flags, *data.flags]
    assert train_main([*command, "--out", str(adapter)]) == 0
    assert run_export(adapter, "--out", bundle) == 0
    return adapter, bundle


def test_an_encoder_that_embeds_in_another_width_than_it_computes_in(tmp_path: Path, data: Data) -> None:
    """As ELECTRA's small models do: their projection stands between the embeddings and the first layer."""
    from transformers import AutoConfig, AutoModel

    base = make_base_model(tmp_path / "base", "electra")
    config = AutoConfig.from_pretrained(base)
    config.embedding_size = 16
    AutoModel.from_config(config).save_pretrained(base)
    adapter, bundle = train_and_export(base, tmp_path, data, "--method", "p-tuning-v2")
    batch = padded_batch("electra", 4, 13)
    assert np.abs(run_file(bundle / "model.onnx", batch) - peft_logits(adapter, base, batch)).max() < 1e-5


def test_a_bert_with_relative_positions_is_exported_without_the_rewrite(data: Data, tmp_path: Path) -> None:
    """Its layers have a term that `CpuEncoder` does not know; the export itself holds it against PEFT."""
    from transformers import BertConfig, BertModel

    base = make_base_model(tmp_path / "base", "bert")
    config = BertConfig.from_pretrained(base, position_embedding_type="relative_key_query", attn_implementation="eager")
    torch.manual_seed(3)
    BertModel(config).save_pretrained(base)
    (adapter, bundle), (other, _) = (train_and_export(base, tmp_path / name, data) for name in ("one", "two"))
    batch = padded_batch("bert", 4, 20)
    assert np.abs(run_file(bundle / "model.onnx", batch) - peft_logits(adapter, base, batch)).max() < 1e-4
    assert run_export(adapter, other.rename(tmp_path / "other"), "--out", tmp_path / "c") == 0
    both = OnnxClassifier(load_bundle(tmp_path / "c"), task="other", threads=1)
    assert np.abs(both.logits(batch) - peft_logits(tmp_path / "other", base, batch)).max() < 1e-4


def test_a_tokenizer_without_token_types_means_the_same_to_the_bundle_as_in_training(
    data: Data, tmp_path: Path
) -> None:
    """Training, like PEFT's users, then gives a BERT zeros for both sentences."""
    from transformers import AutoTokenizer

    base = make_base_model(tmp_path / "base", "bert")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    adapter, bundle = train_and_export(base, tmp_path, data)
    pair = ("word1 word2 word3", "word4 word5")
    classifier = OnnxClassifier(load_bundle(bundle), threads=1)
    encoded = dict(AutoTokenizer.from_pretrained(adapter)(*pair, return_tensors="np"))
    assert "token_type_ids" not in encoded
    golden = peft_logits(adapter, base, encoded)
    assert np.abs(classifier.logits(classifier.tokenize([pair]).arrays) - golden).max() < 1e-5


def test_texts_without_a_limit_are_compared_up_to_one(bundle: Folders) -> None:
    """BLOOM takes texts of any length; attention over 2,043 tokens would only cost memory."""
    (task,) = manifest_of(bundle("bloom"))["tasks"]
    assert max(row["sequence_length"] for row in task["parity"]["rows"]) == 1024


@pytest.mark.parametrize(
    ("flags", "other", "words"),
    [
        ("--virtual-tokens 3", "bert", "has another number of virtual tokens (3)"),
        ("--max-length 20", "bert", "has another longest text (20)"),
        ("", "bert-v2", "has another method (p-tuning-v2)"),
    ],
)
def test_adapters_that_differ_in_what_a_graph_has_once_are_refused(
    flags: str, other: str, words: str, adapter: Folders, second: Second, tmp_path: Path, capsys: Capture
) -> None:
    error = refusal(capsys, adapter("bert"), second(other, flags=flags), "--out", tmp_path / "b")
    assert words in error
    assert "so one graph cannot serve both. Train it alike, or export it alone." in error
    assert not (tmp_path / "b").exists()
