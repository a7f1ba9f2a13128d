"""The tab "The prompt": what was learned and what it does, held against transformers and PEFT."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gradio as gr
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save, save_file
from scipy.special import softmax
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from demo.engines.engine_process import EngineProcess
from demo.engines.pytorch import PyTorchBackend
from demo.engines.stage import Stage
from demo.measure.prompt import (
    NEAREST_WORDS,
    RANDOM_PROMPTS,
    LearnedPrompt,
    PromptEffect,
    Word,
    learned_prompt,
    measure_sizes,
    prompt_effect,
    training_curves,
)
from demo.page.tab_prompt import build_prompt_tab
from export.bundle.folder import FP32, load_bundle
from tests.conftest import ENCODERS, ROOT, SHIPPED, VIRTUAL_TOKENS, WORDS, Folders, family_of, peft_logits
from tests.demo.engines import PAIR, make_mood_adapter, stage_of
from tests.demo.one_tab import handler, make_page
from tests.train.test_gguf import write_gguf
from train.adapter.folder import load_adapter
from train.adapter.record import Adapter
from train.common.errors import PromptfoldError, TextError
from train.common.folder_record import sha256_of_files
from train.data.tasks import custom_task

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stage(
    adapter: Folders, bundle: Folders, base_model: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    """Adapters of both methods, and one of single sentences with a label that is markup."""
    flags = "--method p-tuning --virtual-tokens 1 --encoder-hidden-size 8 --epochs 1"
    labels = ("bad", "good", "<b>so-so</b>")
    moods = make_mood_adapter(tmp_path_factory.mktemp("moods"), base_model("bert"), flags=flags, labels=labels)
    bundles = (bundle("bert"), bundle("llama-v2"))
    with stage_of(adapter("bert"), adapter("llama-v2"), adapter("roberta-v2"), moods, bundles=bundles) as stage:
        yield stage


def peft_model(adapter_folder: Path, base_folder: Path) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=2)
    return PeftModel.from_pretrained(model, adapter_folder).eval()


@lru_cache
def golden_batch(tokenizer: Path) -> dict[str, np.ndarray]:
    return dict(AutoTokenizer.from_pretrained(tokenizer)(*PAIR, return_tensors="np"))


def cosines(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Cosines of each row with each, shape = (…, n_first, n_second)."""
    return torch.nn.functional.cosine_similarity(first[..., :, None, :], second[..., None, :, :], dim=-1)


def check_nearest(learned: LearnedPrompt, words: torch.Tensor, adapter_folder: Path, base_folder: Path) -> torch.Tensor:
    """The words nearest to each virtual token are those that PEFT, torch and transformers find; the prompt."""
    with torch.inference_mode():
        prompt: torch.Tensor = peft_model(adapter_folder, base_folder).get_prompt(1)[0]
    best, ids = cosines(prompt, words).topk(NEAREST_WORDS)
    tokenizer = AutoTokenizer.from_pretrained(adapter_folder)
    assert learned.vocabulary is not None
    near = learned.vocabulary.nearest
    assert [[word.token for word in row] for row in near] == [tokenizer.convert_ids_to_tokens(row) for row in ids]
    assert np.allclose([[word.cosine for word in row] for row in near], best, atol=1e-6)
    return prompt


def check_words(kind: str, adapter: Folders, base_model: Folders) -> None:
    learned = learned_prompt(load_adapter(adapter(kind)))
    words: torch.Tensor = AutoModel.from_pretrained(base_model(kind)).get_input_embeddings().weight.detach()
    prompt = check_nearest(learned, words, adapter(kind), base_model(kind))
    assert learned.vocabulary is not None
    assert learned.vocabulary.n_words == len(words) == len(WORDS) + 4
    assert learned.vocabulary.median_norm == pytest.approx(float(np.median(words.norm(dim=1))))
    (part,) = learned.parts
    assert np.allclose(part.norms, [prompt.norm(dim=1)], rtol=1e-6)
    assert np.allclose(part.cosines, cosines(prompt, prompt), atol=1e-6)
    assert (learned.n_layers, learned.is_decoder) == (2, kind not in ENCODERS)


