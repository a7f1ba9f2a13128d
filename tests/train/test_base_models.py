"""Base models as people bring them: other files than tokenizer.json and safetensors, and vocabularies that do not fit."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModel, AutoTokenizer

from demo.__main__ import main as demo_main
from demo.engines.adapters import choose_adapters
from demo.engines.stage import Setup, Stage
from export.__main__ import main as export_main
from export.bundle.folder import BUNDLE, load_bundle
from export.runtime.classifier import OnnxClassifier
from tests.conftest import Data, Folders, make_base_model, peft_logits, random_batch, train_kind, write_jsonl
from tests.test_untrusted import rehash
from tests.train.peft_sources import list_mismatches_as, make_base_with_head
from train.__main__ import main as train_main
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base, load_prompted_classifier
from train.adapter.record import ADAPTER
from train.common.errors import BundleError, ModelError
from train.common.folder_record import FolderKind
from train.evaluate import main as evaluate_main
from train.fit import loop
from train.model.find import find_base_model
from train.model.tokenizer import base_tokenizer

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def copied(base_model: Folders, tmp_path: Path) -> Folders:
    """A function from a family to a copy of its base model."""
    return lambda family: shutil.copytree(base_model(family), tmp_path / family)


def add_tokens(folder: Path, *tokens: str, **special: str) -> None:
    """Add tokens as people do, and forget to resize the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token) for token in tokens])
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)


def without_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_tokens_without_an_embedding_are_refused_before_training(
    family: str, copied: Folders, data: Data, tmp_path: Path, capsys: Capture
) -> None:
    base = copied(family)
    n_tokens = len(AutoTokenizer.from_pretrained(base))
    add_tokens(base, "<user>", "<city>")
    assert train_main(["--model", str(base), "--out", str(tmp_path / "a"), *data.flags]) == 2
    error = capsys.readouterr().err
    sizes = f"has {n_tokens + 2:,} tokens and {base} has embeddings for {n_tokens:,}, so 2 tokens have none"
    assert f"{sizes}, such as '<user>', '<city>'. Take the two that belong together" in error
    assert not (tmp_path / "a").exists()
    # A model with an embedding for each is what the tokenizer belongs to, and one with more is usual.
    model = AutoModel.from_pretrained(base)
    for n_rows in (n_tokens + 2, n_tokens + 60):
        model.resize_token_embeddings(n_rows, mean_resizing=False)
        model.save_pretrained(base)
        found = find_base_model(str(base))
        assert found.vocabulary_size == n_rows
        assert n_tokens in base_tokenizer(found, 40)("<user>")["input_ids"]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_padding_token_that_was_added_alone_gives_way_to_another(
    family: str, copied: Folders, tmp_path: Path
) -> None:
    base = copied(family)
    add_tokens(base, pad_token="<new pad>")
    found = find_base_model(str(base))
    tokenizer = base_tokenizer(found, 40)
    tokenizer.save_pretrained(tmp_path / "saved")
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert max(one.get_vocab().values()) < found.vocabulary_size
        assert max(one("a text with <new pad> in it")["input_ids"]) < found.vocabulary_size
        assert one.pad_token_id < found.vocabulary_size
    # As the end of a text it is no padding.
    add_tokens(base, eos_token="<new pad>")
    with pytest.raises(ModelError, match="1 tokens have none, such as '<new pad>'"):
        base_tokenizer(found, 40)


def with_a_token_more(folder: Path, kind: FolderKind, other: Path) -> Path:
    """A copy of an adapter or a bundle whose tokenizer was changed by somebody who knows how records are written."""
    shutil.copytree(folder, other)
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.add_tokens(["<user>"])
    tokenizer.save(str(other / "tokenizer.json"))
    rehash(other, kind)
    return other


def test_an_adapter_and_a_bundle_with_more_tokens_are_refused_when_they_are_opened(
    adapter: Folders, bundle: Folders, data: Data, tmp_path: Path, capsys: Capture
) -> None:
    changed = with_a_token_more(adapter("bert"), ADAPTER, tmp_path / "adapter")
    for main, words in (
        (evaluate_main, ["--adapter", str(changed), "--file", str(data.validation_file)]),
        (export_main, [str(changed), "--out", str(tmp_path / "b"), "--precision", "fp32"]),
    ):
        assert main(words) == 2
        assert "so 1 tokens have none, such as '<user>'. Train the adapter again." in capsys.readouterr().err
    changed = with_a_token_more(bundle("bert"), BUNDLE, tmp_path / "bundle")
    with pytest.raises(BundleError, match="has 1 tokens, such as '<user>', beyond the"):
        OnnxClassifier(load_bundle(changed))


