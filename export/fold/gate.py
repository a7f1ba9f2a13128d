"""The quality gate: what a precision costs on labelled rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.bundle.folder import FP32, GRAPH_FILES, INT8, Gate
from export.runtime.batches import in_batches, softmax
from export.runtime.session import open_session, run_session
from train.data.tasks import Task, score

GATE_TOLERANCE = 0.005
"""By how much a metric may fall: half a point."""


Logits = Callable[[Mapping[str, np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class LabelledBatches:
    """Labelled rows, tokenised once for every candidate.

    Attributes:
        file: what they came from, for the manifest.
        task: whose metrics count.
        batches: input arrays by name.
        rows: of each batch the numbers of its rows; int64, shape = (n_batch,)
        expected: class indices; int64, shape = (n_rows,)
    """

    file: str
    task: Task
    batches: tuple[dict[str, np.ndarray], ...]
    rows: tuple[np.ndarray, ...]
    expected: np.ndarray

    def logits(self, run: Logits) -> np.ndarray:
        """Run a graph over all rows; shape = (n_rows, n_labels)"""
        logits = np.empty((len(self.expected), len(self.task.labels)))
        for batch, rows in zip(self.batches, self.rows, strict=True):
            # A shared graph has as many columns as the task with the most labels.
            logits[rows] = run(batch)[:, : logits.shape[1]]
        return logits

    def head(self, n_rows: int) -> "LabelledBatches":
        """At most so many rows, from all over the lengths."""
        wanted = -(-n_rows // max(len(batch["input_ids"]) for batch in self.batches))
        picked = [round(i) for i in np.linspace(0, len(self.batches) - 1, min(wanted, len(self.batches)))]
        order = np.concatenate([self.rows[i] for i in picked])
        renumbered, start = [], 0
        for i in picked:
            renumbered.append(np.arange(start, start + len(self.rows[i])))
            start += len(self.rows[i])
        return LabelledBatches(
            file=self.file,
            task=self.task,
            batches=tuple(self.batches[i] for i in picked),
            rows=tuple(renumbered),
            expected=self.expected[order],
        )


def labelled_batches(
    file: Path,
    task: Task,
    encode: Callable[[Sequence[tuple[str, ...]]], dict[str, np.ndarray]],
    texts: Sequence[tuple[str, ...]],
    expected: Sequence[int],
) -> LabelledBatches:
    """Tokenise labelled rows into batches of like length.

    Args:
        encode: texts → the graph's input arrays.
        expected: of each text its class index.
    """
    rows = [np.array(batch) for batch in in_batches(texts, 32)]
    return LabelledBatches(
        file=file.name,
        task=task,
        batches=tuple(encode([texts[row] for row in batch]) for batch in rows),
        rows=tuple(rows),
        expected=np.array(expected),
    )


def measure_gates(
    folder: Path, precision: str, tasks: Sequence[LabelledBatches], *, threads: int, kept_fp32: Sequence[int] = ()
) -> list[Gate]:
    """Hold a bundle's graph in one precision against its fp32 graph, task by task.

    Args:
        folder: holds both graphs.
        tasks: labelled rows of each.
        kept_fp32: layers that stayed in fp32.
    """
    references = reference_logits(folder, precision, tasks, threads)
    return gate_tasks(folder, precision, tasks, references, threads=threads, kept_fp32=kept_fp32)


def reference_logits(folder: Path, precision: str, tasks: Sequence[LabelledBatches], threads: int) -> list[np.ndarray]:
    """The fp32 graph's logits, where a graph in another precision will be run."""
    run = graph_runner(folder / GRAPH_FILES[FP32], precision, threads)
    return [data.logits(run) for data in tasks]


def gate_tasks(
    folder: Path,
    precision: str,
    tasks: Sequence[LabelledBatches],
    references: Sequence[np.ndarray],
    *,
    threads: int,
    kept_fp32: Sequence[int],
) -> list[Gate]:
    run = graph_runner(folder / GRAPH_FILES[precision], precision, threads)
    return [
        _gate(reference, data.logits(run), data, kept_fp32) for data, reference in zip(tasks, references, strict=True)
    ]


def _gate(reference: np.ndarray, logits: np.ndarray, data: LabelledBatches, kept_fp32: Sequence[int]) -> Gate:
    before, after = reference.argmax(axis=1), logits.argmax(axis=1)
    is_finite = bool(np.isfinite(logits).all())
    return Gate(
        file=data.file,
        n_rows=len(data.expected),
        fp32=score(data.task, before, data.expected).values,
        scores=score(data.task, after, data.expected).values,
        label_flips=int((before != after).sum()),
        max_probability_difference=float(np.abs(softmax(logits) - softmax(reference)).max()) if is_finite else 1.0,
        tolerance=GATE_TOLERANCE,
        kept_fp32=tuple(kept_fp32),
        is_finite=is_finite,
    )


def graph_runner(path: Path, precision: str, threads: int) -> Logits:
    # int8 is for CPUs, so that is where it is judged, on a machine with a GPU too.
    session = open_session(path, threads=threads, use_cuda=False if precision == INT8 else None)
    return lambda arrays: run_session(session, arrays)
