"""``python -m export`` through its entry point: what it writes, that it is equal, what it refuses."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

import export.fold.trace
from export.__main__ import main
from export.bundle.folder import load_bundle
from export.fold.encoder import FoldedEncoder
from export.runtime.classifier import OnnxClassifier
from export.runtime.tokenizer import TextTokenizer
from tests.conftest import (
    DECODERS,
    ENCODERS,
    KINDS,
    POSITIONS,
    TOKEN_TYPES,
    VIRTUAL_TOKENS,
    Data,
    family_of,
    flip_bit,
    make_base_model,
    make_pairs,
    peft_logits,
    random_batch,
)
from train.__main__ import main as train_main
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base, load_prompted_classifier
from train.common.errors import BundleError

Folders = Callable[[str], Path]

ENCODER_KINDS = [kind for kind in KINDS if family_of(kind) in ENCODERS]

N_LAYERS = 2
"""Of every tiny model."""


def has_types(kind: str) -> bool:
    return family_of(kind) in TOKEN_TYPES


def inputs_of(kind: str) -> list[str]:
    names = ["input_ids", "attention_mask"]
    return [*names, "token_type_ids"] if has_types(kind) else names


def open_graph(bundle_folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(bundle_folder / "model.onnx", providers=["CPUExecutionProvider"])


def embedded_rows(model: Any, table: np.ndarray) -> np.ndarray:
    """What transformers' own embeddings module makes of a prompt table, shape = (1, n_virtual, n_hidden)"""
    name = "input_embeds" if model.config.model_type == "distilbert" else "inputs_embeds"
    with torch.inference_mode():
        rows = model.embeddings(input_ids=None, **{name: torch.from_numpy(table)[None]})
        return (model.embeddings_project(rows) if hasattr(model, "embeddings_project") else rows).numpy()


def learned_prompt(kind: str, adapter_folder: Path, base_folder: Path) -> dict[str, np.ndarray]:
    """What the graph shall hold, by name, made of the adapter file with NumPy and transformers alone."""
    from transformers import AutoModel

    table = load_file(adapter_folder / "adapter_model.safetensors")["prompt_embeddings"]
    n_head = 8
    model = AutoModel.from_pretrained(base_folder).eval()
    if kind in ENCODERS:
        return {"prompt_rows": embedded_rows(model, table)}
    if kind.endswith("-v2"):
        # PEFT's order: each virtual token's row holds, layer by layer, its keys and then its values, head by head.
        layers = table.reshape(VIRTUAL_TOKENS, N_LAYERS, 2, -1, n_head).transpose(1, 2, 3, 0, 4)[:, :, None].copy()
        if family_of(kind) in ENCODERS:
            # There the last layer adds its biases after the sum over the keys.
            attention = model.encoder.layer[-1].attention.self
            for i, dense in enumerate([attention.key, attention.value]):
                layers[-1, i] -= dense.bias.detach().numpy().reshape(1, -1, 1, n_head)
    else:
        mask = torch.ones(1, VIRTUAL_TOKENS, dtype=torch.long)
        with torch.inference_mode():
            cache = model(inputs_embeds=torch.from_numpy(table)[None], attention_mask=mask, use_cache=True)
        layers = np.stack([np.stack([keys, values]) for keys, values in cache.past_key_values.to_legacy_cache()])
    return {
        f"prompt_{name}_{layer}": layers[layer, i]
        for layer in range(N_LAYERS)
        for i, name in enumerate(["key", "value"])
    }


