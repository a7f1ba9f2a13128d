"""``python -m tests.measure.training``: the tutorial's training loop against ours, on the same machine, data and epochs.

What is measured: rows per second of a whole training, scoring the validation rows after every epoch
included, as both do; loading models and tokenising left out.

- tutorial: PEFT's P-tuning tutorial as it stands (https://huggingface.co/docs/peft/main/en/task_guides/
  ptuning-seq-classification): `PeftModel` in the Trainer, random batches padded to their longest text, fp32,
  dropout in the frozen model.
- promptfold: `train.fit.loop.fit` with the same method, sizes and learning rate: batches of like length, no dropout
  in what is frozen, the last layer for the pooled row alone.

Each training has a process of its own, and they take turns, so that neither sits in the other's caches or
beside its threads. The figure is the ratio of the medians. Run it on an idle machine:

    python -m tests.measure.training --model minilm --train-file train.jsonl --validation-file validation.jsonl --epochs 2 --rounds 3

Prints a table, then one JSON document as the last line.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from train.common.console import Parser, run_main, say
from train.common.errors import EngineError, PromptfoldError, UsageError
from train.config import TrainConfig

PAUSE_SECONDS = 2.0
"""Before each training: what the one before it still writes or frees is done by then."""


@dataclass(frozen=True)
class Measured:
    """One training.

    Attributes:
        loop: whose.
        seconds: of the training.
        samples_per_second: training rows of all epochs over ``seconds``.
        peak_memory_mib: largest resident size of the process.
        scores: on validation, of the best epoch.
        machine: where it ran.
    """

    loop: str
    seconds: float
    samples_per_second: float
    peak_memory_mib: float
    scores: dict[str, float]
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
    import resource

    from train.common.machine import describe_machine

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes, but bytes on macOS.
    peak_mib = peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    return Measured(loop, seconds, n_samples / seconds, peak_mib, scores, describe_machine())


def _in_child(sender: Connection, loop: str, config: TrainConfig) -> None:
    try:
        sender.send(LOOPS[loop](config))
    except PromptfoldError as error:
        sender.send(error)


def measure(loop: str, config: TrainConfig) -> Measured:
    """Run one training in a process of its own.

    Raises:
        PromptfoldError: whatever the training raises, or an EngineError when its process died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(sender, loop, config), name=f"promptfold-bench-{loop}")
    process.start()
    sender.close()
    try:
        reply: Measured | PromptfoldError = receiver.recv()
    except EOFError as cause:
        process.join()
        raise EngineError(f"The {loop} training ended unexpectedly (exit code {process.exitcode}).") from cause
    finally:
        process.join()
    if isinstance(reply, PromptfoldError):
        raise reply
    return reply


def _command(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m tests.measure.training",
        description="Time the PEFT tutorial's training loop against ours; the last line is JSON.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="minilm", help="as for python -m train")
    parser.add_argument("--task", default="mrpc", help="as for python -m train")
    parser.add_argument("--train-file", type=Path, default=argparse.SUPPRESS, help="as for python -m train")
    parser.add_argument("--validation-file", type=Path, default=argparse.SUPPRESS, help="as for python -m train")
    parser.add_argument("--epochs", type=int, default=2, help="of each training")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each loop; the figure is their median")
    options = vars(parser.parse_args(argv))
    rounds = options.pop("rounds")
    if rounds < 1:
        raise UsageError(f"--rounds {rounds}: give a whole number of at least 1.")
    # The tutorial's own settings are the defaults.
    config = TrainConfig(out=Path("bench"), **options)
    measured: list[Measured] = []
    for number in range(1, rounds + 1):
        for loop in LOOPS:
            time.sleep(PAUSE_SECONDS)
            result = measure(loop, config)
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
    say(
        json.dumps(
            {
                "model": config.model,
                "task": config.task,
                "epochs": config.epochs,
                "batch_size": config.batch_size,
                "machine": measured[0].machine,
                "trainings": [asdict(item) for item in measured],
                "ratio_per_round": ratios,
                "samples_per_second_ratio": speedup,
            }
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
