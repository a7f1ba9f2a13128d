"""The adapter folder: every file name once, save, load, check.

adapter/   adapter_config.json  adapter_model.safetensors   PEFT's own; `PeftModel.from_pretrained` loads it
           tokenizer.json …                                 the tokenizer
           training.json                                    task, settings, scores per epoch, hashes of the files
           README.md                                        the model card
           curves.png                                       loss and scores per epoch
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.baselines import Baselines
from train.config import METHODS, P_TUNING, P_TUNING_V2
from train.errors import AdapterError, ModelError
from train.files import FolderKind, check_seal, read_json_object, read_record, reading, write_record
from train.limits import MAX_MODEL_BYTES, MAX_TOKENS, whole_number
from train.model import BaseModel, find_base_model
from train.tasks import METRICS, Scores, Task

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast

    from train.prompted import PromptedClassifier


@dataclass(frozen=True)
class AdapterFiles:
    """Names inside an adapter folder."""

    config: str = "adapter_config.json"
    weights: str = "adapter_model.safetensors"
    tokenizer: str = "tokenizer.json"
    training: str = "training.json"
    card: str = "README.md"
    curves: str = "curves.png"


FILES = AdapterFiles()


def _decisive(training: Mapping[str, Any]) -> list[object]:
    """What of training.json decides an answer.

    Not the scores and their history, which a person may correct, nor the base model's name: it may have been moved, and
    its weights' hash says whether it is the right one.
    """
    names = ("sha256", "task", "method", "virtual_tokens", "max_length", "baseline_rules")
    return [training["model"]["sha256"], *(training[name] for name in names)]


ADAPTER = FolderKind(
    name="adapter",
    record=FILES.training,
    needed=(FILES.config, FILES.weights, FILES.tokenizer),
    format_version=3,
    error=AdapterError,
    command="python -m train --out",
    remedy="Train it again with `python -m train`, or take an unbroken copy.",
    sealed=_decisive,
)


_PEFT_TYPES = {P_TUNING: "P_TUNING", P_TUNING_V2: "PREFIX_TUNING"}
"""By method, PEFT's name for it."""


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that was checked.

    Attributes:
        folder: where it lies.
        model: the base model's name, as for `train.model.find_base_model`.
        model_sha256: hash of the base model's weights.
        task: what was learned.
        method: "p-tuning" or "p-tuning-v2".
        virtual_tokens: length of the prompt.
        max_length: longest text in tokens.
        scores: on validation.
        baselines: what scores on the same rows without any prompt, by a name for people.
        baseline_rules: how those answer, for other rows.
        n_validation: how many rows those are.
        validation_file: where they came from, None for the hub; on another machine it is somewhere else, or nowhere.
        validation_sha256: hash of that file; empty for the hub.
        sha256: hash over everything in the folder that changes an answer.
    """

    folder: Path
    model: str
    model_sha256: str
    task: Task
    method: str
    virtual_tokens: int
    max_length: int
    scores: Scores
    baselines: dict[str, Scores]
    baseline_rules: Baselines
    n_validation: int
    validation_file: Path | None
    validation_sha256: str
    sha256: str

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.task.labels


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
    write_record(folder, ADAPTER, training, unhashed=[FILES.card, FILES.curves])


def load_adapter(folder: Path) -> Adapter:
    """Read an adapter folder and check it file by file.

    Raises:
        AdapterError: it is not there, is no adapter made by promptfold, or a file of it was changed.
    """
    training = read_record(folder, ADAPTER)
    with reading(folder, ADAPTER):
        adapter = Adapter(
            folder=folder,
            model=str(training["model"]["name"]),
            model_sha256=str(training["model"]["sha256"]),
            task=Task.from_json(training["task"]),
            method=_method(training["method"]),
            virtual_tokens=whole_number(training, "virtual_tokens", 1, MAX_TOKENS),
            max_length=whole_number(training, "max_length", 1, MAX_TOKENS),
            scores=_read_scores(training["validation"]),
            baselines={str(name): _read_scores(scores) for name, scores in training["baselines"].items()},
            baseline_rules=Baselines.from_json(training["baseline_rules"]),
            n_validation=int(training["n_validation"]),
            validation_file=_path(training["config"].get("validation_file")),
            validation_sha256=str(training["data_sha256"].get("validation", "")),
            sha256=_sha256_of_answers(training),
        )
        check_seal(folder, training, ADAPTER)
    _check_peft_config(adapter)
    return adapter


def _check_peft_config(adapter: Adapter) -> None:
    """Refuse a configuration with which PEFT would do anything but load a prompt of our two kinds.

    Of its some thirty kinds others import the module that the file names, or read the pickles that it names.

    Raises:
        AdapterError: it is another one, or makes a table larger than any.
    """
    path = adapter.folder / FILES.config
    config = read_json_object(path, AdapterError, ADAPTER.remedy)
    expected = {
        "peft_type": _PEFT_TYPES[adapter.method],
        "task_type": "SEQ_CLS",
        "num_virtual_tokens": adapter.virtual_tokens,
        "auto_mapping": None,
    }
    for name, value in expected.items():
        if config.get(name) != value:
            raise AdapterError(
                f"{path} has {name} {config.get(name)!r:.80}; an adapter of this kind has {value!r}. {ADAPTER.remedy}"
            )
    sizes = ("num_virtual_tokens", "token_dim", "num_layers", "num_transformer_submodules")
    try:
        n_bytes = 4 * 2 * math.prod(whole_number(config, name, 1, MAX_TOKENS) for name in sizes)
    except (KeyError, ValueError) as cause:
        raise AdapterError(f"{path} lacks {cause}. {ADAPTER.remedy}") from cause
    if n_bytes > MAX_MODEL_BYTES:
        raise AdapterError(f"{path} describes a prompt of {n_bytes / 1e9:,.0f} GB. {ADAPTER.remedy}")


def _method(name: object) -> str:
    if name not in METHODS:
        raise ValueError(f"a method among {', '.join(METHODS)}")
    return str(name)


def _path(name: str | None) -> Path | None:
    return Path(name) if name else None


def _read_scores(scores: dict[str, Any]) -> Scores:
    return Scores({name: float(scores[name]) for name in METRICS if name in scores})


def _sha256_of_answers(training: dict[str, Any]) -> str:
    """Hash what decides an answer: the files, the base model, the labels, the limit; not the scores or the card."""
    parts = [training[name] for name in ("sha256", "model", "task", "method", "virtual_tokens", "max_length")]
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
    return read_weights(adapter.folder, adapter.virtual_tokens)


def read_weights(folder: Path, virtual_tokens: int) -> "dict[str, Any]":
    """The tensors in a folder that `save_weights` wrote, by name.

    Raises:
        AdapterError: they have no prompt of that length.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / FILES.weights
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as cause:
        raise AdapterError(f"{path} cannot be read ({cause}). Train the adapter again.") from cause
    prompt = state.get("prompt_embeddings")
    if prompt is None or prompt.ndim != 2 or prompt.shape[0] != virtual_tokens:
        raise AdapterError(f"{path} holds no prompt of {virtual_tokens} virtual tokens. Train the adapter again.")
    return state


