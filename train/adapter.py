"""The adapter folder: every file name once, save, load, check.

adapter/   adapter_config.json  adapter_model.safetensors   PEFT's own; `PeftModel.from_pretrained` loads it
           tokenizer.json …                                 the base model's tokenizer
           training.json                                    settings, scores per epoch, hashes of the files
           README.md                                        the model card
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import AdapterError, ModelError
from train.files import FolderKind, read_record, reading, write_record
from train.model import BaseModel, find_base_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class AdapterFiles:
    """Names inside an adapter folder."""

    config: str = "adapter_config.json"
    weights: str = "adapter_model.safetensors"
    tokenizer: str = "tokenizer.json"
    training: str = "training.json"
    card: str = "README.md"


FILES = AdapterFiles()

ADAPTER = FolderKind(
    name="adapter",
    record=FILES.training,
    needed=(FILES.config, FILES.weights, FILES.tokenizer),
    format_version=1,
    error=AdapterError,
    command="python -m train --out",
    remedy="Train it again with `python -m train`, or take an unbroken copy.",
)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that was checked.

    Attributes:
        folder: where it lies.
        model: the base model's name, as for `train.model.find_base_model`.
        model_sha256: hash of the base model's weights.
        task: name of the task.
        labels: class names in the order of the logits.
        virtual_tokens: length of the prompt.
        max_length: longest text in tokens.
        scores: accuracy and F1 on validation.
        always_positive: what always answering the positive class scores on the same pairs.
        n_validation: how many pairs those are.
        sha256: hash over everything in the folder that changes an answer.
    """

    folder: Path
    model: str
    model_sha256: str
    task: str
    labels: tuple[str, ...]
    virtual_tokens: int
    max_length: int
    scores: dict[str, float]
    always_positive: dict[str, float]
    n_validation: int
    sha256: str


def save_weights(folder: Path, peft_model: "PeftModel", tokenizer: "PreTrainedTokenizerFast") -> None:
    """Write PEFT's own files and the tokenizer's into an existing, empty folder.

    The prompt encoder runs once, here; what is written is the table it computed.
    """
    # save_embedding_layers: "auto" would ask the hub about the base model's vocabulary.
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(folder)


def finish_adapter(folder: Path, training: dict[str, Any]) -> None:
    """Add training.json and the model card to what `save_weights` wrote.

    Args:
        training: what training.json shall hold besides its format and hashes.
    """
    (folder / FILES.card).write_text(_model_card(training), encoding="utf-8")
    write_record(folder, ADAPTER, training, unhashed=[FILES.card])


def load_adapter(folder: Path) -> Adapter:
    """Read an adapter folder and check it file by file.

    Raises:
        AdapterError: it is not there, is no adapter made by promptfold, or a file of it was changed.
    """
    training = read_record(folder, ADAPTER)
    with reading(folder, ADAPTER):
        return Adapter(
            folder=folder,
            model=str(training["model"]["name"]),
            model_sha256=str(training["model"]["sha256"]),
            task=str(training["task"]),
            labels=tuple(str(label) for label in training["labels"]),
            virtual_tokens=int(training["virtual_tokens"]),
            max_length=int(training["max_length"]),
            scores=_read_scores(training["validation"]),
            always_positive=_read_scores(training["always_positive"]),
            n_validation=int(training["n_validation"]),
            sha256=_sha256_of_answers(training),
        )


def _read_scores(scores: dict[str, Any]) -> dict[str, float]:
    return {name: float(scores[name]) for name in ("accuracy", "f1")}


def _sha256_of_answers(training: dict[str, Any]) -> str:
    """Hash what decides an answer: the files, the base model, the labels, the limit; not the scores or the card."""
    parts = [training[name] for name in ("sha256", "model", "task", "labels", "virtual_tokens", "max_length")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find_adapter_base(adapter: Adapter) -> BaseModel:
    """Find the base model that an adapter was trained on.

    Raises:
        AdapterError: what is found under that name has other weights or another width.
        HubError, ModelError: as `find_base_model` does.
    """
    try:
        base = find_base_model(adapter.model)
    except ModelError as cause:
        raise ModelError(f"{adapter.folder} needs the base model it was trained on. {cause}") from cause
    if base.sha256 != adapter.model_sha256:
        raise AdapterError(
            f"{adapter.folder} was trained on another base model: its {adapter.model} has weights with SHA-256 "
            f"{adapter.model_sha256[:12]}…, the one in {base.folder} has {base.sha256[:12]}…. "
            "Put the right base model there, or train an adapter for this one."
        )
    return base


def load_adapter_weights(adapter: Adapter) -> "dict[str, Any]":
    """The tensors of an adapter by name.

    Raises:
        AdapterError: they have no prompt of the stated length.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = adapter.folder / FILES.weights
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as cause:
        raise AdapterError(f"{path} cannot be read ({cause}). Train the adapter again.") from cause
    prompt = state.get("prompt_embeddings")
    if prompt is None or prompt.ndim != 2 or prompt.shape[0] != adapter.virtual_tokens:
        raise AdapterError(
            f"{path} holds no prompt of {adapter.virtual_tokens} virtual tokens. Train the adapter again."
        )
    return state


def load_peft_model(folder: Path, base: BaseModel, labels: Sequence[str]) -> "PeftModel":
    """An adapter as PEFT itself runs it, in evaluation mode: the tutorial's model, and the reference for parity.

    Raises:
        AdapterError: PEFT cannot put the adapter on this base model.
    """
    from peft import PeftModel

    from train.model import load_classifier

    model = load_classifier(base, labels)
    try:
        return PeftModel.from_pretrained(model, folder).eval()
    except (RuntimeError, ValueError, KeyError) as cause:
        raise AdapterError(
            f"{folder} does not fit {base.name} ({cause}). Give an adapter of this base model."
        ) from cause


def _model_card(training: dict[str, Any]) -> str:
    """The README.md of an adapter folder, with the front matter that the Hugging Face hub reads."""
    rows = "\n".join(
        f"| {row['epoch']} | {row['train_loss']:.4f} | {row['validation_loss']:.4f} "
        f"| {100 * row['accuracy']:.1f} | {100 * row['f1']:.1f} |"
        for row in training["epochs"]
    )
    model, scores, trivial = training["model"], training["validation"], training["always_positive"]
    versions = ", ".join(f"{name} {version}" for name, version in training["versions"].items())
    return f"""---
base_model: {model["hub_name"]}
library_name: peft
pipeline_tag: text-classification
---

# {model["name"]}, P-tuned on {training["task"]}

A learned prompt of {training["virtual_tokens"]} virtual tokens and a classification head for a frozen
`{model["hub_name"]}` (P-Tuning, arXiv 2103.10385, PEFT). `peft.PeftModel.from_pretrained` loads this folder.

Made by

    {training["command"]}

with seed {training["seed"]}, on {training["n_train"]} training pairs. It was scored on
{training["n_validation"]} validation pairs after every epoch; the epoch with the best accuracy (then F1) was
kept, which is epoch {training["best_epoch"]} of {len(training["epochs"])}.

| on validation | accuracy | F1 |
|---|---|---|
| this adapter, loaded again from this folder | {100 * scores["accuracy"]:.1f} | {100 * scores["f1"]:.1f} |
| always `{training["positive_label"]}` | {100 * trivial["accuracy"]:.1f} | {100 * trivial["f1"]:.1f} |

The same pairs chose the epoch, so these scores flatter the adapter somewhat. No test set was used.

| epoch | training loss | validation loss | accuracy | F1 |
|---|---|---|---|---|
{rows}

Made with {versions}.
"""
