"""One training run: Hugging Face's Trainer over a PEFT P-Tuning model, the best epoch kept."""

import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.adapter import ADAPTER, Adapter, finish_adapter, load_adapter, load_peft_model, save_weights
from train.config import TrainConfig
from train.console import say
from train.data import Encoded, encode, load_split
from train.errors import UsageError
from train.files import check_target, new_folder, sha256_of_file
from train.model import BaseModel, add_prompt, find_base_model, load_classifier, load_tokenizer, text_limit
from train.tasks import Scores, Task, get_task, score

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class EpochScores:
    """What one epoch gave: mean training loss, and loss, accuracy and F1 on validation."""

    epoch: int
    train_loss: float
    validation_loss: float
    accuracy: float
    f1: float


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        adapter: the folder, complete and checked.
        scores: accuracy and F1 on validation of the adapter as loaded again from its folder.
        always_positive: what always answering the positive class scores on the same pairs.
        best_epoch: the epoch that was kept, from 1.
        epochs: what each epoch gave.
    """

    adapter: Adapter
    scores: Scores
    always_positive: Scores
    best_epoch: int
    epochs: tuple[EpochScores, ...]


@dataclass(frozen=True)
class _Snapshot:
    """The trainable state after one epoch, prompt encoder included."""

    epoch: EpochScores
    state: "dict[str, torch.Tensor]"


def train(config: TrainConfig, *, command: str) -> TrainResult:
    """Run one training and write the adapter to ``config.out``.

    Args:
        command: the command line for the model card.

    Raises:
        PromptfoldError: UsageError, DataError, HubError, ModelError; nothing is left at ``config.out`` then.
    """
    check_target(config.out, ADAPTER, overwrite=config.overwrite)
    task = get_task(config.task)
    # Data first: a wrong file should not cost a download of the model.
    splits = {
        "train": load_split(task, "train", config.train_file),
        "validation": load_split(task, "validation", config.validation_file),
    }
    base = find_base_model(config.model)
    max_length = _max_length(config, base)
    tokenizer = load_tokenizer(base.folder, max_length)
    encoded = {name: encode(split, task, tokenizer) for name, split in splits.items()}
    say(f"{len(splits['train'])} training and {len(splits['validation'])} validation pairs on {base.name}")
    for name, split in encoded.items():
        if split.texts_cut:
            say(f"{split.texts_cut} {name} texts are longer than {max_length} tokens and lose their end")

    truth = splits["validation"]["labels"]
    always_positive = score(task, [task.labels.index(task.positive_label)] * len(truth), truth)
    with new_folder(config.out) as folder:
        fitted = _fit(config, task=task, base=base, tokenizer=tokenizer, encoded=encoded)
        save_weights(folder, fitted.peft_model, load_tokenizer(base.folder, max_length))
        # The scores to report are those of what was written, not of what was in memory.
        written = load_peft_model(folder, base, task.labels).to(fitted.peft_model.device)
        scores = evaluate(written, task, tokenizer, encoded["validation"])
        finish_adapter(
            folder,
            {
                "model": {"name": base.name, "hub_name": base.hub_name, "sha256": base.sha256},
                "task": task.name,
                "labels": list(task.labels),
                "positive_label": task.positive_label,
                "virtual_tokens": config.virtual_tokens,
                "max_length": max_length,
                "validation": asdict(scores),
                "always_positive": asdict(always_positive),
                "best_epoch": fitted.best_epoch,
                "epochs": [asdict(epoch) for epoch in fitted.epochs],
                "n_train": len(splits["train"]),
                "n_validation": len(truth),
                "command": command,
                "seed": config.seed,
                "config": _plain_config(config),
                "data_sha256": {
                    name: sha256_of_file(file)
                    for name, file in (("train", config.train_file), ("validation", config.validation_file))
                    if file is not None
                },
                "versions": {
                    name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "datasets")
                },
            },
        )
    return TrainResult(
        adapter=load_adapter(config.out),
        scores=scores,
        always_positive=always_positive,
        best_epoch=fitted.best_epoch,
        epochs=fitted.epochs,
    )


def _max_length(config: TrainConfig, base: BaseModel) -> int:
    limit = text_limit(base, config.virtual_tokens)
    if config.max_length is None:
        return limit
    if config.max_length > limit:
        raise UsageError(
            f"--max-length {config.max_length}: {base.name} has {base.positions} positions and the prompt takes "
            f"{config.virtual_tokens}. Give at most {limit}."
        )
    return config.max_length


def _plain_config(config: TrainConfig) -> dict[str, object]:
    """The settings for training.json; in which folders the files lay is nobody's business."""
    settings = asdict(config)
    del settings["out"], settings["overwrite"]
    return {name: value.name if isinstance(value, Path) else value for name, value in settings.items()}


@dataclass(frozen=True)
class _Fitted:
    """A trained model with its best epoch's state in place."""

    peft_model: "PeftModel"
    best_epoch: int
    epochs: tuple[EpochScores, ...]