def load_prompted_classifier(
    adapter: Adapter, base: BaseModel, *, attention: str | None = None
) -> "PromptedClassifier":
    """An adapter on its base model, in evaluation mode: what is scored and exported.

    Args:
        attention: as for `train.model.load_classifier`.

    Raises:
        AdapterError, ModelError: the adapter does not fit the base model.
    """
    from train.model import load_classifier, prompted_classifier

    model = load_classifier(base, adapter.labels, attention=attention)
    return prompted_classifier(model, base, adapter.method, load_adapter_weights(adapter))


def load_peft_model(folder: Path, base: BaseModel, labels: Sequence[str]) -> "PeftModel":
    """An adapter as PEFT itself runs it, in evaluation mode: the tutorial's model, and the reference for parity.

    A decoder takes one text at a time, without padding.

    Raises:
        AdapterError: PEFT cannot put the adapter on this base model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from train.model import load_classifier

    model = load_classifier(base, labels)
    if base.is_decoder:
        # PEFT's rows are right without padding only. So no token is padding here: a text may end with the one that
        # otherwise is (as </s> often is), and transformers refuses a batch of several instead of misreading it.
        model.config.pad_token_id = None
    else:
        model.base_model.register_forward_hook(_drop_cache)
    try:
        return PeftModel.from_pretrained(model, folder).eval()
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as cause:
        raise AdapterError(
            f"{folder} does not fit {base.name} ({cause}). Give an adapter of this base model."
        ) from cause


def _drop_cache(_: object, __: object, outputs: Any) -> Any:
    """Take the cache out of an encoder's outputs.

    PEFT's `_prefix_tuning_forward` reads the pooled row from ``outputs[1]`` where there is a second output. Of models
    without a pooler (RoBERTa, ELECTRA) that is the cache since transformers returns it, and PEFT fails.
    """
    if getattr(outputs, "past_key_values", None) is None:
        return outputs
    return type(outputs)(**{name: value for name, value in outputs.items() if name != "past_key_values"})


def _model_card(training: dict[str, Any]) -> str:
    """The README.md of an adapter folder, with the front matter that the Hugging Face hub reads."""
    model, task = training["model"], training["task"]
    kept, limits = training["epochs"], training["limits"]
    names = list(task["metrics"])
    head = " | ".join(METRICS[name] for name in names)
    rule = "|---" * (len(names) + 1) + "|"

    def cells(scores: dict[str, float]) -> str:
        return " | ".join(f"{100 * scores[name]:.1f}" for name in names)

    results = [f"| this adapter, loaded again from this folder | {cells(training['validation'])} |"]
    spread = training["seed_summary"]
    # Empty in the adapter of one seed while the others still run.
    if len(training["seeds"]) > 1 and spread:
        means = " | ".join(f"{100 * spread[name]['mean']:.1f} ± {100 * spread[name]['std']:.1f}" for name in names)
        results.append(f"| mean ± standard deviation over seeds {', '.join(map(str, training['seeds']))} | {means} |")
    results += [f"| {name} | {cells(scores)} |" for name, scores in training["baselines"].items()]
    rows = [
        f"| {row['epoch']} | {row['train_loss']:.4f} | {row['validation_loss']:.4f} | {cells(row['scores'])} |"
        for row in kept
    ]
    method = {
        "p-tuning": "learned embeddings before the text (P-Tuning, arXiv 2103.10385)",
        "p-tuning-v2": "learned keys and values in every layer (P-Tuning v2, arXiv 2110.07602)",
    }[training["method"]]
    versions = ", ".join(f"{name} {version}" for name, version in training["versions"].items())
    newline = "\n"
    return f"""---
base_model: {model["hub_name"]}
library_name: peft
pipeline_tag: text-classification
---

# {model["name"]}, P-tuned on {task["name"]}

A prompt of {training["virtual_tokens"]} virtual tokens, {method}, and a classification head for a frozen
`{model["hub_name"]}`. `peft.PeftModel.from_pretrained` loads this folder. Labels in the order of the logits:
{", ".join(f"`{label}`" for label in task["labels"])}.

Made by

    {training["command"]}

with seed {training["seed"]}, on {training["n_train"]} training rows, in {training["seconds"]:.0f} s on {training["machine"]}.
It was scored on {training["n_validation"]} validation rows after every epoch; the epoch with the best score was kept,
which is epoch {training["best_epoch"]} of {len(kept)}.

| on validation | {head} |
{rule}
{newline.join(results)}

![Loss and scores per epoch]({FILES.curves})

| epoch | training loss | validation loss | {head} |
|---|---{rule}
{newline.join(rows)}

## Limits

{newline.join(f"- {limit}" for limit in limits)}

Made with {versions}.
"""
