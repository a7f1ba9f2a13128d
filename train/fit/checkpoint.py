"""Checkpoints of a run, from which an interrupted run reaches the same weights to the last bit.

OUT.checkpoints/   run.json                          the run's fingerprint: settings, data, base model
                   seed-0/checkpoint-115/            one checkpoint, complete once complete.json is there
                   seed-0/adapter/                   a finished seed, while other seeds still run

PEFT's own checkpoint holds only the table that the prompt encoder computed, from which training cannot go on.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from train.common.atomic_folder import held_folder, sync_folder, sync_path, write_trouble, write_whole
from train.common.errors import UsageError
from train.common.folder_record import read_json_object, refuse_another_run, sha256_of_file
from train.common.records import parse_record
from train.config import TrainConfig

State = dict[str, Any]
"""Trainable tensors by name."""

_RUN, _COMPLETE, _PROGRESS = "run.json", "complete.json", "progress.json"
_REMEDY = "Start anew: leave --resume out and add --overwrite."
_RECORD = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


@dataclass(frozen=True, config=_RECORD)
class EpochScores:
    """Mean training loss of one epoch, and loss and scores on validation after it."""

    epoch: int
    train_loss: float
    validation_loss: float
    scores: dict[str, float]


@dataclass(config=_RECORD)
class Progress:
    """How far a run is, beyond what the Trainer keeps. All but the tensors is in progress.json."""

    epochs: list[EpochScores] = field(default_factory=list)
    best_epoch: int = 0
    """The epoch to keep, from 1; 0 before the first one's end."""
    loss_sum: float = 0.0
    """Training loss summed over ``loss_steps`` steps of the current epoch."""
    loss_steps: int = 0
    seconds: float = 0.0
    """Spent on training and scoring, without interruptions."""
    finished: bool = False
    best: State = field(default_factory=dict)
    """Those of the best epoch, on the CPU."""
    average: State = field(default_factory=dict)
    """Their running average; empty where none is kept."""

    def stops_early(self, patience: int | None) -> bool:
        """Whether none of the last ``patience`` epochs was better than the best."""
        return patience is not None and len(self.epochs) - self.best_epoch >= patience


def seed_folder(out: Path, seed: int) -> Path:
    return _run_folder(out) / f"seed-{seed}"


def _run_folder(out: Path) -> Path:
    return out.absolute().with_name(f"{out.name}.checkpoints")


@contextmanager
def checkpoints_held(out: Path) -> Iterator[None]:
    """Keep other runs out of a run's checkpoints within the block; a UsageError where one is at work there.

    Where the block fails before there is anything to go on with, nothing is left.
    """
    folder = _run_folder(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} holds something that is no interrupted run. Move it away.")
    is_new = not (folder / _RUN).exists()
    with ExitStack() as at_end:
        try:
            at_end.enter_context(held_folder(folder, f"--out {out}"))
        except OSError as cause:
            raise UsageError(f"{folder} cannot be written ({cause.strerror}). Choose another --out.") from cause
        try:
            yield
        except BaseException:
            if is_new and not any(folder.glob("seed-*/*")):
                with suppress(OSError):
                    _remove_folders(folder)
                    (folder / _RUN).unlink(missing_ok=True)
            raise


def check_checkpoints(config: TrainConfig, fingerprint: dict[str, Any]) -> None:
    """Refuse a run whose checkpoints folder, which `checkpoints_held` made, is taken, unless it may be resumed or replaced.

    Nothing is changed. The fingerprint is everything that determines the weights: settings, hashes of data and base model.
    Plain JSON.
    """
    folder = _run_folder(config.out)
    record = folder / _RUN
    if record.is_file() and config.resume:
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as cause:
            raise UsageError(f"{record} is damaged. {_REMEDY}") from cause
        # JSON turns tuples into lists, as it did in the record.
        refuse_another_run(folder, before, json.loads(json.dumps(fingerprint)))
    elif there := [path.name for path in folder.iterdir()]:
        if not config.overwrite and not config.resume:
            raise UsageError(
                f"{folder} holds an interrupted run. Add --resume to go on with it, or --overwrite to start anew."
            )
        partial = f".{_RUN}."  # a killed `write_whole` leaves such a file
        if not record.is_file() and not all(name.startswith(partial) for name in there):
            raise UsageError(f"{folder} holds something that is no interrupted run. Move it away.")


