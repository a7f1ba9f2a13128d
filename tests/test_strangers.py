"""What strangers may send: adapters, base models and bundles that would run code, read other files, or take all memory.

Each hostile thing is made for real, with hashes that fit: whoever makes a folder makes its hashes too.
"""

import builtins
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import export.runtime.trial
import train.common.limits
from export.__main__ import main as export_main
from export.bundle.folder import BUNDLE, load_bundle
from export.bundle.graph_outline import check_graph
from export.runtime.classifier import OnnxClassifier
from export.runtime.session import open_session
from export.runtime.tokenizer import TextTokenizer
from export.runtime.trial import try_bundle
from export.score.__main__ import main as score_main
from export.triton import TritonConfig, write_triton_repository
from tests.conftest import KINDS, ROOT, Data
from train.__main__ import main as train_main
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base, load_peft_model, load_prompted_classifier
from train.adapter.record import ADAPTER
from train.common.errors import AdapterError, BundleError, ModelError, PromptfoldError
from train.common.folder_record import FolderKind, content_of, write_record
from train.model.classifier import load_classifier
from train.model.find import find_base_model
from train.model.tokenizer import load_tokenizer

Folders = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("one_thread")

KIND_NAMES = ("adapter", "bundle")


# How strangers work


def rehash(folder: Path, kind: FolderKind, **changes: Any) -> None:
    """Make a folder's hashes anew, and change entries of its record."""
    path = folder / kind.record
    content = content_of(json.loads(path.read_text(encoding="utf-8"))) | changes
    path.unlink()
    unhashed = ["README.md", "curves.png"] if kind is ADAPTER else []
    write_record(folder, kind, content, unhashed=unhashed)


def load(folder: Path, kind: FolderKind) -> object:
    return load_bundle(folder) if kind is BUNDLE else load_adapter(folder)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


class Trap:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self._canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """What hostile code makes when it runs."""
    return tmp_path / "hostile-code-was-here"


def test_the_trap_works(canary: Path) -> None:
    pickle.loads(pickle.dumps(Trap(canary)))  # noqa: S301 -- our own
    assert canary.exists()


@pytest.fixture
def copies(adapter: Folders, bundle: Folders, tmp_path: Path) -> Callable[[str], tuple[Path, FolderKind]]:
    """A function from "adapter" or "bundle" to a copy of one, and its kind."""

    def get(name: str) -> tuple[Path, FolderKind]:
        folder = tmp_path / name
        shutil.copytree((adapter if name == "adapter" else bundle)("bert"), folder)
        return folder, (ADAPTER if name == "adapter" else BUNDLE)

    return get


Copies = Callable[[str], tuple[Path, FolderKind]]


@pytest.fixture
def base(base_model: Folders, tmp_path: Path) -> Path:
    """A copy of a base model."""
    folder = tmp_path / "base"
    shutil.copytree(base_model("bert"), folder)
    return folder


