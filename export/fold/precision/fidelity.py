"""Fidelity: how near a precision's answers are to those of fp32, which needs no labels."""

from collections.abc import Sequence

import numpy as np

from export.bundle.folder import Fidelity
from export.fold.precision.calibration import TaskBatches
from export.runtime.batches import differ
from train.config import REGRESSION
from train.data.tasks import Task

LEAST_EQUAL = 0.98
"""Share of the labels that must be equal where no labelled rows say what a precision costs."""
NEAR = 0.2
"""How far a regression's number may move, in standard deviations of fp32's numbers. Where 98 % keep to it, the error is
about a tenth of the deviation, which lowers a correlation by half a point."""
Z_95 = 1.959964
"""The normal distribution's quantile for an interval of 95 %."""


def compare_logits(texts: TaskBatches, reference: np.ndarray, logits: np.ndarray) -> Fidelity:
    """Compare logits with those of fp32; float64, shapes = (n_texts, n_labels)"""
    is_finite = bool(np.isfinite(logits).all())
    differences = np.abs(logits - reference) if is_finite else np.zeros(1)
    n_equal = int(same_labels(texts.task, reference, logits).sum())
    return Fidelity(
        texts=texts.name,
        n_texts=len(reference),
        equal_labels=n_equal,
        interval=wilson_interval(n_equal, len(reference)),
        rms_logit_difference=float(np.sqrt((differences**2).mean())),
        max_logit_difference=float(differences.max()),
        least_equal=LEAST_EQUAL,
        is_finite=is_finite,
    )


def same_labels(task: Task, reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Whether each row has the same prediction, its labels all equal or its number near; bool, shape = (n_rows,)"""
    one, other = task.predict(reference), task.predict(np.nan_to_num(logits))
    if task.kind == REGRESSION:
        return np.asarray(np.abs(one - other) <= NEAR * one.std())
    return ~differ(task, one, other)


def wilson_interval(n_hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, which holds for shares near 1 as well (Wilson 1927, without continuity correction)."""
    share, z2 = n_hits / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * np.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # For a share of 0 or 1 the near bound is the share itself, which rounding would miss.
    return float(min(centre - half, share)), float(max(centre + half, share))


def root_mean_square(references: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """The error of all tasks' logits; infinite where one is no number."""
    squares = [np.square(one - other).mean() for one, other in zip(references, found, strict=True)]
    error = float(np.sqrt(np.mean(squares)))
    return error if np.isfinite(error) else float("inf")
