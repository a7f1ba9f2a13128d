"""95 % intervals of metrics, by the bootstrap: how far chance alone may move a score on so few rows.

Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, percentiles.
"""

from collections.abc import Callable, Mapping

import numpy as np

from train.config import CLASSIFICATION, REGRESSION
from train.data.tasks import Task, count_pairs, score, score_counts

RESAMPLES = 1000
"""Samples of the bootstrap; a fifth where `score` is called for each, which takes milliseconds."""
Interval = tuple[float, float]


def metric_intervals(task: Task, predicted: np.ndarray, expected: np.ndarray) -> dict[str, Interval]:
    """The interval of each metric, by its name, of predictions as from `Task.predict` and labels in the same form."""
    return _bootstrap(task, expected, lambda drawn: _metrics(task, predicted[drawn], expected[drawn]))


def rise_intervals(task: Task, before: np.ndarray, after: np.ndarray, expected: np.ndarray) -> dict[str, Interval]:
    """The interval of how much each metric rises from one prediction to another of the same rows, by its name.

    The bootstrap is paired: rows are drawn with both predictions.
    """

    def rises(drawn: np.ndarray) -> dict[str, float]:
        one, other = (_metrics(task, predicted[drawn], expected[drawn]) for predicted in (before, after))
        return {name: value - one[name] for name, value in other.items()}

    return _bootstrap(task, expected, rises)


def _metrics(task: Task, predicted: np.ndarray, expected: np.ndarray) -> Mapping[str, float]:
    if task.kind == CLASSIFICATION:
        return score_counts(task, count_pairs(task, expected, predicted)).values
    return score(task, predicted, expected).values


def _bootstrap(
    task: Task, expected: np.ndarray, measure: Callable[[np.ndarray], Mapping[str, float]]
) -> dict[str, Interval]:
    generator = np.random.default_rng(0)
    values: dict[str, list[float]] = {name: [] for name in task.metrics}
    for _ in range(RESAMPLES if task.kind == CLASSIFICATION else RESAMPLES // 5):
        drawn = generator.integers(0, len(expected), len(expected))
        if task.kind == REGRESSION and np.ptp(expected[drawn]) == 0:
            continue  # no correlation is defined
        for name, value in measure(drawn).items():
            values[name].append(value)
    bounds = {name: np.percentile(found or [0.0], [2.5, 97.5]) for name, found in values.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}