def sparse(path: Path, n_bytes: int) -> None:
    """A file that has its length and nothing in it."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(n_bytes)


# Folders


@pytest.mark.parametrize("name", KIND_NAMES)
@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("../outside", "lists a file outside its folder"),
        ("a/b", "lists a file outside its folder"),
        ("/etc/hostname", "lists a file outside its folder"),
        (".", "lists a file outside its folder"),
        ("", "lacks"),
        ("..", "lacks .."),
        ("x\0y", "lacks x"),
        ("x" * 5000, "cannot be read"),
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
    """Also to the very bytes whose hash is recorded."""
    folder, kind = copies(name)
    path = folder / file.format(record=kind.record)
    elsewhere = folder.parent / "elsewhere"
    if target == "folder":
        elsewhere.mkdir()
    elif target == "file":
        elsewhere.write_bytes(path.read_bytes() if path.exists() else b"x")
    path.unlink(missing_ok=True)
    path.symlink_to(elsewhere)
    with pytest.raises(kind.error, match="is a link" if target == "file" or file[0] in "e." else "lacks"):
        load(folder, kind)


def test_a_copy_without_links_is_what_the_refusal_says(copies: Copies) -> None:
    folder, kind = copies("bundle")
    (folder / "model.onnx").rename(folder.parent / "blob")
    (folder / "model.onnx").symlink_to(folder.parent / "blob")
    with pytest.raises(BundleError, match=r"cp -rL .* COPY"):
        load(folder, kind)
    subprocess.run(["cp", "-rL", str(folder), str(folder.parent / "COPY")], check=True)  # noqa: S607
    load(folder.parent / "COPY", kind)


@pytest.mark.parametrize("name", KIND_NAMES)
@pytest.mark.parametrize("file", ["{record}", "tokenizer.json", "tokenizer_config.json", "unlisted"])
def test_a_pipe_or_a_socket_in_place_of_a_file_is_refused_and_never_read(
    name: str, file: str, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    ("name", "file", "n_bytes", "limit"),
    [
        ("adapter", "training.json", 2**30, "64"),
        ("adapter", "training.json", 17 * 2**20, "16"),
        ("adapter", "tokenizer.json", 2**30, "64"),
        ("adapter", "adapter_model.safetensors", 100 * 2**30, "2,048"),
        ("adapter", "adapter_model.bin", 100 * 2**30, "64"),
        ("bundle", "manifest.json", 2**30, "64"),
        ("bundle", "tokenizer.json", 2**30, "64"),
        ("bundle", "config.json", 2**30, "64"),
        ("bundle", "model.onnx", 100 * 2**30, "2,048"),
        ("bundle", "model_int8.onnx", 100 * 2**30, "2,048"),
    ],
)
def test_a_file_larger_than_any_is_refused_by_its_length(
    name: str, file: str, n_bytes: int, limit: str, copies: Copies
) -> None:
    folder, kind = copies(name)
    sparse(folder / file, n_bytes)
    with pytest.raises(kind.error, match=f"{file} has .* MiB; no such file has more than {limit}"):
        load(folder, kind)


@pytest.mark.parametrize("name", KIND_NAMES)
def test_thousands_of_files_are_refused(name: str, copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.common.limits, "MAX_ENTRIES", 30)
    folder, kind = copies(name)
    load(folder, kind)
    for number in range(30):
        (folder / str(number)).touch()
    with pytest.raises(kind.error, match="holds more than 30 files"):
        load(folder, kind)


@pytest.mark.parametrize("name", KIND_NAMES)
def test_folders_within_are_left_alone(name: str, copies: Copies) -> None:
    """As `.git` is one, or what the hub's downloads leave."""
    folder, kind = copies(name)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "link").symlink_to("/")
    load(folder, kind)
    rehash(folder, kind)
    load(folder, kind)


@pytest.mark.parametrize("name", KIND_NAMES)
@pytest.mark.parametrize(
    "content",
    [
        pytest.param("[" * 100_000, id="deep"),
        pytest.param('{"a":' * 100_000, id="deep objects"),
        pytest.param('{"format_version": ' + "9" * 10_000 + "}", id="digits"),
        pytest.param("[1]", id="list"),
        pytest.param("", id="empty"),
        pytest.param("\ud800", id="surrogate"),
    ],
)
def test_a_record_that_is_no_usable_json_is_refused(name: str, content: str, copies: Copies) -> None:
    folder, kind = copies(name)
    (folder / kind.record).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(kind.error, match=f"{kind.record} (cannot be read|holds no JSON object)"):
        load(folder, kind)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 2**60},
        {"max_length": 0},
        {"max_length": -1},
        {"max_length": 5.5},
        {"max_length": "40"},
        {"max_length": float("inf")},
        {"virtual_tokens": 2**60},
        {"virtual_tokens": True},
        {"pad_token_id": -1},
        {"pad_token_id": 2**60},
        {"vocabulary_size": 2**60},
        {"inputs": ["input_ids", "attention_mask", "hidden"]},
        {"inputs": ["input_ids"]},
        {"inputs": [["input_ids", "attention_mask"]]},
        {"graphs": [{"precision": "fp32", "file": "/etc/passwd", "gates": [1]}]},
        {"graphs": [{"precision": "../model", "file": "model.onnx", "gates": []}]},
        {"graphs": []},
        {"tasks": {}},
        {"tasks": []},
    ],
)
def test_a_manifest_of_nonsense_with_hashes_that_fit_is_refused(changes: dict[str, Any], copies: Copies) -> None:
    folder, kind = copies("bundle")
    rehash(folder, kind, **changes)
    with pytest.raises(PromptfoldError, match=rf"manifest\.json, {next(iter(changes))}"):
        load_bundle(folder)


@pytest.mark.parametrize("name", KIND_NAMES)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": [str(number) for number in range(100_000)]}, "from 2 to 100 labels"),
        ({"labels": ["one"]}, "from 2 to 100 labels"),
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


@pytest.mark.parametrize("name", KIND_NAMES)
def test_the_graphs_file_is_ours_whatever_the_manifest_says(name: str, copies: Copies) -> None:
    folder, kind = copies(name)
    if kind is BUNDLE:
        graphs = [{"precision": "fp32", "file": "../../../etc/passwd", "gates": []}]
        rehash(folder, kind, graphs=graphs)
        assert load_bundle(folder).graph_path("fp32") == folder / "model.onnx"
    else:
        rehash(folder, kind, method="lora")
        with pytest.raises(AdapterError, match="method: Input should be 'p-tuning' or 'p-tuning-v2'"):
            load_adapter(folder)


