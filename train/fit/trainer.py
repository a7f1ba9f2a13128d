"""Hugging Face's Trainer with our data order, checkpoints and record of the epochs.

It imports transformers: other modules import it only when training begins.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, ProgressCallback, Trainer

from train.common.console import say
from train.common.errors import UsageError, first_line
from train.common.processes import is_main_process, process_count
from train.config import REGRESSION, TrainConfig
from train.data.tasks import Scores, Task, score
from train.data.token_ids import LengthGroupedSampler
from train.fit.checkpoint import EpochScores, Progress, State, complete_checkpoint, read_trainable, write_progress
from train.model.loss import mean_loss


class PromptTrainer(Trainer):
    """Trains a `PromptedClassifier` and keeps its best epoch in a `Progress`."""

    def __init__(
        self, *, config: TrainConfig, task: Task, progress: Progress, sampler: LengthGroupedSampler, **kwargs: Any
    ) -> None:
        self._config, self._task, self._progress, self.sampler = config, task, progress, sampler
        # Left on the device, because reading it waits for the step to end.
        self._loss_sum: float | torch.Tensor = progress.loss_sum
        self._since = time.perf_counter()
        super().__init__(**kwargs, compute_metrics=self._metrics)
        # Otherwise the Trainer divides the loss by a number of items, which our classifier does not take.
        self.model_accepts_loss_kwargs = False
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self._callback = _Bookkeeping(self, steps_per_epoch=-(-len(sampler) // config.batch_size))
        self.add_callback(self._callback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own; the line of a progress bar that an error leaves open ends before the error is printed."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for bar in (self._callback.prediction_bar, self._callback.training_bar):
                if bar is not None:
                    bar.close()

    def mean_loss(self) -> float:
        """Over the steps of the current epoch, in this process."""
        return float(self._loss_sum) / self._progress.loss_steps

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._loss_sum = loss + self._loss_sum
        self._progress.loss_steps += 1
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the weights that would be kept, and record the epoch."""
        trainable = self._trainable()
        raw = {name: tensor.detach().clone() for name, tensor in trainable.items()}
        if self._config.average:
            _copy(self._progress.average, trainable)
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self._record(metrics, trainable)
        _copy(raw, trainable)
        return metrics

    def update_average(self) -> None:
        """Move the running average towards the weights; faster at first, when it still holds the beginning."""
        if not self._config.average:
            return
        average, step = self._progress.average, self.state.global_step
        decay = min(self._config.average, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in self._trainable().items():
                if name in average:
                    average[name] = average[name].to(tensor.device).lerp_(tensor, 1 - decay)
                else:
                    average[name] = tensor.detach().clone()

    def _trainable(self) -> State:
        model = self.accelerator.unwrap_model(self.model)
        return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}

    def _metrics(self, output: Any) -> dict[str, float]:
        # With several processes the Trainer's own loss counts some rows twice: those that fill up the last batch.
        logits, labels = torch.from_numpy(output.predictions).float(), torch.from_numpy(output.label_ids)
        classifier = self.accelerator.unwrap_model(self.model)
        weights = None if classifier.class_weights is None else classifier.class_weights.cpu()
        loss = mean_loss(classifier.config.problem_type, logits, labels, weights)
        if not np.isfinite(output.predictions).all():
            return {"loss": math.nan}  # `_record` ends the training
        scores = score(self._task, self._task.predict(output.predictions), output.label_ids)
        return scores.values | {"loss": float(loss)}

    def _mean_over_processes(self, value: float | torch.Tensor) -> torch.Tensor:
        tensor = torch.as_tensor(value, device=self.args.device)
        return tensor if process_count() == 1 else self.accelerator.reduce(tensor, "mean")

    def _record(self, metrics: dict[str, float], trainable: State) -> None:
        progress = self._progress
        loss = float(self._mean_over_processes(self._loss_sum) / max(1, progress.loss_steps))
        if not math.isfinite(loss) or not math.isfinite(metrics["eval_loss"]):
            self._end_diverged(loss, metrics["eval_loss"])
            return
        scores = Scores({name: metrics[f"eval_{name}"] for name in self._task.metrics})
        epoch = EpochScores(len(progress.epochs) + 1, loss, metrics["eval_loss"], scores.values)
        progress.epochs.append(epoch)
        best = Scores(progress.epochs[progress.best_epoch - 1].scores) if progress.best_epoch else None
        if best is None or scores.key > best.key:
            progress.best_epoch = epoch.epoch
            progress.best = {name: tensor.detach().cpu().clone() for name, tensor in trainable.items()}
        self._end_epoch()
        progress.finished = self.state.global_step >= self.state.max_steps
        if progress.stops_early(self._config.early_stopping):
            progress.finished = self.control.should_training_stop = True
        if is_main_process():
            mark = "  best so far" if progress.best_epoch == epoch.epoch else ""
            say(
                f"epoch {epoch.epoch}/{self.state.num_train_epochs}  training loss {epoch.train_loss:.4f}  "
                f"validation loss {epoch.validation_loss:.4f}  {scores}{mark}"
            )

    def _end_epoch(self) -> None:
        progress, now = self._progress, time.perf_counter()
        self._loss_sum, progress.loss_steps = 0.0, 0
        progress.seconds, self._since = progress.seconds + now - self._since, now

    def _end_diverged(self, loss: float, validation_loss: float) -> None:
        """End a training whose numbers overflowed: weights that are NaN stay so.

        The best epoch before is kept, as with early stopping, since it is what the run would have kept in any case. A
        UsageError where there is none.
        """
        progress = self._progress
        what = (
            f"epoch {len(progress.epochs) + 1}: the training loss is {loss:.4g} and the validation loss "
            f"{validation_loss:.4g}, so the training has diverged"
        )
        remedy = "a smaller --learning-rate or --weight-decay"
        if self._task.kind == REGRESSION:
            remedy += ", or labels nearer to 0"
        if not progress.best_epoch:
            raise UsageError(f"{what} before any epoch was good. Take {remedy}.")
        self._end_epoch()
        progress.finished = self.control.should_training_stop = True
        if is_main_process():
            say(f"{what}. It ends here, and epoch {progress.best_epoch} is kept; better may be {remedy}")

    # What follows replaces the Trainer's own methods.

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # All processes come here; `_save` is called in the main one alone.
        self._loss_sum = self._mean_over_processes(self._loss_sum)
        self._progress.loss_sum = float(self._loss_sum)
        super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_progress(folder, self._trainable(), self._progress)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _copy(read_trainable(Path(resume_from_checkpoint)), self._trainable())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The Trainer's own maps to "cpu:0" where several processes train on CPUs, which torch refuses.
        if checkpoint is not None:
            parts: dict[str, Any] = {"optimizer.pt": self.optimizer, "scheduler.pt": self.lr_scheduler}
            with _plain_states(checkpoint):
                for name, part in parts.items():
                    part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _plain_states(checkpoint):
            super()._load_rng_state(checkpoint)