def _fit(
    config: TrainConfig,
    *,
    task: Task,
    base: BaseModel,
    tokenizer: "PreTrainedTokenizerFast",
    encoded: dict[str, Encoded],
) -> _Fitted:
    import torch
    from transformers import (
        DataCollatorWithPadding,
        ProgressCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    set_seed(config.seed)
    peft_model = add_prompt(
        load_classifier(base, task.labels),
        base,
        virtual_tokens=config.virtual_tokens,
        encoder_hidden_size=config.encoder_hidden_size,
    )
    peft_model.print_trainable_parameters()

    class KeepBest(TrainerCallback):
        """Records every epoch and keeps the trainable state of the best one in memory.

        Not `load_best_model_at_end`: PEFT saves only the table that the prompt encoder computed, and
        loading it back into a model that still has its encoder runs the encoder over it a second time.
        """

        def __init__(self) -> None:
            self.epochs: list[EpochScores] = []
            self.best: _Snapshot | None = None
            self.train_loss = float("nan")

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            self.train_loss = (logs or {}).get("loss", self.train_loss)

        def on_evaluate(self, *_: Any, metrics: dict[str, float] | None = None, **__: Any) -> None:
            assert metrics is not None
            epoch = EpochScores(
                epoch=len(self.epochs) + 1,
                train_loss=self.train_loss,
                validation_loss=metrics["eval_loss"],
                accuracy=metrics["eval_accuracy"],
                f1=metrics["eval_f1"],
            )
            self.epochs.append(epoch)
            key = (epoch.accuracy, epoch.f1)
            if self.best is None or key > (self.best.epoch.accuracy, self.best.epoch.f1):
                self.best = _Snapshot(
                    epoch,
                    {
                        name: parameter.detach().cpu().clone()
                        for name, parameter in peft_model.named_parameters()
                        if parameter.requires_grad
                    },
                )
            say(
                f"epoch {epoch.epoch}/{config.epochs}  training loss {epoch.train_loss:.4f}  "
                f"validation loss {epoch.validation_loss:.4f}  accuracy {100 * epoch.accuracy:.1f}  "
                f"F1 {100 * epoch.f1:.1f}"
            )

    class Bar(ProgressCallback):
        """The Trainer's progress bar without the dictionaries it prints: each epoch has a line already."""

        def on_log(self, *_: Any, **__: Any) -> None:
            pass

    keep_best = KeepBest()
    with tempfile.TemporaryDirectory() as work:
        trainer = Trainer(
            model=peft_model,
            args=TrainingArguments(
                output_dir=work,
                num_train_epochs=config.epochs,
                per_device_train_batch_size=config.batch_size,
                per_device_eval_batch_size=config.batch_size,
                eval_strategy="epoch",
                logging_strategy="epoch",
                save_strategy="no",
                seed=config.seed,
                label_names=["labels"],
                # PEFT's forward takes **kwargs, from which the Trainer cannot see which columns are wanted.
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                report_to="none",
            ),
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=encoded["train"].dataset,
            eval_dataset=encoded["validation"].dataset,
            compute_metrics=lambda output: asdict(score(task, output.predictions.argmax(axis=-1), output.label_ids)),
            optimizers=(_optimizer(peft_model, config), None),
            callbacks=[keep_best],
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Bar)
        trainer.train()
    assert keep_best.best is not None
    peft_model.load_state_dict(keep_best.best.state, strict=False)
    return _Fitted(peft_model.eval(), keep_best.best.epoch.epoch, tuple(keep_best.epochs))


def _optimizer(peft_model: "PeftModel", config: TrainConfig) -> "torch.optim.Optimizer":
    """AdamW with one group for the prompt encoder and one for the head."""
    import torch

    trainable = [item for item in peft_model.named_parameters() if item[1].requires_grad]
    prompt = [parameter for name, parameter in trainable if name.startswith("prompt_encoder.")]
    head = [parameter for name, parameter in trainable if not name.startswith("prompt_encoder.")]
    return torch.optim.AdamW(
        [
            {"params": prompt, "lr": config.prompt_learning_rate or config.learning_rate},
            {"params": head, "lr": config.learning_rate},
        ],
        weight_decay=config.weight_decay,
    )


def evaluate(
    model: "PeftModel",
    task: Task,
    tokenizer: "PreTrainedTokenizerFast",
    encoded: Encoded,
    *,
    batch_size: int = 32,
) -> Scores:
    """Score a model on encoded pairs, in the model's own mode and on its own device."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    predicted: list[int] = []
    expected: list[int] = []
    loader = DataLoader(
        encoded.dataset,
        batch_size=batch_size,
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    with torch.inference_mode():
        for batch in loader:
            expected += batch.pop("labels").tolist()
            predicted += model(**batch.to(model.device)).logits.argmax(dim=-1).tolist()
    return score(task, predicted, expected)
