"""The tab "The prompt": what was learned and what it does, held against transformers and PEFT; the tab as it is served."""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from demo.engines.adapters import choose_adapters
from demo.engines.engine_process import Engine
from demo.engines.pytorch import PYTORCH_MODES, PyTorchBackend
from demo.engines.stage import Setup, Stage
from demo.measure.prompt import (
    NEAREST_WORDS,
    RANDOM_PROMPTS,
    PromptEffect,
    Word,
    learned_prompt,
    measure_sizes,
    prompt_effect,
    stored_tensors,
    training_curves,
)
from demo.page.controls import Selectors
from demo.page.tab_prompt import _effect, _learned, build_prompt_tab
from export.bundle.folder import FP32, load_bundle
from tests.conftest import (
    ENCODERS,
    ON_CPU,
    P_TUNED_V2,
    ROOT,
    SHIPPED,
    VIRTUAL_TOKENS,
    WORDS,
    Data,
    family_of,
    make_pairs,
    peft_logits,
    write_jsonl,
)
from tests.train.test_gguf import write_gguf
from train.__main__ import main as train_main
from train.adapter.folder import load_adapter
from train.adapter.record import Adapter
from train.common.errors import ModelError, PromptfoldError, TextError, UsageError
from train.common.folder_record import sha256_of_files

Folders = Callable[[str], Path]

PAIR = ("word1 word2 word3 word4", "word4 word3 word2 word1 word9")

pytestmark = pytest.mark.usefixtures("one_thread")


def peft_model(adapter_folder: Path, base_folder: Path) -> Any:
    """The adapter by PEFT alone."""
    model = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=2)
    return PeftModel.from_pretrained(model, adapter_folder).eval()


def peft_prompt(adapter_folder: Path, base_folder: Path) -> torch.Tensor:
    """The virtual tokens' embeddings by PEFT alone, shape = (n_virtual, n_width)"""
    with torch.inference_mode():
        return peft_model(adapter_folder, base_folder).get_prompt(1)[0]


@lru_cache
def golden_batch(tokenizer: Path) -> dict[str, np.ndarray]:
    """The pair in token ids, by transformers alone."""
    return dict(AutoTokenizer.from_pretrained(tokenizer)(*PAIR, return_tensors="np"))


@contextmanager
def stage_of(*adapters: Path, bundles: tuple[Path, ...] = (), has_pytorch: bool = True) -> Iterator[Stage]:
    """A real stage of these adapters and none of those that ship."""
    choices = [choice for choice in choose_adapters(adapters) if choice.adapter.folder in adapters]
    stage = Stage(choices, bundles=bundles, has_pytorch=has_pytorch, threads=1)
    try:
        yield stage
    finally:
        stage.close()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "opt", "bloom", "roberta"])
