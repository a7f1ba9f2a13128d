"""What tests/train shows of a few kinds of PEFT's adapters, shown of all; files by old versions; PEFT's tutorial as printed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demo.measure.compare import Comparison
from export.__main__ import main as export_main
from tests.conftest import ROOT, Folders, MadeOnce
from tests.demo.engines import both_engines
from tests.train.peft_sources import MERGED_KINDS, PROMPT_KINDS, TASK, golden_logits
from tests.train.test_import_peft import (
    Sources,
    check_against_peft,
    check_kind,
    own_logits,
    run_import,
    source,  # noqa: F401 -- a fixture
)
from train.common.console import quiet_transformers
from train.model.find import minilm_folder

pytestmark = pytest.mark.usefixtures("one_thread")

OLD_VERSIONS = ("0.3.0", "0.6.2", "0.10.0")
OLD_KINDS = {
    "0.3.0": ("mlp", "lstm", "prefix", "projection", "prompt"),
    "0.6.2": (*PROMPT_KINDS, "lora", "ia3"),
    "0.10.0": (*PROMPT_KINDS, "lora", "ia3"),
}
"""What each version can still write with today's transformers and torch: 0.3's LoRA cannot."""


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, of a missing CUDA extension and of norms
@pytest.mark.parametrize("kind", [*PROMPT_KINDS, *MERGED_KINDS])
def test_every_kind_keeps_its_logits(kind: str, source: Sources, base_model: Folders, tmp_path: Path) -> None:  # noqa: F811
    check_kind(kind, "bert", source, base_model("bert"), tmp_path / "out")


def test_rounding_alone_refuses_no_adapter(source: Sources, tmp_path: Path) -> None:  # noqa: F811
    """In fp32 RandLora's merged weights give pairs of random words other last digits than PEFT's two products."""
    run_import(source("randlora"), tmp_path / "out", "--pair")


@pytest.mark.parametrize("kind", [*PROMPT_KINDS, "lora", "ia3"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])  # PEFT guesses OPT-350m's width wrong
def test_decoders_keep_their_logits(
    kind: str,
    family: str,
    source: Sources,  # noqa: F811
    base_model: Folders,
    tmp_path: Path,
) -> None:
    check_kind(kind, family, source, base_model(family), tmp_path / "out")


@pytest.mark.parametrize("family", ["electra", "gpt2", "llama", "roberta"])
def test_lora_of_every_family_becomes_a_graph(
    family: str,
    source: Sources,  # noqa: F811
    base_model: Folders,
    tmp_path: Path,
) -> None:
    folder = source("lora", family)
    adapter = run_import(folder, tmp_path / "adapter")
    check_against_peft("lora", folder, base_model(family), adapter)
    # It compares the graph with PEFT's own, unmerged, over padded shapes.
    assert export_main([str(adapter.folder), "--out", str(tmp_path / "bundle")]) == 0
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert "quality" not in manifest["tasks"][0]
    assert manifest["prompt_initializers"] == []


@pytest.fixture(scope="module")
def old_peft(made_once: MadeOnce) -> Folders:
    """A function from a version to a folder with that PEFT alone; the rest of the environment is today's."""

    def get(version: str) -> Path:
        def install(folder: Path) -> None:
            words = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"peft=={version}"]
            subprocess.run([sys.executable, *words], check=True)

        return made_once(f"peft-{version}", install)

    return get


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_files_by_old_versions_keep_their_logits(
    version: str, old_peft: Folders, base_model: Folders, tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.train.peft_sources import make_source; "
        "[make_source(Path(sys.argv[1]) / kind, Path(sys.argv[2]), kind) for kind in sys.argv[3:]]"
    )
    kinds = OLD_KINDS[version]
    places = os.pathsep.join((str(old_peft(version)), str(ROOT)))
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(base_model("bert")), *kinds],
        env={**os.environ, "PYTHONPATH": places},
        check=True,
    )
    for kind in kinds:
        folder = tmp_path / kind
        assert json.loads((folder / "adapter_config.json").read_text()).get("peft_version") is None
        flags = ["--allow-bin", *(["--task-id", str(TASK)] if kind == "multitask" else [])]
        adapter = run_import(folder, tmp_path / f"{kind}-out", *flags)
        check_against_peft(kind, folder, base_model("bert"), adapter)


REDWOODS = (
    "Coast redwood trees are the tallest trees on the planet and can grow over 300 feet tall.",
    "The coast redwood trees, which can attain a height of over 300 feet, are the tallest trees on earth.",
)


def run_tutorial(output: Path, model_name: str) -> None:
    """PEFT's tutorial as printed, with other pairs, one epoch, and a smaller model than roberta-large.

    Source: https://huggingface.co/docs/peft/main/en/task_guides/ptuning-seq-classification
    """
    from datasets import Dataset, DatasetDict
    from peft import PromptEncoderConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from tests.conftest import make_pairs

    splits = {"train": make_pairs(200, seed=1), "validation": make_pairs(40, seed=2)}
    dataset = DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
    tokenizer = AutoTokenizer.from_pretrained(model_name, padding_side="right")

    def tokenize_function(examples: Any) -> Any:
        return tokenizer(examples["sentence1"], examples["sentence2"], truncation=True, max_length=None)

    tokenized = dataset.map(tokenize_function, batched=True, remove_columns=["idx", "sentence1", "sentence2"])
    tokenized = tokenized.rename_column("label", "labels")

    def compute_metrics(eval_pred: Any) -> dict[str, float]:
        predictions, labels = eval_pred
        return {"accuracy": float((np.argmax(predictions, axis=1) == labels).mean())}

    peft_config = PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=20, encoder_hidden_size=128)
    model: Any = AutoModelForSequenceClassification.from_pretrained(model_name, return_dict=True)
    model = get_peft_model(model, peft_config)
    training_args = TrainingArguments(
        output_dir=str(output),
        learning_rate=1e-3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        num_train_epochs=1,
        weight_decay=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer=tokenizer, padding="longest"),
        compute_metrics=compute_metrics,
    )
    trainer.train()


@pytest.mark.filterwarnings("ignore")
def test_the_tutorial_as_printed_ends_on_the_page(tmp_path: Path) -> None:
    """PEFT's own logits, from checkpoint to page. What the tutorial's libraries warn of is theirs."""
    output = tmp_path / "roberta-large-peft-p-tuning"
    with quiet_transformers():
        run_tutorial(output, str(minilm_folder()))
    (checkpoint,) = output.glob("checkpoint-*")
    assert {"trainer_state.json", "training_args.bin", "optimizer.pt"} <= {path.name for path in checkpoint.iterdir()}
    adapter = run_import(output, tmp_path / "adapter", "--pair", "--labels", "not_equivalent,equivalent")
    golden = golden_logits(checkpoint, minilm_folder(), REDWOODS, "mlp", n_labels=2)
    assert own_logits(adapter, REDWOODS, length=64) == pytest.approx(golden, abs=1e-5)
    assert export_main([str(adapter.folder), "--out", str(tmp_path / "bundle")]) == 0
    expected = torch.softmax(torch.tensor(golden), 0).numpy()
    with both_engines(adapter.folder, tmp_path / "bundle") as pair:
        comparison: Comparison = pair.steps(*REDWOODS, stopped=lambda: True)[0]
        assert comparison.pytorch is not None
        for answer in (comparison.pytorch, comparison.onnx):
            assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-5)