@contextmanager
def _plain_states(checkpoint: str | None) -> Iterator[None]:
    """Turn the refusal of torch's restricted unpickler, which runs nothing, into a `UsageError`."""
    try:
        yield
    except UnpicklingError as cause:
        raise UsageError(
            f"{checkpoint} holds a file that is no state of a training run ({first_line(cause)}). Start anew: leave "
            "--resume out and add --overwrite."
        ) from cause


def _copy(values: State, trainable: State) -> None:
    with torch.no_grad():
        for name, tensor in trainable.items():
            tensor.copy_(values[name])


class _Bookkeeping(ProgressCallback):
    """Tells the sampler which epoch begins, moves the average, marks whole checkpoints; its bar shows the loss."""

    def __init__(self, trainer: PromptTrainer, *, steps_per_epoch: int) -> None:
        super().__init__()
        self._trainer, self._steps_per_epoch = trainer, steps_per_epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Not by a set_epoch method: accelerate calls it with 0 after it has skipped batches.
        self._trainer.sampler.epoch = state.global_step // self._steps_per_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None and state.global_step % 10 == 0:
            self.training_bar.set_postfix(loss=f"{self._trainer.mean_loss():.4f}", refresh=False)
        self._trainer.update_average()
        if state.global_step % self._steps_per_epoch == 0 or state.global_step >= state.max_steps:
            # The epoch ends here. Resumed from a checkpoint of this step, it would never be scored.
            control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = True  # after the epoch is scored

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.accelerator.wait_for_everyone()  # each process writes the state of its random generators
        if state.is_world_process_zero:
            complete_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, *_: Any, **__: Any) -> None:
        """Print nothing; `PromptTrainer` does."""
