"""Untrusted adapters, base models and bundles, made for real, that would run code, read other files, or take all memory."""

import builtins
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import train.common.limits
from export.__main__ import main as export_main
from export.bundle.folder import BUNDLE, load_bundle
from export.runtime.classifier import OnnxClassifier
from export.runtime.session import open_session
from export.runtime.trial import try_bundle
from export.triton import TritonConfig, write_triton_repository
from tests.conftest import ROOT, Data, Folders
from train.__main__ import main as train_main
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base, load_peft_model, load_prompted_classifier
from train.adapter.record import ADAPTER
from train.common.errors import AdapterError, BundleError, ModelError
from train.common.folder_record import FolderKind, content_of, write_record
from train.model.classifier import load_classifier
from train.model.find import find_base_model
from train.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
MakeGraph = Callable[[], onnx.ModelProto]
Copies = Callable[[str], tuple[Path, FolderKind]]
Hostile = Callable[[onnx.ModelProto | bytes], Path]
KIND_NAMES = ("adapter", "bundle")
GRAPH = {"precision": "fp32", "file": "../../../etc/passwd", "gates": []}
EXABYTE = (2**60).to_bytes(8, "little") + b"{}"
KIND = "peft_type: Input should be"
BAD_JSON = ("[" * 100_000, '{"a":' * 100_000, '{"format_version": ' + "9" * 10_000 + "}", "[1]", "", "\ud800")


def rehash(folder: Path, kind: FolderKind, **changes: Any) -> None:
    """Make a folder's hashes anew, and change entries of its record."""
    path = folder / kind.record
    content = content_of(json.loads(path.read_text(encoding="utf-8"))) | changes
    path.unlink()
    write_record(folder, kind, content, unhashed=["README.md", "curves.png"] if kind is ADAPTER else [])