def check_keys_and_values(kind: str, adapter: Folders, base_model: Folders) -> None:
    learned = learned_prompt(load_adapter(adapter(kind)))
    assert learned.vocabulary is None
    assert "no word is near them" in learned.why_no_words
    assert learned.is_decoder == (family_of(kind) not in ENCODERS)
    with torch.inference_mode():
        layers = peft_model(adapter(kind), base_model(family_of(kind))).get_prompt(1).layers
    assert [part.name for part in learned.parts] == ["keys", "values"]
    for part in learned.parts:
        # shape = (n_layers, n_virtual, n_heads · n_head)
        states = torch.stack([getattr(layer, part.name)[0].transpose(0, 1).flatten(1) for layer in layers])
        assert states.shape[:2] == (2, VIRTUAL_TOKENS)
        assert np.allclose(part.norms, states.norm(dim=-1), rtol=1e-6)
        assert np.allclose(part.cosines, cosines(states, states).mean(dim=0), atol=1e-6)


def test_words_norms_and_curves_are_as_torch_finds_them(adapter: Folders, base_model: Folders) -> None:
    for kind, check in {"bert": check_words, "gpt2": check_words, "roberta-v2": check_keys_and_values}.items():
        check(kind, adapter, base_model)
    loaded = load_adapter(adapter("bert"))
    # Other random numbers, and many more of them: the mean is the same up to its spread.
    vocabulary = learned_prompt(loaded).vocabulary
    assert vocabulary is not None
    words = load_file(base_model("bert") / "model.safetensors")["embeddings.word_embeddings.weight"]
    other = torch.randn(20_000, words.shape[1], generator=torch.Generator().manual_seed(5))
    best = cosines(other, words).max(dim=1).values
    assert abs(vocabulary.random_cosine - best.mean()) < 5 * best.std() / VIRTUAL_TOKENS**0.5
    assert 0 < vocabulary.random_cosine < 1
    curves, record = training_curves(loaded), json.loads((adapter("bert") / "training.json").read_text())
    assert curves is not None
    assert curves.epochs == (1, 2, 3)
    for name in ("train_loss", "validation_loss"):
        assert getattr(curves, name) == tuple(row[name] for row in record["epochs"])
    assert [name for name, _ in curves.scores] == ["accuracy", "F1"]
    kept = curves.epochs.index(curves.kept_epoch)
    assert [values[kept] for _, values in curves.scores] == pytest.approx(list(loaded.scores.values.values()))


def test_words_are_read_from_any_float_type_and_files(adapter: Folders, base_model: Folders, tmp_path: Path) -> None:
    whole = load_file(base_model("gpt2") / "model.safetensors")
    for dtype, n_files in ((torch.bfloat16, 1), (torch.float16, 2), (torch.float64, 1)):
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in whole.items()}
        folder = tmp_path / str(dtype)
        folder.mkdir()
        for number in range(n_files):
            part = {name: tensors[name] for name in sorted(tensors)[number::n_files]}
            save_file(part, folder / f"model-{number + 1:05}-of-{n_files:05}.safetensors")
        learned = learned_prompt(on_other_base(load_adapter(adapter("gpt2")), folder))
        check_nearest(learned, tensors["wte.weight"].float(), adapter("gpt2"), base_model("gpt2"))


def on_other_base(adapter: Adapter, folder: Path, *, sha256: str | None = None) -> Adapter:
    """The adapter as if it had been trained on the base model in a folder, or in a file."""
    files = sorted(folder.glob("model*.safetensors")) if folder.is_dir() else [folder]
    weights = sha256 or (sha256_of_files(files) if all(file.is_file() for file in files) else "none")
    return replace(adapter, model=str(folder), model_sha256=weights, sha256=f"{folder} {weights}")


