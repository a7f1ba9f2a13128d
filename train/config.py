"""What a training run is told: one frozen dataclass, from which the command line is derived."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from train.console import Parser
from train.errors import UsageError


def _option(help: str, default: Any = MISSING) -> Any:
    """A field of `TrainConfig` with the help text of its flag."""
    return field(default=default, metadata={"help": help})


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
        "base model, kept frozen: minilm (ships with the requirements), a hub name, or a folder",
        "roberta-large",
    )
    task: str = _option("what is learned; mrpc: are two sentences paraphrases?", "mrpc")
    train_file: Path | None = _option("training data (.csv, .jsonl or .parquet) in place of the hub's", None)
    validation_file: Path | None = _option("validation data (.csv, .jsonl or .parquet) in place of the hub's", None)
    virtual_tokens: int = _option("number of virtual tokens in the prompt", 20)
    encoder_hidden_size: int = _option("hidden size of the prompt encoder (MLP)", 128)
    learning_rate: float = _option("learning rate of the classification head and the prompt", 1e-3)
    prompt_learning_rate: float | None = _option(
        "learning rate of the prompt alone (default: the same as --learning-rate)", None
    )
    batch_size: int = _option("pairs per optimiser step", 32)
    weight_decay: float = _option("AdamW's weight decay", 0.01)
    epochs: int = _option("passes over the training data; the best one on validation is kept", 20)
    max_length: int | None = _option("longest text in tokens (default: the model's positions less the prompt)", None)
    seed: int = _option("seed of everything random", 0)
    overwrite: bool = _option("replace an older adapter at --out", False)

    def __post_init__(self) -> None:
        for name in ("virtual_tokens", "encoder_hidden_size", "batch_size", "epochs"):
            value = getattr(self, name)
            if value < 1:
                raise UsageError(f"{flag(name)} {value}: give a whole number of at least 1.")
        for name in ("learning_rate", "prompt_learning_rate"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise UsageError(f"{flag(name)} {value}: give a number above 0, such as 1e-3.")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"--weight-decay {self.weight_decay}: give 0 or a number above it.")
        if self.max_length is not None and self.max_length < 8:
            raise UsageError(f"--max-length {self.max_length}: give at least 8 tokens.")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed}: give a whole number from 0 to 4294967295.")
        if (self.train_file is None) != (self.validation_file is None):
            given, missing = ("--train-file", "--validation-file")
            if self.train_file is None:
                given, missing = missing, given
            raise UsageError(f"{given} was given without {missing}. Give both, or neither for the hub's data.")


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
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    hints = get_type_hints(TrainConfig)
    for item in fields(TrainConfig):
        help_text = item.metadata["help"]
        if hints[item.name] is bool:
            parser.add_argument(flag(item.name), action="store_true", help=help_text)
            continue
        required = item.default is MISSING
        parser.add_argument(
            flag(item.name),
            type=_plain_type(hints[item.name]),
            required=required,
            default=argparse.SUPPRESS if required or item.default is None else item.default,
            metavar=item.name.rpartition("_")[2].upper(),
            help=help_text,
        )
    return TrainConfig(**vars(parser.parse_args(argv)))


def _plain_type(hint: Any) -> Any:
    """``int`` for ``int | None``; anything else as it is."""
    if get_origin(hint) is UnionType:
        return next(member for member in get_args(hint) if member is not type(None))
    return hint
