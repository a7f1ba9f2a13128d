"""The tab "The prompt": what was learned and what it does, held against transformers and PEFT."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from demo.engines.engine_process import EngineProcess
from demo.engines.pytorch import PyTorchBackend
from demo.engines.stage import Stage
from demo.measure.prompt import (
    NEAREST_WORDS,
    RANDOM_PROMPTS,
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
    """The adapter by PEFT alone."""
    model = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=2)
    return PeftModel.from_pretrained(model, adapter_folder).eval()


@lru_cache
def golden_batch(tokenizer: Path) -> dict[str, np.ndarray]:
    """The pair in token ids, by transformers alone."""
    return dict(AutoTokenizer.from_pretrained(tokenizer)(*PAIR, return_tensors="np"))


def cosines(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Cosines of each row with each, shape = (…, n_first, n_second)."""
    return torch.nn.functional.cosine_similarity(first[..., :, None, :], second[..., None, :, :], dim=-1)


def nearest(prompt: torch.Tensor, words: torch.Tensor, adapter_folder: Path) -> tuple[torch.Tensor, list[list[str]]]:
    """Cosines and tokens of the words nearest to each virtual token, by torch and transformers."""
    best, ids = cosines(prompt, words).topk(NEAREST_WORDS)
    tokenizer = AutoTokenizer.from_pretrained(adapter_folder)
    return best, [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]


def check_words(kind: str, adapter: Folders, base_model: Folders) -> None:
    """The nearest words and the norms are those that torch finds."""
    learned = learned_prompt(load_adapter(adapter(kind)))
    with torch.inference_mode():
        prompt = peft_model(adapter(kind), base_model(kind)).get_prompt(1)[0]
    words: torch.Tensor = AutoModel.from_pretrained(base_model(kind)).get_input_embeddings().weight.detach()
    vocabulary = learned.vocabulary
    assert vocabulary is not None
    expected, tokens = nearest(prompt, words, adapter(kind))
    assert [[word.token for word in near] for near in vocabulary.nearest] == tokens
    assert np.allclose([[word.cosine for word in near] for near in vocabulary.nearest], expected, atol=1e-6)
    assert vocabulary.n_words == len(words) == len(WORDS) + 4
    assert vocabulary.median_norm == pytest.approx(float(np.median(words.norm(dim=1))))
    (part,) = learned.parts
    assert np.allclose(part.norms, [prompt.norm(dim=1)], rtol=1e-6)
    assert np.allclose(part.cosines, cosines(prompt, prompt), atol=1e-6)
    assert learned.n_layers == 2
    assert learned.is_decoder == (kind not in ENCODERS)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_nearest_words_and_the_norms_are_those_that_torch_finds(
    kind: str, adapter: Folders, base_model: Folders
) -> None:
    check_words(kind, adapter, base_model)


def test_a_random_vectors_nearest_word_is_as_near_as_another_random_vectors(
    adapter: Folders, base_model: Folders
) -> None:
    """Other random numbers, and many more of them: the mean is the same up to its spread."""
    vocabulary = learned_prompt(load_adapter(adapter("bert"))).vocabulary
    assert vocabulary is not None
    words = torch.nn.functional.normalize(
        load_file(base_model("bert") / "model.safetensors")["embeddings.word_embeddings.weight"]
    )
    generator = torch.Generator().manual_seed(5)
    other = torch.nn.functional.normalize(torch.randn(20_000, words.shape[1], generator=generator))
    best = (other @ words.T).max(dim=1).values
    assert abs(vocabulary.random_cosine - best.mean()) < 5 * best.std() / VIRTUAL_TOKENS**0.5
    assert 0 < vocabulary.random_cosine < 1


def check_keys_and_values(kind: str, adapter: Folders, base_model: Folders) -> None:
    """Keys and values are those that PEFT gives each layer."""
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


@pytest.mark.parametrize("kind", ["roberta-v2", "llama-v2"])
def test_keys_and_values_are_those_that_peft_gives_each_layer(kind: str, adapter: Folders, base_model: Folders) -> None:
    check_keys_and_values(kind, adapter, base_model)