def load(folder: Path, kind: FolderKind) -> object:
    return load_bundle(folder) if kind is BUNDLE else load_adapter(folder)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def sparse(path: Path, n_bytes: int) -> None:
    """A file that has its length and nothing in it."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(n_bytes)


@dataclass
class Trap:
    """An object whose pickle makes a folder when it is loaded."""

    canary: Path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """What hostile code makes when it runs."""
    return tmp_path / "hostile-code-was-here"


@pytest.fixture
def copies(adapter: Folders, bundle: Folders, tmp_path: Path) -> Copies:
    """A function from "adapter" or "bundle" to a copy of one, and its kind."""

    def get(name: str) -> tuple[Path, FolderKind]:
        folder = tmp_path / name
        shutil.copytree((adapter if name == "adapter" else bundle)("bert"), folder)
        return folder, (ADAPTER if name == "adapter" else BUNDLE)

    return get


@pytest.fixture
def base(base_model: Folders, tmp_path: Path) -> Path:
    """A copy of a base model."""
    return Path(shutil.copytree(base_model("bert"), tmp_path / "base"))


@pytest.fixture
def hostile(copies: Copies) -> Hostile:
    """A function from a graph to a bundle of it, whose hashes fit."""
    folder, kind = copies("bundle")

    def get(model: onnx.ModelProto | bytes) -> Path:
        content = model if isinstance(model, bytes) else model.SerializeToString()
        (folder / "model.onnx").write_bytes(content)
        rehash(folder, kind)
        return folder

    return get


def graph_of(body: str, *, domain: str = "", output: str = "logits") -> onnx.ModelProto:
    """A model that takes what a bundle's does, from ONNX's own text format."""
    inputs = ", ".join(f"int64[batch, length] {name}" for name in ("input_ids", "attention_mask", "token_type_ids"))
    opsets = '"" : 18' + (f', "{domain}" : 1' if domain else "")
    text = f"<ir_version: 9, opset_import: [{opsets}]> hostile ({inputs}) => (float[] {output}) {body}"
    return onnx.parser.parse_model(text)


def harmless() -> onnx.ModelProto:
    """Two logits, 1 and 1, of every text."""
    shape = "rows = Shape <start = 0, end = 1> (input_ids) shape = Concat <axis = 0> (rows, two)"
    ones = "ConstantOfShape <value = float[1] {1.0}> (shape)"
    return graph_of(f"<int64[1] two = {{2}}> {{ {shape} logits = {ones} }}")


def test_the_trap_works(canary: Path) -> None:
    pickle.loads(pickle.dumps(Trap(canary)))  # noqa: S301 -- our own
    assert canary.exists()


@pytest.mark.parametrize("name", KIND_NAMES)
@pytest.mark.parametrize(
    ("listed", "words"),
    [
        *((name, "lists a file outside its folder") for name in ("../outside", "a/b", "/etc/hostname", ".")),
        *(("", "lacks"), ("..", "lacks .."), ("x\0y", "lacks x"), ("x" * 5000, "cannot be read")),
    ],
)
def test_a_record_that_names_a_file_elsewhere_is_refused(name: str, listed: str, words: str, copies: Copies) -> None:
    folder, kind = copies(name)
    (folder.parent / "outside").write_text("x")
    record = json.loads((folder / kind.record).read_text())
    change_json(folder / kind.record, sha256=record["sha256"] | {listed: "0" * 64})
    with pytest.raises(kind.error, match=words):
        load(folder, kind)


@pytest.mark.parametrize("name", KIND_NAMES)
@pytest.mark.parametrize("file", ["tokenizer.json", "extra.txt", ".hidden", "{record}"])
@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
def test_a_link_is_refused_wherever_it_leads(name: str, file: str, target: str, copies: Copies) -> None:
    """Also to the very bytes whose hash is recorded; a copy without links is what the refusal says."""
    folder, kind = copies(name)
    path = folder / file.format(record=kind.record)
    elsewhere, copy = folder.parent / "elsewhere", folder.parent / "COPY"
    if target == "folder":
        elsewhere.mkdir()
    elif target == "file":
        elsewhere.write_bytes(path.read_bytes() if path.exists() else b"x")
    path.unlink(missing_ok=True)
    path.symlink_to(elsewhere)
    with pytest.raises(kind.error, match="is a link" if target == "file" or file[0] in "e." else "lacks") as refused:
        load(folder, kind)
    if target == "file":
        assert "cp -rL" in str(refused.value)
        subprocess.run(["cp", "-rL", str(folder), str(copy)], check=True)  # noqa: S607
        assert file != "tokenizer.json" or load(copy, kind)


@pytest.mark.parametrize("name", KIND_NAMES)
@pytest.mark.parametrize("file", ["{record}", "tokenizer.json", "tokenizer_config.json", "unlisted"])
def test_a_pipe_or_a_socket_is_never_read(name: str, file: str, copies: Copies, monkeypatch: Patch) -> None:
    """To open a pipe would wait for ever."""
    folder, kind = copies(name)
    path = folder / file.format(record=kind.record)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(kind.error, match=r"is no plain file|lacks"):
        load(folder, kind)
    path.unlink()
    monkeypatch.chdir(folder)  # a socket's name may have a hundred characters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
        with pytest.raises(kind.error, match=r"is no plain file|lacks"):
            load(folder, kind)


@pytest.mark.parametrize(
    ("name", "mib", "limit", "files"),
    [
        ("adapter", 2**10, "64", "training.json tokenizer.json"),
        ("adapter", 17, "16", "training.json"),
        ("adapter", 100 * 2**10, "64", "adapter_model.bin"),
        ("adapter", 100 * 2**10, "2,048", "adapter_model.safetensors"),
        ("bundle", 2**10, "64", "manifest.json tokenizer.json config.json"),
        ("bundle", 100 * 2**10, "2,048", "model.onnx model_int8.onnx"),
    ],
)
def test_a_file_larger_than_any_is_refused(name: str, mib: int, limit: str, files: str, copies: Copies) -> None:
    for file in files.split():
        folder, kind = copies(name)
        sparse(folder / file, mib * 2**20)
        with pytest.raises(kind.error, match=f"{file} has .* MiB; no such file has more than {limit}"):
            load(folder, kind)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", KIND_NAMES)
def test_thousands_of_files_are_refused(name: str, copies: Copies, monkeypatch: Patch) -> None:
    """But folders within are left alone: `.git`, or what the hub's downloads leave."""
    monkeypatch.setattr(train.common.limits, "MAX_ENTRIES", 30)
    folder, kind = copies(name)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "link").symlink_to("/")
    load(folder, kind)
    rehash(folder, kind)
    load(folder, kind)
    for number in range(30):
        (folder / str(number)).touch()
    with pytest.raises(kind.error, match="holds more than 30 files"):
        load(folder, kind)


