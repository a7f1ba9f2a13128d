"""``python -m train.import_peft`` through its entry point, on what PEFT itself wrote."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from demo.__main__ import main as demo_main
from demo.engines.adapters import choose_adapters
from export.__main__ import main as export_main
from export.bundle.folder import load_bundle
from export.runtime.classifier import OnnxClassifier
from tests.conftest import Folders, MadeOnce, make_pairs, write_jsonl
from tests.train.peft_sources import (
    PROMPT_KINDS,
    TASK,
    VIRTUAL_TOKENS,
    golden_logits,
    list_mismatches_as,
    make_base_with_head,
    make_source,
)
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base, load_peft_model, load_prompted_classifier
from train.adapter.record import Adapter
from train.evaluate import main as evaluate_main
from train.foreign import compare, convert
from train.import_peft import main
from train.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
Capture = pytest.CaptureFixture[str]
Sources = Callable[..., Path]
TEXTS = (("word4 word7 word1",), ("word8",), ("word11 word12 word13 word14 word15 word16 word17",))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="session")
def source(made_once: MadeOnce, base_model: Folders) -> Sources:
    """A function from a kind of PEFT's adapters and a family to a folder that PEFT wrote."""

    def get(kind: str, family: str = "bert", *, modules: list[str] | None = None) -> Path:
        name = f"peft-{family}-{kind}-{'-'.join(modules or ['head'])}"
        return made_once(name, lambda folder: make_source(folder, base_model(family), kind, modules=modules))

    return get


