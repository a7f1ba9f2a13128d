"""The files of an adapter folder, the kind of folder it is, and `Adapter`, which is read from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.errors import AdapterError
from train.common.folder_record import FolderKind
from train.data.files.options import ReadOptions
from train.data.tasks import Scores, Task
from train.model.baselines import Baselines

MERGED = ", merged"
"""How the name of a method ends that has no prompt."""


@dataclass(frozen=True)
class AdapterFiles:
    """File names inside an adapter folder."""

    config: str = "adapter_config.json"
    weights: str = "adapter_model.safetensors"
    tokenizer: str = "tokenizer.json"
    training: str = "training.json"
    card: str = "README.md"
    curves: str = "curves.png"


FILES = AdapterFiles()


def _sealed(training: Mapping[str, Any]) -> list[object]:
    """The parts of training.json that change predictions; only these are hashed, as scores may be corrected by hand.

    The base model may have been moved, so its weights' hash counts and not its name.
    """
    names = ("sha256", "task", "method", "virtual_tokens", "max_length")
    # An adapter made elsewhere has no baselines.
    return [training["model"]["sha256"], *(training[name] for name in names), training.get("baseline_rules")]


ADAPTER = FolderKind(
    name="adapter",
    record=FILES.training,
    needed=(FILES.config, FILES.weights, FILES.tokenizer),
    format_version=3,
    error=AdapterError,
    command="python -m train --out",
    remedy="Train it again with `python -m train`, or take an unbroken copy.",
    sealed=_sealed,
)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that was checked."""

    folder: Path
    model: str
    """The base model's name, as for `train.model.find.find_base_model`."""
    model_sha256: str
    task: Task
    method: str
    """ "p-tuning", "p-tuning-v2", or PEFT's name of a method without a prompt as "lora, merged"."""
    virtual_tokens: int
    """0 for a method without a prompt."""
    max_length: int
    """The longest text in tokens."""
    scores: Scores
    """On the validation rows, as are ``baselines``, whose names are for people. Both are empty where an adapter was made
    elsewhere, and nothing was measured here."""
    baselines: dict[str, Scores]
    more_scores: dict[str, Scores]
    """On further splits of the hub, by their names; of mnli the mismatched one."""
    baseline_rules: Baselines | None
    """None for an adapter made elsewhere, whose training data is not known."""
    n_validation: int
    """0 where nothing was measured."""
    validation_file: Path | None
    """Its name at training; None for the hub's data."""
    validation_sha256: str
    """Empty for the hub's data."""
    train_file: Path | None
    """As ``validation_file``."""
    train_sha256: str
    read_options: ReadOptions
    """How both files were read."""
    tokens_per_word: float
    """Tokens for each word of the training's texts; 0 where it is not known."""
    sha256: str
    """One hash over everything in the folder that changes predictions."""

    @property
    def is_merged(self) -> bool:
        """Whether it has no prompt and changes the base model's weights, into which PEFT merges it."""
        return self.method.endswith(MERGED)

    @property
    def quality(self) -> str:
        """The scores for people, or what measures them."""
        unknown = f"not measured here: `python -m train.evaluate {self.folder} --file FILE` measures it"
        return str(self.scores) if self.scores.values else unknown

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.task.labels
