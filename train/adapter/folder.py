"""The adapter folder: written, finished, read and checked."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.adapter.card import model_card
from train.adapter.peft import check_peft_config, method_of
from train.adapter.record import ADAPTER, FILES, Adapter
from train.common.folder_record import check_seal, read_record, reading, write_record
from train.common.limits import MAX_TOKENS, whole_number
from train.data.tasks import METRICS, Scores, Task
from train.model.baselines import Baselines

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast


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
    (folder / FILES.card).write_text(model_card(training), encoding="utf-8")
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
            method=method_of(training["method"]),
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
    check_peft_config(adapter)
    return adapter


def _path(name: str | None) -> Path | None:
    return Path(name) if name else None


def _read_scores(scores: dict[str, Any]) -> Scores:
    return Scores({name: float(scores[name]) for name in METRICS if name in scores})


def _sha256_of_answers(training: dict[str, Any]) -> str:
    """Hash what decides an answer: the files, the base model, the labels, the limit; not the scores or the card."""
    parts = [training[name] for name in ("sha256", "model", "task", "method", "virtual_tokens", "max_length")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