# Adapters


def test_pickled_weights_are_no_adapter_and_beside_safetensors_nobody_reads_them(
    copies: Copies, base_model: Folders, canary: Path
) -> None:
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
    # As a name alone it makes no difference.
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    rehash(folder, kind)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors cannot be read"):
        load_prompted_classifier(load_adapter(folder), found)
    with pytest.raises(AdapterError, match="does not fit"):
        load_peft_model(folder, found, adapter.labels)
    assert not canary.exists()


def test_a_safetensors_header_of_an_exabyte_is_refused(copies: Copies, base: Path) -> None:
    folder, kind = copies("adapter")
    content = (2**60).to_bytes(8, "little") + b"{}"
    (folder / "adapter_model.safetensors").write_bytes(content)
    rehash(folder, kind)
    adapter = load_adapter(folder)
    found = find_adapter_base(adapter)
    with pytest.raises(AdapterError, match="cannot be read"):
        load_prompted_classifier(adapter, found)
    with pytest.raises(AdapterError, match="does not fit"):
        load_peft_model(folder, found, adapter.labels)
    # The configuration fits, so a size of the weights that is too small does not hide what is tested.
    (base / "model.safetensors").write_bytes(content + bytes(100_000))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_classifier(find_base_model(str(base)), ["a", "b"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # Of these kinds of PEFT one imports a module by name, one reads a pickle, one reads a tokenizer elsewhere.
        (
            {"peft_type": "LORA", "megatron_config": {"x": 1}, "megatron_core": "evil"},
            "peft_type: Input should be 'P_TUNING' or 'PREFIX_TUNING'",
        ),
        (
            {"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "evil.bin"},
            "peft_type: Input should be 'P_TUNING' or 'PREFIX_TUNING'",
        ),
        (
            {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "../evil"},
            "peft_type: Input should be 'P_TUNING' or 'PREFIX_TUNING'",
        ),
        ({"peft_type": "PREFIX_TUNING"}, "describes a PREFIX_TUNING prompt"),
        ({"peft_type": ["P_TUNING"]}, "peft_type: Input should be"),
        ({"task_type": "CAUSAL_LM"}, "task_type: Input should be 'SEQ_CLS'"),
        (
            {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
            "auto_mapping: Input should be null",
        ),
        ({"num_virtual_tokens": 10**12}, "num_virtual_tokens: Input should be less than"),
        ({"num_virtual_tokens": 5.0}, "num_virtual_tokens: Input should be a valid integer"),
        ({"token_dim": 10**12}, "token_dim: Input should be less than"),
        ({"token_dim": 2**23, "num_layers": 2**10}, "describes a prompt of"),
        ({"num_layers": None}, "num_layers: Input should be a valid integer"),
        ({"num_transformer_submodules": "2"}, "num_transformer_submodules: Input should be a valid integer"),
    ],
)
def test_a_configuration_that_makes_peft_do_anything_else_is_refused(
    changes: dict[str, Any], words: str, copies: Copies
) -> None:
    folder, kind = copies("adapter")
    change_json(folder / "adapter_config.json", **changes)
    rehash(folder, kind)
    with pytest.raises(AdapterError, match=words):
        load_adapter(folder)


def test_what_the_configuration_says_of_its_base_model_leads_nowhere(
    copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    folder, kind = copies("adapter")
    before = load_adapter(folder)
    base = find_adapter_base(before)
    ids = {"input_ids": torch.tensor([[0, 5, 6, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}

    def logits() -> np.ndarray:
        with torch.inference_mode():
            return load_peft_model(folder, base, before.labels)(**ids).logits.numpy()

    expected = logits()
    change_json(folder / "adapter_config.json", base_model_name_or_path="stranger/model", revision="evil")
    rehash(folder, kind)

    def no_network(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert load_adapter(folder).sha256 != before.sha256
    assert np.array_equal(logits(), expected)


def test_an_adapter_that_names_a_file_of_this_machine_to_be_judged_by_does_not_get_it(
    copies: Copies, data: Data, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """It is opened only where its hash is known to the stranger, and never where it is larger than any."""
    from train.common.folder_record import sha256_of_file

    folder, kind = copies("adapter")
    training = json.loads((folder / "training.json").read_text())
    huge = folder.parent / "huge.jsonl"
    sparse(huge, 100 * 2**30)
    locked = folder.parent / ("x" * 300)
    for named in (huge, locked, Path("/dev/zero")):
        rehash(folder, kind, config=training["config"] | {"validation_file": str(named)})
        capsys.readouterr()
        out = folder.parent / f"b{len(str(named))}"
        assert export_main([str(folder), "--out", str(out)]) == 0
        assert "fp32 alone" in capsys.readouterr().out
    sha256 = sha256_of_file(data.validation_file)
    changed = training["config"] | {"validation_file": str(data.validation_file)}
    rehash(folder, kind, config=changed, data_sha256={"validation": sha256})
    assert export_main([str(folder), "--out", str(folder.parent / "b")]) == 0
    assert f"gated on the 40 rows of {data.validation_file}" in capsys.readouterr().out


# Tokenizers


def hostile_tokenizer(folder: Path, canary: Path) -> None:
    """One that wants a class from a file beside it."""
    change_json(
        folder / "tokenizer_config.json",
        tokenizer_class="Hostile",
        auto_map={"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]},
    )
    (folder / "hostile.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Hostile: pass\n")


def say_yes_to_everything(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whoever asks on the terminal is told yes; returned is the list of what was asked so far."""
    asked: list[str] = []

    def say_yes(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", say_yes)
    return asked


def test_a_tokenizers_own_code_is_never_run_nor_asked_about(
    copies: Copies, base: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = say_yes_to_everything(monkeypatch)
    folder, kind = copies("adapter")
    for place in (folder, base):
        hostile_tokenizer(place, canary)
    rehash(folder, kind)
    for place in (folder, base):
        with pytest.raises(ModelError, match="auto_map"):
            load_tokenizer(place, 40)
        change_json(place / "tokenizer_config.json", auto_map=None)
        with pytest.raises(ModelError, match="holds no tokenizer that can be loaded"):
            load_tokenizer(place, 40)
    assert not asked
    assert not canary.exists()


@pytest.mark.parametrize("model_type", ["bert", "evil"])
def test_nor_is_that_of_a_configuration_beside_it(
    model_type: str, copies: Copies, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers turns to config.json where the tokenizer's own settings name no class."""
    asked = say_yes_to_everything(monkeypatch)
    folder, kind = copies("adapter")
    hostile_tokenizer(folder, canary)
    (folder / "tokenizer_config.json").write_text("{}")
    code = {"AutoConfig": "hostile.Hostile", "AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": code}))
    rehash(folder, kind)
    with pytest.raises(ModelError, match="holds no tokenizer that can be loaded"):
        load_tokenizer(folder, 40)
    assert not asked
    assert not canary.exists()


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file", "init_inputs"])
def test_a_tokenizer_whose_settings_name_another_file_is_refused(key: str, copies: Copies) -> None:
    """transformers would read that one, though tokenizer.json lies beside them."""
    folder, kind = copies("adapter")
    elsewhere = folder.parent / "elsewhere.json"
    shutil.copyfile(folder / "tokenizer.json", elsewhere)
    change_json(folder / "tokenizer_config.json", **{key: str(elsewhere)})
    rehash(folder, kind)
    with pytest.raises(ModelError, match=f"leads elsewhere: {key}"):
        load_tokenizer(folder, load_adapter(folder).max_length)
    # What old versions of save_pretrained wrote is fine.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings[key]
    settings["special_tokens_map_file"] = "/home/me/x.json"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    load_tokenizer(folder, 40)


def broken_tokenizers(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Files that are JSON, and of which the library makes an error, an odd error, or a panic of its Rust code."""
    processor = content["post_processor"]
    return [
        {},
        content | {"model": {"type": "Unknown"}},
        content | {"model": content["model"] | {"vocab": {"a": -1}}},
        # It loads, and panics at the first text.
        content | {"post_processor": processor | {"special_tokens": {}}},
        content | {"model": content["model"] | {"unk_token": "none"}},
    ]


@pytest.mark.parametrize("number", range(5))
def test_a_broken_tokenizer_is_refused_in_words(number: int, copies: Copies) -> None:
    folder, kind = copies("bundle")
    adapter_folder, _ = copies("adapter")
    content = json.loads((folder / "tokenizer.json").read_text())
    broken = broken_tokenizers(content)[number]
    for place, its_kind in ((folder, kind), (adapter_folder, ADAPTER)):
        (place / "tokenizer.json").write_text(json.dumps(broken))
        rehash(place, its_kind)
    with pytest.raises(BundleError, match=r"tokenizer\.json (is no tokenizer|has no token)"):
        OnnxClassifier(load_bundle(folder), threads=1).tokenize([("strange", "words")])
    with pytest.raises(BundleError):
        try_bundle(load_bundle(folder))
    with pytest.raises(ModelError, match="holds no tokenizer that can be loaded"):
        load_tokenizer(adapter_folder, 40)


def test_a_tokenizer_file_that_is_a_pipe_or_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path)
    with pytest.raises(BundleError, match="is no plain file"):
        TextTokenizer(path, max_length=8, pad_token_id=1, inputs=["input_ids"])
    sparse(path, 2**30)
    with pytest.raises(BundleError, match="no such file has more than 64"):
        TextTokenizer(path, max_length=8, pad_token_id=1, inputs=["input_ids"])


# Base models


def refused_base(folder: Path, words: str, data: Data, capsys: Capture) -> None:
    """It is refused by the function and, in one sentence, by the program."""
    with pytest.raises(ModelError, match=words):
        find_base_model(str(folder))
    capsys.readouterr()
    assert train_main(["--model", str(folder), "--out", str(folder.parent / "a"), *data.flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (folder.parent / "a").exists()


def test_a_base_model_of_pickled_weights_is_refused(base: Path, canary: Path, data: Data, capsys: Capture) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(canary)))
    refused_base(base, "has no safetensors weights", data, capsys)
    assert not canary.exists()


@pytest.mark.parametrize("named", ["pytorch_model.bin", "../base/other.safetensors", "other.safetensors", "/x"])
def test_an_index_of_weights_that_names_other_files_is_refused(
    named: str, base: Path, canary: Path, data: Data, capsys: Capture
) -> None:
    """transformers would read whatever it names, pickles too, and the hash would be that of the files it leaves out."""
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(canary)))
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": named}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused_base(base, r"names other files than model\*\.safetensors", data, capsys)
    assert not canary.exists()
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}}))
    refused_base(base, r"names other files than model\*\.safetensors", data, capsys)


def test_a_base_model_in_parts_is_still_one(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(base).save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    load_classifier(find_base_model(str(tmp_path / "parts")), ["a", "b"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "wants code of its own"),
        ({"transformers_weights": "../elsewhere/model.safetensors"}, "names another file of weights"),
        ({"attn_implementation": "stranger/kernel"}, "wants attention by code from elsewhere"),
        ({"_attn_implementation": "stranger/kernel"}, "wants attention by code from elsewhere"),
        ({"hidden_size": 10**9}, "has hidden_size 1000000000"),
        ({"vocab_size": 10**12}, "has vocab_size 1000000000000"),
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers 1000000000"),
        ({"intermediate_size": 10**12}, "has intermediate_size 1000000000000"),
        ({"max_position_embeddings": 10**12}, "has max_position_embeddings 1000000000000"),
        ({"vocab_size": "94"}, "has vocab_size '94'"),
        ({"id2label": 7}, "cannot be used"),
    ],
)
def test_a_configuration_that_leads_elsewhere_or_fits_no_weights_is_refused(
    changes: dict[str, Any], words: str, base: Path, data: Data, capsys: Capture
) -> None:
    change_json(base / "config.json", **changes)
    refused_base(base, words, data, capsys)


def test_a_quantised_base_model_is_refused_in_words(base: Path) -> None:
    change_json(base / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_classifier(find_base_model(str(base)), ["a", "b"])


def test_a_base_model_that_is_an_adapter_is_refused(base: Path, adapter: Folders, data: Data, capsys: Capture) -> None:
    """transformers would load what its configuration names instead."""
    shutil.copyfile(adapter("bert") / "adapter_config.json", base / "adapter_config.json")
    refused_base(base, "is an adapter", data, capsys)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"])
def test_a_base_model_with_a_pipe_or_a_file_without_end_is_refused(
    file: str, base: Path, data: Data, capsys: Capture
) -> None:
    (base / file).unlink(missing_ok=True)
    os.mkfifo(base / file)
    refused_base(base, "is no plain file|has no config", data, capsys)
    sparse(base / file, 2**37)
    refused_base(base, "no such file has more than", data, capsys)


def test_a_base_model_of_links_is_fine(base: Path, tmp_path: Path) -> None:
    """The hub's own cache is made of them."""
    (tmp_path / "links").mkdir()
    for path in base.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    assert find_base_model(str(tmp_path / "links")).sha256 == find_base_model(str(base)).sha256


# Graphs


INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[onnx.TensorProto] = (),
    *,
    domain: str = "",
    output: str = "logits",
) -> onnx.ModelProto:
    """A model that takes what a bundle's does."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in INPUTS]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    graph = helper.make_graph(list(nodes), "hostile", inputs, outputs, list(initializers))
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def numbers(name: str, values: Sequence[int]) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def ones(shape: str, output: str) -> onnx.NodeProto:
    """A node that fills a tensor of whatever shape."""
    return helper.make_node(
        "ConstantOfShape", [shape], [output], value=helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    )


def harmless() -> onnx.ModelProto:
    """Two logits, 1 and 1, of every text."""
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["rows"], start=0, end=1),
        helper.make_node("Concat", ["rows", "two"], ["shape"], axis=0),
        ones("shape", "logits"),
    ]
    return graph_of(nodes, [numbers("two", [2])])


@pytest.fixture
def hostile(copies: Copies) -> Callable[[onnx.ModelProto | bytes], Path]:
    """A function from a graph to a bundle of it, whose hashes fit."""
    folder, kind = copies("bundle")

    def get(model: onnx.ModelProto | bytes) -> Path:
        content = model if isinstance(model, bytes) else model.SerializeToString()
        (folder / "model.onnx").write_bytes(content)
        rehash(folder, kind)
        return folder

    return get


Hostile = Callable[[onnx.ModelProto | bytes], Path]


def test_a_strangers_harmless_graph_is_opened(hostile: Hostile) -> None:
    bundle = load_bundle(hostile(harmless()))
    try_bundle(bundle)
    classifier = OnnxClassifier(bundle, threads=1, use_cuda=False)
    assert np.array_equal(classifier.logits(classifier.tokenize([("a", "b")]).arrays), [[1, 1]])


@pytest.mark.parametrize("kind", KINDS)
def test_every_graph_of_ours_is_opened(kind: str, bundle: Folders) -> None:
    check_graph(bundle(kind) / "model.onnx")


@pytest.mark.parametrize("location", ["../../../../../../etc/passwd", "/etc/passwd", "weights.bin"])
@pytest.mark.parametrize("place", ["initializer", "constant"])
def test_a_graph_whose_numbers_are_in_another_file_is_refused(
    location: str, place: str, hostile: Hostile, tmp_path: Path
) -> None:
    tensor = onnx.TensorProto(name="w", data_type=TensorProto.UINT8, dims=[8])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    cast = helper.make_node("Cast", ["w"], ["logits"], to=TensorProto.FLOAT)
    if place == "initializer":
        model = graph_of([cast], [tensor])
    else:
        model = graph_of([helper.make_node("Constant", [], ["w"], value=tensor), cast])
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
    with pytest.raises(BundleError, match="numbers are in another file"):
        try_bundle(bundle)


def endless_loop() -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Identity", ["x"], ["x_out"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x_out", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["start"], to=TensorProto.FLOAT),
        helper.make_node("Loop", ["", "true", "start"], ["logits"], body=body),
    ]
    return graph_of(nodes, [helper.make_tensor("true", TensorProto.BOOL, [], [True])])


def with_functions() -> onnx.ModelProto:
    """Each calls the one before it twice: a line more, twice the graph."""
    model = harmless()
    for level in range(40):
        inner = ("double", f"f{level - 1}") if level else ("", "Identity")
        nodes = [
            helper.make_node(inner[1], ["x"], ["y"], domain=inner[0]),
            helper.make_node(inner[1], ["y"], ["z"], domain=inner[0]),
        ]
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("double", 1)]
        model.functions.append(helper.make_function("double", f"f{level}", ["x"], ["z"], nodes, opsets))
    return model


def with_sparse() -> onnx.ModelProto:
    model = harmless()
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [10**12]))
    return model


def with_training() -> onnx.ModelProto:
    model = harmless()
    model.training_info.add()
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (endless_loop, "a graph within the graph"),
        (with_functions, "functions of its own"),
        (with_sparse, "sparse tensors"),
        (with_training, "a part for training"),
        (lambda: graph_of([helper.make_node("Run", ["input_ids"], ["logits"], domain="evil")]), "operators of 'evil'"),
        (
            lambda: graph_of(
                [
                    helper.make_node(
                        "EPContext", ["input_ids"], ["logits"], domain="com.microsoft", ep_cache_context="../x"
                    )
                ],
                domain="com.microsoft",
            ),
            "a part that is compiled for one device",
        ),
    ],
)
def test_a_graph_that_holds_what_no_graph_of_ours_does_is_refused(
    make: Callable[[], onnx.ModelProto], words: str, hostile: Hostile
) -> None:
    with pytest.raises(BundleError, match=f"model.onnx is not opened: it holds {words}"):
        OnnxClassifier(load_bundle(hostile(make())), threads=1, use_cuda=False)


def test_a_graph_of_a_million_empty_nodes_is_refused_before_it_is_parsed(hostile: Hostile) -> None:
    """Two bytes each in the file, hundreds in memory."""

    def nested(field: int, content: bytes) -> bytes:
        """A field of a protobuf message that holds another one."""
        length, digits = len(content), bytearray()
        while length > 127:
            digits.append(length & 127 | 128)
            length >>= 7
        return bytes([field << 3 | 2, *digits, length]) + content

    good = harmless().SerializeToString()
    for content, words in (
        (nested(7, b"\x0a\x00" * 1_000_001), "more than 1,000,000 fields"),
        (nested(7, nested(10, b"x" * (17 * 2**20))), "17 MiB beside the bytes of its tensors"),
    ):
        with pytest.raises(BundleError, match=words):
            check_graph(hostile(good + content) / "model.onnx")
    # The bytes of tensors do not count.
    check_graph(hostile(good + nested(7, nested(5, nested(9, b"x" * (17 * 2**20))))) / "model.onnx")


def test_whatever_the_bytes_a_graph_is_read_to_its_end_or_refused(tmp_path: Path, bundle: Folders) -> None:
    path = tmp_path / "model.onnx"
    generator = random.Random(5)  # noqa: S311 -- test data
    for good in (harmless().SerializeToString(), (bundle("gpt2") / "model.onnx").read_bytes()[:3000]):
        outcomes = []
        for _ in range(300):
            content = bytearray(good)
            for _ in range(generator.randint(1, 4)):
                content[generator.randrange(len(content))] = generator.choice(
                    (0, 1, 127, 128, 255, generator.randrange(256))
                )
            path.write_bytes(content[: generator.randint(1, len(content))])
            try:
                check_graph(path)
            except BundleError:
                outcomes.append(False)
            else:
                outcomes.append(True)
        assert False in outcomes
    for broken in (b"", b"\x80", b"\xff" * 20, b"\x3a\xff\xff\xff\xff\x0f", b"\x0b", b"\x00\x00"):
        path.write_bytes(broken)
        with pytest.raises(BundleError, match="ONNX Runtime cannot load"):
            check_graph(path)


def test_a_graph_that_is_a_pipe_or_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    os.mkfifo(path)
    with pytest.raises(BundleError, match="is no plain file"):
        open_session(path, threads=1)
    path.unlink()
    sparse(path, 100 * 2**30)
    with pytest.raises(BundleError, match=r"no such file has more than 2,048"):
        open_session(path, threads=1)


def wrong_outputs() -> list[onnx.ModelProto]:
    cast = helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT)
    return [
        graph_of([cast]),
        graph_of([cast, helper.make_node("ReduceSum", ["logits"], ["sum"])], output="sum"),
        graph_of(
            [cast, helper.make_node("Reshape", ["logits", "no"], ["out"])], [numbers("no", [7, 77])], output="out"
        ),
        graph_of([helper.make_node("NoSuchOperator", ["input_ids"], ["logits"])]),
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_graph_that_gives_no_logits_of_the_texts_is_refused(number: int, hostile: Hostile) -> None:
    bundle = load_bundle(hostile(wrong_outputs()[number]))
    with pytest.raises(BundleError, match=r"gives no logits|gives logits of shape|cannot (load|run)"):
        classifier = OnnxClassifier(bundle, threads=1, use_cuda=False)
        classifier.logits(classifier.tokenize([("word1", "word2")]).arrays)
    with pytest.raises(BundleError, match=r"cannot be opened: "):
        try_bundle(bundle)


# The first opening


def too_large() -> list[onnx.ModelProto]:
    total = helper.make_node("ReduceSum", ["big"], ["logits"])
    million = numbers("million", [10**6])
    doubled = [helper.make_node("Concat", [f"x{i}", f"x{i}"], [f"x{i + 1}"], axis=0) for i in range(40)]
    return [
        # Known before any text, so ONNX Runtime may compute it while it loads.
        graph_of([ones("shape", "big"), total], [numbers("shape", [2 * 10**9])]),
        # Known only with the text.
        graph_of(
            [
                helper.make_node("Shape", ["input_ids"], ["length"], start=1, end=2),
                helper.make_node("Mul", ["length", "million"], ["many"]),
                helper.make_node("Mul", ["many", "million"], ["shape"]),
                ones("shape", "big"),
                total,
            ],
            [million],
        ),
        graph_of(
            [ones("shape", "x0"), *doubled, helper.make_node("ReduceSum", ["x40"], ["logits"])],
            [numbers("shape", [1000])],
        ),
        # It claims to hold what it does not.
        graph_of(
            [helper.make_node("Identity", ["w"], ["logits"])],
            [onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[10**12])],
        ),
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_graph_that_wants_more_memory_than_there_is_ends_in_a_process_of_its_own(
    number: int, hostile: Hostile
) -> None:
    with pytest.raises(BundleError, match=r"cannot be opened: .*512 MiB of memory and 60 s"):
        try_bundle(load_bundle(hostile(too_large()[number])))


def test_a_graph_that_takes_for_ever_is_stopped(hostile: Hostile) -> None:
    """Matrices of 8000 by 8000, a thousand products of them: hours."""
    products = [helper.make_node("MatMul", ["x0", f"x{i}"], [f"x{i + 1}"]) for i in range(1000)]
    model = graph_of(
        [ones("shape", "x0"), *products, helper.make_node("Identity", ["x1000"], ["logits"])],
        [numbers("shape", [8000, 8000])],
    )
    with pytest.raises(BundleError, match=r"(was not open after 3 s|it took too long).*2048 MiB of memory and 3 s"):
        try_bundle(load_bundle(hostile(model)), memory_mib=2048, seconds=3)


def test_a_process_without_memory_says_so_and_does_not_take_us_along(bundle: Folders) -> None:
    with pytest.raises(BundleError, match=r"cannot be opened: its? .*32 MiB of memory"):
        try_bundle(load_bundle(bundle("bert")), memory_mib=32)


def put_in_its_place(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program instead of the one that `try_bundle` starts."""
    run = subprocess.run

    def run_other(_: list[str], **settings: Any) -> Any:
        return run([sys.executable, "-c", code], **settings)

    monkeypatch.setattr(export.runtime.trial.subprocess, "run", run_other)


def test_a_process_that_does_nothing_at_all_is_stopped(bundle: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processor time does not end."""
    put_in_its_place("import time; time.sleep(3600)", monkeypatch)
    with pytest.raises(BundleError, match="was not open after 1 s"):
        try_bundle(load_bundle(bundle("bert")), seconds=1)


@pytest.mark.parametrize("status", [-11, -24, -9, 3, -200])
def test_a_process_that_ends_without_a_word_is_described(
    status: int, bundle: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a crash, a limit or a killer ends it."""
    code = f"import os; os._exit({status})" if status >= 0 else f"import os; os.kill(os.getpid(), {min(-status, 64)})"
    put_in_its_place(code, monkeypatch)
    expected = {-11: "ended by SIGSEGV", -24: "it took too long", -9: "ended by SIGKILL", 3: "ended with status 3"}
    with pytest.raises(BundleError, match=expected.get(status, r"ended by (SIGRTMAX|signal)")):
        try_bundle(load_bundle(bundle("bert")))


def test_the_process_can_write_no_file_and_its_limits_are_set(tmp_path: Path) -> None:
    code = (
        "import pathlib, resource, sys\n"
        "from export.runtime.trial import limit_process\n"
        "limit_process(4096, 7)\n"
        "print(resource.getrlimit(resource.RLIMIT_AS)[1] >> 20, resource.getrlimit(resource.RLIMIT_CPU)[0])\n"
        "pathlib.Path(sys.argv[1]).write_text('x')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["4096", "7"]
    assert "File too large" in result.stderr
    assert not (tmp_path / "x").read_text()


@pytest.mark.parametrize("kind", ["bert", "gpt2-v2"])
def test_our_own_bundles_open_from_any_folder(
    kind: str, bundle_in: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle_in(kind, "int8"), tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    try_bundle(load_bundle(Path("bundle")))


def test_several_tasks_are_all_tried(adapter: Folders, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        shutil.copytree(adapter("bert"), folder)
    assert export_main([*map(str, folders), "--out", str(tmp_path / "b")]) == 0
    try_bundle(load_bundle(tmp_path / "b"))


def test_a_file_is_labelled_by_an_untrusted_bundle_only_after_it_was_tried(
    hostile: Hostile, bundle: Folders, data: Data, tmp_path: Path, capsys: Capture
) -> None:
    words = ["--in", str(data.validation_file), "--threads", "1", "--no-labels", "--out"]
    out = tmp_path / "x.jsonl"
    assert score_main([str(hostile(too_large()[0])), *words, str(out), "--untrusted"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "If you trust who made it, open it without this trial." in error
    assert not out.exists()
    assert score_main([str(bundle("bert")), *words, str(out), "--untrusted"]) == 0
    again = tmp_path / "y.jsonl"
    assert score_main([str(bundle("bert")), *words, str(again)]) == 0
    assert out.read_bytes() == again.read_bytes()
