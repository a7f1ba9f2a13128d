"""Fitting one seed: Hugging Face's Trainer over a prompted classifier, the best epoch kept, resumable."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.console import say
from train.common.errors import UsageError
from train.common.processes import from_main_process, is_main_process, process_count
from train.config import TrainConfig
from train.data.tasks import Scores, Task, score
from train.data.token_ids import Encoded, LengthGroupedSampler
from train.fit.checkpoint import (
    EpochScores,
    Progress,
    complete_checkpoint,
    newest_checkpoint,
    read_progress,
    read_trainable,
    saving,
    write_progress,
)
from train.model.add_prompt import add_prompt
from train.model.classifier import load_classifier, put_prompt_before
from train.model.find import BaseModel

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast, TrainingArguments

    from train.model.prompted import PromptedClassifier


_REPORTER_MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio"}
"""What the Trainer imports; where it cannot, it reports to nowhere without a word."""


def check_machine(config: TrainConfig) -> None:
    """Refuse what cannot be used on this machine, before any work is done.

    Raises:
        UsageError: the precision, the batch size or the reporter.
    """
    import torch

    if config.precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("--precision fp16 needs an NVIDIA GPU, and there is none. Take fp32 or bf16.")
    n_processes = process_count()
    if config.batch_size % n_processes:
        raise UsageError(
            f"--batch-size {config.batch_size} cannot be shared out among {n_processes} processes. Give a multiple."
        )
    if config.report_to != "none":
        try:
            import_module(_REPORTER_MODULES[config.report_to])
        except ImportError as cause:
            raise UsageError(
                f"--report-to {config.report_to}: it is not installed ({cause}). "
                f"Run: pip install -r requirements.txt {config.report_to}"
            ) from cause


@dataclass(frozen=True)
class Fitted:
    """A trained model with its best epoch's state in place.

    Attributes:
        peft_model: in evaluation mode.
        best_epoch: the epoch that was kept, from 1.
        epochs: what each epoch gave.
        seconds: of training and scoring, interruptions left out.
    """

    peft_model: "PeftModel"
    best_epoch: int
    epochs: tuple[EpochScores, ...]
    seconds: float


def fit(
    config: TrainConfig,
    *,
    seed: int,
    task: Task,
    base: BaseModel,
    tokenizer: "PreTrainedTokenizerFast",
    train: Encoded,
    validation: Encoded,
    checkpoints: Path,
    log_folder: Path,
) -> Fitted:
    """Train one seed, from its newest complete checkpoint if there is one.

    Args:
        checkpoints: the folder for this seed's.
        log_folder: for the reporter, where one was asked for.

    Raises:
        UsageError: the method does not work with this kind of model, or the checkpoint is on another machine.
    """
    import torch
    from transformers import DataCollatorWithPadding, set_seed

    if is_main_process():
        with saving(checkpoints):
            # The Trainer would, outside of what is watched below.
            checkpoints.mkdir(parents=True, exist_ok=True)
    arguments = _arguments(config, seed, checkpoints, log_folder)
    set_seed(seed)
    special = set(tokenizer.all_special_ids)
    text_ids = [token for row in train.rows[:100] for token in row["input_ids"] if token not in special]
    # On a CPU the backward pass of PyTorch's fused attention takes ten times as long in bf16 as in fp32 (PyTorch 2.14:
    # 327 against 28 ms for six layers of minilm), which eats up what the matrix products gain.
    attention = "eager" if config.precision == "bf16" and not torch.cuda.is_available() else None
    peft_model: Any = add_prompt(
        load_classifier(base, task.labels, attention=attention), base, config, text_ids=text_ids
    )
    classifier = put_prompt_before(
        peft_model.base_model, base, config.method, peft_model.prompt_encoder[peft_model.active_adapter]
    )
    _freeze_in(classifier, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision])
    if is_main_process():
        trainable = sum(tensor.numel() for tensor in classifier.parameters() if tensor.requires_grad)
        total = sum(tensor.numel() for tensor in classifier.parameters())
        say(f"learning {trainable:,} of {total:,} parameters, seed {seed}")
        if process_count() > 1:
            say(f"{process_count()} processes share each batch")

    checkpoint = from_main_process(newest_checkpoint(checkpoints) if is_main_process() else None)
    if checkpoint is not None and not checkpoint.is_dir():
        raise UsageError(
            f"{checkpoint} is not on this machine. Where several train together, --out has to lie on storage that "
            "all of them share."
        )
    progress = read_progress(checkpoint) if checkpoint is not None else Progress()
    if checkpoint is not None and is_main_process():
        say(f"going on from {checkpoint}")
    sampler = LengthGroupedSampler(
        [len(row["input_ids"]) for row in train.rows],
        batch_size=config.batch_size,
        seed=seed,
        swap=config.swap_sentences,
    )
    trainer_class = _trainer_class()
    trainer = trainer_class(
        config=config,
        task=task,
        progress=progress,
        sampler=sampler,
        model=classifier,
        args=arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train.rows + train.swapped,
        # By length: a batch then has next to no padding. No metric minds the order.
        eval_dataset=sorted(validation.rows, key=lambda row: len(row["input_ids"])),
        optimizers=(_optimizer(classifier, config), None),
    )
    if not progress.finished:
        try:
            with saving(checkpoints):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        finally:
            trainer.close_bars()
    classifier.load_state_dict(progress.best, strict=False)
    return Fitted(peft_model.eval(), progress.best_epoch, tuple(progress.epochs), progress.seconds)


def _freeze_in(classifier: "PromptedClassifier", dtype: "torch.dtype") -> None:
    """Keep what is frozen in a precision, once: autocast would convert it again in every step."""
    for parameter in classifier.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _arguments(config: TrainConfig, seed: int, checkpoints: Path, log_folder: Path) -> "TrainingArguments":
    import torch
    from transformers import TrainingArguments

    on_cuda = torch.cuda.is_available()
    n_processes = process_count()
    if config.report_to != "none":
        # transformers 5 takes the folder from the environment, 4.57 too.
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(log_folder)
    # --precision decides, and not accelerate's configuration, nor an earlier run in this process, which left it here.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size // n_processes,
        per_device_eval_batch_size=config.batch_size,
        eval_strategy="epoch",
        logging_strategy="epoch",
        logging_dir=str(log_folder),
        save_strategy="epoch" if config.checkpoint_steps is None else "steps",
        save_steps=config.checkpoint_steps or 500,
        # `complete_checkpoint` removes old ones, once the new one is whole.
        save_total_limit=None,
        seed=seed,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        use_cpu=not on_cuda,
        ddp_backend=None if on_cuda or n_processes == 1 else "gloo",
        ddp_find_unused_parameters=False,
        label_names=["labels"],
        # The rows hold just what the model takes.
        remove_unused_columns=False,
        dataloader_pin_memory=on_cuda,
        report_to=config.report_to,
        run_name=config.out.name,
    )
    # One process uses one GPU: with two in sight the Trainer would take torch's DataParallel and double the batch.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _optimizer(classifier: "PromptedClassifier", config: TrainConfig) -> "torch.optim.Optimizer":
    """AdamW with one group for the prompt and one for the head."""
    import torch

    trainable = [item for item in classifier.named_parameters() if item[1].requires_grad]
    prompt = [parameter for name, parameter in trainable if name.startswith("prompt_encoder.")]
    head = [parameter for name, parameter in trainable if not name.startswith("prompt_encoder.")]
    return torch.optim.AdamW(
        [
            {"params": prompt, "lr": config.prompt_learning_rate or config.learning_rate},
            {"params": head, "lr": config.learning_rate},
        ],
        weight_decay=config.weight_decay,
    )


def _trainer_class() -> "Callable[..., Any]":
    """The Trainer with our data order, our checkpoints and our record of the epochs.

    A function, because transformers must not be imported with this module.
    """
    import torch
    from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

    class Bookkeeping(TrainerCallback):
        """Tells the sampler which epoch begins, moves the average, and marks each checkpoint once it is complete."""

        def __init__(
            self,
            sampler: LengthGroupedSampler,
            steps_per_epoch: int,
            after_step: Callable[[], None],
            wait_for_everyone: Callable[[], None],
        ) -> None:
            self._sampler = sampler
            self._steps_per_epoch = steps_per_epoch
            self._after_step = after_step
            self._wait_for_everyone = wait_for_everyone

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Not by a set_epoch method: accelerate calls it with 0 after it has skipped batches.
            self._sampler.epoch = state.global_step // self._steps_per_epoch

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._after_step()
            if state.global_step % self._steps_per_epoch == 0 or state.global_step >= state.max_steps:
                # The epoch ends here. A checkpoint of now would be taken up in the next epoch, this one unscored.
                control.should_save = False

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = True  # once it is scored

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._wait_for_everyone()  # each process writes the state of its random generators
            if state.is_world_process_zero:
                complete_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    class Bar(ProgressCallback):
        """The Trainer's progress bar with the loss beside it, without the dictionaries it prints."""

        def __init__(self, progress: Progress) -> None:
            super().__init__()
            self._progress = progress

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            if self.training_bar is not None and state.global_step % 10 == 0:
                loss = float(self._progress.loss_sum) / self._progress.loss_steps
                self.training_bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

        def on_log(self, *_: Any, **__: Any) -> None:
            pass

        def close(self) -> None:
            for bar in (self.prediction_bar, self.training_bar):
                if bar is not None:
                    bar.close()

    class PromptTrainer(Trainer):
        """See the function around it."""

        def __init__(
            self,
            *,
            config: TrainConfig,
            task: Task,
            progress: Progress,
            sampler: LengthGroupedSampler,
            **kwargs: Any,
        ) -> None:
            self._config = config
            self._progress = progress
            self._sampler = sampler
            self._task = task
            self._since = time.perf_counter()
            super().__init__(**kwargs, compute_metrics=self._metrics)
            # Ours takes no count of items, by which the Trainer would divide the loss.
            self.model_accepts_loss_kwargs = False
            self.remove_callback(ProgressCallback)
            self.remove_callback(PrinterCallback)
            if is_main_process() and not self.args.disable_tqdm:
                self.add_callback(Bar(progress))
            steps_per_epoch = -(-len(sampler) // config.batch_size)
            self.add_callback(Bookkeeping(sampler, steps_per_epoch, self._follow, self.accelerator.wait_for_everyone))

        def close_bars(self) -> None:
            """End the line of a progress bar that an error left open: what is printed next is about that error."""
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Bar):
                    callback.close()

        def _metrics(self, output: Any) -> dict[str, float]:
            # The Trainer's own loss counts the rows twice that fill up the last batch of several processes.
            loss = torch.nn.functional.cross_entropy(
                torch.from_numpy(output.predictions).float(), torch.from_numpy(output.label_ids)
            )
            return score(self._task, output.predictions.argmax(axis=-1), output.label_ids).values | {
                "loss": float(loss)
            }

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return self._sampler

        def _trainable(self) -> "dict[str, torch.Tensor]":
            model = self.accelerator.unwrap_model(self.model)
            return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}

        def training_step(self, *args: Any, **kwargs: Any) -> "torch.Tensor":
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            self._progress.loss_sum = loss + self._progress.loss_sum
            self._progress.loss_steps += 1
            return loss

        def _follow(self) -> None:
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

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            """Score the validation rows with what would be kept; record the epoch, and its state if it is the best."""
            trainable = self._trainable()
            raw = {name: tensor.detach().clone() for name, tensor in trainable.items()}
            if self._config.average:
                self._put(trainable, self._progress.average)
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            self._record(metrics, trainable)
            self._put(trainable, raw)
            return metrics

        @staticmethod
        def _put(trainable: "dict[str, torch.Tensor]", values: "dict[str, torch.Tensor]") -> None:
            with torch.no_grad():
                for name, tensor in trainable.items():
                    tensor.copy_(values[name])

        def _mean_over_processes(self, value: "float | torch.Tensor") -> "torch.Tensor":
            tensor = torch.as_tensor(value, device=self.args.device)
            return tensor if process_count() == 1 else self.accelerator.reduce(tensor, "mean")

        def _record(self, metrics: dict[str, float], trainable: "dict[str, torch.Tensor]") -> None:
            progress, config = self._progress, self._config
            loss = self._mean_over_processes(progress.loss_sum) / max(1, progress.loss_steps)
            epoch = EpochScores(
                epoch=len(progress.epochs) + 1,
                train_loss=float(loss),
                validation_loss=metrics["eval_loss"],
                scores=Scores({name: metrics[f"eval_{name}"] for name in self._task.metrics}),
            )
            best = progress.epochs[progress.best_epoch - 1] if progress.epochs else None
            progress.epochs.append(epoch)
            if best is None or epoch.scores.key > best.scores.key:
                progress.best_epoch = epoch.epoch
                progress.best = {name: tensor.detach().cpu().clone() for name, tensor in trainable.items()}
            progress.loss_sum, progress.loss_steps = 0.0, 0
            now = time.perf_counter()
            progress.seconds, self._since = progress.seconds + now - self._since, now
            progress.finished = self.state.global_step >= self.state.max_steps
            if progress.stops_early(config.early_stopping):
                progress.finished = self.control.should_training_stop = True
            if is_main_process():
                mark = "  best so far" if progress.best_epoch == epoch.epoch else ""
                say(
                    f"epoch {epoch.epoch}/{self.state.num_train_epochs}  training loss {epoch.train_loss:.4f}  "
                    f"validation loss {epoch.validation_loss:.4f}  {epoch.scores}{mark}"
                )

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            # One process writes for all.
            self._progress.loss_sum = self._mean_over_processes(self._progress.loss_sum)
            super()._save_checkpoint(*args, **kwargs)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            assert output_dir is not None
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_progress(folder, self._trainable(), self._progress)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            self._put(self._trainable(), read_trainable(Path(resume_from_checkpoint)))

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            # The Trainer's own maps to "cpu:0" where several processes train on CPUs, a device that torch cannot map to.
            if checkpoint is not None:
                parts: dict[str, Any] = {"optimizer.pt": self.optimizer, "scheduler.pt": self.lr_scheduler}
                for name, part in parts.items():
                    part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    return PromptTrainer


def evaluate(
    classifier: "PromptedClassifier",
    task: Task,
    tokenizer: "PreTrainedTokenizerFast",
    rows: "Sequence[dict[str, Any]]",
    *,
    batch_size: int = 32,
) -> Scores:
    """Score a classifier on encoded rows, on a GPU where there is one."""
    import torch
    from transformers import DataCollatorWithPadding

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier.to(device).eval()
    collate: Any = DataCollatorWithPadding(tokenizer)
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    predicted: list[int] = []
    with torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            batch = collate(ordered[start : start + batch_size]).to(device)
            del batch["labels"]
            predicted += classifier(**batch)["logits"].argmax(dim=-1).tolist()
    return score(task, predicted, [row["labels"] for row in ordered])