def test_reading_what_was_learned_needs_neither_torch_nor_transformers(adapter: Folders) -> None:
    """Nor does the tab: pages that run ONNX Runtime alone."""
    code = """
import sys
from pathlib import Path
from demo.engines.adapters import choose_adapters
from demo.engines.stage import Stage
from demo.measure.prompt import learned_prompt, measure_sizes
from demo.page.tab_prompt import build_prompt_tab
from tests.demo.one_tab import handler, make_page
choices = choose_adapters([Path(name) for name in sys.argv[1:]])
fill = handler(make_page(Stage(choices, has_pytorch=False), build_prompt_tab), "fill")
for choice in choices:
    fill(choice.name, "")
    print(bool(learned_prompt(choice.adapter).vocabulary), measure_sizes(choice.adapter, None).frozen_numbers)
assert not {"torch", "transformers"} & set(sys.modules)
"""
    command = [sys.executable, "-c", code, str(adapter("bert")), str(adapter("llama-v2"))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    shown = [line.split() for line in result.stdout.splitlines()]
    assert [has_words for has_words, _ in shown] == ["True", "False", "False", "True"]
    assert all(int(count) > 1000 for _, count in shown)


@pytest.mark.parametrize(("dtype", "n_files"), [(torch.bfloat16, 1), (torch.float16, 2), (torch.float64, 1)])
def test_words_are_read_from_any_float_type_and_from_several_files(
    dtype: torch.dtype, n_files: int, adapter: Folders, base_model: Folders, tmp_path: Path
) -> None:
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(base_model("gpt2") / "model.safetensors").items()
    }
    names = sorted(tensors)
    for number in range(n_files):
        part = {name: tensors[name] for name in names[number::n_files]}
        save_file(part, tmp_path / f"model-{number + 1:05}-of-{n_files:05}.safetensors")
    learned = learned_prompt(on_other_base(load_adapter(adapter("gpt2")), tmp_path))
    with torch.inference_mode():
        prompt = peft_model(adapter("gpt2"), base_model("gpt2")).get_prompt(1)[0]
    expected, tokens = nearest(prompt, tensors["wte.weight"].float(), adapter("gpt2"))
    assert learned.vocabulary is not None
    assert [[word.token for word in near] for near in learned.vocabulary.nearest] == tokens
    assert np.allclose([[word.cosine for word in near] for near in learned.vocabulary.nearest], expected, atol=1e-6)


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


@pytest.mark.parametrize(
    ("kind", "file", "content", "words"),
    [
        ("bert", "adapter_model.safetensors", b"no tensors at all", "adapter_model.safetensors cannot be read"),
        ("bert", "adapter_model.safetensors", None, "holds no prompt of 5 virtual tokens"),
        ("llama-v2", "adapter_config.json", b'{"num_layers": 7}', "wrong form"),
        ("llama-v2", "adapter_config.json", b"{}", "num_layers"),
    ],
)
def test_an_adapter_of_another_make_is_refused(
    kind: str, file: str, content: bytes | None, words: str, adapter: Folders, tmp_path: Path
) -> None:
    """Its hashes are right, as an attacker's would be."""
    shutil.copytree(adapter(kind), tmp_path / "made")
    if content is None:
        save_file({"prompt_embeddings": torch.ones(4, 32)}, tmp_path / "made" / file)
    else:
        (tmp_path / "made" / file).write_bytes(content)
    made = replace(load_adapter(adapter(kind)), folder=tmp_path / "made", sha256=f"{kind} {words}")
    with pytest.raises(PromptfoldError, match=words):
        learned_prompt(made)


