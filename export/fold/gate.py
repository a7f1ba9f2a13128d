"""The quality gate: what a precision costs on labelled rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.bundle.folder import FILES, FP32, GRAPH_FILES, INT8, TEXT_INPUTS, Gate
from export.fold.read import Sources
from export.runtime.batches import differ, in_batches
from export.runtime.classifier import with_task
from export.runtime.session import open_session, run_session
from export.runtime.tokenizer import TextTokenizer
from train.common.machine import usable_cores
from train.data.tasks import Task, score
from train.data.token_ids import sentences_of

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

GATE_TOLERANCE = 0.005
"""By how much a metric may fall: half a point."""


@dataclass(frozen=True)
class LabelledBatches:
    """The labelled rows of a task, tokenized once for every candidate; ``file`` is the name of the file with them."""

    file: str
    task: Task
    number: int
    batches: tuple[dict[str, np.ndarray], ...]
    """Text inputs by name."""
    expected: tuple[np.ndarray, ...]
    """Class indices of each batch; int64, shape = (n_batch,)"""

    def sample(self, n_rows: int) -> "LabelledBatches":
        """Batches of about so many rows, of all lengths."""
        n_wanted = min(-(-n_rows // max(map(len, self.expected))), len(self.batches))
        picked = [round(i) for i in np.linspace(0, len(self.batches) - 1, n_wanted)]
        batches, expected = (tuple(values[i] for i in picked) for values in (self.batches, self.expected))
        return replace(self, batches=batches, expected=expected)


def label_batches(folder: Path, sources: Sources) -> list[LabelledBatches]:
    """Tokenize the labelled rows of all tasks into batches of similar length; where one task has none, none is judged."""
    # Adapters in one graph have one tokenizer and one limit.
    tokenize = TextTokenizer(
        folder / FILES.tokenizer,
        max_length=sources.adapters[0].max_length,
        pad_token_id=sources.tokenizer.pad_token_id,
        token_types=sources.has_token_types,
        inputs=TEXT_INPUTS,
    )
    found = []
    for task in sources.tasks:
        if task.rows is None:
            return []
        texts = sentences_of(task.rows.dataset, task.rows.task)
        labels = np.array(task.rows.dataset[task.rows.task.label_column])
        groups = list(in_batches(texts, 32))
        batches = tuple(tokenize([texts[row] for row in group]).arrays for group in groups)
        expected = tuple(labels[group] for group in groups)
        found.append(LabelledBatches(task.rows.file.name, task.rows.task, task.number, batches, expected))
    return found


def run_for_task(session: "InferenceSession", batch: Mapping[str, np.ndarray], number: int) -> np.ndarray:
    """The logits of a batch of one task, float32, shape = (n_batch, n_labels of the task with the most)"""
    arrays = with_task(batch, number)
    return run_session(session, {item.name: arrays[item.name] for item in session.get_inputs()})


def logits_of(path: Path, precision: str, tasks: Sequence[LabelledBatches]) -> list[np.ndarray]:
    """The logits of a graph for the rows of each task; float64, shape = (n_rows, n_labels)"""
    # int8 is for CPUs, so it is judged on one, even on a machine with a GPU.
    session = open_session(path, threads=usable_cores(), use_cuda=False if precision == INT8 else None)
    found = []
    for rows in tasks:
        logits = np.concatenate([run_for_task(session, batch, rows.number) for batch in rows.batches])
        # A graph for many tasks has as many columns as the task with the most labels.
        found.append(logits[:, : len(rows.task.labels)].astype(np.float64))
    return found


def measure_gates(
    folder: Path,
    precision: str,
    tasks: Sequence[LabelledBatches],
    *,
    kept_fp32: Sequence[int] = (),
    references: Sequence[np.ndarray] | None = None,
) -> list[Gate]:
    """Compare a bundle's graph in one precision with its fp32 graph, or with the logits of it, task by task."""
    if references is None:
        references = logits_of(folder / GRAPH_FILES[FP32], precision, tasks)
    found = logits_of(folder / GRAPH_FILES[precision], precision, tasks)
    gates = []
    for rows, reference, logits in zip(tasks, references, found, strict=True):
        expected = np.concatenate(rows.expected)
        is_finite = bool(np.isfinite(logits).all())
        before, after = (rows.task.predict(np.nan_to_num(found)) for found in (reference, logits))
        probabilities, before_them = rows.task.probabilities(logits), rows.task.probabilities(reference)
        difference = float(np.abs(probabilities - before_them).max()) if is_finite else 1.0
        gates.append(
            Gate(
                file=rows.file,
                n_rows=len(expected),
                fp32=score(rows.task, before, expected).values,
                scores=score(rows.task, after, expected).values,
                label_flips=int(differ(rows.task, before, after).sum()),
                max_probability_difference=difference,
                tolerance=GATE_TOLERANCE,
                kept_fp32=tuple(kept_fp32),
                is_finite=is_finite,
            )
        )
    return gates
