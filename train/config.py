"""The settings of a training run, which are the flags of ``python -m train``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from train.common.command_line import WholeNumbers, Words, check_counts, flag
from train.common.errors import UsageError

MINILM = "minilm"
SMOLLM2 = "smollm2"

P_TUNING, P_TUNING_V2 = "p-tuning", "p-tuning-v2"
METHODS = (P_TUNING, P_TUNING_V2)
REPARAMETERIZATIONS = ("mlp", "lstm", "residual", "none")
PRECISIONS = ("fp32", "bf16", "fp16")
REPORTERS = ("none", "tensorboard", "trackio")
CLASS_WEIGHTS = ("none", "balanced")
CLASSIFICATION, REGRESSION, MULTI_LABEL = "classification", "regression", "multi_label"
KINDS = (CLASSIFICATION, REGRESSION, MULTI_LABEL)
"""Kinds of task: exactly one class a text; a number; any number of labels."""
MAX_RATE = 1e9
"""The largest learning rate or weight decay: beyond, their products are no numbers in fp32, in which AdamW computes."""

_DATA, _METHOD, _OPTIMISER, _RUN = (
    Parameter(group=Group.create_ordered(name)) for name in ("Data", "Method", "Optimiser", "Run")
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """P-tune a frozen transformer and write the learned prompt and head as an adapter folder.

    The defaults are the PEFT tutorial's:
    https://huggingface.co/docs/peft/main/en/task_guides/ptuning-seq-classification: roberta-large, GLUE MRPC, 20
    virtual tokens, encoder hidden size 128, learning rate 1e-3, batch size 32, weight decay 0.01. (The tutorial stops
    after 2 epochs, before the model leaves the majority class; here it is 20 and the best epoch is kept.)
    """

    out: Path
    """folder for the adapter; it appears when the run is complete"""
    model: str = "roberta-large"
    """base model, kept frozen: minilm (ships with the requirements), smollm2 (an optional package), a hub name, or a
    folder"""

    task: Annotated[str | None, _DATA] = None
    """a GLUE task: mrpc, qqp, rte, qnli, wnli, mnli, sst2, cola or stsb (default: mrpc, or your own columns where
    --text-columns names them)"""
    train_file: Annotated[Path | None, _DATA] = None
    """training data (.csv, .jsonl or .parquet) in place of the hub's"""
    validation_file: Annotated[Path | None, _DATA] = None
    """validation data (.csv, .jsonl or .parquet) in place of the hub's"""
    text_columns: Annotated[Words, _DATA] = ()
    """one or two text columns of your own files, such as premise,hypothesis"""
    label_column: Annotated[str | None, _DATA] = None
    """label column of your own files (default: label)"""
    labels: Annotated[Words, _DATA] = ()
    """labels of your own files in the order you want (default: those of the training file, sorted)"""
    kind: Annotated[str | None, _DATA, Parameter(choices=KINDS)] = None
    """kind of task of your own files: classification, one label a row; regression, a number; multi_label, any number of labels: a
    list, or names with a comma between (default: classification)"""
    threshold: Annotated[float | None, _DATA] = None
    """with --kind multi_label: the probability from which a label is predicted (default: 0.5)"""
    merge_labels: Annotated[bool, _DATA] = False
    """take labels for one that differ in case or blanks alone"""
    delimiter: Annotated[str | None, _DATA] = None
    """between the cells of your CSV files: one character, or comma, semicolon, tab, pipe (default: recognised)"""
    encoding: Annotated[str | None, _DATA] = None
    """encoding of your text files, such as cp1252 (default: recognised)"""
    quote: Annotated[str | None, _DATA] = None
    """around quoted cells of your CSV files: one character, or none (default: recognised)"""
    max_length: Annotated[int | None, _DATA] = None
    """longest text in tokens (default: the model's positions less the prompt)"""
    swap_sentences: Annotated[bool, _DATA] = False
    """show each training pair at random in either order; only where a pair means the same both ways (mrpc, qqp, your
    own)"""

    method: Annotated[str, _METHOD, Parameter(choices=METHODS)] = P_TUNING
    """p-tuning: learned embeddings before the text (arXiv 2103.10385); p-tuning-v2: learned keys and values in every
    layer (arXiv 2110.07602, PEFT's prefix tuning)"""
    virtual_tokens: Annotated[int, _METHOD] = 20
    """number of virtual tokens in the prompt"""
    reparameterization: Annotated[str | None, _METHOD, Parameter(choices=REPARAMETERIZATIONS)] = None
    """what computes p-tuning's prompt while it is learned: mlp or lstm as PEFT's; residual: a table that starts from
    the vocabulary, plus an MLP of it (arXiv 2305.03937); none: the table alone (default: mlp)"""
    encoder_hidden_size: Annotated[int, _METHOD] = 128
    """hidden size of the prompt encoder (mlp, lstm, residual)"""

    epochs: Annotated[int, _OPTIMISER] = 20
    """passes over the training data; the best one on validation is kept"""
    max_steps: Annotated[int | None, _OPTIMISER] = None
    """stop after this many optimiser steps instead"""
    early_stopping: Annotated[int | None, _OPTIMISER] = None
    """stop after this many epochs without a better one on validation"""
    batch_size: Annotated[int, _OPTIMISER] = 32
    """rows per optimiser step, over all processes together"""
    learning_rate: Annotated[float, _OPTIMISER] = 1e-3
    """learning rate of the classification head and the prompt"""
    prompt_learning_rate: Annotated[float | None, _OPTIMISER] = None
    """learning rate of the prompt alone (default: the same as --learning-rate)"""
    weight_decay: Annotated[float, _OPTIMISER] = 0.01
    """AdamW's weight decay"""
    class_weights: Annotated[str, _OPTIMISER, Parameter(choices=CLASS_WEIGHTS)] = "none"
    """balanced: the loss weighs each class by n / (k · its rows), of n rows and k classes, so that rare ones count"""
    average: Annotated[float, _OPTIMISER] = 0.0
    """decay per step of a running average of what is learned, which is then what is scored and kept; 0: none"""
    precision: Annotated[str, _OPTIMISER, Parameter(choices=PRECISIONS)] = "fp32"
    """precision of the frozen model while training; what is learned stays fp32"""
    seed: Annotated[int, _OPTIMISER] = 0
    """seed of everything random"""
    seeds: Annotated[WholeNumbers, _OPTIMISER] = ()
    """several seeds, such as 0,1,2: train each, report mean and standard deviation, keep the median one"""

    resume: Annotated[bool, _RUN] = False
    """go on from the last checkpoint of an interrupted run"""
    checkpoint_steps: Annotated[int | None, _RUN] = None
    """steps between checkpoints (default: one after every epoch)"""
    report_to: Annotated[str, _RUN, Parameter(choices=REPORTERS)] = "none"
    """where the curves go besides curves.png"""
    overwrite: Annotated[bool, _RUN] = False
    """replace an older adapter at --out, or an interrupted run's checkpoints"""

    def __post_init__(self) -> None:
        check_counts(self, "virtual_tokens", "encoder_hidden_size", "batch_size", "epochs", "max_steps")
        check_counts(self, "early_stopping", "checkpoint_steps", "max_length")
        for name in ("learning_rate", "prompt_learning_rate"):
            value = getattr(self, name)
            if value is not None and not (0 < value <= MAX_RATE):
                raise UsageError(f"{flag(name)} {value}: give a number above 0 and at most {MAX_RATE:g}, such as 1e-3.")
        if not 0 <= self.weight_decay <= MAX_RATE:
            raise UsageError(f"--weight-decay {self.weight_decay}: give a number from 0 to {MAX_RATE:g}, such as 0.01.")
        if not 0 <= self.average < 1:
            raise UsageError(f"--average {self.average}: give a number from 0 to below 1, such as 0.99.")
        if self.max_length is not None and self.max_length < 8:
            raise UsageError(f"--max-length {self.max_length}: give at least 8 tokens.")
        if self.method == P_TUNING_V2 and self.reparameterization is not None:
            raise UsageError(
                f"--reparameterization {self.reparameterization} belongs to --method {P_TUNING}; {P_TUNING_V2} learns its "
                "keys and values directly. Leave one of the two out."
            )
        self._check_seeds()
        self._check_data()

    def _check_seeds(self) -> None:
        for name, seed in (("seed", self.seed), *(("seeds", seed) for seed in self.seeds)):
            if not 0 <= seed < 2**32:
                raise UsageError(f"--{name} {seed}: give a whole number from 0 to 4294967295.")
        if len(set(self.seeds)) != len(self.seeds):
            raise UsageError("--seeds names a seed twice. Name each once.")

    def _check_data(self) -> None:
        if (self.train_file is None) != (self.validation_file is None):
            given, missing = ("--train-file", "--validation-file")
            if self.train_file is None:
                given, missing = missing, given
            raise UsageError(f"{given} was given without {missing}. Give both, or neither for the hub's data.")
        if not self.text_columns:
            for name in ("label_column", "labels", "merge_labels", "kind", "threshold"):
                if getattr(self, name):
                    raise UsageError(f"{flag(name)} needs --text-columns, which says that the columns are your own.")
            return
        if len(self.text_columns) > 2 or len(set(self.text_columns)) != len(self.text_columns):
            raise UsageError(f"--text-columns {','.join(self.text_columns)}: name one column, or two different ones.")
        label_column = self.label_column or "label"
        if label_column in self.text_columns:
            raise UsageError(
                f"--label-column {label_column} is one of --text-columns too. Name the column of the class."
            )
        if self.task is not None:
            raise UsageError(f"--task {self.task} has its own columns. Leave --task or --text-columns out.")
        self._check_kind()
        if self.train_file is None:
            raise UsageError("--text-columns names columns of your own files. Give --train-file and --validation-file.")

    def _check_kind(self) -> None:
        if self.kind == REGRESSION and self.labels:
            raise UsageError(f"--labels {','.join(self.labels):.80}: a regression has a number. Leave --labels out.")
        if self.threshold is not None and self.kind != MULTI_LABEL:
            raise UsageError(f"--threshold {self.threshold} is for --kind {MULTI_LABEL}. Add that, or leave it out.")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise UsageError(f"--threshold {self.threshold}: give a number above 0 and below 1, such as 0.5.")

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds to run: ``seeds``, or ``seed`` alone."""
        return self.seeds or (self.seed,)
