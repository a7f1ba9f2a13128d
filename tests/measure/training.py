"""``python -m tests.measure.training``: the tutorial's training loop against ours, on the same machine, data and epochs.

Measured are rows per second of a whole training, scoring the validation rows after every epoch included, as both do;
loading models and tokenizing left out.

- tutorial: PEFT's P-tuning tutorial as it stands (https://huggingface.co/docs/peft/main/en/task_guides/
  ptuning-seq-classification): `PeftModel` in the Trainer, random batches padded to their longest text, fp32,
  dropout in the frozen model.
- promptfold: our own loop with the same method, sizes and learning rate: batches of like length, no dropout in what is
  frozen, the last layer for the pooled row alone.

Each training has a process of its own, and they take turns. The figure is the ratio of the medians. Run it on an idle
machine:

    python -m tests.measure.training --model minilm --train-file train.jsonl --validation-file validation.jsonl --epochs 2 --rounds 3

Prints a table, then one JSON document as the last line.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.measure.child import in_child
from train.common.command_line import Command, check_counts
from train.common.console import say
from train.config import TrainConfig

PAUSE_SECONDS = 2.0
"""Before each training: what the one before it still writes or frees is done by then."""


@dataclass(frozen=True)
class Measured:
    """One training."""

    loop: str
    seconds: float
    samples_per_second: float
    """Training rows of all epochs over ``seconds``."""
    peak_memory_mib: float
    """Largest resident size of the process."""
    scores: dict[str, float]
    """Of the best epoch, on validation."""
    machine: str


def train_as_the_tutorial(config: TrainConfig) -> Measured:
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
                save_total_limit=None,
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


def train_as_promptfold(config: TrainConfig) -> Measured:
    """Our loop, with the same settings."""
    from train.fit.loop import fit, prepare

    prepared = prepare(config)
    with tempfile.TemporaryDirectory() as work:
        _, progress = fit(prepared, seed=config.seed, checkpoints=Path(work), log_folder=Path(work) / "runs")
    best = progress.epochs[progress.best_epoch - 1].scores
    return _measured("promptfold", progress.seconds, len(prepared.train.rows) * config.epochs, best)


LOOPS: dict[str, Callable[[TrainConfig], Measured]] = {
    "tutorial": train_as_the_tutorial,
    "promptfold": train_as_promptfold,
}


def _measured(loop: str, seconds: float, n_samples: int, scores: dict[str, float]) -> Measured:
    from train.common.machine import describe_machine, peak_memory_mib

    return Measured(loop, seconds, n_samples / seconds, peak_memory_mib(), scores, describe_machine())


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
    # The tutorial's own settings are the defaults.
    config, rounds = TrainConfig(out=Path("bench"), **settings), options.rounds
    measured: list[Measured] = []
    for number in range(1, rounds + 1):
        for loop, train in LOOPS.items():
            time.sleep(PAUSE_SECONDS)
            result = in_child(train, config)
            measured.append(result)
            say(f"round {number}/{rounds}  {loop}: {result.samples_per_second:.1f} samples/s in {result.seconds:.0f} s")
    medians = {
        loop: statistics.median(item.samples_per_second for item in measured if item.loop == loop) for loop in LOOPS
    }
    ratios = [
        ours.samples_per_second / theirs.samples_per_second for theirs, ours in zip(*[iter(measured)] * 2, strict=True)
    ]
    say(f"\n{'loop':<12}{'samples/s':>11}{'memory MiB':>12}  validation")
    for loop in LOOPS:
        last = [item for item in measured if item.loop == loop][-1]
        scores = ", ".join(f"{name} {100 * value:.1f}" for name, value in last.scores.items())
        say(f"{loop:<12}{medians[loop]:>11.1f}{last.peak_memory_mib:>12.0f}  {scores}")
    speedup = medians["promptfold"] / medians["tutorial"]
    say(f"promptfold trains {speedup:.2f} times as fast ({measured[0].machine})")
    document = {name: getattr(config, name) for name in ("model", "task", "epochs", "batch_size")}
    document |= {"machine": measured[0].machine, "trainings": [asdict(item) for item in measured]}
    say(json.dumps(document | {"ratio_per_round": ratios, "samples_per_second_ratio": speedup}))


main = Command(TrainingConfig, _run, "python -m tests.measure.training")

if __name__ == "__main__":
    sys.exit(main())
