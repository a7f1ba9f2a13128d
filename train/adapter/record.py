"""What an adapter folder holds: the names of its files, its record, and `Adapter`, which is read from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.errors import AdapterError
from train.common.folder_record import FolderKind
from train.data.tasks import Scores, Task
from train.model.baselines import Baselines


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


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that was checked.

    Attributes:
        folder: where it lies.
        model: the base model's name, as for `train.model.find.find_base_model`.
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