@pytest.mark.parametrize("name", KIND_NAMES)
@pytest.mark.parametrize("content", BAD_JSON, ids=["deep", "deep objects", "digits", "list", "empty", "surrogate"])
def test_a_record_that_is_no_usable_json_is_refused(name: str, content: str, copies: Copies) -> None:
    folder, kind = copies(name)
    (folder / kind.record).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(kind.error, match=f"{kind.record} (cannot be read|holds no JSON object)"):
        load(folder, kind)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_length", [2**60, 0, -1, 5.5, "40", float("inf")]),
        ("virtual_tokens", [2**60, True]),
        ("pad_token_id", [-1, 2**60]),
        ("vocabulary_size", [2**60]),
        ("inputs", [["input_ids", "attention_mask", "hidden"], ["input_ids"], [["input_ids", "attention_mask"]]]),
        ("graphs", [[GRAPH | {"gates": [1]}], [GRAPH | {"precision": "../model"}], []]),
        ("tasks", [{}, []]),
    ],
)
def test_a_manifest_of_nonsense_with_hashes_that_fit_is_refused(field: str, values: list[Any], copies: Copies) -> None:
    folder, kind = copies("bundle")
    content = json.loads((folder / kind.record).read_text())
    for value in values:
        rehash(folder, kind, **{field: value})
        with pytest.raises(BundleError, match=rf"manifest\.json, {field}"):
            load_bundle(folder)
    # The name of the graph's file is ours, whatever the manifest says.
    rehash(folder, kind, **{field: content[field], "graphs": [GRAPH]})
    assert load_bundle(folder).graph_path("fp32") == folder / "model.onnx"


@pytest.mark.parametrize("name", KIND_NAMES)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": [str(number) for number in range(100_000)]}, "from 2 to 1000 labels"),
        ({"labels": ["one"]}, "from 2 to 1000 labels"),
        ({"text_columns": ["a", "b", "c"]}, "one or two text columns"),
        ({"metrics": ["profit"]}, "metrics among"),
        ({"unknown": 1}, "wrong form"),
    ],
)
def test_a_task_that_none_can_be_is_refused(name: str, changes: dict[str, Any], words: str, copies: Copies) -> None:
    folder, kind = copies(name)
    record = json.loads((folder / kind.record).read_text())
    task = (record if kind is ADAPTER else record["tasks"][0])["task"] | changes
    rehash(folder, kind, **({"task": task} if kind is ADAPTER else {"tasks": [record["tasks"][0] | {"task": task}]}))
    with pytest.raises(kind.error, match=words):
        load(folder, kind)