def test_a_vocabulary_of_word_pieces_is_converted(copied: Folders) -> None:
    base = without_tokenizer(copied("bert"))
    (base / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "fox", "##es"]))
    tokenizer = base_tokenizer(find_base_model(str(base)), 20)
    assert tokenizer("Red foxes", "dog")["input_ids"] == [2, 5, 6, 7, 3, 1, 3]


def test_a_sentencepiece_file_is_converted_or_the_package_that_lacks_is_named(copied: Folders) -> None:
    base = without_tokenizer(copied("xlm-roberta"))
    code = (
        "from transformers.utils import sentencepiece_model_pb2_new as pb\n"
        "model = pb.ModelProto()\n"
        "kinds = {'<unk>': 2, '<s>': 3, '</s>': 3}\n"
        "for i, piece in enumerate([*kinds, '▁', '▁red', '▁fox', 'es']):\n"
        "    model.pieces.add(piece=piece, score=-float(i), type=kinds.get(piece, 1))\n"
        "model.trainer_spec.model_type = 1\n"
        "model.normalizer_spec.name = 'identity'\n"
        f"open({str(base / 'sentencepiece.bpe.model')!r}, 'wb').write(model.SerializeToString())\n"
    )
    # Not in this process: sentencepiece brings the same description of the file, and protobuf takes it but once.
    subprocess.run([sys.executable, "-c", code], check=True)
    found = find_base_model(str(base))
    if find_spec("sentencepiece") is None:
        with pytest.raises(
            ModelError, match=r"converting its sentencepiece\.bpe\.model needs .*pip install sentencepiece"
        ):
            base_tokenizer(found, 20)
    else:
        tokens = base_tokenizer(found, 20).convert_ids_to_tokens(base_tokenizer(found, 20)("red foxes")["input_ids"])
        assert tokens == ["<s>", "▁red", "▁fox", "es", "</s>"]


def test_a_tiktoken_file_needs_tiktoken_and_no_file_at_all_is_said(copied: Folders) -> None:
    base = without_tokenizer(copied("llama"))
    found = find_base_model(str(base))
    with pytest.raises(ModelError, match=r"it has none of tokenizer\.json, vocab\.txt, vocab\.json, merges\.txt and"):
        base_tokenizer(found, 20)
    (base / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    if find_spec("tiktoken") is None:
        with pytest.raises(ModelError, match=r"converting its tokenizer\.model needs .*pip install tiktoken"):
            base_tokenizer(found, 20)


def test_a_file_that_no_tokenizer_of_the_models_type_is_made_of_is_named(copied: Folders) -> None:
    """Also where the packages are missing that convert it for other types."""
    base = without_tokenizer(copied("qwen3"))
    (base / "tokenizer.model").write_bytes(b"\n\x05")
    words = r"makes one of merges\.txt or tokenizer\.json or vocab\.json, not of tokenizer\.model; copy tokenizer\.json from"
    with pytest.raises(ModelError, match=words):
        base_tokenizer(find_base_model(str(base)), 20)


def test_pickled_weights_are_refused_with_a_command_that_converts_them(copied: Folders, tmp_path: Path) -> None:
    base = copied("bert")
    weights = load_file(base / "model.safetensors")
    torch.save(weights, base / "pytorch_model.bin")
    sha256 = find_base_model(str(base)).sha256
    (base / "model.safetensors").unlink()
    folder = base.rename(tmp_path / "it's a model")
    with pytest.raises(ModelError, match=r"A pytorch_model\.bin is a pickle, which is not opened here") as raised:
        find_base_model(str(folder))
    command = str(raised.value).split(" Run: ")[1]
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, capture_output=True)
    named = re.search(r"it for --model (.*)\. Run: ", str(raised.value))
    assert named is not None
    found = find_base_model(shlex.split(named[1])[0])
    assert found.sha256 != sha256  # it has a head
    converted = load_file(found.folder / "model.safetensors")
    assert all(torch.equal(converted[f"bert.{name}"], tensor) for name, tensor in weights.items())
    assert len(base_tokenizer(found, 20)) == found.vocabulary_size