def test_where_the_words_cannot_be_read_it_is_said_why_and_the_rest_is_shown(
    adapter: Folders, base_model: Folders, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = stage.choices["bert"].adapter
    write_gguf(tmp_path / "tiny.gguf", base_model("llama"))
    for name, tensors in (
        ("no words", {"lm_head.weight": torch.ones(3, 32)}),
        ("whole numbers", {"embed_tokens.weight": torch.ones(94, 32, dtype=torch.int8)}),
    ):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    made = shutil.copytree(adapter("bert"), tmp_path / "made")
    (made / "tokenizer.json").write_text("{}")
    gguf, nowhere = (on_other_base(trained, tmp_path / name) for name in ("tiny.gguf", "nowhere"))
    cases = {
        "The base model is a GGUF file": gguf,
        "The base model nowhere is not on this machine": nowhere,
        "The base model nowhere.gguf is not on this machine": on_other_base(trained, tmp_path / "nowhere.gguf"),
        "model on-the-hub is not on this machine": replace(trained, model="some/on-the-hub", sha256="hub"),
        "is not the one of the training": on_other_base(trained, tmp_path / "no words", sha256="0" * 64),
        "holds no word embeddings that are known": on_other_base(trained, tmp_path / "no words"),
        "model.safetensors holds numbers of type I8": on_other_base(trained, tmp_path / "whole numbers"),
        "tokenizer cannot be read": replace(trained, folder=made, sha256="no tokenizer"),
    }
    fill = handler(make_page(stage, build_prompt_tab), "fill")
    whole = learned_prompt(trained)
    for words, changed in cases.items():
        learned = learned_prompt(changed)
        assert learned.vocabulary is None
        assert words in learned.why_no_words
        assert str(tmp_path) not in learned.why_no_words
        assert learned.parts == whole.parts
        monkeypatch.setattr("demo.page.tab_prompt.learned_prompt", lambda _, learned=learned: learned)
        markup = fill("bert", "")[0]
        assert learned.why_no_words.partition("'")[0] in markup
        assert "Nearest words" not in markup
    sizes = measure_sizes(gguf, None)
    assert sizes.frozen_numbers is None
    assert "GGUF" in sizes.why_unknown
    assert sizes.files[0].n_bytes == (tmp_path / "tiny.gguf").stat().st_size
    assert len(measure_sizes(nowhere, None).files) == 1


def test_an_adapter_of_another_make_is_refused(adapter: Folders, tmp_path: Path) -> None:
    """Its hashes are right, as an attacker's would be."""
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    for kind, file, content, words in (
        ("bert", weights, b"no tensors at all", "adapter_model.safetensors cannot be read"),
        ("bert", weights, save({"prompt_embeddings": torch.ones(4, 32)}), "holds no prompt of 5 virtual tokens"),
        ("llama-v2", config, b'{"num_layers": 7}', "wrong form"),
        ("llama-v2", config, b"{}", "num_layers"),
    ):
        made = shutil.copytree(adapter(kind), tmp_path / words)
        (made / file).write_bytes(content)
        with pytest.raises(PromptfoldError, match=words):
            learned_prompt(replace(load_adapter(adapter(kind)), folder=made, sha256=f"{kind} {words}"))


@pytest.mark.parametrize("kind", ["bert", "llama-v2"])
def test_the_sizes_are_of_files_and_of_peft(kind: str, adapter: Folders, base_model: Folders, bundle: Folders) -> None:
    loaded, base = load_adapter(adapter(kind)), base_model(family_of(kind))
    sizes = measure_sizes(loaded, load_bundle(bundle(kind)))
    files = (base / "model.safetensors", adapter(kind) / "adapter_model.safetensors", bundle(kind) / "model.onnx")
    assert [file.n_bytes for file in sizes.files] == [file.stat().st_size for file in files]
    assert "fp32" in sizes.files[2].name
    assert sizes.files[:2] == measure_sizes(loaded, None).files
    model = peft_model(adapter(kind), base)
    head = [p.numel() for name, p in model.base_model.named_parameters() if ".modules_to_save." in name]
    assert sizes.head_numbers == sum(head) > 0
    assert sizes.prompt_numbers == sum(parameter.numel() for parameter in model.prompt_encoder.parameters())
    frozen = AutoModel.from_pretrained(base).named_parameters()
    assert sizes.frozen_numbers == sum(p.numel() for name, p in frozen if not name.startswith("pooler."))


def plain_logits(adapter_folder: Path, base_folder: Path) -> np.ndarray:
    """The pair's logits with the learned head and no prompt, by transformers alone, shape = (n_labels,)"""
    model = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=2)
    model.config.pad_token_id = None
    learned = load_file(adapter_folder / "adapter_model.safetensors")
    del learned["prompt_embeddings"]
    state = {name.removeprefix("base_model."): value for name, value in learned.items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    batch = {name: torch.from_numpy(array) for name, array in golden_batch(adapter_folder).items()}
    with torch.inference_mode():
        return model.eval()(**batch).logits[0].numpy()


def check_effect(kind: str, adapter: Folders, base_model: Folders, stage: Stage) -> None:
    folder, base = adapter(kind), base_model(family_of(kind))
    setup = stage.setup(kind, "", "")
    effect, again = prompt_effect(stage, setup, *PAIR), prompt_effect(stage, setup, *PAIR)
    opened = stage.open(setup)
    assert opened.pytorch is not None
    after = opened.pytorch.logits(opened.tokenize([PAIR]).arrays)
    assert effect.task.labels == ("not_equivalent", "equivalent")
    learned = softmax(peft_logits(folder, base, golden_batch(folder))[0])
    assert effect.learned == pytest.approx(learned, abs=1e-5)
    assert effect.none == pytest.approx(softmax(plain_logits(folder, base)), abs=1e-5)
    assert effect.tokens == golden_batch(folder)["input_ids"].shape[1]
    assert not effect.cut
    # The prompt is back in its place, to the bit, and the same seeds give the same prompts.
    assert np.array_equal(softmax(after[0].astype(np.float64)), effect.learned)
    assert again == effect
    assert len(effect.random) == RANDOM_PROMPTS
    assert len({effect.learned, effect.none, *effect.random}) == RANDOM_PROMPTS + 2


@pytest.mark.parametrize("kind", ["bert", "llama-v2"])
def test_the_prompts_effect_is_pefts_prediction_beside_transformers_own(
    kind: str, adapter: Folders, base_model: Folders, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: Any = []
    real = EngineProcess.prompt_logits
    monkeypatch.setattr(EngineProcess, "prompt_logits", lambda *a: (held.append(stage.measuring.locked()), real(*a))[1])
    check_effect(kind, adapter, base_model, stage)
    assert held == [True, True]
    assert not stage.measuring.locked()


@pytest.mark.parametrize("kind", ["bert", "llama-v2"])
def test_random_prompts_are_as_long(kind: str, adapter: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, arrays = PyTorchBackend(adapter(kind), 1), golden_batch(adapter(kind))
    table = backend._model.prompt_encoder["default"].embedding.weight
    before, real = table.detach().clone(), backend.logits
    tables: Any = []
    monkeypatch.setattr(backend, "logits", lambda arrays: (tables.append(table.detach().clone()), real(arrays))[1])
    first, other = backend.prompt_logits(arrays, 3, 0), backend.prompt_logits(arrays, 3, 1)
    assert torch.equal(table, before)
    assert torch.equal(tables[0], before)
    for random in tables[1:4]:
        assert torch.allclose(random.norm(dim=1), before.norm(dim=1), rtol=1e-5)
        assert (torch.nn.functional.cosine_similarity(random, before).abs() < 0.99).all()
    assert first.random.shape == (3, 1, 2)
    assert not np.array_equal(first.random, other.random)
    assert np.array_equal(first.none, other.none)


def parse(markup: str) -> ElementTree.Element:
    """Markup that is well-formed and has what a screen reader needs."""
    plain = re.sub(' xmlns="[^"]*"', "", markup)
    tree = ElementTree.fromstring(f"<div>{plain}</div>")  # noqa: S314 -- our own
    for element in tree.iter():
        role = element.get("role")
        assert element.tag not in {"script", "b"}
        assert element.tag != "th" or element.get("scope") in {"row", "col"}
        assert element.tag != "svg" or role == "img"
        assert "overflow-x" not in element.get("style", "") or (element.get("tabindex"), role) == ("0", "region")
        assert role not in {"img", "region"} or element.get("aria-label")
    return tree


def seen(markup: str) -> tuple[list[str | None], int, str]:
    tree = parse(markup)
    return [heading.text for heading in tree.iter("h2")], len(list(tree.iter("svg"))), "".join(tree.itertext())


def test_what_random_prompts_say_is_counted_averaged_and_shown(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    show = handler(make_page(stage, build_prompt_tab), "show_effect")
    text = seen(show("bert", FP32, "eager", "word1 " * 100, "word2"))[2]
    for words in ("The text was cut to the 43 tokens", "20 random prompts, mean", "random prompts leave it so"):
        assert words in text
    random = ((0.4, 0.6), (0.8, 0.2), (0.3, 0.7), (0.9, 0.1))
    effect = PromptEffect(
        custom_task(("said",), "gold", ["a", "<b>b</b>"]),
        learned=(0.1, 0.9),
        random=random,
        none=(0.75, 0.25),
        tokens=9,
        cut=False,
    )
    assert (*effect.random_mean, effect.random_kept) == pytest.approx((0.6, 0.4, 2))
    value = effect.as_json()
    assert value["learned"] == {"label": "<b>b</b>", "probabilities": {"a": 0.1, "<b>b</b>": 0.9}}
    assert value["none"]["label"] == "a"
    assert value["random"] | {"label": "a", "prompts": 4, "label_kept": 2} == value["random"]
    monkeypatch.setattr("demo.page.tab_prompt.measure_effect", lambda *_: effect)
    text = seen(show("bert", FP32, "eager", *PAIR))[2]
    for words in ("<b>b</b>", "10.0 %", "90.0 %", "60.0 %", "75.0 %", "2 of 4 random prompts leave it so"):
        assert words in text


def test_the_endpoints_give_words_norms_and_effect(stage: Stage, adapter: Folders, base_model: Folders) -> None:
    page = make_page(stage, build_prompt_tab)
    assert set(page.get_api_info()["named_endpoints"]) == {"/prompt", "/prompt_effect"}
    prompt, prompt_effect = handler(page, "prompt"), handler(page, "prompt_effect")
    value, second, effect = prompt(), prompt("llama-v2"), prompt_effect(*PAIR)
    with pytest.raises(gr.Error, match="reads one sentence"):
        prompt_effect("word1", "word2", "moods")
    learned = learned_prompt(load_adapter(adapter("bert")))
    assert value == {"adapter": "bert", "method": "p-tuning"} | json.loads(json.dumps(learned.as_json()))
    assert len(value["nearest_words"]) == VIRTUAL_TOKENS
    assert set(value["nearest_words"][0][0]) == {"word", "cosine"}
    assert second["nearest_words"] is None
    assert np.shape(second["norms"]["keys"]) == (2, VIRTUAL_TOKENS)
    golden = softmax(peft_logits(adapter("bert"), base_model("bert"), golden_batch(adapter("bert")))[0])
    assert list(effect["learned"]["probabilities"].values()) == pytest.approx(golden, abs=1e-5)
    assert set(effect) == {"learned", "random", "none", "tokens", "cut"}


def test_the_tab_is_filled_and_follows_the_adapter(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    page = make_page(stage, build_prompt_tab)
    fill, refill = handler(page, "fill"), handler(page, "refill")
    # Before it was opened, a change of the adapter costs nothing.
    assert all(update == gr.skip() for update in refill("roberta-v2", ""))
    stage.bundle("bert")
    learned, about, shown, *boxes = fill("bert", "")
    assert shown == "bert"
    assert seen(learned)[:2] == (["What bert learned"], 1)
    headings, n_pictures, text = seen(about)
    assert headings == ["How it was learned", "How large it is", "How it is folded"]
    assert n_pictures == 2
    assert "ONNX graph, fp32" in text
    assert "not made yet" not in text
    assert "5 rows, put before the text's" in text
    assert boxes[0] == gr.update(label="Sentence 1")
    learned, about, shown, *boxes = refill("roberta-v2", shown)
    assert shown == "roberta-v2"
    assert seen(learned)[1] == 2
    assert "keys and values of 5 virtual tokens in each of 2 layers" in seen(about)[2]
    assert "not made yet" in seen(about)[2]  # no bundle was given, and looking makes none
    # Once more: what the visitor wrote and saw stays.
    assert all(update == gr.skip() for update in fill("roberta-v2", shown)[3:])
    learned, about, shown, *boxes = refill("moods", shown)
    parse(about)
    assert seen(learned)[1] == 1  # of a single virtual token
    assert boxes[0] == gr.update(label="Sentence", value="")
    assert boxes[1]["visible"] is False
    with pytest.raises(gr.Error, match="There is no adapter"):
        fill("no-such", shown)
    # Words of the vocabulary are shown as they are.
    evil = (Word("<script>alert(1)</script>", 0.5), Word("${1+1}{{value}}&amp;", 0.25))
    prompt = learned_prompt(stage.choices["bert"].adapter)
    assert prompt.vocabulary is not None
    vocabulary = replace(prompt.vocabulary, nearest=(evil, *prompt.vocabulary.nearest[1:]))
    monkeypatch.setattr("demo.page.tab_prompt.learned_prompt", lambda _: replace(prompt, vocabulary=vocabulary))
    words = [code.text for code in parse(fill("bert", "")[0]).iter("code")]
    assert words[:2] == [word.token for word in evil]


def test_a_page_without_pytorch_shows_what_was_learned(adapter: Folders, bundle: Folders) -> None:
    with stage_of(adapter("bert"), bundles=(bundle("bert"),), has_pytorch=False) as stage:
        page = make_page(stage, build_prompt_tab)
        learned, about, shown = handler(page, "fill")("bert", "")
        assert shown == "bert"
        assert seen(learned)[1] == 1
        parse(about)
        props = [component["props"] for component in page.get_config_file()["components"]]
        assert any("This page runs without PyTorch" in str(found.get("value")) for found in props)
        assert not [found for found in props if "lines" in found or found.get("variant") == "primary"]
        assert handler(page, "prompt")()["adapter"] == "bert"
        with pytest.raises(gr.Error, match="runs without PyTorch"):
            handler(page, "prompt_effect")(*PAIR)
        assert not stage._engines
    # A text that cannot be read starts no engine.
    with stage_of(adapter("bert")) as stage, pytest.raises(TextError, match="Sentence 2 is empty"):
        prompt_effect(stage, stage.default(), "word1", " ")
    assert not stage._engines
    assert not stage._bundles


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_can_be_shown(name: str) -> None:
    """minilm, whose package's files are found without transformers."""
    adapter = load_adapter(ROOT / "demo" / "adapters" / name)
    sizes = measure_sizes(adapter, None)
    assert sizes.why_unknown == ""
    assert sizes.files[0].n_bytes > 90_000_000
    learned = learned_prompt(adapter)
    assert (learned.vocabulary is not None) == (adapter.method == "p-tuning")
    curves = training_curves(adapter)
    assert curves is not None
    assert curves.kept_epoch in curves.epochs