def test_weights_are_read_from_sound_safetensors_alone(copies: Copies, canary: Path) -> None:
    folder, kind = copies("adapter")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(canary)))
    rehash(folder, kind)
    adapter = load_adapter(folder)
    found = find_adapter_base(adapter)
    load_prompted_classifier(adapter, found)
    load_peft_model(folder, found, adapter.labels)
    load_tokenizer(folder, adapter.max_length)
    assert export_main([str(folder), "--out", str(folder.parent / "b")]) == 0
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"lacks adapter_model\.safetensors"):
        load_adapter(folder)
    # As a name alone it makes no difference; nor is a header of an exabyte read.
    for content in ((folder / "adapter_model.bin").read_bytes(), EXABYTE):
        (folder / "adapter_model.safetensors").write_bytes(content)
        rehash(folder, kind)
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors cannot be read"):
            load_prompted_classifier(load_adapter(folder), found)
        with pytest.raises(AdapterError, match="does not fit"):
            load_peft_model(folder, found, adapter.labels)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # Of these kinds of PEFT one imports a module by name, one reads a pickle, one reads a tokenizer elsewhere.
        ({"peft_type": "LORA", "megatron_config": {"x": 1}, "megatron_core": "evil"}, KIND),
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "evil.bin"}, KIND),
        ({"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "../e"}, KIND),
        ({"peft_type": "PREFIX_TUNING"}, "describes a PREFIX_TUNING prompt"),
        ({"task_type": "CAUSAL_LM"}, "task_type: Input should be 'SEQ_CLS'"),
        ({"auto_mapping": {"base_model_class": "system", "parent_library": "os"}}, "auto_mapping: Input should be"),
        ({"num_virtual_tokens": 10**12}, "num_virtual_tokens: Input should be less than"),
        ({"token_dim": 10**12}, "token_dim: Input should be less than"),
        ({"token_dim": 2**23, "num_layers": 2**10}, "describes a prompt of"),
        ({"num_layers": None}, "num_layers: Input should be a valid integer"),
    ],
)
def test_a_configuration_for_anything_else_is_refused(changes: dict[str, Any], words: str, copies: Copies) -> None:
    folder, kind = copies("adapter")
    change_json(folder / "adapter_config.json", **changes)
    rehash(folder, kind)
    with pytest.raises(AdapterError, match=rf"adapter_config\.json.*{words}"):
        load_adapter(folder)


def test_a_tokenizers_code_is_never_run(copies: Copies, base: Path, canary: Path, monkeypatch: Patch) -> None:
    """Nor is a question about it asked on the terminal."""
    monkeypatch.setattr(builtins, "input", lambda *_: canary.write_text("asked") and "y")
    folder, _ = copies("adapter")
    code = {"AutoConfig": "hostile.Hostile", "AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}
    for place in (folder, base):
        change_json(place / "tokenizer_config.json", tokenizer_class="Hostile", auto_map=code)
        (place / "hostile.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Hostile: pass\n")
        with pytest.raises(ModelError, match=r"wants code of its own.*auto_map"):
            load_tokenizer(place, 40)
        change_json(place / "tokenizer_config.json", auto_map=None)
        with pytest.raises(ModelError, match="holds no tokenizer that can be loaded"):
            load_tokenizer(place, 40)
    # transformers turns to config.json where the tokenizer's own settings name no class.
    (folder / "tokenizer_config.json").write_text("{}")
    for model_type in ("bert", "evil"):
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": code}))
        with pytest.raises(ModelError, match=r"wants code of its own.*auto_map"):
            load_tokenizer(folder, 40)
    assert not canary.exists()


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file", "init_inputs"])
def test_a_tokenizer_whose_settings_name_another_file_is_refused(key: str, copies: Copies) -> None:
    """transformers would read that one, though tokenizer.json lies beside them."""
    folder, kind = copies("adapter")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    elsewhere = shutil.copyfile(folder / "tokenizer.json", folder.parent / "elsewhere.json")
    change_json(folder / "tokenizer_config.json", **{key: str(elsewhere)})
    rehash(folder, kind)
    with pytest.raises(ModelError, match=f"leads elsewhere, to other files .{key}"):
        load_tokenizer(folder, 40)
    with pytest.raises(AdapterError, match=f"leads elsewhere, to other files .{key}"):
        load_adapter(folder)
    # What old versions of save_pretrained wrote is fine.
    settings["special_tokens_map_file"] = "/home/me/x.json"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    load_tokenizer(folder, 40)


def test_a_base_model_of_pickled_weights_is_refused(base: Path, canary: Path, data: Data, capsys: Capture) -> None:
    """In one sentence. So is one with a header of an exabyte; its configuration fits the size of the rest."""
    (base / "model.safetensors").write_bytes(EXABYTE + bytes(100_000))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_classifier(find_base_model(str(base)), ["a", "b"])
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(canary)))
    assert train_main(["--model", str(base), "--out", str(base.parent / "a"), *data.flags]) == 2
    assert re.fullmatch("error: .*has no safetensors weights.*\n", capsys.readouterr().err)
    assert not (base.parent / "a").exists()
    assert not canary.exists()