@pytest.mark.parametrize("transformers", [4, 5])
def test_a_head_for_other_labels_gives_way_to_a_new_one_and_no_other_tensor_does(
    transformers: int,
    base_model: Folders,
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    base = make_base_with_head(tmp_path / "base", base_model("bert"), 3)
    list_mismatches_as(transformers, monkeypatch)
    train_kind("bert", base, tmp_path / "a", "--epochs 1", data.flags)
    adapter = load_adapter(tmp_path / "a")
    batch = random_batch(np.random.default_rng(0), 3, 9, token_types=True)
    logits = load_prompted_classifier(adapter, find_adapter_base(adapter))(
        **{name: torch.from_numpy(array) for name, array in batch.items()}
    )["logits"]
    assert logits.detach().numpy() == pytest.approx(peft_logits(tmp_path / "a", base, batch), abs=2e-5)
    weights = load_file(base / "model.safetensors")
    weights["bert.embeddings.token_type_embeddings.weight"] = torch.ones(3, 32)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert train_main(["--model", str(base), "--out", str(tmp_path / "b"), *data.flags]) == 2
    words = "in another shape, such as bert.embeddings.token_type_embeddings.weight. Take an unbroken copy."
    assert words in capsys.readouterr().err


def test_the_base_models_own_kind_of_task_changes_nothing_in_the_training_of_another(
    copied: Folders, data: Data, tmp_path: Path
) -> None:
    base, weights = copied("bert"), set()
    config = json.loads((base / "config.json").read_text())
    for number, problem_type in enumerate((None, "multi_label_classification", "regression")):
        (base / "config.json").write_text(json.dumps(config | {"problem_type": problem_type}))
        train_kind("bert", base, tmp_path / str(number), "--epochs 1", data.flags)
        weights.add((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
    assert len(weights) == 1


def test_an_adapter_whose_base_model_moved_is_used_with_the_flag_that_the_refusal_names(
    copied: Folders, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, folder = copied("bert"), tmp_path / "a"
    train_kind("bert", base, folder, "--epochs 1", data.flags)
    batch = random_batch(np.random.default_rng(0), 3, 9, token_types=True)
    golden, moved = peft_logits(folder, base, batch), base.rename(tmp_path / "moved")
    commands: tuple[tuple[Callable[[list[str]], int], list[str]], ...] = (
        (evaluate_main, [str(folder), "--file", str(data.validation_file)]),
        (export_main, [str(folder), "--out", str(tmp_path / "b"), "--precision", "fp32"]),
    )
    for main, words in commands:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"needs the base model it was trained on. Base model {base}: there is no such folder" in error
        assert re.findall(r"--[\w-]+", error) == ["--base-model"]
        assert main([*words, "--base-model", str(copied("roberta"))]) == 2
        assert "was trained on another base model" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "roberta")
        assert main([*words, "--base-model", str(moved)]) == 0
    assert OnnxClassifier(load_bundle(tmp_path / "b")).logits(batch) == pytest.approx(golden, abs=1e-4)
    assert demo_main(["--base-model", str(moved)]) == 2
    assert "--base-model is that of the adapters at --adapter" in capsys.readouterr().err
    choices = choose_adapters([folder], str(moved), shipped=tmp_path)
    with closing(Stage(choices, bundles=[tmp_path / "b"], threads=1)) as stage:
        pytorch = stage.open(Setup("a")).pytorch
        assert pytorch is not None
        assert pytorch.logits(batch) == pytest.approx(golden, abs=1e-4)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # transformers' own, in Funnel
def test_a_type_that_no_exporter_writes_is_refused_before_it_is_trained(
    data: Data, tmp_path: Path, capsys: Capture
) -> None:
    base = make_base_model(tmp_path / "base", "funnel")
    assert train_main(["--model", str(base), *data.flags, "--out", str(tmp_path / "a")]) == 2
    assert "in its last layer, and no exporter writes such a graph. Take another one." in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_texts_of_which_the_tokenizer_knows_no_token_are_refused(
    base_model: Folders, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that a model is too large for a bundle is said before, here with a lower limit."""
    monkeypatch.setattr(loop, "MAX_BASE_BYTES", 2**10)
    rows = [{"text": text, "label": label} for label, text in enumerate(("¿¿", "¡¡"))]
    file, other = (write_jsonl(tmp_path / f"{n}.jsonl", rows * n) for n in (8, 1))
    words = ["--model", str(base_model("bert")), "--out", str(tmp_path / "a"), "--text-columns", "text"]
    assert train_main([*words, "--train-file", str(file), "--validation-file", str(other)]) == 2
    printed = capsys.readouterr()
    assert "cannot be exported: in fp32 its graph would have 0.0 GiB" in printed.out
    assert "knows no token of the 16 training texts in text. Check what" in printed.err
    assert not (tmp_path / "a").exists()