@pytest.mark.parametrize("kind", ["bert", "llama-v2"])
def test_the_sizes_are_those_of_the_files_and_of_pefts_parameters(
    kind: str, adapter: Folders, base_model: Folders, bundle: Folders
) -> None:
    loaded = load_adapter(adapter(kind))
    sizes = measure_sizes(loaded, load_bundle(bundle(kind)))
    assert [file.n_bytes for file in sizes.files] == [
        (base_model(family_of(kind)) / "model.safetensors").stat().st_size,
        (adapter(kind) / "adapter_model.safetensors").stat().st_size,
        (bundle(kind) / "model.onnx").stat().st_size,
    ]
    assert "fp32" in sizes.files[2].name
    assert sizes.files[:2] == measure_sizes(loaded, None).files
    model = peft_model(adapter(kind), base_model(family_of(kind)))
    head = [p.numel() for name, p in model.base_model.named_parameters() if ".modules_to_save." in name]
    assert sizes.head_numbers == sum(head) > 0
    assert sizes.prompt_numbers == sum(parameter.numel() for parameter in model.prompt_encoder.parameters())
    backbone = AutoModel.from_pretrained(base_model(family_of(kind)))
    frozen = [p.numel() for name, p in backbone.named_parameters() if not name.startswith("pooler.")]
    assert sizes.frozen_numbers == sum(frozen)


def test_the_curves_are_the_trainings(adapter: Folders) -> None:
    loaded = load_adapter(adapter("bert"))
    curves = training_curves(loaded)
    record = json.loads((adapter("bert") / "training.json").read_text())
    assert curves.epochs == (1, 2, 3)
    assert curves.train_loss == tuple(row["train_loss"] for row in record["epochs"])
    assert curves.validation_loss == tuple(row["validation_loss"] for row in record["epochs"])
    assert [name for name, _ in curves.scores] == ["accuracy", "F1"]
    kept = curves.epochs.index(curves.kept_epoch)
    assert [values[kept] for _, values in curves.scores] == pytest.approx(list(loaded.scores.values.values()))


def plain_logits(adapter_folder: Path, base_folder: Path) -> np.ndarray:
    """The pair's logits with the learned head and no prompt, by transformers alone, shape = (n_labels,)"""
    model = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=2)
    model.config.pad_token_id = None
    state = load_file(adapter_folder / "adapter_model.safetensors")
    del state["prompt_embeddings"]
    result = model.load_state_dict(
        {name.removeprefix("base_model."): value for name, value in state.items()}, strict=False
    )
    assert not result.unexpected_keys
    batch = {name: torch.from_numpy(array) for name, array in golden_batch(adapter_folder).items()}
    with torch.inference_mode():
        return model.eval()(**batch).logits[0].numpy()


def check_effect(kind: str, adapter: Folders, base_model: Folders, stage: Stage) -> None:
    """The effect is PEFT's prediction beside transformers' own, and the prompt is put back."""
    folder, base = adapter(kind), base_model(family_of(kind))
    setup = stage.setup(kind, "", "")
    effect, again = prompt_effect(stage, setup, *PAIR), prompt_effect(stage, setup, *PAIR)
    opened = stage.open(setup)
    assert opened.pytorch is not None
    after = opened.pytorch.logits(opened.tokenize([PAIR]).arrays)
    assert effect.labels == ("not_equivalent", "equivalent")
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
    held: list[bool] = []
    real = EngineProcess.prompt_logits

    def watched(self: EngineProcess, *arguments: Any) -> Any:
        held.append(stage.measuring.locked())
        return real(self, *arguments)

    monkeypatch.setattr(EngineProcess, "prompt_logits", watched)
    check_effect(kind, adapter, base_model, stage)
    assert held == [True, True]
    assert not stage.measuring.locked()


