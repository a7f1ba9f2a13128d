"""The quality gate: what a precision costs, on labelled rows and in fidelity to fp32."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.bundle.folder import FP32, GRAPH_FILES, Fidelity, Gate
from export.fold.config import GATE_TOLERANCE
from export.fold.precision.calibration import TaskBatches, text_tokenizer
from export.fold.precision.fidelity import compare_logits
from export.fold.read import Sources
from export.runtime.batches import differ, in_batches
from export.runtime.classifier import with_task
from export.runtime.session import open_session, run_session
from train.common.machine import usable_cores
from train.data.intervals import rise_intervals
from train.data.tasks import score
from train.data.token_ids import sentences_of

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


@dataclass(frozen=True)
class LabelledBatches(TaskBatches):
    """The labelled rows of a task; ``name`` is that of the file with them."""

    expected: tuple[np.ndarray, ...]
    """The labels of each batch, in the form of `Task.predict`."""


@dataclass(frozen=True)
class Cost:
    """What a precision costs, task by task."""

    gates: tuple[Gate, ...]
    """On labelled rows; empty where some task has none."""
    fidelity: tuple[Fidelity, ...]
    """On calibration texts; empty where they are no measure."""

    @property
    def passed(self) -> bool:
        """Labelled rows decide where there are any, and fidelity elsewhere."""
        return all(one.passed for one in self.gates or self.fidelity)

    def __str__(self) -> str:
        """For people: each gate and each fidelity with its file."""
        return "; ".join(
            [
                *(f"on {gate.file}: {gate}" for gate in self.gates),
                *(f"on {one.texts}: {one}" for one in self.fidelity),
            ]
        )


def label_batches(folder: Path, sources: Sources) -> list[LabelledBatches]:
    """Tokenize the labelled rows of all tasks into batches of similar length; where one task has none, none is judged."""
    tokenize = text_tokenizer(folder, sources)
    found = []
    for task in sources.tasks:
        if task.rows is None:
            return []
        texts = sentences_of(task.rows.dataset, task.rows.task)
        labels = np.array(task.rows.dataset[task.rows.task.label_column])
        groups = list(in_batches(texts, 32))
        batches = tuple(tokenize([texts[row] for row in group]).arrays for group in groups)
        expected = tuple(labels[group] for group in groups)
        found.append(LabelledBatches(task.rows.file.name, task.number, task.rows.task, batches, expected))
    return found


def run_for_task(session: "InferenceSession", batch: Mapping[str, np.ndarray], number: int) -> np.ndarray:
    """The logits of a batch of one task, float32, shape = (n_batch, n_labels of the task with the most)"""
    arrays = with_task(batch, number)
    return run_session(session, {item.name: arrays[item.name] for item in session.get_inputs()})


def task_logits(session: "InferenceSession", tasks: Iterable[TaskBatches]) -> list[np.ndarray]:
    """The logits for all texts of each task; float64, shape = (n_texts, n_labels)"""
    found = []
    for task in tasks:
        logits = np.concatenate([run_for_task(session, batch, task.number) for batch in task.batches])
        # A graph for many tasks has as many columns as the task with the most labels.
        found.append(logits[:, : len(task.task.labels)].astype(np.float64))
    return found


class Judge:
    """Compares a bundle's graphs with its fp32 graph, task by task: on labelled rows, and on calibration texts."""

    def __init__(self, folder: Path, rows: Sequence[LabelledBatches], texts: Sequence[TaskBatches]) -> None:
        """Run nothing yet.

        Args:
            rows: of every task, or none.
            texts: of every task on which fidelity is a measure, or none.
        """
        self._fp32 = folder / GRAPH_FILES[FP32]
        self._rows, self._texts = rows, texts
        self._references: dict[bool, list[np.ndarray]] = {}

    def __call__(self, path: Path, *, on_cpu: bool) -> Cost:
        """What a graph costs; ``on_cpu`` even on a machine with a GPU."""
        if on_cpu not in self._references:
            self._references[on_cpu] = self._logits(self._fp32, on_cpu=on_cpu)
        pairs = list(zip(self._references[on_cpu], self._logits(path, on_cpu=on_cpu), strict=True))
        n_gates = len(self._rows)
        gates = [_gate(rows, *pair) for rows, pair in zip(self._rows, pairs[:n_gates], strict=True)]
        fidelity = [compare_logits(texts, *pair) for texts, pair in zip(self._texts, pairs[n_gates:], strict=True)]
        return Cost(tuple(gates), tuple(fidelity))

    def _logits(self, path: Path, *, on_cpu: bool) -> list[np.ndarray]:
        """The logits for the labelled rows of each task, then for its texts; float64, shape = (n_rows, n_labels)"""
        session = open_session(path, threads=usable_cores(), use_cuda=False if on_cpu else None)
        return task_logits(session, (*self._rows, *self._texts))

    def classes_seen(self) -> list[int]:
        """How many different answers fp32 gives to the texts of each task."""
        if True not in self._references:
            self._references[True] = self._logits(self._fp32, on_cpu=True)
        references = self._references[True][len(self._rows) :]
        return [
            len(np.unique(texts.task.predict(logits), axis=0))
            for texts, logits in zip(self._texts, references, strict=True)
        ]


def _gate(rows: LabelledBatches, reference: np.ndarray, logits: np.ndarray) -> Gate:
    expected = np.concatenate(rows.expected)
    is_finite = bool(np.isfinite(logits).all())
    before, after = (rows.task.predict(np.nan_to_num(found)) for found in (reference, logits))
    changes = np.abs(rows.task.probabilities(logits) - rows.task.probabilities(reference))
    return Gate(
        file=rows.name,
        n_rows=len(expected),
        fp32=score(rows.task, before, expected).values,
        scores=score(rows.task, after, expected).values,
        label_flips=int(differ(rows.task, before, after).sum()),
        max_probability_difference=float(changes.max()) if is_finite else 1.0,
        tolerance=GATE_TOLERANCE,
        is_finite=is_finite,
        changes=rise_intervals(rows.task, before, after, expected),
    )