@pytest.fixture
def changed(source: Sources, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies a source, with other settings or other names of its tensors."""

    def get(kind: str = "mlp", *, rename: Callable[[str], str] | None = None, **settings: Any) -> Path:
        folder = shutil.copytree(source(kind), tmp_path / "source")
        config = json.loads((folder / CONFIG).read_text()) | settings
        (folder / CONFIG).write_text(json.dumps(config))
        if rename is not None:
            tensors = load_file(folder / WEIGHTS)
            (folder / WEIGHTS).unlink()
            save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
        return folder

    return get


def run_import(folder: Path | str, out: Path, *words: str) -> Adapter:
    assert main([str(folder), "--out", str(out), *words]) == 0
    return load_adapter(out)


def refusal(capsys: Capture, folder: Path | str, out: Path, *words: str) -> str:
    """The one sentence on standard error; nothing was written."""
    assert main([str(folder), "--out", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    return error


def own_logits(adapter: Adapter, sentences: tuple[str, ...], *, length: int = 20) -> np.ndarray:
    """What the adapter folder answers, padded to a longer text, as in a batch."""
    tokenizer = load_tokenizer(adapter.folder, adapter.max_length)
    batch = tokenizer(*sentences, padding="max_length", max_length=length, return_tensors="pt")
    classifier = load_prompted_classifier(adapter, find_adapter_base(adapter))
    with torch.inference_mode():
        logits: np.ndarray = classifier(**batch)["logits"][0].numpy()
    return logits


def check_against_peft(kind: str, folder: Path, base: Path, adapter: Adapter, *, original: Path | None = None) -> None:
    for sentences in TEXTS:
        golden = golden_logits(original or folder, base, sentences, kind)
        assert own_logits(adapter, sentences) == pytest.approx(golden, abs=2e-5)


def check_kind(kind: str, family: str, source: Sources, base: Path, out: Path) -> None:
    """An adapter of a kind is imported, and both its folder and PEFT on its folder give the logits of the source."""
    folder = source(kind, family)
    adapter = run_import(folder, out, *(["--task-id", str(TASK)] if kind == "multitask" else []))
    is_prefix = kind in {"prefix", "projection"}
    assert adapter.method == ("p-tuning-v2" if is_prefix else "p-tuning" if kind in PROMPT_KINDS else f"{kind}, merged")
    assert adapter.virtual_tokens == (VIRTUAL_TOKENS if kind in PROMPT_KINDS else 0)
    assert adapter.labels == ("label_0", "label_1", "label_2")
    check_against_peft(kind, folder, base, adapter)
    model = load_peft_model(adapter.folder, find_adapter_base(adapter), adapter.labels)
    batch = load_tokenizer(adapter.folder, adapter.max_length)(*TEXTS[0], return_tensors="pt")
    with torch.inference_mode():
        logits = model(**batch).logits[0].numpy()
    assert logits == pytest.approx(golden_logits(folder, base, TEXTS[0], kind), abs=2e-5)


@pytest.mark.parametrize(
    ("kind", "family"), [("mlp", "bert"), ("prefix", "gpt2"), ("multitask", "bert"), ("lora", "roberta")]
)
def test_an_adapter_keeps_its_logits(
    kind: str, family: str, source: Sources, base_model: Folders, tmp_path: Path
) -> None:
    check_kind(kind, family, source, base_model(family), tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "rename"),
    [("prompt", "wrapped"), ("prompt", "other"), ("lora", "named"), ("lora", "bare"), ("lora", "bias")],
)
def test_tensors_by_other_names_are_found(
    kind: str, rename: str, changed: Callable[..., Path], source: Sources, base_model: Folders, tmp_path: Path
) -> None:
    """Names by 0.2 and of people who saved a state dict themselves; built here, as PEFT has none of these today."""

    def new(name: str) -> str:
        if rename == "bias":  # until 0.6
            return name.replace(".base_layer.bias", ".bias")
        if "classifier" not in name:
            return name
        prefix, parameter = name.rsplit("classifier.", 1)
        if rename == "other":
            prefix = {"base_model.": "base_model.model.", "base_model.model.": "base_model."}[prefix]
        return {
            "wrapped": f"{prefix}classifier.modules_to_save.{parameter}",
            "named": f"{prefix}classifier.modules_to_save.default.{parameter}",
            "other": f"{prefix}classifier.{parameter}",
            "bare": f"classifier.{parameter}",
        }[rename]

    folder = changed(kind, rename=new)
    tensors = load_file(folder / WEIGHTS)
    if rename == "wrapped":  # 0.2 kept the untrained head as well
        tensors |= {
            name.replace("modules_to_save", "original_module"): torch.zeros_like(tensor)
            for name, tensor in tensors.items()
            if "modules_to_save" in name
        }
        save_file(tensors, folder / WEIGHTS)
    adapter = run_import(folder, tmp_path / "out")
    check_against_peft(kind, folder, base_model("bert"), adapter, original=source(kind))


@pytest.mark.parametrize(("kind", "transformers"), [("mlp", 4), ("lora", 5)])
def test_a_base_model_may_have_a_head_for_another_number_of_labels(
    kind: str, transformers: int, base_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    base = make_base_with_head(tmp_path / "base", base_model("bert"), 2)
    folder = make_source(tmp_path / "source", base, kind)
    list_mismatches_as(transformers, monkeypatch)
    check_against_peft(kind, folder, base, run_import(folder, tmp_path / "out"))
    # Without a head of its own the adapter would answer with random numbers: the weight fits no more than the bias.
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if "classifier.bias" not in name}, folder / WEIGHTS)
    assert "holds no classifier.bias" in refusal(capsys, folder, tmp_path / "lost")


def test_of_a_weight_that_stands_twice_in_pefts_file_that_is_taken_which_peft_loads(
    base_model: Folders, tmp_path: Path
) -> None:
    folder = make_source(tmp_path / "source", base_model("bert"), "lora", bias="all")
    tensors = load_file(folder / WEIGHTS)
    copied = "base_model.model.classifier.modules_to_save.bias"
    assert torch.equal(tensors[copied], tensors["base_model.model.classifier.bias"])
    for number in (0, 5):  # changed, the copy shows which of the two PEFT loads
        save_file(tensors | {copied: tensors[copied] + number}, folder / WEIGHTS)
        adapter = run_import(folder, tmp_path / f"out{number}")
        check_against_peft("lora", folder, base_model("bert"), adapter)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("modules", [["classifier"], ["classifier", "word_embeddings"]])
def test_an_adapter_of_a_longer_vocabulary_needs_the_base_model_of_that_length(
    modules: list[str], base_model: Folders, tmp_path: Path, capsys: Capture
) -> None:
    base = base_model("bert")
    model = AutoModel.from_pretrained(base)
    n_tokens = model.config.vocab_size + 3
    folder = make_source(tmp_path / "source", base, "lora", n_tokens=n_tokens, modules=modules)
    error = refusal(capsys, folder, tmp_path / "out")
    assert "with 3 tokens more than" in error
    assert f"model.resize_token_embeddings({n_tokens}) and model.save_pretrained, and give its folder" in error
    resized = shutil.copytree(base, tmp_path / "resized")
    model.resize_token_embeddings(n_tokens, mean_resizing=False)
    model.save_pretrained(resized)
    adapter = run_import(folder, tmp_path / "out", "--base-model", str(resized))
    check_against_peft("lora", folder, resized, adapter)


def test_a_pooler_that_was_trained_too_comes_along(source: Sources, base_model: Folders, tmp_path: Path) -> None:
    folder = source("mlp", modules=["pooler"])
    assert any("pooler" in name for name in load_file(folder / WEIGHTS))
    check_against_peft("mlp", folder, base_model("bert"), run_import(folder, tmp_path / "out"))


def test_a_pickle_is_read_only_when_it_is_allowed(
    changed: Callable[..., Path], source: Sources, base_model: Folders, tmp_path: Path, capsys: Capture
) -> None:
    folder = changed("mlp")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    assert "--allow-bin" in refusal(capsys, folder, tmp_path / "out")
    adapter = run_import(folder, tmp_path / "out", "--allow-bin")
    check_against_peft("mlp", folder, base_model("bert"), adapter, original=source("mlp"))
    torch.save(torch.nn.Linear(2, 2), folder / "adapter_model.bin")
    assert "cannot be read" in refusal(capsys, folder, tmp_path / "other", "--allow-bin")


def test_unknown_facts_are_absent_until_they_are_measured(source: Sources, tmp_path: Path, capsys: Capture) -> None:
    rows = [{"text": row["sentence1"], "label": "abc"[index % 3]} for index, row in enumerate(make_pairs(12, seed=5))]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    labels = ("--labels", "a,b,c")
    adapter = run_import(source("mlp"), tmp_path / "out", *labels)
    record = json.loads((adapter.folder / "training.json").read_text())
    assert not {"validation", "n_validation", "baselines", "baseline_rules", "epochs", "command"} & record.keys()
    assert 0 < record["imported"].pop("max_logit_difference") < 1e-5
    assert adapter.scores.values == {}
    assert "not measured here: `python -m train.evaluate" in adapter.quality
    assert "python -m train.evaluate ADAPTER --file FILE" in (adapter.folder / "README.md").read_text()
    capsys.readouterr()
    assert evaluate_main([str(adapter.folder), "--file", str(file)]) == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluated["baselines"] == {}
    measured = run_import(source("mlp"), tmp_path / "measured", *labels, "--validation-file", str(file))
    assert measured.scores.values == evaluated["scores"]
    assert (measured.n_validation, measured.validation_file) == (12, file)
    assert measured.sha256 == adapter.sha256
    assert "on 12 validation rows" in (measured.folder / "README.md").read_text()


def test_labels_that_are_none_of_the_adapters_can_be_named(source: Sources, tmp_path: Path, capsys: Capture) -> None:
    rows: list[dict[str, object]] = [{"text": f"word{index}", "label": "abc"[index % 3]} for index in range(6)]
    words = ["--validation-file", str(write_jsonl(tmp_path / "rows.jsonl", rows))]
    assert main([str(source("mlp")), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert "Fix or remove them, or name all labels, in the order of the logits, with --labels:\n" in error
    run_import(source("mlp"), tmp_path / "out", *words, "--labels", "a,b,c")


def test_which_of_several_adapters_is_taken_is_said(base_model: Folders, tmp_path: Path, capsys: Capture) -> None:
    base, folder = base_model("bert"), tmp_path / "both"
    config = LoraConfig(task_type="SEQ_CLS", r=4)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config)
    model.add_adapter("other", config)
    model.save_pretrained(str(folder))
    run_import(folder, tmp_path / "out")
    found = re.search("in the folder itself; other beside it can be imported by name: (.*)", capsys.readouterr().out)
    assert found is not None
    run_import(found[1], tmp_path / "other")
    assert "beside" not in capsys.readouterr().out


def test_the_best_checkpoint_is_taken_or_asked_for(source: Sources, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "output"
    for step, kind in ((7, "mlp"), (14, "prompt")):
        shutil.copytree(source(kind), output / f"checkpoint-{step}")
        for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            os.mkfifo(output / f"checkpoint-{step}" / name)  # reading one of these would never end
    error = refusal(capsys, output, tmp_path / "out")
    assert "checkpoint-14, checkpoint-7" in error
    state = output / "checkpoint-14" / "trainer_state.json"
    state.write_text(json.dumps({"best_model_checkpoint": "/home/else/output/checkpoint-7", "best_metric": 0.9}))
    run_import(output, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["imported"]["peft_type"] == "P_TUNING"


def test_labels_columns_and_pairs_are_as_they_were_named(
    source: Sources, base_model: Folders, tmp_path: Path, capsys: Capture
) -> None:
    adapter = run_import(source("mlp"), tmp_path / "pair", "--text-columns", "premise,hypothesis", "--labels", "x,y,z")
    assert (adapter.task.text_columns, adapter.labels) == (("premise", "hypothesis"), ("x", "y", "z"))
    assert "a text is taken for one sentence" not in capsys.readouterr().out
    base = shutil.copytree(base_model("bert"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    names = {"0": "negative", "1": "neutral", "2": "positive"}
    (base / "config.json").write_text(
        json.dumps(config | {"id2label": names, "label2id": {label: int(index) for index, label in names.items()}})
    )
    adapter = run_import(source("mlp"), tmp_path / "named", "--base-model", str(base))
    assert adapter.labels == tuple(names.values())
    assert adapter.task.text_columns == ("text",)
    assert "a text is taken for one sentence" in capsys.readouterr().out


def test_a_head_of_one_number_is_a_regression_and_labels_may_be_many(
    source: Sources, base_model: Folders, tmp_path: Path, capsys: Capture
) -> None:
    folder = make_source(tmp_path / "number", base_model("bert"), "mlp", n_labels=1)
    adapter = run_import(folder, tmp_path / "out")
    assert (adapter.task.kind, len(adapter.labels)) == ("regression", 1)
    golden = golden_logits(folder, base_model("bert"), TEXTS[0], "mlp", n_labels=1)
    assert own_logits(adapter, TEXTS[0]) == pytest.approx(golden, abs=2e-5)
    assert "gives one number" in refusal(capsys, folder, tmp_path / "named", "--labels", "x,y")
    many = run_import(source("mlp"), tmp_path / "many", "--multi-label", "--labels", "x,y,z")
    assert (many.task.kind, many.labels) == ("multi_label", ("x", "y", "z"))


def test_the_base_models_problem_type_is_the_adapters_kind_of_task(
    base_model: Folders, tmp_path: Path, capsys: Capture
) -> None:
    """And that of the bundle, by which transformers' pipeline chooses between sigmoids and a softmax."""
    base = make_base_with_head(tmp_path / "base", base_model("bert"), 3, problem_type="multi_label_classification")
    folder = make_source(tmp_path / "source", base, "lora")
    adapter = run_import(folder, tmp_path / "out")
    assert "a text has any number of the labels, as the base model's config.json says" in capsys.readouterr().out
    assert adapter.task.kind == "multi_label"
    check_against_peft("lora", folder, base, adapter)
    assert export_main([str(adapter.folder), "--out", str(tmp_path / "bundle"), "--precision", "fp32"]) == 0
    settings = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert settings["problem_type"] == "multi_label_classification"


@pytest.mark.parametrize(
    ("n_labels", "problem_type", "flags", "words"),
    [
        (3, "regression", "", "of which promptfold takes one number. If the adapter was trained for another kind"),
        (1, "multi_label_classification", "", "of which promptfold takes two labels or more. If the adapter"),
        (1, None, "--multi-label", "--multi-label: the adapter's head gives one number"),
    ],
)
def test_another_kind_of_task_than_the_base_models_is_refused(
    n_labels: int,
    problem_type: str | None,
    flags: str,
    words: str,
    base_model: Folders,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    base = make_base_with_head(tmp_path / "base", base_model("bert"), n_labels, problem_type=problem_type)
    folder = make_source(tmp_path / "source", base, "mlp", n_labels=n_labels)
    assert words in refusal(capsys, folder, tmp_path / "out", *flags.split())


@pytest.mark.parametrize(
    ("problem_type", "flags", "kind"),
    [("single_label_classification", "--multi-label", "multi_label"), ("regression", "", "classification")],
)
def test_a_flag_and_another_number_of_labels_count_more_than_what_the_base_model_was_trained_for(
    problem_type: str, flags: str, kind: str, base_model: Folders, tmp_path: Path
) -> None:
    base = make_base_with_head(tmp_path / "base", base_model("bert"), 1, problem_type=problem_type)
    folder = make_source(tmp_path / "source", base, "mlp")
    assert run_import(folder, tmp_path / "out", *flags.split()).task.kind == kind


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task_type": "CAUSAL_LM"}, "task_type 'CAUSAL_LM'"),
        ({"task_type": "TOKEN_CLS"}, "task_type 'TOKEN_CLS'"),
        ({"peft_type": "XLORA"}, "peft_type 'XLORA'"),
        ({"auto_mapping": {"base_model_class": "x", "parent_library": "os"}}, "auto_mapping"),
        ({"base_model_name_or_path": None}, "Give it with --base-model"),
        (
            {"base_model_name_or_path": "/home/else/model"},
            "Base model /home/else/model: there is no such folder. Give --base-model a",
        ),
        ({"num_virtual_tokens": 6}, "holds no prompt"),
        ({"modules_to_save": "classifier"}, "modules_to_save"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], words: str, changed: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    assert words in refusal(capsys, changed("mlp", **settings), tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "os"},
        {"init_lora_weights": "corda", "corda_config": {"cache_file": "x.pt"}},
        {"init_lora_weights": "eva"},
        {"a_setting_of_2030": 3},
        {"target_modules": {"query": {"a": 1}}},
    ],
)
def test_lora_that_is_more_than_data_is_refused(
    settings: dict[str, Any], changed: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    error = refusal(capsys, changed("lora", **settings), tmp_path / "out")
    assert any(name in error for name in settings)


@pytest.mark.parametrize("kind", ["mlp", "lora"])
def test_a_missing_head_is_an_error_and_no_random_numbers(
    kind: str, changed: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    folder = changed(kind)
    tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "classifier" not in name}
    save_file(tensors, folder / WEIGHTS)
    error = refusal(capsys, folder, tmp_path / "out", "--labels", "x,y")
    assert "holds no classifier.bias, classifier.weight" in error
    assert "modules_to_save" in error


@pytest.mark.parametrize("kind", ["mlp", "lora"])
def test_tensors_that_fit_nothing_or_are_damaged_are_refused(
    kind: str, changed: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    folder = changed(kind)
    whole = load_file(folder / WEIGHTS)
    save_file(whole | {"base_model.model.spare.weight": torch.ones(2)}, folder / WEIGHTS)
    assert "has no place for" in refusal(capsys, folder, tmp_path / "out")
    name = next(name for name in whole if "classifier" not in name)
    save_file(whole | {name: whole[name] * float("nan")}, folder / WEIGHTS)
    assert "not finite" in refusal(capsys, folder, tmp_path / "out")
    save_file({other: tensor for other, tensor in whole.items() if other != name}, folder / WEIGHTS)
    assert "lacks" in (error := refusal(capsys, folder, tmp_path / "out")) or "holds no prompt" in error
    save_file(whole, folder / WEIGHTS)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert "cannot be read" in refusal(capsys, folder, tmp_path / "out")


def test_another_base_model_is_refused(source: Sources, base_model: Folders, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    other = ("--base-model", "minilm")
    assert "another base model" in refusal(capsys, source("mlp"), out, *other)
    assert "another base model" in refusal(capsys, source("prefix"), out, *other)
    assert "shape" in refusal(capsys, source("lora"), out, *other)
    quantized = shutil.copytree(base_model("bert"), tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "quantized" in refusal(capsys, source("mlp"), out, "--base-model", str(quantized))


def test_flags_that_do_not_fit_are_refused(source: Sources, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert "--labels names 2" in refusal(capsys, source("mlp"), out, "--labels", "x,y")
    assert "--task-id" in refusal(capsys, source("mlp"), out, "--task-id", "0")
    assert "3 tasks" in refusal(capsys, source("multitask"), out)
    assert "numbered from 0" in refusal(capsys, source("multitask"), out, "--task-id", "3")
    assert "exclude each other" in refusal(capsys, source("mlp"), out, "--single", "--pair")
    assert "There is no folder" in refusal(capsys, tmp_path / "nothing", out)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no adapter_config.json" in refusal(capsys, empty, out)


def test_other_logits_than_pefts_are_refused_and_rounding_is_not(
    source: Sources, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "TOLERANCE", 1e-12)  # of which fp32 is not capable
    run_import(source("mlp"), tmp_path / "right")
    imported = json.loads((tmp_path / "right" / "training.json").read_text())["imported"]
    assert imported["max_logit_difference"] < 1e-12
    write = compare.write_peft_files

    def write_another(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        write(folder, {name: 1.0001 * tensor for name, tensor in tensors.items()}, config)

    monkeypatch.setattr(convert, "write_peft_files", write_another)
    error = refusal(capsys, source("mlp"), tmp_path / "wrong")
    assert "The imported adapter differs from PEFT by" in error


def test_a_name_on_the_hub_without_network_is_one_sentence(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "Without network" in refusal(capsys, "somebody/adapter", tmp_path / "out")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(
    name: str, changed: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    folder = changed("mlp")
    outside = tmp_path / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.write_text("{}")
    (folder / name).symlink_to(outside)
    error = refusal(capsys, folder, tmp_path / "out")
    assert name in error
    assert "link" in error


def test_lora_becomes_a_plain_graph_and_export_takes_the_source_itself(
    source: Sources, base_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = source("lora")
    assert export_main([str(folder), "--out", str(tmp_path / "bundle")]) == 0
    bundle = load_bundle(tmp_path / "bundle")
    assert (bundle.method, bundle.virtual_tokens, bundle.tasks[0].name) == ("lora, merged", 0, folder.name)
    assert bundle.tasks[0].max_logit_difference < 1e-4
    classifier, tokenizer = OnnxClassifier(bundle), load_tokenizer(bundle.folder, bundle.max_length)
    for sentences in TEXTS:
        golden = golden_logits(folder, base_model("bert"), sentences, "lora")
        batch = tokenizer(*sentences, padding="max_length", max_length=20, return_tensors="np")
        assert classifier.logits(batch)[0] == pytest.approx(golden, abs=2e-5)
    (choice, *_) = choose_adapters((folder,))
    assert (choice.name, choice.adapter.method) == (folder.name, "lora, merged")
    capsys.readouterr()
    both = [str(folder), str(source("ia3"))]
    assert export_main([*both, "--out", str(tmp_path / "two")]) == 2
    assert "Export it alone" in capsys.readouterr().err


def test_an_import_in_the_cache_is_made_again_when_its_base_model_changed(
    base_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("train.foreign.direct.run_in_child", lambda work, *arguments, **_: work(*arguments))
    base = shutil.copytree(base_model("bert"), tmp_path / "base")
    folder = make_source(tmp_path / "source", base, "mlp")

    def is_imported(*words: str) -> bool:
        command = [str(folder), "--out", str(tmp_path / "b"), "--precision", "fp32", "--overwrite", *words]
        assert export_main(command) == 0
        return "importing it to" in capsys.readouterr().out

    assert [is_imported(), is_imported()] == [True, False]
    weights = {name: 1.5 * tensor for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert [is_imported(), is_imported()] == [True, False]
    classifier, tokenizer = OnnxClassifier(load_bundle(tmp_path / "b")), load_tokenizer(tmp_path / "b", 40)
    golden = golden_logits(folder, base, TEXTS[0], "mlp")
    assert classifier.logits(tokenizer(*TEXTS[0], return_tensors="np"))[0] == pytest.approx(golden, abs=2e-5)
    moved = base.rename(tmp_path / "moved")
    assert export_main([str(folder), "--out", str(tmp_path / "c")]) == 2
    assert "there is no such folder. Give --base-model a folder" in capsys.readouterr().err
    assert is_imported("--base-model", str(moved))


def checkpoints(folder: Path) -> Path:
    """A Trainer's folder that does not say which checkpoint was best."""
    for step in (10, 20):
        shutil.copytree(folder, folder.parent / "output" / f"checkpoint-{step}")
    return folder.parent / "output"


def pickled(folder: Path) -> Path:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


@pytest.mark.parametrize(
    ("question", "ending"),
    [
        ("base", "source --out ADAPTER --base-model MODEL"),
        ("task", "source --out ADAPTER --task-id NUMBER"),
        ("pickle", "source --out ADAPTER --allow-bin"),
        ("checkpoint", "output/CHECKPOINT --out ADAPTER"),
        ("hub", "someone/adapter --out ADAPTER"),
    ],
)
def test_what_has_to_be_asked_names_the_command(
    question: str,
    ending: str,
    changed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if question != "base":
        # That one comes from a child process, as all do outside of tests; each takes seconds to start.
        monkeypatch.setattr("train.foreign.direct.run_in_child", lambda work, *arguments, **_: work(*arguments))
    make: dict[str, Callable[[], Path]] = {
        "base": lambda: changed("mlp", base_model_name_or_path=None),
        "task": lambda: changed("multitask"),
        "pickle": lambda: pickled(changed("mlp")),
        "checkpoint": lambda: checkpoints(changed("mlp")),
        "hub": lambda: Path("someone/adapter"),
    }
    folder = make[question]()
    for command in (
        lambda: export_main([str(folder), "--out", str(tmp_path / "bundle")]),
        lambda: demo_main(["--adapter", str(folder)]),
    ):
        assert command() == 2
        error = capsys.readouterr().err
        assert "has to be imported first." in error
        assert f"The command is: python -m train.import_peft {folder}" in error
        assert error.rstrip().endswith(ending)
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "bundle").exists()