def test_a_bundle_folder_holds_exactly_these_files(bundle: Folders) -> None:
    assert {path.name for path in bundle("bert").iterdir()} == {
        "config.json",
        "manifest.json",
        "model.onnx",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_takes_any_batch_and_length_and_one_file_holds_it(kind: str, bundle: Folders) -> None:
    model = onnx.load(bundle(kind) / "model.onnx", load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [item.name for item in model.graph.input] == inputs_of(kind)
    for item in model.graph.input:
        assert item.type.tensor_type.elem_type == onnx.TensorProto.INT64
        dimensions = [dimension.dim_param for dimension in item.type.tensor_type.shape.dim]
        assert dimensions == ["batch_size", "sequence_length"]
    assert [item.name for item in model.graph.output] == ["logits"]
    assert not [item for item in model.graph.initializer if item.external_data]


@pytest.mark.parametrize("kind", KINDS)
def test_the_learned_prompt_is_in_the_graph_under_the_names_of_the_manifest(
    kind: str, bundle: Folders, adapter: Folders, base_model: Folders
) -> None:
    """An encoder's rows as its first layer reads them; else keys and values. No request pays for either."""
    model = onnx.load(bundle(kind) / "model.onnx")
    initializers = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    expected = learned_prompt(kind, adapter(kind), base_model(family_of(kind)))
    assert json.loads((bundle(kind) / "manifest.json").read_text())["prompt_initializers"] == list(expected)
    for name, array in expected.items():
        assert initializers[name].shape == array.shape
        assert np.abs(initializers[name] - array).max() < 1e-5
    if family_of(kind) not in {"llama", "opt"}:  # whose keys or embeddings are 16 wide
        # The prompt encoder, whose hidden size is 16, is gone, and so is the length that was traced.
        assert not [name for name, array in initializers.items() if 16 in array.shape]


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_in_an_encoders_graph_the_last_layer_is_computed_for_row_0_alone(
    kind: str, bundle: Folders, base_model: Folders
) -> None:
    """No dense layer of it sees any other row, and its keys and values are no dense layers any more."""
    from transformers import AutoModelForSequenceClassification

    graph = onnx.load(bundle(kind) / "model.onnx")
    ranks = {item.name: len(item.dims) for item in graph.graph.initializer}
    outputs = [
        node.output[0]
        for node in graph.graph.node
        if node.op_type in {"Gemm", "MatMul"} and ranks.get(node.input[1]) == 2
    ]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    n_batch, n_text = 3, 11
    arrays = session.run(outputs, random_batch(np.random.default_rng(1), n_batch, n_text, token_types=has_types(kind)))

    model = AutoModelForSequenceClassification.from_pretrained(base_model(family_of(kind)))
    n_dense = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    n_rows = n_batch * (n_text + (0 if kind.endswith("-v2") else VIRTUAL_TOKENS))
    # Query, key, value, output and the two of the feed-forward part, in every layer but the last.
    full = 6 * (N_LAYERS - 1)
    assert Counter(math.prod(array.shape[:-1]) for array in arrays) == {n_rows: full, n_batch: n_dense - full - 2}


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_an_encoder_written_anew_gives_pefts_logits(kind: str, adapter: Folders, base_model: Folders) -> None:
    loaded = load_adapter(adapter(kind))
    folded = FoldedEncoder(load_prompted_classifier(loaded, find_adapter_base(loaded), attention="eager")).eval()
    generator = np.random.default_rng(7)
    for batch_size, length in ((1, 1), (4, 17), (9, POSITIONS - VIRTUAL_TOKENS)):
        batch = random_batch(generator, batch_size, length, token_types=has_types(kind))
        with torch.inference_mode():
            logits = folded(**{name: torch.from_numpy(array) for name, array in batch.items()})["logits"].numpy()
        assert np.abs(logits - peft_logits(adapter(kind), base_model(family_of(kind)), batch)).max() < 1e-5


@pytest.mark.parametrize("kind", ["roberta", "roberta-v2", "xlm-roberta-v2"])
def test_a_padding_token_inside_a_text_is_numbered_as_peft_numbers_it(
    kind: str, bundle: Folders, adapter: Folders, base_model: Folders
) -> None:
    """RoBERTa leaves it out of the count where it is given ids, and counts it where it is given embeddings."""
    batch = {
        "input_ids": np.array([[0, 5, 1, 7, 1, 1, 9, 2], [1, 8, 1, 2, 1, 1, 1, 1]]),
        "attention_mask": np.array([[1] * 8, [1] * 4 + [0] * 4]),
    }
    session = open_graph(bundle(kind))
    logits = session.run(["logits"], batch)[0]
    assert np.abs(logits - peft_logits(adapter(kind), base_model(family_of(kind)), batch)).max() < 1e-5


def test_an_encoder_that_embeds_in_another_width_than_it_computes_in(tmp_path: Path, data: Data) -> None:
    """As ELECTRA's small models do: their projection stands between the embeddings and the first layer."""
    from transformers import AutoConfig, AutoModel

    base = make_base_model(tmp_path / "base", "electra")
    config = AutoConfig.from_pretrained(base)
    config.embedding_size = 16
    AutoModel.from_config(config).save_pretrained(base)
    flags = f"--virtual-tokens {VIRTUAL_TOKENS} --method p-tuning-v2 --epochs 1".split()
    adapter_folder = tmp_path / "adapter"
    assert train_main(["--model", str(base), "--out", str(adapter_folder), *flags, *data.flags]) == 0
    assert main([str(adapter_folder), "--out", str(tmp_path / "b")]) == 0
    batch = random_batch(np.random.default_rng(2), 4, 13, token_types=True)
    logits = open_graph(tmp_path / "b").run(["logits"], batch)[0]
    assert np.abs(logits - peft_logits(adapter_folder, base, batch)).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_gives_pefts_logits_on_shapes_that_were_not_traced(
    kind: str, bundle: Folders, adapter: Folders, base_model: Folders
) -> None:
    session = open_graph(bundle(kind))
    generator = np.random.default_rng(3)
    for batch_size, length in ((1, 1), (1, 11), (5, 23), (11, POSITIONS - VIRTUAL_TOKENS)):
        batch = random_batch(generator, batch_size, length, token_types=has_types(kind))
        if family_of(kind) in DECODERS:
            # PEFT reads the last row, be it padding, and takes a last padding token for padding.
            batch["attention_mask"][:] = 1
            batch["input_ids"][:, -1] = 7
        expected = peft_logits(adapter(kind), base_model(family_of(kind)), batch)
        assert np.abs(session.run(["logits"], batch)[0] - expected).max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_of_the_graph_does_not_depend_on_its_batch(kind: str, bundle: Folders) -> None:
    session = open_graph(bundle(kind))
    batch = random_batch(np.random.default_rng(6), 7, 19, token_types=has_types(kind))
    together = session.run(["logits"], batch)[0]
    # Other padding, and more of it.
    padded = {name: np.pad(array, ((0, 0), (0, 9))) for name, array in batch.items()}
    padded["input_ids"] = np.where(padded["attention_mask"] == 1, padded["input_ids"], 3)
    assert np.abs(session.run(["logits"], padded)[0] - together).max() < 1e-5
    for row, length in enumerate(batch["attention_mask"].sum(axis=1)):
        alone = {name: array[row : row + 1, :length] for name, array in batch.items()}
        assert np.abs(session.run(["logits"], alone)[0] - together[row]).max() < 1e-5
    # And texts do differ, or all of this shows nothing.
    assert np.abs(together - together[0]).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_loads_in_optimum_and_gives_the_same_logits(kind: str, bundle: Folders) -> None:
    from optimum.onnxruntime import ORTModelForSequenceClassification

    model = ORTModelForSequenceClassification.from_pretrained(bundle(kind))
    assert model.config.id2label == {0: "not_equivalent", 1: "equivalent"}
    # text-embeddings-inference takes for a classifier what says so here.
    assert all(name.endswith("ForSequenceClassification") for name in model.config.architectures)
    assert len(model.config.architectures) == 1
    classifier = OnnxClassifier(load_bundle(bundle(kind)), threads=1)
    batch = random_batch(np.random.default_rng(4), 3, 12, token_types=has_types(kind))
    result = model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits.numpy()
    assert np.abs(result - classifier.logits(batch)).max() < 1e-6


def test_the_manifest_records_what_was_measured(bundle: Folders, adapter: Folders) -> None:
    manifest = json.loads((bundle("bert") / "manifest.json").read_text())
    training = json.loads((adapter("bert") / "training.json").read_text())
    assert manifest["base_model"]["sha256"] == training["model"]["sha256"]
    (task,) = manifest["tasks"]
    assert task["name"] == "bert"
    assert task["task"] == training["task"]
    assert manifest["method"] == "p-tuning"
    assert load_bundle(bundle("bert-v2")).method == "p-tuning-v2"
    assert load_bundle(bundle("bert")).find_task().task.labels == ("not_equivalent", "equivalent")
    assert manifest["virtual_tokens"] == VIRTUAL_TOKENS
    assert manifest["max_length"] == POSITIONS - VIRTUAL_TOKENS
    # Of the tiny tokenizer: four special tokens and ninety words.
    assert manifest["vocabulary_size"] == 94
    # Where no labelled rows are at hand, nothing but fp32 can be justified.
    assert manifest["graphs"] == [{"precision": "fp32", "file": "model.onnx", "gates": []}]
    assert manifest["refused"] == []
    assert task["quality"] == {
        "n_validation": 40,
        "validation": training["validation"],
        "baselines": training["baselines"],
    }
    assert (
        manifest["providers_tried"] == ["CPUExecutionProvider"]
        or "CUDAExecutionProvider" in manifest["providers_tried"]
    )
    parity = task["parity"]
    shapes = {(row["batch_size"], row["sequence_length"]) for row in parity["rows"]}
    traced = manifest["traced_shape"]
    assert (traced["batch_size"], traced["sequence_length"]) not in shapes
    assert len(shapes) >= 5
    assert max(length for _, length in shapes) == POSITIONS - VIRTUAL_TOKENS
    assert sum(row["padding_tokens"] for row in parity["rows"]) > 0
    assert 0 < parity["max_logit_difference"] <= parity["tolerance"] == 1e-4
    # BLOOM takes texts of any length; attention over 2,043 tokens would only cost memory.
    (task,) = json.loads((bundle("bloom") / "manifest.json").read_text())["tasks"]
    assert max(row["sequence_length"] for row in task["parity"]["rows"]) == 1024


@pytest.mark.parametrize("kind", ["bert", "bert-v2", "opt"])
def test_a_graph_that_differs_from_pytorch_fails_the_export_and_leaves_nothing(
    kind: str,
    adapter: Folders,
    no_leftovers: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The fault is put into the graph: one learned number is off by a little."""
    write_graph = export.fold.trace.write_graph

    def write_wrong_graph(
        classifier: export.fold.trace.PromptedClassifier, path: Path, *, is_decoder: bool, virtual_tokens: int
    ) -> export.fold.trace.Graph:
        graph = write_graph(classifier, path, is_decoder=is_decoder, virtual_tokens=virtual_tokens)
        model = onnx.load(path)
        for item in model.graph.initializer:
            if item.name == graph.prompt_initializers[-1]:
                table = onnx.numpy_helper.to_array(item).copy()
                table.flat[0] += 0.5
                item.CopyFrom(onnx.numpy_helper.from_array(table, item.name))
        onnx.save(model, path)
        return graph

    monkeypatch.setattr(export.fold.trace, "write_graph", write_wrong_graph)
    folder = adapter(kind)
    capsys.readouterr()
    assert main([str(folder), "--out", str(no_leftovers / "b")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The exported graph differs from PyTorch by")
    assert "0.0001 is allowed" in error
    assert list(no_leftovers.iterdir()) == []


def test_an_adapter_of_another_base_model_is_refused(
    adapter: Folders, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_base_model(no_leftovers / "other", "bert")
    flip_bit(other / "model.safetensors", 4000)
    copy = no_leftovers / "adapter"
    shutil.copytree(adapter("bert"), copy)
    training = json.loads((copy / "training.json").read_text())
    training["model"]["name"] = str(other)
    (copy / "training.json").write_text(json.dumps(training))
    assert main([str(copy), "--out", str(no_leftovers / "b")]) == 2
    assert "was trained on another base model" in capsys.readouterr().err
    assert not (no_leftovers / "b").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["{tmp}/none", "--out", "{tmp}/b"], "There is no adapter folder"),
        (["{tmp}", "--out", "{tmp}/b"], "is no adapter of promptfold"),
        (["{adapter}", "--out", "{tmp}"], "holds something that is no bundle"),
        (["{adapter}"], "--out"),
        ([], "--help"),
    ],
)
def test_a_wrong_argument_ends_with_one_sentence_and_status_2(
    flags: list[str], words: str, adapter: Folders, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (no_leftovers / "x.txt").write_text("x")
    filled = [flag.replace("{tmp}", str(no_leftovers)).replace("{adapter}", str(adapter("bert"))) for flag in flags]
    assert main(filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert [path.name for path in no_leftovers.iterdir()] == ["x.txt"]


def test_an_older_bundle_is_replaced_only_when_asked(
    adapter: Folders, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = no_leftovers / "b"
    assert main([str(adapter("bert")), "--out", str(out)]) == 0
    first = load_bundle(out)
    assert main([str(adapter("electra")), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert load_bundle(out) == first
    assert main([str(adapter("electra")), "--out", str(out), "--overwrite"]) == 0
    assert load_bundle(out).tasks[0].adapter_sha256 != first.tasks[0].adapter_sha256


@pytest.mark.parametrize("name", ["model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_one_flipped_bit_in_a_bundle_is_refused(name: str, bundle: Folders, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle("bert"), copy)
    flip_bit(copy / name, 1234)
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 3}, "format version 3; this promptfold reads 4"),
        ({"format_version": 5}, "format version 5; this promptfold reads 4"),
        ({"tasks": None}, "wrong form"),
        ({"tasks": [{"name": "mrpc"}]}, "wrong form"),
        ({"graphs": [{"precision": "fp7", "file": "model.onnx", "gates": []}]}, "wrong form"),
        ({"graphs": [{"precision": "int8", "file": "model_int8.onnx", "gates": [{}]}]}, "wrong form"),
        ({"sha256": {}}, "has no SHA-256 of model.onnx"),
        ({"sha256": {"model.onnx": "", "tokenizer.json": "", "config.json": "", "../x": ""}}, "model.onnx is damaged"),
        ({"sha256": {"../x": "", "model.onnx": "", "tokenizer.json": "", "config.json": ""}}, "outside its folder"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(
    change: dict[str, object], words: str, bundle: Folders, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle("bert"), copy)
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=words):
        load_bundle(copy)


def test_a_missing_file_is_named(bundle: Folders, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle("bert"), copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"lacks tokenizer\.json"):
        load_bundle(copy)
    with pytest.raises(BundleError, match="There is no bundle folder"):
        load_bundle(tmp_path / "none")


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_the_runtime_tokenises_as_transformers_does(family: str, bundle: Folders) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(bundle(family))
    rows = make_pairs(6, seed=5)
    rows[0]["sentence2"] = " ".join(["word3"] * 60)
    pairs = [(str(row["sentence1"]), str(row["sentence2"])) for row in rows]
    expected = reference(
        [first for first, _ in pairs],
        [second for _, second in pairs],
        padding=True,
        truncation="longest_first",
        return_tensors="np",
    )
    tokenize = OnnxClassifier(load_bundle(bundle(family)), threads=1).tokenize
    encoded = tokenize(pairs)
    assert set(encoded.arrays) == set(expected) == set(inputs_of(family))
    for name, array in encoded.arrays.items():
        assert np.array_equal(array, expected[name])
    assert encoded.cut == (True, False, False, False, False, False)
    assert encoded.arrays["input_ids"].shape[1] == POSITIONS - VIRTUAL_TOKENS

    singles = [first for first, _ in pairs]
    expected = reference(singles, padding=True, truncation=True, return_tensors="np")
    encoded = tokenize([(single,) for single in singles])
    for name, array in encoded.arrays.items():
        assert np.array_equal(array, expected[name])


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(BundleError, match="is no tokenizer"):
        TextTokenizer(path, max_length=8, pad_token_id=1, inputs=["input_ids"])


def test_the_runtime_says_on_what_it_runs(bundle: Folders) -> None:
    classifier = OnnxClassifier(load_bundle(bundle("bert")), threads=1, use_cuda=False)
    execution = classifier.execution
    assert (execution.provider, execution.on_cuda, execution.threads, execution.precision) == (
        "CPUExecutionProvider",
        False,
        1,
        "fp32",
    )
    assert execution.engine == f"ONNX Runtime {onnxruntime.__version__}"


def test_a_graph_that_onnx_runtime_cannot_load_is_refused(tmp_path: Path) -> None:
    from export.runtime.session import open_session

    path = tmp_path / "model.onnx"
    path.write_bytes(b"no protobuf")
    with pytest.raises(BundleError, match="ONNX Runtime cannot load"):
        open_session(path, threads=1, use_cuda=False)


def test_a_bert_with_relative_positions_is_exported_without_the_rewrite(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its layers have a term that `FoldedEncoder` does not know; the export itself holds it against PEFT."""
    from transformers import BertConfig, BertModel

    base = make_base_model(tmp_path / "base", "bert")
    config = BertConfig.from_pretrained(base, position_embedding_type="relative_key_query", attn_implementation="eager")
    torch.manual_seed(3)
    BertModel(config).save_pretrained(base)
    adapters = [tmp_path / name for name in ("one", "two")]
    for folder in adapters:
        flags = ["--model", str(base), "--virtual-tokens", "5", "--epochs", "1", "--out", str(folder), *data.flags]
        assert train_main(flags) == 0
    assert main([str(adapters[0]), "--out", str(tmp_path / "b")]) == 0
    batch = random_batch(np.random.default_rng(5), 4, 20, token_types=True)
    golden = peft_logits(adapters[0], base, batch)
    assert np.abs(open_graph(tmp_path / "b").run(["logits"], batch)[0] - golden).max() < 1e-4
    capsys.readouterr()
    assert main([*map(str, adapters), "--out", str(tmp_path / "c")]) == 2
    assert "has relative positions (relative_key_query)" in capsys.readouterr().err


def test_a_tokenizer_without_token_types_means_the_same_to_the_bundle_as_in_training(
    data: Data, tmp_path: Path
) -> None:
    """Training, like PEFT's users, then gives a BERT zeros for both sentences."""
    from transformers import AutoTokenizer

    base = make_base_model(tmp_path / "base", "bert")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    adapter_folder = tmp_path / "a"
    flags = ["--model", str(base), "--virtual-tokens", "5", "--epochs", "1", "--out", str(adapter_folder), *data.flags]
    assert train_main(flags) == 0
    assert main([str(adapter_folder), "--out", str(tmp_path / "b")]) == 0
    pair = ("word1 word2 word3", "word4 word5")
    classifier = OnnxClassifier(load_bundle(tmp_path / "b"), threads=1)
    encoded = dict(AutoTokenizer.from_pretrained(adapter_folder)(*pair, return_tensors="np"))
    assert "token_type_ids" not in encoded
    golden = peft_logits(adapter_folder, base, encoded)
    assert np.abs(classifier.logits(classifier.tokenize([pair]).arrays) - golden).max() < 1e-5
