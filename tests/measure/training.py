"""``python -m tests.measure.training``: the tutorial's training loop against ours, on the same machine, data and epochs.

Measured are rows per second of a whole training, scoring the validation rows after every epoch included, as both do;
loading models and tokenizing left out.

- tutorial: PEFT's P-tuning tutorial as it stands (https://huggingface.co/docs/peft/main/en/task_guides/
  ptuning-seq-classification): `PeftModel` in the Trainer, random batches padded to their longest text, fp32,
  dropout in the frozen model.
- promptfold: our own loop with the same method, sizes and learning rate: batches of like length, no dropout in what is
  frozen, the last layer for the pooled row alone.

Each training has a process of its own, and they take turns. The figure is the ratio of the medians. Run it on an idle
machine. Prints a table, then one JSON document as the last line.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.common.child import run_in_child
from train.common.command_line import Command, check_counts
from train.common.console import say
from train.config import TrainConfig

PAUSE_SECONDS = 2.0
"""Before each training: what the one before it still writes or frees is done by then."""
Training = dict[str, Any]
"""What one training took; ``scores`` are those of its best epoch on validation."""


def train_as_the_tutorial(config: TrainConfig) -> Training:
    """PEFT's tutorial: its model, its loop, its settings, with the learning rate and sizes of ``config``."""
    import torch
    from peft import PromptEncoderConfig, TaskType, get_peft_model
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments, set_seed

    from train.data.load import load_splits
    from train.data.tasks import score
    from train.data.token_ids import encode
    from train.model.classifier import load_classifier
    from train.model.find import find_base_model, text_limit
    from train.model.tokenizer import base_tokenizer

    splits = load_splits(config)
    base = find_base_model(config.model)
    tokenizer = base_tokenizer(base, text_limit(base, config.virtual_tokens))
    train, validation = (encode(split, splits.task, tokenizer) for split in (splits.train, splits.validation))
    set_seed(config.seed)
    model = get_peft_model(
        load_classifier(base, splits.task.labels),
        PromptEncoderConfig(
            task_type=TaskType.SEQ_CLS,
            num_virtual_tokens=config.virtual_tokens,
            token_dim=base.hidden_size,
            encoder_hidden_size=config.encoder_hidden_size,
        ),
    )
    history: list[dict[str, float]] = []

    def metrics(output: Any) -> dict[str, float]:
        history.append(score(splits.task, output.predictions.argmax(axis=-1), output.label_ids).values)
        return history[-1]

    with tempfile.TemporaryDirectory() as work:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=work,
                learning_rate=config.learning_rate,
                per_device_train_batch_size=config.batch_size,
                per_device_eval_batch_size=config.batch_size,
                num_train_epochs=config.epochs,
                weight_decay=config.weight_decay,
                eval_strategy="epoch",
                save_strategy="epoch",
                seed=config.seed,
                use_cpu=not torch.cuda.is_available(),
                label_names=["labels"],
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                report_to="none",
                disable_tqdm=True,
            ),
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=train.rows,
            eval_dataset=validation.rows,
            compute_metrics=metrics,
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    best = max(history, key=lambda values: tuple(values.values()))
    return _measured("tutorial", seconds, len(train.rows) * config.epochs, best)


def train_as_promptfold(config: TrainConfig) -> Training:
    """Our loop, with the same settings."""
    from train.fit.loop import fit, prepare

    prepared = prepare(config)
    with tempfile.TemporaryDirectory() as work:
        _, progress = fit(prepared, seed=config.seed, checkpoints=Path(work), log_folder=Path(work) / "runs")
    best = progress.epochs[progress.best_epoch - 1].scores
    return _measured("promptfold", progress.seconds, len(prepared.train.rows) * config.epochs, best)


def _measured(loop: str, seconds: float, n_samples: int, scores: Mapping[str, float]) -> Training:
    from train.common.machine import describe_machine, peak_memory_mib

    training = {"loop": loop, "seconds": seconds, "samples_per_second": n_samples / seconds}
    return training | {"peak_memory_mib": peak_memory_mib(), "scores": scores, "machine": describe_machine()}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Time the PEFT tutorial's training loop against ours; the last line is JSON."""

    model: str = "minilm"
    """as for python -m train"""
    task: str = "mrpc"
    """as for python -m train"""
    train_file: Path | None = None
    """as for python -m train"""
    validation_file: Path | None = None
    """as for python -m train"""
    epochs: int = 2
    """epochs of each training"""
    rounds: int = 3
    """trainings of each loop; the figure is their median"""

    def __post_init__(self) -> None:
        check_counts(self, "rounds")


def _run(options: TrainingConfig) -> None:
    settings = {name: value for name, value in asdict(options).items() if name != "rounds"}
    config = TrainConfig(out=Path("bench"), **settings)  # the tutorial's own settings are the defaults
    trainings: dict[str, list[Training]] = {"tutorial": [], "promptfold": []}
    for number in range(1, options.rounds + 1):
        for loop, train in zip(trainings, (train_as_the_tutorial, train_as_promptfold), strict=True):
            time.sleep(PAUSE_SECONDS)
            made = run_in_child(train, config, name=f"The training of {loop}", remedy="Is there enough memory?")
            trainings[loop].append(made)
            speed = f"{made['samples_per_second']:.1f} samples/s in {made['seconds']:.0f} s"
            say(f"round {number}/{options.rounds}  {loop}: {speed}")
    speeds = {loop: [made["samples_per_second"] for made in all_made] for loop, all_made in trainings.items()}
    medians = {loop: statistics.median(values) for loop, values in speeds.items()}
    say(f"\n{'loop':<12}{'samples/s':>11}{'memory MiB':>12}  validation")
    for loop, (*_, last) in trainings.items():
        scores = ", ".join(f"{name} {100 * value:.1f}" for name, value in last["scores"].items())
        say(f"{loop:<12}{medians[loop]:>11.1f}{last['peak_memory_mib']:>12.0f}  {scores}")
    speedup, machine = medians["promptfold"] / medians["tutorial"], made["machine"]
    say(f"promptfold trains {speedup:.2f} times as fast ({machine})")
    document = {name: getattr(config, name) for name in ("model", "task", "epochs", "batch_size")}
    in_turn = [made for one_round in zip(*trainings.values(), strict=True) for made in one_round]
    ratios = [ours / theirs for theirs, ours in zip(*speeds.values(), strict=True)]
    document |= {"machine": machine, "trainings": in_turn, "ratio_per_round": ratios}
    say(json.dumps(document | {"samples_per_second_ratio": speedup}))


main = Command(TrainingConfig, _run, "python -m tests.measure.training")

if __name__ == "__main__":
    sys.exit(main())
