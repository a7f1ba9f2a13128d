"""What a training run is told: one frozen dataclass, from which the command line is derived."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from train.common.console import Parser
from train.common.errors import UsageError

MINILM = "minilm"


SMOLLM2 = "smollm2"


P_TUNING, P_TUNING_V2 = "p-tuning", "p-tuning-v2"


METHODS = (P_TUNING, P_TUNING_V2)


REPARAMETERIZATIONS = ("mlp", "lstm", "residual", "none")


PRECISIONS = ("fp32", "bf16", "fp16")


REPORTERS = ("none", "tensorboard", "trackio")


def _option(help: str, default: Any = MISSING, *, choices: tuple[str, ...] = (), group: str = "") -> Any:
    """A field of `TrainConfig` with the help text of its flag, its choices, and the group it is listed in."""
    return field(default=default, metadata={"help": help, "choices": choices, "group": group})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of one run. The defaults are the PEFT tutorial's.

    https://huggingface.co/docs/peft/main/en/task_guides/ptuning-seq-classification: roberta-large,
    GLUE MRPC, 20 virtual tokens, encoder hidden size 128, learning rate 1e-3, batch size 32, weight
    decay 0.01. (The tutorial stops after 2 epochs, before the model leaves the majority class; here
    it is 20 and the best epoch is kept.)

    Raises:
        UsageError: a value that cannot be used; the message names the flag.
    """

    out: Path = _option("folder for the adapter; it appears when the run is complete")
    model: str = _option(
        "base model, kept frozen: minilm (ships with the requirements), smollm2 (an optional package), a hub name, "
        "or a folder",
        "roberta-large",
    )

    task: str | None = _option(
        "a GLUE task: mrpc, qqp, rte, qnli, wnli, mnli, sst2 or cola (default: mrpc, or your own columns where "
        "--text-columns names them)",
        None,
        group="data",
    )
    train_file: Path | None = _option(
        "training data (.csv, .jsonl or .parquet) in place of the hub's", None, group="data"
    )
    validation_file: Path | None = _option(
        "validation data (.csv, .jsonl or .parquet) in place of the hub's", None, group="data"
    )
    text_columns: tuple[str, ...] = _option(
        "one or two text columns of your own files, such as premise,hypothesis", (), group="data"
    )
    label_column: str | None = _option("the label column of your own files (default: label)", None, group="data")
    labels: tuple[str, ...] = _option(
        "the labels of your own files in the order you want (default: those of the training file, sorted)",
        (),
        group="data",
    )
    max_length: int | None = _option(
        "longest text in tokens (default: the model's positions less the prompt)", None, group="data"
    )
    swap_sentences: bool = _option(
        "show each training pair at random in either order; only where a pair means the same both ways (mrpc, qqp, "
        "your own)",
        False,
        group="data",
    )

    method: str = _option(
        "p-tuning: learned embeddings before the text (arXiv 2103.10385); p-tuning-v2: learned keys and values in "
        "every layer (arXiv 2110.07602, PEFT's prefix tuning)",
        P_TUNING,
        choices=METHODS,
        group="method",
    )
    virtual_tokens: int = _option("number of virtual tokens in the prompt", 20, group="method")
    reparameterization: str | None = _option(
        "what computes p-tuning's prompt while it is learned: mlp or lstm as PEFT's; residual: a table that starts "
        "from the vocabulary, plus an MLP of it (arXiv 2305.03937); none: the table alone (default: mlp)",
        None,
        choices=REPARAMETERIZATIONS,
        group="method",
    )
    encoder_hidden_size: int = _option("hidden size of the prompt encoder (mlp, lstm, residual)", 128, group="method")

    epochs: int = _option("passes over the training data; the best one on validation is kept", 20, group="optimiser")
    max_steps: int | None = _option("stop after this many optimiser steps instead", None, group="optimiser")
    early_stopping: int | None = _option(
        "stop after this many epochs without a better one on validation", None, group="optimiser"
    )
    batch_size: int = _option("rows per optimiser step, over all processes together", 32, group="optimiser")
    learning_rate: float = _option("learning rate of the classification head and the prompt", 1e-3, group="optimiser")
    prompt_learning_rate: float | None = _option(
        "learning rate of the prompt alone (default: the same as --learning-rate)", None, group="optimiser"
    )
    weight_decay: float = _option("AdamW's weight decay", 0.01, group="optimiser")
    average: float = _option(
        "decay per step of a running average of what is learned, which is then what is scored and kept; 0: none",
        0.0,
        group="optimiser",
    )
    precision: str = _option(
        "of the frozen model while training; what is learned stays fp32", "fp32", choices=PRECISIONS, group="optimiser"
    )
    seed: int = _option("seed of everything random", 0, group="optimiser")
    seeds: tuple[int, ...] = _option(
        "several seeds, such as 0,1,2: train each, report mean and standard deviation, keep the median one",
        (),
        group="optimiser",
    )

    resume: bool = _option("go on from the last checkpoint of an interrupted run", False, group="run")
    checkpoint_steps: int | None = _option(
        "steps between checkpoints (default: one after every epoch)", None, group="run"
    )
    report_to: str = _option("where the curves go besides curves.png", "none", choices=REPORTERS, group="run")
    overwrite: bool = _option(
        "replace an older adapter at --out, or an interrupted run's checkpoints", False, group="run"
    )

    def __post_init__(self) -> None:
        for name in (
            "virtual_tokens",
            "encoder_hidden_size",
            "batch_size",
            "epochs",
            "max_steps",
            "early_stopping",
            "checkpoint_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{flag(name)} {value}: give a whole number of at least 1.")
        for name in ("learning_rate", "prompt_learning_rate"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise UsageError(f"{flag(name)} {value}: give a number above 0, such as 1e-3.")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"--weight-decay {self.weight_decay}: give 0 or a number above it.")
        if not 0 <= self.average < 1:
            raise UsageError(f"--average {self.average}: give a number from 0 to below 1, such as 0.99.")
        if self.max_length is not None and self.max_length < 8:
            raise UsageError(f"--max-length {self.max_length}: give at least 8 tokens.")
        for name, seed in (("seed", self.seed), *(("seeds", seed) for seed in self.seeds)):
            if not 0 <= seed < 2**32:
                raise UsageError(f"--{name} {seed}: give a whole number from 0 to 4294967295.")
        if len(set(self.seeds)) != len(self.seeds):
            raise UsageError("--seeds names a seed twice. Name each once.")
        self._check_choices()
        self._check_data()

    def _check_choices(self) -> None:
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise UsageError(f"{flag(item.name)} {value}: choose one of {', '.join(choices)}.")
        if self.method == P_TUNING_V2 and self.reparameterization is not None:
            raise UsageError(
                f"--reparameterization {self.reparameterization} belongs to --method {P_TUNING}; {P_TUNING_V2} learns its "
                "keys and values directly. Leave one of the two out."
            )

    def _check_data(self) -> None:
        if (self.train_file is None) != (self.validation_file is None):
            given, missing = ("--train-file", "--validation-file")
            if self.train_file is None:
                given, missing = missing, given
            raise UsageError(f"{given} was given without {missing}. Give both, or neither for the hub's data.")
        if not self.text_columns:
            for name in ("label_column", "labels"):
                if getattr(self, name):
                    raise UsageError(f"{flag(name)} needs --text-columns, which says that the columns are your own.")
            return
        if len(self.text_columns) > 2 or len(set(self.text_columns)) != len(self.text_columns):
            raise UsageError(f"--text-columns {','.join(self.text_columns)}: name one column, or two different ones.")
        if (self.label_column or "label") in self.text_columns:
            raise UsageError(
                f"--label-column {self.label_column or 'label'} is one of --text-columns too. Name the column of the class."
            )
        if self.task is not None:
            raise UsageError(f"--task {self.task} has its own columns. Leave --task or --text-columns out.")
        if self.train_file is None:
            raise UsageError("--text-columns names columns of your own files. Give --train-file and --validation-file.")

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds to run: ``seeds``, or ``seed`` alone."""
        return self.seeds or (self.seed,)


def flag(name: str) -> str:
    """The command-line flag of a field of `TrainConfig`."""
    return "--" + name.replace("_", "-")


def parse_config(argv: Sequence[str] | None) -> TrainConfig:
    """Parse the command line into a `TrainConfig`.

    Raises:
        UsageError: an unknown flag, a missing one, or a value that cannot be used.
    """
    parser = Parser(
        prog="python -m train",
        description="P-tune a frozen transformer and write the learned prompt and head as an adapter folder.",
        epilog=(
            "offline example: python -m train --model minilm --task mrpc "
            "--train-file train.jsonl --validation-file validation.jsonl --out adapters/minilm-mrpc"
        ),
        formatter_class=_HelpFormatter,
    )
    hints = get_type_hints(TrainConfig)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in fields(TrainConfig):
        name = item.metadata["group"]
        if name and name not in groups:
            groups[name] = parser.add_argument_group(name)
        target = groups[name] if name else parser
        help_text = item.metadata["help"]
        if hints[item.name] is bool:
            target.add_argument(flag(item.name), action="store_true", help=help_text)
            continue
        required = item.default is MISSING
        target.add_argument(
            flag(item.name),
            type=_converter(hints[item.name]),
            required=required,
            default=argparse.SUPPRESS if required or item.default in (None, ()) else item.default,
            metavar="|".join(item.metadata["choices"]) or item.name.rpartition("_")[2].upper(),
            help=help_text,
        )
    return TrainConfig(**vars(parser.parse_args(argv)))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults, but not to a switch, of which everybody knows that it is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if isinstance(action, argparse._StoreTrueAction) else super()._get_help_string(action)


def _converter(hint: Any) -> Callable[[str], Any]:
    """From a word of the command line to a field's type: ``int | None``, ``tuple[str, ...]`` …"""
    if get_origin(hint) is UnionType:
        hint = next(member for member in get_args(hint) if member is not type(None))
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]

        def split(text: str) -> tuple[Any, ...]:
            return tuple(item(part.strip()) for part in text.split(",") if part.strip())

        split.__name__ = f"comma-separated {item.__name__}"  # argparse puts it into its complaint
        return split
    plain: Callable[[str], Any] = hint
    return plain
