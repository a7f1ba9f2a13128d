"""The adapter folder: written, read and checked."""

import hashlib
import json
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from train.adapter.card import model_card
from train.adapter.peft_config import METHODS, TokenCount, check_peft_config
from train.adapter.record import ADAPTER, FILES, Adapter
from train.common.errors import AdapterError, UsageError
from train.common.folder_record import check_seal, read_record, reading, write_record
from train.common.limits import MAX_TOKENS
from train.common.records import parse_record
from train.data.files.options import ReadOptions
from train.data.tasks import Scores, Task
from train.model.baselines import Baselines
from train.untrusted.settings import refuse_settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class _ModelRecord:
    name: str
    sha256: str


@dataclass(frozen=True)
class _SettingsRecord:
    train_file: Path | None = None
    validation_file: Path | None = None
    delimiter: str | None = None
    encoding: str | None = None
    quote: str | None = None


def _known_method(method: str) -> str:
    if method not in METHODS:
        raise ValueError(f"methods are {'; '.join(METHODS)}")
    return method


@dataclass(frozen=True)
class _RecallsRecord:
    """By label; adapters of earlier versions have none."""

    validation: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _TrainingRecord:
    """The entries of training.json that `Adapter` is made of; the others are for people."""

    model: _ModelRecord
    task: dict[str, Any]
    method: Annotated[str, AfterValidator(_known_method)]
    virtual_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)]
    max_length: TokenCount
    # The rest is known of an adapter that was trained or measured here.
    validation: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    baseline_rules: Baselines | None = None
    n_validation: int = 0
    config: _SettingsRecord = _SettingsRecord()
    data_sha256: dict[str, str] = field(default_factory=dict)
    tokens_per_word: float = 0.0
    recalls: _RecallsRecord = field(default_factory=_RecallsRecord)
    more_validation: dict[str, dict[str, float]] = field(default_factory=dict)


def save_weights(folder: Path, peft_model: "PeftModel", tokenizer: "PreTrainedTokenizerFast") -> None:
    """Write PEFT's own files and the tokenizer's; of the prompt encoder only the table that it computes."""
    # save_embedding_layers: "auto" would ask the hub about the base model's vocabulary.
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(folder)


def finish_adapter(folder: Path, training: dict[str, Any]) -> None:
    """Add training.json, of which ``training`` is the content, and the model card to what `save_weights` wrote."""
    (folder / FILES.card).write_text(model_card(training), encoding="utf-8")
    write_record(folder, ADAPTER, training, unhashed=[FILES.card, FILES.curves])


def load_adapter(folder: Path, base_model: str | None = None) -> Adapter:
    """Read an adapter folder and check it file by file; an AdapterError where it is none or was changed.

    ``base_model`` is where the base model lies now, if not where the training found it.
    """
    training = read_record(folder, ADAPTER)
    record = parse_record(_TrainingRecord, training, AdapterError, str(folder / FILES.training), ADAPTER.remedy)
    with reading(folder, ADAPTER):
        task = Task.from_json(record.task)
    settings = record.config
    try:
        read_options = ReadOptions.parse(settings.delimiter, settings.encoding, settings.quote)
    except UsageError as cause:
        raise AdapterError(f"{folder / FILES.training}: {cause} {ADAPTER.remedy}") from cause
    check_seal(folder, training, ADAPTER)
    # Everything that changes predictions; not the scores or the card.
    parts = [training[name] for name in ("sha256", "model", "task", "method", "virtual_tokens", "max_length")]
    check_peft_config(folder, record.method, record.virtual_tokens)
    refuse_settings(folder, AdapterError)
    return Adapter(
        folder=folder,
        model=base_model or record.model.name,
        model_sha256=record.model.sha256,
        task=task,
        method=record.method,
        virtual_tokens=record.virtual_tokens,
        max_length=record.max_length,
        scores=_scores(task, record.validation, record.recalls.validation, record.intervals),
        baselines={
            name: _scores(task, values, record.recalls.baselines.get(name, {}), {})
            for name, values in record.baselines.items()
        },
        more_scores={name: _scores(task, values, {}, {}) for name, values in record.more_validation.items()},
        baseline_rules=record.baseline_rules,
        n_validation=record.n_validation,
        validation_file=record.config.validation_file,
        train_file=record.config.train_file,
        read_options=read_options,
        train_sha256=record.data_sha256.get("train", ""),
        validation_sha256=record.data_sha256.get("validation", ""),
        tokens_per_word=record.tokens_per_word,
        sha256=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
    )


def _scores(
    task: Task, values: dict[str, float], recalls: dict[str, float], intervals: dict[str, tuple[float, float]]
) -> Scores:
    names = [name for name in task.metrics if name in values]
    return Scores(
        {name: values[name] for name in names},
        recalls,
        {name: intervals[name] for name in names if name in intervals},
    )
