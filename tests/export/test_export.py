"""``python -m export`` through its entry point: what it writes, that it is equal, what it refuses.

tests/slow/export/test_every_kind.py runs the tests that take a kind of model for all of them.
"""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

import export.fold.pipeline
import export.fold.trace
from export.bundle.folder import load_bundle
from export.fold.config import ExportConfig
from export.fold.fold import FoldedModel
from export.fold.precision.texts import unchanged_file
from export.fold.read import read_sources
from tests.conftest import (
    ENCODERS,
    MAIN_KINDS,
    POSITIONS,
    VIRTUAL_TOKENS,
    Folders,
    family_of,
    is_decoder,
    make_pairs,
    peft_logits,
)
from tests.export.graphs import (
    N_LAYERS,
    change_manifest,
    inputs_of,
    manifest_of,
    padded_batch,
    peft_batch,
    refusal,
    run_export,
    run_file,
)
from tests.families import GENERIC
from train.__main__ import main as train
from train.common.errors import BundleError

USUAL_KINDS = MAIN_KINDS


def learned_prompt(kind: str, adapter_folder: Path, base_folder: Path) -> dict[str, np.ndarray]:
    """What the graph shall hold, by name, made of the adapter file with NumPy and transformers alone."""
    from transformers import AutoModel

    table = load_file(adapter_folder / "adapter_model.safetensors")["prompt_embeddings"]
    if kind in GENERIC:
        return {"prompt_embeddings": table}
    model: Any = AutoModel.from_pretrained(base_folder).eval()
    if kind in ENCODERS:
        name = "input_embeds" if kind == "distilbert" else "inputs_embeds"
        with torch.inference_mode():
            rows = model.embeddings(input_ids=None, **{name: torch.from_numpy(table)[None]})
            return {"prompt_rows": getattr(model, "embeddings_project", torch.nn.Identity())(rows).numpy()}
    if kind.endswith("-v2"):
        # PEFT's order: each virtual token's row holds, layer by layer, its keys and then its values, head by head.
        width = GENERIC[family_of(kind)].sizes.get("head_dim", 8) if family_of(kind) in GENERIC else 8
        layers = table.reshape(VIRTUAL_TOKENS, N_LAYERS, 2, -1, width).transpose(1, 2, 3, 0, 4)[:, :, None].copy()
        if family_of(kind) in ENCODERS:
            # There the last layer adds its biases after the sum over the keys.
            attention = model.encoder.layer[-1].attention.self
            for i, dense in enumerate([attention.key, attention.value]):
                layers[-1, i] -= dense.bias.detach().numpy().reshape(1, -1, 1, 8)
    else:
        mask = torch.ones(1, VIRTUAL_TOKENS, dtype=torch.long)
        with torch.inference_mode():
            cache = model(inputs_embeds=torch.from_numpy(table)[None], attention_mask=mask, use_cache=True)
        layers = np.stack([np.stack([keys, values]) for keys, values in cache.past_key_values.to_legacy_cache()])
    names = [(layer, i, name) for layer in range(N_LAYERS) for i, name in enumerate(["key", "value"])]
    return {f"prompt_{name}_{layer}": layers[layer, i] for layer, i, name in names}


