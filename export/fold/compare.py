"""Step 4, compare: the graph's logits against `PeftModel.forward`, over shapes that were not traced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from export.fold.precision.gate import run_for_task
from export.fold.read import ExportTask
from export.runtime.batches import random_batch
from export.runtime.session import open_session
from train.adapter.peft import load_peft_model
from train.common.console import say
from train.common.errors import ParityError
from train.common.machine import usable_cores
from train.model.find import BaseModel

TOLERANCE_FP32 = 1e-4
"""Largest difference of a logit, absolute, that an fp32 graph may show."""
LONGEST = 1024
"""Upper bound for the compared texts: the scores of attention grow with the square of the length, to gigabytes beyond."""
SHAPES = ((1, 1), (1, 7), (3, 5), (4, 33), (7, 61), (2, LONGEST))
"""Batch sizes and lengths; longer than the model reads means as long as it reads."""


@dataclass(frozen=True)
class ParityRow:
    """One batch."""

    batch_size: int
    sequence_length: int
    padding_tokens: int
    max_logit_difference: float


@dataclass(frozen=True)
class ParityReport:
    """All batches of a task."""

    tolerance: float
    max_logit_difference: float
    rows: tuple[ParityRow, ...]


def compare_with_peft(
    path: Path, tasks: Sequence[ExportTask], base: BaseModel, *, use_cuda: bool | None = None
) -> tuple[list[str], list[ParityReport]]:
    """Compare a graph in fp32 with PEFT, each batch padded on the right; on CUDA by default where it can be used.

    Returns:
        the execution providers that ran the graph, and a report for each task

    Raises:
        ParityError: the shapes differ, a logit is not finite, or one differs by more than the tolerance.
    """
    say("[3/5] comparing its logits with PEFT's on shapes that were not traced")
    session = open_session(path, threads=usable_cores(), use_cuda=use_cuda)
    inputs = [item.name for item in session.get_inputs()]
    reports = []
    for task in tasks:
        adapter = task.adapter
        peft_model = load_peft_model(adapter.folder, base, adapter.labels)
        vocabulary_size = peft_model.config.get_text_config().vocab_size
        generator = np.random.default_rng(0)
        rows = []
        for batch_size, wanted_length in SHAPES:
            shape = (batch_size, min(wanted_length, adapter.max_length))
            batch = random_batch(generator, shape, inputs=inputs, vocabulary_size=vocabulary_size, padded=True)
            expected = _logits_of_peft(peft_model, batch)
            actual = run_for_task(session, batch, task.number)[:, : len(adapter.labels)]
            difference = _difference(actual, expected, f"at batch size {batch_size} and length {shape[1]}")
            rows.append(ParityRow(*shape, int((batch["attention_mask"] == 0).sum()), difference))
        report = ParityReport(TOLERANCE_FP32, max(row.max_logit_difference for row in rows), tuple(rows))
        say(f"      {task.name}: largest logit difference {report.max_logit_difference:.1e}")
        reports.append(report)
    return session.get_providers(), reports


def _logits_of_peft(peft_model: PeftModel, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """The reference's logits, shape = (n_batch, n_labels)

    Each text runs alone, without its padding: PEFT takes a decoder's last row, even if it is padding, and what a model says
    of a text must not depend on the texts beside it.
    """
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    lengths = batch["attention_mask"].sum(axis=1)
    texts = [{name: rows[i : i + 1, :length] for name, rows in tensors.items()} for i, length in enumerate(lengths)]
    with torch.inference_mode():
        return torch.cat([peft_model(**text).logits for text in texts]).float().cpu().numpy()


def _difference(actual: np.ndarray, expected: np.ndarray, where: str) -> float:
    if actual.shape != expected.shape:
        raise ParityError(
            f"The exported graph gives logits of shape {actual.shape} {where}, PyTorch {expected.shape}. "
            "Nothing was written."
        )
    difference = float(np.max(np.abs(actual - expected)))
    # "not <=", so that NaN fails too.
    if not difference <= TOLERANCE_FP32:
        raise ParityError(
            f"The exported graph differs from PyTorch by {difference:.3g} in a logit {where}; "
            f"{TOLERANCE_FP32:g} is allowed. Nothing was written. Please report the base model and the versions."
        )
    return difference