def test_the_nearest_words_and_the_norms_are_those_that_torch_finds(
    kind: str, adapter: Folders, base_model: Folders
) -> None:
    learned = learned_prompt(load_adapter(adapter(kind)))
    prompt = peft_prompt(adapter(kind), base_model(kind))
    words: torch.Tensor = AutoModel.from_pretrained(base_model(kind)).get_input_embeddings().weight.detach()
    cosines = torch.nn.functional.cosine_similarity(prompt[:, None], words[None], dim=-1)
    expected, ids = cosines.topk(NEAREST_WORDS)
    vocabulary = learned.vocabulary
    assert vocabulary is not None
    tokenizer = AutoTokenizer.from_pretrained(adapter(kind))
    found = [[word.token for word in near] for near in vocabulary.nearest]
    assert found == [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
    values = [[word.cosine for word in near] for near in vocabulary.nearest]
    assert np.allclose(values, expected, atol=1e-6)
    assert vocabulary.n_words == len(words) == len(WORDS) + 4
    assert vocabulary.median_norm == pytest.approx(float(np.median(words.norm(dim=1))))
    (part,) = learned.parts
    assert np.allclose(part.norms, [prompt.norm(dim=1)], rtol=1e-6)
    among = torch.nn.functional.cosine_similarity(prompt[:, None], prompt[None], dim=-1)
    assert np.allclose(part.cosines, among, atol=1e-6)
    assert learned.n_layers == 2
    assert learned.is_decoder == (kind not in ENCODERS)


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


@pytest.mark.parametrize("family", P_TUNED_V2)
def test_keys_and_values_are_those_that_peft_gives_each_layer(
    family: str, adapter: Folders, base_model: Folders
) -> None:
    learned = learned_prompt(load_adapter(adapter(f"{family}-v2")))
    assert learned.vocabulary is None
    assert "no word is near them" in learned.why_no_words
    model = peft_model(adapter(f"{family}-v2"), base_model(family))
    with torch.inference_mode():
        layers = model.get_prompt(1).layers
    assert [part.name for part in learned.parts] == ["keys", "values"]
    for part in learned.parts:
        # shape = (n_layers, n_virtual, n_heads · n_head)
        states = torch.stack([getattr(layer, part.name)[0].transpose(0, 1).flatten(1) for layer in layers])
        assert states.shape[:2] == (2, VIRTUAL_TOKENS)
        assert np.allclose(part.norms, states.norm(dim=-1), rtol=1e-6)
        cosines = torch.nn.functional.cosine_similarity(states[:, :, None], states[:, None], dim=-1).mean(dim=0)
        assert np.allclose(part.cosines, cosines, atol=1e-6)


def test_reading_what_was_learned_needs_neither_torch_nor_transformers(adapter: Folders) -> None:
    """Nor does the tab: pages that run ONNX Runtime alone."""
    code = (
        "import sys\nfrom pathlib import Path\nimport demo.page.tab_prompt\n"
        "from demo.measure.prompt import learned_prompt, measure_sizes, training_curves\n"
        "from demo.engines.adapters import choose_adapters\n"
        "for choice in choose_adapters([Path(name) for name in sys.argv[1:]]):\n"
        "    learned = learned_prompt(choice.adapter)\n"
        "    print(bool(learned.vocabulary), measure_sizes(choice.adapter, None).frozen_numbers)\n"
        "    demo.page.tab_prompt._about(learned, choice.adapter, measure_sizes(choice.adapter, None),\n"
        "                           training_curves(choice.adapter))\n"
        "assert 'torch' not in sys.modules, 'torch'\nassert 'transformers' not in sys.modules, 'transformers'\n"
    )
    command = [sys.executable, "-c", code, str(adapter("bert")), str(adapter("bert-v2"))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    shown = [line.split() for line in result.stdout.splitlines()]
    assert [has_words for has_words, _ in shown] == ["True", "False", "False", "True"]
    assert all(int(count) > 1000 for _, count in shown)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n_files", [1, 2])
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
    prompt = peft_prompt(adapter("gpt2"), base_model("gpt2"))
    words = tensors["wte.weight"].float()
    best, ids = torch.nn.functional.cosine_similarity(prompt[:, None], words[None], dim=-1).topk(NEAREST_WORDS)
    assert learned.vocabulary is not None
    tokenizer = AutoTokenizer.from_pretrained(adapter("gpt2"))
    for row, near in enumerate(learned.vocabulary.nearest):
        assert [word.token for word in near] == tokenizer.convert_ids_to_tokens(ids[row].tolist())
        assert [word.cosine for word in near] == pytest.approx(best[row].tolist(), abs=1e-6)


def on_other_base(adapter: Adapter, folder: Path, *, sha256: str | None = None) -> Adapter:
    """The adapter as if it had been trained on the base model in a folder, or in a file."""
    files = sorted(folder.glob("model*.safetensors")) if folder.is_dir() else [folder]
    weights = sha256 or (sha256_of_files(files) if all(file.is_file() for file in files) else "none")
    return replace(adapter, model=str(folder), model_sha256=weights, sha256=f"{folder} {weights}")


def test_where_the_words_cannot_be_read_it_is_said_why_and_the_rest_is_shown(
    adapter: Folders, base_model: Folders, tmp_path: Path
) -> None:
    trained = load_adapter(adapter("llama"))
    write_gguf(tmp_path / "tiny.gguf", base_model("llama"))
    other = tmp_path / "other"
    other.mkdir()
    save_file({"lm_head.weight": torch.ones(3, 32)}, other / "model.safetensors")
    whole = tmp_path / "whole-numbers"
    whole.mkdir()
    save_file({"embed_tokens.weight": torch.ones(94, 32, dtype=torch.int8)}, whole / "model.safetensors")
    cases = {
        "The base model is a GGUF file": on_other_base(trained, tmp_path / "tiny.gguf"),
        "The base model nowhere is not on this machine": on_other_base(trained, tmp_path / "nowhere"),
        "The base model nowhere.gguf is not on this machine": on_other_base(trained, tmp_path / "nowhere.gguf"),
        "some/name-of-the-hub": replace(trained, model="some/name-of-the-hub", sha256="hub"),
        "is not the one of the training": on_other_base(trained, other, sha256="0" * 64),
        "holds no word embeddings that are known": on_other_base(trained, other),
        "model.safetensors holds numbers of type I8": on_other_base(trained, whole),
    }
    for words, changed in cases.items():
        learned = learned_prompt(changed)
        assert learned.vocabulary is None
        # A hub's name loses its owner, which stands in no folder's name either.
        assert words.rpartition("/")[2] in learned.why_no_words
        assert str(tmp_path) not in learned.why_no_words
        assert learned.parts == learned_prompt(trained).parts
        markup = _learned(learned, choose_adapters([adapter("llama")])[0])
        assert learned.why_no_words.partition("'")[0] in markup
        assert "Nearest words" not in markup
    gguf = cases["The base model is a GGUF file"]
    sizes = measure_sizes(gguf, None)
    assert sizes.frozen_numbers is None
    assert "GGUF" in sizes.why_unknown
    assert sizes.files[0].n_bytes == (tmp_path / "tiny.gguf").stat().st_size
    assert len(measure_sizes(cases["The base model nowhere is not on this machine"], None).files) == 1


def test_a_type_that_numpy_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="type F8_E4M3"):
        stored_tensors(tmp_path / "model.safetensors")["a"].rows()


@pytest.mark.parametrize(
    ("kind", "file", "content", "words"),
    [
        ("bert", "adapter_model.safetensors", b"no tensors at all", "adapter_model.safetensors cannot be read"),
        ("bert", "adapter_model.safetensors", None, "holds no prompt of 5 virtual tokens"),
        ("bert-v2", "adapter_config.json", b'{"num_layers": 7}', "wrong form"),
        ("bert-v2", "adapter_config.json", b"{}", "num_layers"),
    ],
)
def test_an_adapter_of_another_make_is_refused(
    kind: str, file: str, content: bytes | None, words: str, adapter: Folders, tmp_path: Path
) -> None:
    """Its hashes are right, as a stranger's are."""
    shutil.copytree(adapter(kind), tmp_path / "made")
    if content is None:
        save_file({"prompt_embeddings": torch.ones(4, 32)}, tmp_path / "made" / file)
    else:
        (tmp_path / "made" / file).write_bytes(content)
    made = replace(load_adapter(adapter(kind)), folder=tmp_path / "made", sha256=f"{kind} {words}")
    with pytest.raises(PromptfoldError, match=words):
        learned_prompt(made)


def test_a_tokenizer_that_is_none_costs_the_words_alone(adapter: Folders, tmp_path: Path) -> None:
    shutil.copytree(adapter("bert"), tmp_path / "made")
    (tmp_path / "made" / "tokenizer.json").write_text("{}")
    learned = learned_prompt(replace(load_adapter(adapter("bert")), folder=tmp_path / "made", sha256="no tokenizer"))
    assert learned.vocabulary is None
    assert "tokenizer cannot be read" in learned.why_no_words


@pytest.mark.parametrize("kind", ["bert", "bert-v2", "gpt2"])
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
    head = {
        name: parameter.numel()
        for name, parameter in model.base_model.named_parameters()
        if ".modules_to_save." in name
    }
    assert sizes.head_numbers == sum(head.values()) > 0
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
    assert [name for name, _ in curves.scores] == ["accuracy"] if len(curves.scores) == 1 else ["accuracy", "F1"]
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


@pytest.mark.parametrize("kind", ["bert", "bert-v2", "gpt2", "gpt2-v2"])
def test_the_prompts_effect_is_pefts_prediction_beside_transformers_own(
    kind: str, adapter: Folders, base_model: Folders, bundle: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = adapter(kind), base_model(family_of(kind))
    held: list[bool] = []
    real = Engine.prompt_logits

    def watched(self: Engine, *arguments: Any) -> Any:
        held.append(own_stage.measuring.locked())
        return real(self, *arguments)

    monkeypatch.setattr(Engine, "prompt_logits", watched)
    with stage_of(folder, bundles=(bundle(kind),)) as own_stage:
        setup = own_stage.default()
        effect = prompt_effect(own_stage, setup, *PAIR)
        again = prompt_effect(own_stage, setup, *PAIR)
        opened = own_stage.open(setup)
        assert opened.pytorch is not None
        after = opened.pytorch.logits(opened.tokenize([PAIR]).arrays)
    assert held == [True, True]
    assert not own_stage.measuring.locked()
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


@pytest.mark.parametrize("kind", ["bert", "bert-v2"])
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
    first = backend.prompt_logits(arrays, 3, 0)
    assert torch.equal(table, before)
    learned, *randoms = tables
    assert torch.equal(learned, before)
    assert len(randoms) == 3
    for random in randoms:
        assert torch.allclose(random.norm(dim=1), before.norm(dim=1), rtol=1e-5)
        cosines = torch.nn.functional.cosine_similarity(random, before)
        assert (cosines.abs() < 0.99).all()
    assert first.random.shape == (3, 1, 2)
    other = backend.prompt_logits(arrays, 3, 1)
    assert not np.array_equal(first.random, other.random)
    assert np.array_equal(first.none, other.none)


def test_what_random_prompts_say_is_counted_and_averaged() -> None:
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
    assert {name: value["random"][name] for name in ("label", "prompts", "label_kept")} == {
        "label": "a",
        "prompts": 4,
        "label_kept": 2,
    }
    markup = _effect(effect)
    for words in ("10.0 %", "90.0 %", "60.0 %", "75.0 %", "2 of 4 random prompts leave it so"):
        assert words in markup


@pytest.fixture(scope="module")
def mood_adapter(tmp_path_factory: pytest.TempPathFactory, base_model: Folders) -> Path:
    """An adapter for single sentences with three labels, one of which is markup."""
    folder = tmp_path_factory.mktemp("moods")
    rows: list[dict[str, object]] = [
        {"remark": row["sentence1"], "mood": ("bad", "good", "<b>so-so</b>")[index % 3]}
        for index, row in enumerate(make_pairs(36, seed=3))
    ]
    data = Data(write_jsonl(folder / "train.jsonl", rows[:24]), write_jsonl(folder / "validation.jsonl", rows[24:]))
    flags = shlex.split(
        f"--model {base_model('bert')} --text-columns remark --label-column mood --epochs 1 --virtual-tokens 1 "
        f"--encoder-hidden-size 8 --out {folder / 'moods'}"
    )
    assert train_main(flags + data.flags) == 0
    return folder / "moods"


@pytest.fixture(scope="module")
def folders(adapter: Folders, mood_adapter: Path) -> tuple[Path, ...]:
    """Adapters of both methods, and one of single sentences."""
    return adapter("bert"), adapter("bert-v2"), mood_adapter


@pytest.fixture(scope="module")
def stage(folders: tuple[Path, ...], bundle: Folders) -> Iterator[Stage]:
    with stage_of(*folders, bundles=(bundle("bert"),)) as stage:
        yield stage


async def build_page(stage: Stage) -> gr.Blocks:
    """A page with nothing but the selectors and this tab."""
    with gr.Blocks(analytics_enabled=False) as page:
        selectors = Selectors(
            gr.Dropdown(list(stage.choices), label="Adapter"),
            gr.Dropdown([FP32], label="Precision"),
            gr.Dropdown(list(PYTORCH_MODES), label="PyTorch"),
        )
        with gr.Tab("The prompt") as tab:
            build_prompt_tab(stage, selectors, tab)
    return page


def make_page(stage: Stage) -> gr.Blocks:
    """The same from where no event loop runs: there Gradio would make one for each of its locks, and close none."""
    return asyncio.run(build_page(stage))


def handler(page: gr.Blocks, name: str) -> Callable[..., Any]:
    """The function of an event of the page."""
    (found,) = [event.fn for event in page.fns.values() if event.fn and event.fn.__name__ == name]
    return found


def serve_page(bundle_folder: str, has_pytorch: bool, *adapters: str) -> None:
    """The page in a process of its own, until its input ends: Gradio leaves sockets open where it has served."""
    bundles = (Path(bundle_folder),)
    with stage_of(*map(Path, adapters), bundles=bundles, has_pytorch=has_pytorch) as stage:
        page = make_page(stage)
        page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1")
        print(f"ready {page.local_url}", flush=True)
        sys.stdin.read()


@contextmanager
def visit(bundle_folder: Path, adapters: Sequence[Path], *, has_pytorch: bool = True) -> Iterator[Client]:
    """Serve the page and visit it with a program."""
    arguments = (str(bundle_folder), has_pytorch, *map(str, adapters))
    code = f"from tests.demo.test_prompt import serve_page; serve_page(*{arguments!r})"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | ON_CPU,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        printed = ""
        while not (found := re.search(r"^ready (\S+)$", printed, flags=re.MULTILINE)):
            line = process.stdout.readline()
            assert line, f"the page did not start:\n{printed}"
            printed += line
        client = Client(found[1], verbose=False)
        yield client
        client.close()
        printed += process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "Traceback" not in printed, printed


def test_the_endpoints_give_the_words_the_norms_and_the_effect(
    folders: tuple[Path, ...], adapter: Folders, base_model: Folders, bundle: Folders
) -> None:
    with visit(bundle("bert"), folders) as client:
        endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
        assert set(endpoints) == {"/prompt", "/prompt_effect"}
        value = client.predict(api_name="/prompt")
        second = client.predict("bert-v2", api_name="/prompt")
        effect = client.predict(*PAIR, api_name="/prompt_effect")
        for arguments, words in (
            ((*PAIR, "no-such"), "There is no adapter 'no-such'"),
            (("", "x"), "Sentence 1 is empty"),
            (("word1", "word2", "moods"), "reads one sentence"),
        ):
            with pytest.raises(AppError, match=words):
                client.predict(*arguments, api_name="/prompt_effect")
    learned = learned_prompt(load_adapter(adapter("bert")))
    assert value == {"adapter": "bert", "method": "p-tuning"} | json.loads(json.dumps(learned.as_json()))
    assert len(value["nearest_words"]) == VIRTUAL_TOKENS
    assert set(value["nearest_words"][0][0]) == {"word", "cosine"}
    assert second["nearest_words"] is None
    assert np.shape(second["norms"]["keys"]) == (2, VIRTUAL_TOKENS)
    golden = softmax(peft_logits(adapter("bert"), base_model("bert"), golden_batch(adapter("bert")))[0])
    assert list(effect["learned"]["probabilities"].values()) == pytest.approx(golden, abs=1e-5)
    assert set(effect) == {"learned", "random", "none", "tokens", "cut"}


class _Checker(HTMLParser):
    """Markup that a browser need not mend, and what a screen reader asks for."""

    VOID = frozenset({"br", "img", "input", "meta"})

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
        if tag == "th":
            assert found["scope"] in {"row", "col"}
        if tag == "svg":
            assert found["role"] == "img"
            assert found["aria-label"]
            self.pictures += 1
        if "overflow-x" in (found.get("style") or ""):
            assert found["tabindex"] == "0"
            assert found["role"] == "region"
            assert found["aria-label"]
        assert tag not in {"script", "b"}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        self.words.append(data)


def test_the_tab_is_filled_when_it_is_opened_and_follows_the_adapter(stage: Stage) -> None:
    page = make_page(stage)
    fill, refill = handler(page, "fill"), handler(page, "refill")
    # Before it was opened, a change of the adapter costs nothing.
    assert all(update == gr.skip() for update in refill("bert-v2", ""))

    learned, about, shown, *boxes = fill("bert", "")
    assert shown == "bert"
    first, second = _Checker(learned), _Checker(about)
    assert first.headings == ["What bert learned"]
    assert second.headings == ["How it was learned", "How large it is", "How it is folded"]
    assert (first.pictures, second.pictures) == (1, 2)
    text = "".join(second.words)
    assert "ONNX graph, fp32" in text
    assert "not made yet" not in text
    assert "5 rows, put before the text's" in text
    assert boxes[0] == gr.update(label="Sentence 1")

    learned, about, shown, *boxes = refill("bert-v2", shown)
    assert shown == "bert-v2"
    assert _Checker(learned).pictures == 2
    text = "".join(_Checker(about).words)
    assert "keys and values of 5 virtual tokens in each of 2 layers" in text
    assert "not made yet" in text  # no bundle was given, and looking makes none
    # Once more: what the visitor wrote and saw stays.
    assert all(update == gr.skip() for update in fill("bert-v2", shown)[3:])

    learned, about, shown, *boxes = refill("moods", shown)
    _Checker(about)
    assert _Checker(learned).pictures == 1  # of a single virtual token
    assert boxes[0] == gr.update(label="Sentence", value="")
    assert boxes[1]["visible"] is False
    with pytest.raises(gr.Error, match="There is no adapter"):
        fill("no-such", shown)


def test_a_text_of_one_sentence_is_classified_with_and_without_the_prompt(stage: Stage) -> None:
    show = handler(make_page(stage), "show_effect")
    # What another task left in the second box does not matter, as nobody sees it.
    checked = _Checker(show("moods", FP32, "eager", "word1 word2", "left over"))
    text = "".join(checked.words)
    for words in ("bad", "good", "<b>so-so</b>", "20 random prompts, mean", "random prompts leave it so"):
        assert words in text


def test_a_text_over_the_limit_is_cut_and_the_visitor_told(stage: Stage) -> None:
    text = "".join(
        _Checker(handler(make_page(stage), "show_effect")("bert", FP32, "eager", "word1 " * 100, "word2")).words
    )
    assert "The text was cut to the 43 tokens" in text


def test_words_of_the_vocabulary_are_shown_as_they_are(adapter: Folders) -> None:
    choice = choose_adapters([adapter("bert")])[0]
    learned = learned_prompt(choice.adapter)
    assert learned.vocabulary is not None
    evil = (Word("<script>alert(1)</script>", 0.5), Word("${1+1}{{value}}&amp;", 0.25))
    nearest = (evil, *learned.vocabulary.nearest[1:])
    markup = _learned(replace(learned, vocabulary=replace(learned.vocabulary, nearest=nearest)), choice)
    words = _Checker(markup).words
    assert "<script>alert(1)</script>" in words
    assert "${1+1}{{value}}&amp;" in words


def test_a_page_without_pytorch_shows_what_was_learned_and_says_what_it_cannot_do(
    adapter: Folders, bundle: Folders
) -> None:
    with stage_of(adapter("bert"), bundles=(bundle("bert"),), has_pytorch=False) as stage:
        learned, about, shown = handler(make_page(stage), "fill")("bert", "")
        assert shown == "bert"
        assert _Checker(learned).pictures == 1
        _Checker(about)
        with pytest.raises(UsageError, match="runs without PyTorch"):
            prompt_effect(stage, Setup("bert"), *PAIR)
        assert not stage._engines
    with visit(bundle("bert"), [adapter("bert")], has_pytorch=False) as client:
        props = [component["props"] for component in client.config["components"]]
        assert any("This page runs without PyTorch" in str(found.get("value")) for found in props)
        assert not [found for found in props if "lines" in found or found.get("variant") == "primary"]
        assert client.predict(api_name="/prompt")["adapter"] == "bert"
        with pytest.raises(AppError, match="runs without PyTorch"):
            client.predict(*PAIR, api_name="/prompt_effect")


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