@pytest.mark.parametrize("named", ["pytorch_model.bin", "../base/other.safetensors", "other.safetensors", "/x", None])
def test_an_index_of_weights_that_names_other_files_is_refused(named: str | None, base: Path, canary: Path) -> None:
    """transformers would read whatever it names, pickles too, and the hash would be that of the files it leaves out."""
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(canary)))
    index = {"weight_map": {"embeddings.word_embeddings.weight": named}} if named else {}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}} | index))
    with pytest.raises(ModelError, match=r"names other files than model\*\.safetensors"):
        find_base_model(str(base))


def test_a_base_model_in_parts_or_of_links_is_fine(base: Path, adapter: Folders, tmp_path: Path) -> None:
    """The hub's own cache is made of links."""
    from transformers import AutoModel

    AutoModel.from_pretrained(base).save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    load_classifier(find_base_model(str(tmp_path / "parts")), ["a", "b"])
    (tmp_path / "links").mkdir()
    for path in base.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    assert find_base_model(str(tmp_path / "links")).sha256 == find_base_model(str(base)).sha256
    # What transformers would load in place of an adapter is what its configuration names.
    shutil.copyfile(adapter("bert") / "adapter_config.json", base / "adapter_config.json")
    with pytest.raises(ModelError, match="is an adapter"):
        find_base_model(str(base))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "wants code of its own"),
        ({"transformers_weights": "../elsewhere/model.safetensors"}, "leads elsewhere, to other files"),
        ({"configuration_files": ["config.4.0.0.json"]}, "leads elsewhere, to other files"),
        ({"attn_implementation": "stranger/kernel"}, "wants attention by code from elsewhere"),
        ({"_attn_implementation": "stranger/kernel"}, "wants attention by code from elsewhere"),
        ({"_attn_implementation_internal": "stranger/kernel"}, "wants attention by code from elsewhere"),
        ({"_attn_implementation_internal": "flash_attention_2"}, "wants attention by code from elsewhere"),
        ({"hidden_size": 10**9}, "has hidden_size 1000000000"),
        ({"vocab_size": 10**12}, "has vocab_size 1000000000000"),
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers 1000000000"),
        ({"intermediate_size": 10**12}, "has intermediate_size 1000000000000"),
        ({"max_position_embeddings": 10**12}, "has max_position_embeddings 1000000000000"),
        ({"vocab_size": "94"}, "has vocab_size '94'"),
        ({"id2label": 7}, "cannot be used"),
        ({"quantization_config": {"quant_method": "gptq"}}, "describes a quantized model"),
    ],
)
def test_a_base_model_that_leads_elsewhere_is_refused(changes: dict[str, Any], words: str, base: Path) -> None:
    """Or whose sizes fit no weights."""
    change_json(base / "config.json", **changes)
    with pytest.raises(ModelError, match=words):
        find_base_model(str(base))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"])
def test_a_base_model_with_a_pipe_or_a_file_without_end_is_refused(file: str, base: Path) -> None:
    (base / file).unlink(missing_ok=True)
    os.mkfifo(base / file)
    with pytest.raises(ModelError, match=r"is no plain file|has no config"):
        find_base_model(str(base))
    sparse(base / file, 2**37)
    with pytest.raises(ModelError, match="no such file has more than"):
        find_base_model(str(base))