@pytest.mark.parametrize("kind", ["bert", "llama-v2"])
def test_random_prompts_are_as_long_as_the_learned_one_and_leave_it_in_its_place(
    kind: str, adapter: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = PyTorchBackend(adapter(kind), 1)
    table = backend._model.prompt_encoder["default"].embedding.weight
    before = table.detach().clone()
    tables: list[torch.Tensor] = []
    real = backend.logits

    def watched(arrays: Any) -> np.ndarray:
        tables.append(table.detach().clone())
        return real(arrays)

    monkeypatch.setattr(backend, "logits", watched)
    arrays = golden_batch(adapter(kind))
    first, other = backend.prompt_logits(arrays, 3, 0), backend.prompt_logits(arrays, 3, 1)
    assert torch.equal(table, before)
    learned, *randoms = tables[:4]
    assert torch.equal(learned, before)
    for random in randoms:
        assert torch.allclose(random.norm(dim=1), before.norm(dim=1), rtol=1e-5)
        assert (torch.nn.functional.cosine_similarity(random, before).abs() < 0.99).all()
    assert first.random.shape == (3, 1, 2)
    assert not np.array_equal(first.random, other.random)
    assert np.array_equal(first.none, other.none)


def test_what_random_prompts_say_is_counted_averaged_and_shown(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    effect = PromptEffect(
        labels=("a", "b"),
        learned=(0.1, 0.9),
        random=((0.4, 0.6), (0.8, 0.2), (0.3, 0.7), (0.9, 0.1)),
        none=(0.75, 0.25),
        tokens=9,
        cut=False,
    )
    assert effect.random_mean == pytest.approx((0.6, 0.4))
    assert effect.random_kept == 2
    value = effect.as_json()
    assert value["learned"] == {"label": "b", "probabilities": {"a": 0.1, "b": 0.9}}
    assert value["none"]["label"] == "a"
    assert value["random"] | {"label": "a", "prompts": 4, "label_kept": 2} == value["random"]
    monkeypatch.setattr("demo.page.tab_prompt.measure_effect", lambda *_: effect)
    markup = handler(make_page(stage, build_prompt_tab), "show_effect")("bert", FP32, "eager", *PAIR)
    for words in ("10.0 %", "90.0 %", "60.0 %", "75.0 %", "2 of 4 random prompts leave it so"):
        assert words in markup


def test_the_endpoints_give_the_words_the_norms_and_the_effect(
    stage: Stage, adapter: Folders, base_model: Folders
) -> None:
    page = make_page(stage, build_prompt_tab)
    assert set(page.get_api_info()["named_endpoints"]) == {"/prompt", "/prompt_effect"}
    prompt, prompt_effect = handler(page, "prompt"), handler(page, "prompt_effect")
    value, second, effect = prompt(), prompt("llama-v2"), prompt_effect(*PAIR)
    for arguments, words in (
        ((*PAIR, "no-such"), "There is no adapter 'no-such'"),
        (("", "x"), "Sentence 1 is empty"),
        (("word1", "word2", "moods"), "reads one sentence"),
    ):
        with pytest.raises(gr.Error, match=words):
            prompt_effect(*arguments)
    learned = learned_prompt(load_adapter(adapter("bert")))
    assert value == {"adapter": "bert", "method": "p-tuning"} | json.loads(json.dumps(learned.as_json()))
    assert len(value["nearest_words"]) == VIRTUAL_TOKENS
    assert set(value["nearest_words"][0][0]) == {"word", "cosine"}
    assert second["nearest_words"] is None
    assert np.shape(second["norms"]["keys"]) == (2, VIRTUAL_TOKENS)
    golden = softmax(peft_logits(adapter("bert"), base_model("bert"), golden_batch(adapter("bert")))[0])
    assert list(effect["learned"]["probabilities"].values()) == pytest.approx(golden, abs=1e-5)
    assert set(effect) == {"learned", "random", "none", "tokens", "cut"}


class Checker(HTMLParser):
    """Markup that is well-formed and has what a screen reader needs."""

    VOID = ("br", "img", "input", "meta")

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.pictures = 0
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert tag not in {"script", "b"}
        assert tag != "th" or found["scope"] in {"row", "col"}
        if tag == "svg":
            assert found["role"] == "img"
            self.pictures += 1
        if "overflow-x" in (found.get("style") or ""):
            assert (found["tabindex"], found["role"]) == ("0", "region")
        assert found.get("role") not in {"img", "region"} or found["aria-label"]
        self.open += [tag] * (tag not in self.VOID)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.headings += [data] * (self.open[-1:] == ["h2"])
        self.words.append(data)


def test_the_tab_is_filled_when_it_is_opened_and_follows_the_adapter(stage: Stage) -> None:
    page = make_page(stage, build_prompt_tab)
    fill, refill = handler(page, "fill"), handler(page, "refill")
    # Before it was opened, a change of the adapter costs nothing.
    assert all(update == gr.skip() for update in refill("roberta-v2", ""))

    stage.bundle("bert")
    learned, about, shown, *boxes = fill("bert", "")
    assert shown == "bert"
    first, second = Checker(learned), Checker(about)
    assert first.headings == ["What bert learned"]
    assert second.headings == ["How it was learned", "How large it is", "How it is folded"]
    assert (first.pictures, second.pictures) == (1, 2)
    text = "".join(second.words)
    assert "ONNX graph, fp32" in text
    assert "not made yet" not in text
    assert "5 rows, put before the text's" in text
    assert boxes[0] == gr.update(label="Sentence 1")

    learned, about, shown, *boxes = refill("roberta-v2", shown)
    assert shown == "roberta-v2"
    assert Checker(learned).pictures == 2
    text = "".join(Checker(about).words)
    assert "keys and values of 5 virtual tokens in each of 2 layers" in text
    assert "not made yet" in text  # no bundle was given, and looking makes none
    # Once more: what the visitor wrote and saw stays.
    assert all(update == gr.skip() for update in fill("roberta-v2", shown)[3:])

    learned, about, shown, *boxes = refill("moods", shown)
    Checker(about)
    assert Checker(learned).pictures == 1  # of a single virtual token
    assert boxes[0] == gr.update(label="Sentence", value="")
    assert boxes[1]["visible"] is False
    with pytest.raises(gr.Error, match="There is no adapter"):
        fill("no-such", shown)


def test_a_text_is_classified_with_and_without_the_prompt(stage: Stage) -> None:
    show = handler(make_page(stage, build_prompt_tab), "show_effect")
    # The second box is hidden here, so what another task left in it does not matter.
    text = "".join(Checker(show("moods", FP32, "eager", "word1 word2", "left over")).words)
    for words in ("bad", "good", "<b>so-so</b>", "20 random prompts, mean", "random prompts leave it so"):
        assert words in text
    text = "".join(Checker(show("bert", FP32, "eager", "word1 " * 100, "word2")).words)
    assert "The text was cut to the 43 tokens" in text


def test_words_of_the_vocabulary_are_shown_as_they_are(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = learned_prompt(stage.choices["bert"].adapter)
    assert learned.vocabulary is not None
    evil = (Word("<script>alert(1)</script>", 0.5), Word("${1+1}{{value}}&amp;", 0.25))
    vocabulary = replace(learned.vocabulary, nearest=(evil, *learned.vocabulary.nearest[1:]))
    shown = replace(learned, vocabulary=vocabulary)
    monkeypatch.setattr("demo.page.tab_prompt.learned_prompt", lambda _: shown)
    words = Checker(handler(make_page(stage, build_prompt_tab), "fill")("bert", "")[0]).words
    assert "<script>alert(1)</script>" in words
    assert "${1+1}{{value}}&amp;" in words


def test_a_page_without_pytorch_shows_what_was_learned_and_says_what_it_cannot_do(
    adapter: Folders, bundle: Folders
) -> None:
    with stage_of(adapter("bert"), bundles=(bundle("bert"),), has_pytorch=False) as stage:
        page = make_page(stage, build_prompt_tab)
        learned, about, shown = handler(page, "fill")("bert", "")
        assert shown == "bert"
        assert Checker(learned).pictures == 1
        Checker(about)
        props = [component["props"] for component in page.get_config_file()["components"]]
        assert any("This page runs without PyTorch" in str(found.get("value")) for found in props)
        assert not [found for found in props if "lines" in found or found.get("variant") == "primary"]
        assert handler(page, "prompt")()["adapter"] == "bert"
        with pytest.raises(gr.Error, match="runs without PyTorch"):
            handler(page, "prompt_effect")(*PAIR)
        assert not stage._engines


def test_a_text_that_cannot_be_read_starts_no_engine(adapter: Folders) -> None:
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
    assert training_curves(adapter).kept_epoch in training_curves(adapter).epochs