def test_the_graph_takes_any_batch_and_holds_the_learned_prompt_under_the_names_of_the_manifest(
    kind: str, bundle: Folders, adapter: Folders, base_model: Folders
) -> None:
    """An encoder's rows as its first layer reads them; else keys and values. No request pays for either."""
    model = onnx.load(bundle(kind) / "model.onnx", load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [item.name for item in model.graph.input] == inputs_of(kind)
    for item in model.graph.input:
        assert item.type.tensor_type.elem_type == onnx.TensorProto.INT64
        dimensions = [dimension.dim_param for dimension in item.type.tensor_type.shape.dim]
        assert dimensions == ["batch_size", "sequence_length"]
    assert [item.name for item in model.graph.output] == ["logits"]
    assert not [item for item in model.graph.initializer if item.external_data]

    initializers = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    expected = learned_prompt(kind, adapter(kind), base_model(family_of(kind)))
    assert manifest_of(bundle(kind))["prompt_initializers"] == list(expected)
    for name, array in expected.items():
        assert initializers[name].shape == array.shape
        assert np.abs(initializers[name] - array).max() < 1e-5
    if family_of(kind) not in {"llama", "opt", *GENERIC}:  # whose keys, values or embeddings may be 16 wide
        # The prompt encoder, whose hidden size is 16, is gone, and so is the length that was traced.
        assert not [name for name, array in initializers.items() if 16 in array.shape]


def test_in_an_encoders_graph_the_last_layer_is_computed_for_row_0_alone(
    encoder_kind: str, bundle: Folders, base_model: Folders
) -> None:
    """No dense layer of it sees any other row, and its keys and values are no dense layers any more."""
    from transformers import AutoModelForSequenceClassification

    graph = onnx.load(bundle(encoder_kind) / "model.onnx")
    ranks = {item.name: len(item.dims) for item in graph.graph.initializer}
    dense = [node for node in graph.graph.node if node.op_type in {"Gemm", "MatMul"}]
    outputs = [node.output[0] for node in dense if ranks.get(node.input[1]) == 2]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    n_batch, n_text = 3, 11
    arrays = session.run(outputs, peft_batch(encoder_kind, n_batch, n_text))

    model = AutoModelForSequenceClassification.from_pretrained(base_model(family_of(encoder_kind)))
    n_dense = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    n_rows = n_batch * (n_text + (0 if encoder_kind.endswith("-v2") else VIRTUAL_TOKENS))
    # Query, key, value, output and the two of the feed-forward part, in every layer but the last.
    full = 6 * (N_LAYERS - 1)
    assert Counter(math.prod(array.shape[:-1]) for array in arrays) == {n_rows: full, n_batch: n_dense - full - 2}


def test_the_graph_gives_pefts_logits_on_shapes_that_were_not_traced(
    kind: str, bundle: Folders, adapter: Folders, base_model: Folders
) -> None:
    tolerance = 1e-5 if family_of(kind) in ENCODERS else 1e-4
    shapes = ((1, 1), (1, 11), (4, 17), (5, 23), (11, POSITIONS - VIRTUAL_TOKENS))
    batches = [peft_batch(kind, *shape, seed) for seed, shape in enumerate(shapes)]
    if "roberta" in kind:
        # A padding token inside a text: RoBERTa does not count its position where it is given ids, only with embeddings.
        ids = np.array([[0, 5, 1, 7, 1, 1, 9, 2], [1, 8, 1, 2, 1, 1, 1, 1]])
        batches.append({"input_ids": ids, "attention_mask": np.array([[1] * 8, [1] * 4 + [0] * 4])})
    for batch in batches:
        expected = peft_logits(adapter(kind), base_model(family_of(kind)), batch)
        assert np.abs(run_file(bundle(kind) / "model.onnx", batch) - expected).max() < tolerance


def test_a_prediction_of_the_graph_does_not_depend_on_its_batch(kind: str, bundle: Folders) -> None:
    graph = bundle(kind) / "model.onnx"
    batch = padded_batch(kind, 7, 19, seed=6)
    together = run_file(graph, batch)
    # Other padding, and more of it.
    padded = {name: np.pad(array, ((0, 0), (0, 9))) for name, array in batch.items()}
    padded["input_ids"] = np.where(padded["attention_mask"] == 1, padded["input_ids"], 3)
    assert np.abs(run_file(graph, padded) - together).max() < 1e-5
    for row, length in enumerate(batch["attention_mask"].sum(axis=1)):
        alone = {name: array[row : row + 1, :length] for name, array in batch.items()}
        assert np.abs(run_file(graph, alone) - together[row]).max() < 1e-5
    # And texts do differ, or all of this shows nothing.
    assert np.abs(together - together[0]).max() > 1e-3


def test_a_bundle_holds_these_files_and_its_manifest_records_what_was_measured(
    bundle: Folders, adapter: Folders, tmp_path: Path
) -> None:
    assert {path.name for path in bundle("bert").iterdir()} == {
        *("config.json", "manifest.json", "model.onnx"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
    }
    manifest = manifest_of(bundle("bert"))
    training = json.loads((adapter("bert") / "training.json").read_text())
    assert manifest["base_model"]["sha256"] == training["model"]["sha256"]
    (task,) = manifest["tasks"]
    assert (task["name"], task["task"]) == ("bert", training["task"])
    assert manifest["method"] == "p-tuning"
    assert load_bundle(bundle("roberta-v2")).method == "p-tuning-v2"
    assert load_bundle(bundle("bert")).find_task().task.labels == ("not_equivalent", "equivalent")
    assert (manifest["virtual_tokens"], manifest["max_length"]) == (VIRTUAL_TOKENS, POSITIONS - VIRTUAL_TOKENS)
    # Of the tiny tokenizer: four special tokens and ninety words.
    assert manifest["vocabulary_size"] == 94
    # Where no labelled rows are at hand, nothing but fp32 can be justified.
    assert manifest["graphs"] == [{"precision": "fp32", "file": "model.onnx", "gates": []}]
    assert manifest["refused"] == []
    validation = {"validation": training["validation"], "baselines": training["baselines"]}
    assert task["quality"] == {"n_validation": 40, **validation}
    providers = manifest["providers_tried"]
    assert providers == ["CPUExecutionProvider"] or "CUDAExecutionProvider" in providers
    parity = task["parity"]
    shapes = {(row["batch_size"], row["sequence_length"]) for row in parity["rows"]}
    assert tuple(manifest["traced_shape"].values()) not in shapes
    assert len(shapes) >= 5
    assert max(length for _, length in shapes) == POSITIONS - VIRTUAL_TOKENS
    assert sum(row["padding_tokens"] for row in parity["rows"]) > 0
    assert 0 < parity["max_logit_difference"] <= parity["tolerance"] == 1e-4
    # Bundles of format 4 were first written without saying whether they are decoders.
    for kind in (kind for kind in MAIN_KINDS if kind not in GENERIC):
        old = shutil.copytree(bundle(kind), tmp_path / kind)
        change_manifest(old, lambda manifest: manifest.pop("is_decoder"))
        assert load_bundle(old).is_decoder == load_bundle(bundle(kind)).is_decoder == is_decoder(kind)


def test_a_graph_that_differs_from_pytorch_fails_the_export_and_leaves_nothing(
    adapter: Folders, no_leftovers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault is put into the graph: one learned number is off by a little."""
    write_graph = export.fold.trace.write_graph

    def write_wrong_graph(folded: FoldedModel, path: Path) -> export.fold.trace.WrittenGraph:
        written = write_graph(folded, path)
        model = onnx.load(path)
        (item,) = (item for item in model.graph.initializer if item.name == folded.prompt_names[-1])
        table = onnx.numpy_helper.to_array(item).copy()
        table.flat[0] += 0.5
        item.CopyFrom(onnx.numpy_helper.from_array(table, item.name))
        onnx.save(model, path)
        return written

    monkeypatch.setattr(export.fold.trace, "write_graph", write_wrong_graph)
    error = refusal(capsys, adapter("roberta-v2"), "--out", no_leftovers / "b")
    assert error.startswith("error: The exported graph differs from PyTorch by")
    assert "0.0001 is allowed" in error
    assert list(no_leftovers.iterdir()) == []


def test_a_bundle_that_cannot_be_opened_never_takes_its_place(
    adapter: Folders,
    bundle: Folders,
    no_leftovers: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file changes between its hash and the bundle's opening."""
    out = shutil.copytree(bundle("bert"), no_leftovers / "b")
    first = load_bundle(out)
    write_manifest = export.fold.pipeline.write_manifest

    def write_and_change(folder: Path, *rest: Any, **more: Any) -> None:
        write_manifest(folder, *rest, **more)
        (folder / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(export.fold.pipeline, "write_manifest", write_and_change)
    assert "tokenizer.json" in refusal(capsys, adapter("gpt2"), "--out", out, "--overwrite", "--precision", "fp32")
    assert load_bundle(out) == first


def test_an_older_bundle_is_replaced_only_when_asked(
    adapter: Folders, bundle: Folders, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(bundle("bert"), no_leftovers / "b")
    first = load_bundle(out)
    assert "--overwrite" in refusal(capsys, adapter("gpt2"), "--out", out)
    assert load_bundle(out) == first
    assert run_export(adapter("gpt2"), "--out", out, "--overwrite") == 0
    assert "other precisions, compared with fp32 on" in capsys.readouterr().out
    assert load_bundle(out).tasks[0].adapter_sha256 != first.tasks[0].adapter_sha256
    # What is no bundle never is.
    (no_leftovers / "mine").mkdir()
    (no_leftovers / "mine" / "x.txt").write_text("x")
    for flags in ((), ("--overwrite",)):
        error = refusal(capsys, adapter("gpt2"), "--out", no_leftovers / "mine", *flags)
        assert "holds something that is no bundle" in error
    assert [path.name for path in (no_leftovers / "mine").iterdir()] == ["x.txt"]


FP32 = {"precision": "fp32", "gates": []}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 3}, "format version 3; this promptfold reads 4"),
        ({"format_version": 5}, "format version 5; this promptfold reads 4"),
        ({"tasks": None}, "wrong form"),
        ({"graphs": [{"precision": "fp7", "file": "model.onnx", "gates": []}]}, r"json, graphs\.0\.precision: Input"),
        ({"graphs": [{"precision": "int8", "gates": [{}]}]}, r"manifest\.json, graphs\.0\.gates\.0\.file: Field"),
        ({"graphs": [FP32, FP32 | {"precision": "int8"}]}, r"has no SHA-256 of model_int8\.onnx"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(
    change: dict[str, object], words: str, bundle: Folders, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle("bert"), tmp_path / "copy")
    change_manifest(copy, lambda manifest: manifest.update(change))
    with pytest.raises(BundleError, match=words):
        load_bundle(copy)


def test_what_was_trained_on_shards_is_judged_by_them(
    base_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pattern or a folder stands for several files, which the export reads as the training did."""
    for folder, name, seed in (("all", "v", 6), ("checks", "", 6), ("all", "", 5), ("shards", "", 5)):
        (tmp_path / folder).mkdir(exist_ok=True)
        rows = [f"{row['sentence1']}^{row['label']}\n" for row in make_pairs(48, seed=seed)]
        for number in range(2):
            (tmp_path / folder / f"{name}{number}.csv").write_text("text^label\n" + "".join(rows[number::2]))
    flags = f"--virtual-tokens 5 --encoder-hidden-size 16 --max-steps 1 --text-columns text --delimiter ^ --overwrite --out {tmp_path}/a"
    words = ["--model", str(base_model("bert")), *flags.split()]
    for place, name, checks in ((tmp_path / "all", "[01].csv", "v*.csv"), (tmp_path, "shards", "checks")):
        monkeypatch.chdir(place)  # an adapter keeps the names of its files, not their folders
        assert train(["--train-file", name, "--validation-file", checks, *words]) == 0
        assert len(json.loads((tmp_path / "a" / "training.json").read_text())["data_sha256"]["train"]) == 64
        (task,) = read_sources(ExportConfig((tmp_path / "a",), out=tmp_path / "b", precision="int8")).tasks
        assert task.rows is not None
        assert (len(task.rows.dataset), str(task.rows.file)) == (48, checks)
        assert task.texts is not None
        assert len(task.texts.rows) == 48
    (tmp_path / "checks" / "1.csv").write_text("text^label\na^1\n")
    (task,) = read_sources(ExportConfig((tmp_path / "a",), out=tmp_path / "b", precision="int8")).tasks
    assert task.rows is None  # they are others now
    assert unchanged_file(Path("/**/*.csv"), "0" * 64) is None