def test_a_harmless_graph_is_opened(hostile: Hostile) -> None:
    bundle = load_bundle(hostile(harmless()))
    try_bundle(bundle)
    classifier = OnnxClassifier(bundle, threads=1, use_cuda=False)
    assert np.array_equal(classifier.logits(classifier.tokenize([("a", "b")]).arrays), [[1, 1]])


@pytest.mark.parametrize("location", ["../../../../../../etc/passwd", "/etc/passwd", "weights.bin"])
@pytest.mark.parametrize("place", ["initializer", "constant"])
def test_numbers_in_another_file_are_refused(location: str, place: str, hostile: Hostile, tmp_path: Path) -> None:
    tensor = onnx.TensorProto(
        name="w", data_type=onnx.TensorProto.UINT8, dims=[8], data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    model = graph_of("{ logits = Cast <to = 1> (w) }")
    if place == "initializer":
        model.graph.initializer.append(tensor)
    else:
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=tensor))
    folder = hostile(model)
    (folder / "weights.bin").write_bytes(b"12345678")
    bundle = load_bundle(folder)
    for use in (
        lambda: OnnxClassifier(bundle, threads=1, use_cuda=False),
        lambda: open_session(folder / "model.onnx", threads=1),
        lambda: write_triton_repository(TritonConfig(folder, out=tmp_path / "models")),
    ):
        with pytest.raises(BundleError, match="is not opened: it holds a tensor whose numbers are in another file"):
            use()
    assert not (tmp_path / "models").exists()


ENDLESS_LOOP = """<bool go = {1}> { start = Cast <to = 1> (input_ids)
    logits = Loop <body = body (int64 i, bool more, float[] x) => (bool go_on, float[] x_out) {
        go_on = Identity (more) x_out = Identity (x) }> (, go, start) }"""
COMPILED = '{ logits = com.microsoft.EPContext <ep_cache_context = "../x"> (input_ids) }'


def with_part(part: str) -> onnx.ModelProto:
    model = harmless()
    getattr(model.graph if part == "sparse_initializer" else model, part).add()
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: graph_of(ENDLESS_LOOP), "a graph within the graph"),
        (lambda: with_part("functions"), "functions of its own"),
        (lambda: with_part("sparse_initializer"), "sparse tensors"),
        (lambda: with_part("training_info"), "a part for training"),
        (lambda: graph_of("{ logits = evil.Run (input_ids) }", domain="evil"), "operators of 'evil'"),
        (lambda: graph_of(COMPILED, domain="com.microsoft"), "a part that is compiled for one device"),
    ],
)
def test_a_graph_with_what_ours_never_holds_is_refused(make: MakeGraph, words: str, hostile: Hostile) -> None:
    with pytest.raises(BundleError, match=f"model.onnx is not opened: it holds {words}"):
        OnnxClassifier(load_bundle(hostile(make())), threads=1, use_cuda=False)


@pytest.mark.parametrize("entry", ["train", "export", "demo", "train.common.child"])
def test_kernels_cannot_be_imported_though_it_is_installed(entry: str, tmp_path: Path, canary: Path) -> None:
    """Through it transformers fetches code from the hub. Here a package of that name makes a folder as it is imported."""
    (tmp_path / "kernels.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    (tmp_path / "job.py").write_text("def job():\n    import kernels\n")
    code = {
        "train.common.child": "import job\nif __name__ == '__main__':\n    from train.common.child import run_in_child\n"
        "    run_in_child(job.job, name='x')\n"
    }.get(
        entry, f"import importlib.util, {entry}\nassert importlib.util.find_spec('kernels') is None\nimport kernels\n"
    )
    (tmp_path / "program.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, str(tmp_path / "program.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "ModuleNotFoundError: import of kernels halted" in result.stderr
    assert not canary.exists()
