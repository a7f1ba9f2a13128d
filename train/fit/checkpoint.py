"""Checkpoints of a run: everything that an interrupted one needs to reach the same weights, or nothing at all.

OUT.checkpoints/   run.json                          what is trained: settings, data, base model
                   seed-0/checkpoint-115/            one checkpoint, complete once complete.json is there
                   seed-0/adapter/                   a finished seed, while others still run

PEFT's own checkpoint holds the table that the prompt encoder computed, from which nothing can go on; here
it is the whole trainable state, the optimiser's, the scheduler's and the random generators', the best epoch
so far, the running average, and the epochs' scores.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.atomic_folder import sync_folder, sync_path, write_trouble, write_whole
from train.common.errors import UsageError
from train.common.folder_record import refuse_another_run, sha256_of_file
from train.config import TrainConfig
from train.data.tasks import Scores

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]


_RUN = "run.json"


_COMPLETE = "complete.json"


_PROGRESS = "progress.json"


_STATES = ("trainable", "best", "average")


@dataclass(frozen=True)
class EpochScores:
    """What one epoch gave: mean training loss, and loss and scores on validation."""

    epoch: int
    train_loss: float
    validation_loss: float
    scores: Scores

    def as_json(self) -> dict[str, Any]:
        """For training.json."""
        return asdict(self) | {"scores": self.scores.values}


@dataclass
class Progress:
    """How far a run is, beyond what the Trainer keeps.

    Attributes:
        epochs: what each finished epoch gave.
        best: the trainable state of the best one, on the CPU; empty before the first.
        best_epoch: its number, from 1.
        average: running average of the trainable state; empty where none is kept.
        loss_sum, loss_steps: of the epoch that is under way; the sum stays on the device, for reading it waits.
        seconds: spent on training so far.
        finished: whether nothing is left to train.
    """

    epochs: list[EpochScores] = field(default_factory=list)
    best: "State" = field(default_factory=dict)
    best_epoch: int = 0
    average: "State" = field(default_factory=dict)
    loss_sum: "float | torch.Tensor" = 0.0
    loss_steps: int = 0
    seconds: float = 0.0
    finished: bool = False

    def stops_early(self, patience: int | None) -> bool:
        """Whether the last ``patience`` epochs were none better than the best."""
        return patience is not None and len(self.epochs) - self.best_epoch >= patience


def checkpoints_folder(out: Path) -> Path:
    """Where the checkpoints of a run lie: beside its adapter."""
    out = out.absolute()
    return out.parent / f"{out.name}.checkpoints"


def seed_folder(out: Path, seed: int) -> Path:
    """Where those of one seed lie."""
    return checkpoints_folder(out) / f"seed-{seed}"


def check_checkpoints(config: TrainConfig, fingerprint: dict[str, Any]) -> None:
    """Refuse a run if what lies in its checkpoints' place is neither its own nor to be replaced. Nothing is changed.

    Args:
        fingerprint: what decides the weights: settings, hashes of data and base model. Plain JSON.

    Raises:
        UsageError: an interrupted run lies there and neither --resume nor --overwrite was given, or it was
            another run; or what lies there is no interrupted run.
    """
    folder = checkpoints_folder(config.out)
    record = folder / _RUN
    if record.is_file() and config.resume:
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as cause:
            raise UsageError(f"{record} is damaged. Start anew: leave --resume out and add --overwrite.") from cause
        # Through JSON, as the recorded one went.
        refuse_another_run(folder, before, json.loads(json.dumps(fingerprint)))
    elif folder.exists():
        if not config.overwrite and not config.resume:
            raise UsageError(
                f"{folder} holds an interrupted run. Add --resume to go on with it, or --overwrite to start anew."
            )
        # What `write_whole` leaves when it is killed.
        partial = folder / f"{_RUN}.partial"
        if not folder.is_dir() or (not record.is_file() and any(path != partial for path in folder.iterdir())):
            raise UsageError(f"{folder} holds something that is no interrupted run. Move it away.")


def prepare_checkpoints(config: TrainConfig, fingerprint: dict[str, Any]) -> None:
    """Make the folder for a run's checkpoints, or keep the one that belongs to this very run.

    Args:
        fingerprint: as for `check_checkpoints`.

    Raises:
        UsageError: as from `check_checkpoints`, or the folder cannot be written.
    """
    # Also where it was done before the baselines: another run may have begun in the minutes they took.
    check_checkpoints(config, fingerprint)
    folder = checkpoints_folder(config.out)
    record = folder / _RUN
    if record.is_file() and config.resume:
        return
    try:
        if folder.exists():
            remove_checkpoints(config.out)
        folder.mkdir(parents=True)
        try:
            write_whole(record, f"{json.dumps(fingerprint, indent=2)}\n".encode())
        except OSError:
            folder.rmdir()
            raise
    except OSError as cause:
        raise UsageError(f"{folder} cannot be written ({cause.strerror}). Choose another --out.") from cause


def remove_checkpoints(out: Path) -> None:
    """Remove a run's checkpoints; what says that they are a run's goes last, in case this is interrupted too."""
    folder = checkpoints_folder(out)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    shutil.rmtree(folder)


def write_progress(folder: Path, trainable: "State", progress: Progress) -> None:
    """Write our share of a checkpoint into its folder."""
    from safetensors.torch import save_file

    for name, state in zip(_STATES, (trainable, progress.best, progress.average), strict=True):
        save_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, folder / f"{name}.safetensors"
        )
    (folder / _PROGRESS).write_text(
        json.dumps(
            {
                "epochs": [epoch.as_json() for epoch in progress.epochs],
                "best_epoch": progress.best_epoch,
                "loss_sum": float(progress.loss_sum),
                "loss_steps": progress.loss_steps,
                "seconds": progress.seconds,
                "finished": progress.finished,
            }
        ),
        encoding="utf-8",
    )


def read_trainable(folder: Path) -> "State":
    """The trainable state of a checkpoint."""
    from safetensors.torch import load_file

    return load_file(folder / "trainable.safetensors")


def read_progress(folder: Path) -> Progress:
    """The inverse of `write_progress`, but for the trainable state."""
    from safetensors.torch import load_file

    value = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
    epochs = [EpochScores(**(epoch | {"scores": Scores(epoch["scores"])})) for epoch in value.pop("epochs")]
    return Progress(
        epochs=epochs,
        best=load_file(folder / "best.safetensors"),
        average=load_file(folder / "average.safetensors"),
        **value,
    )


def complete_checkpoint(folder: Path) -> None:
    """Mark a checkpoint as complete: the hash of every file in it, written last. Then remove all but two.

    The one before the last stays for when the last turns out to be damaged.
    """
    hashes = {path.name: sha256_of_file(path) for path in sorted(folder.iterdir()) if path.name != _COMPLETE}
    # On the disk before older ones go: or a power cut might leave none.
    for name in hashes:
        sync_path(folder / name)
    write_whole(folder / _COMPLETE, json.dumps(hashes, indent=2).encode())
    sync_folder(folder.parent)
    for older in _numbered(folder.parent)[2:]:
        shutil.rmtree(older, ignore_errors=True)


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says what is not lost; what was cut short is removed.

    Args:
        folder: a seed's.

    Raises:
        UsageError: something could not be written.
    """
    try:
        yield
    except Exception as cause:
        trouble = write_trouble(cause)
        if trouble is None:
            raise
        for path in _numbered(folder) if folder.is_dir() else ():
            if not (path / _COMPLETE).is_file():
                shutil.rmtree(path, ignore_errors=True)
        raise UsageError(
            f"{folder} could not be written ({trouble}). Free some space and add --resume, or choose another --out."
        ) from cause


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints in a seed's folder, whole or not, the newest first."""
    numbered = [
        (int(match[1]), path) for path in folder.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a seed whose every byte is there, or None. One that was cut short is removed.

    It would otherwise count as one of the two that are kept.
    """
    if not folder.is_dir():
        return None
    for path in _numbered(folder):
        if _is_complete(path):
            return path
        shutil.rmtree(path)
    return None


def _is_complete(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        return all(sha256_of_file(folder / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False