def prepare_checkpoints(config: TrainConfig, fingerprint: dict[str, Any]) -> None:
    """Make the folder for a run's checkpoints, or keep the one of the run that is resumed."""
    # Checked again, as another run may have begun during the baselines where the disk has no locks.
    check_checkpoints(config, fingerprint)
    folder = _run_folder(config.out)
    record = folder / _RUN
    if record.is_file() and config.resume:
        return
    try:
        # The folder itself stays, as it is locked.
        _remove_folders(folder)
        write_whole(record, f"{json.dumps(fingerprint, indent=2)}\n".encode())
    except OSError as cause:
        raise UsageError(f"{folder} cannot be written ({cause.strerror}). Choose another --out.") from cause


def remove_checkpoints(out: Path) -> None:
    """Remove a run's checkpoints. run.json goes last, so that an interrupted removal leaves an interrupted run."""
    folder = _run_folder(out)
    _remove_folders(folder)
    shutil.rmtree(folder)


def _remove_folders(folder: Path) -> None:
    """Remove a run's checkpoints, but not its record."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def write_progress(folder: Path, trainable: State, progress: Progress) -> None:
    """Write our files of a checkpoint into its folder."""
    from safetensors.torch import save_file

    for name, state in {"trainable": trainable, "best": progress.best, "average": progress.average}.items():
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
        save_file(on_cpu, folder / f"{name}.safetensors")
    (folder / _PROGRESS).write_bytes(TypeAdapter(Progress).dump_json(progress, exclude={"best", "average"}))


def read_trainable(folder: Path) -> State:
    from safetensors.torch import load_file

    return load_file(folder / "trainable.safetensors")


def read_progress(folder: Path) -> Progress:
    from safetensors.torch import load_file

    path = folder / _PROGRESS
    progress = parse_record(Progress, read_json_object(path, UsageError, _REMEDY), UsageError, str(path), _REMEDY)
    progress.best, progress.average = (load_file(folder / f"{name}.safetensors") for name in ("best", "average"))
    return progress


def complete_checkpoint(folder: Path) -> None:
    """Mark a checkpoint as complete with the hash of every file in it, then remove all but the newest two."""
    hashes = {path.name: sha256_of_file(path) for path in sorted(folder.iterdir()) if path.name != _COMPLETE}
    # All of it is on the disk before older ones are removed, or a power cut might leave none.
    for name in hashes:
        sync_path(folder / name)
    write_whole(folder / _COMPLETE, json.dumps(hashes, indent=2).encode())
    sync_folder(folder.parent)
    for older in _numbered(folder.parent)[2:]:
        shutil.rmtree(older, ignore_errors=True)


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a UsageError, and remove a seed's checkpoints that were cut short."""
    try:
        yield
    except Exception as cause:
        trouble = write_trouble(cause)
        if trouble is None:
            raise
        for path in _numbered(folder):
            if not (path / _COMPLETE).is_file():
                shutil.rmtree(path, ignore_errors=True)
        raise UsageError(
            f"{folder} could not be written ({trouble}). Free some space and add --resume, or choose another --out."
        ) from cause


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint of a seed; damaged ones are removed, as two are kept."""
    for path in _numbered(folder):
        with suppress(OSError, ValueError, AttributeError):
            hashes = json.loads((path / _COMPLETE).read_text(encoding="utf-8"))
            if all(sha256_of_file(path / name) == expected for name, expected in hashes.items()):
                return path
        shutil.rmtree(path)
    return None


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints in a seed's folder, complete or not, the newest first."""
    found = folder.glob("checkpoint-*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)
