"""Intervals of metrics by the bootstrap."""

import numpy as np
import pytest
from scipy.stats import binomtest

from train.data.intervals import metric_intervals, rise_intervals
from train.data.tasks import MRPC, TASKS


def test_a_metric_has_the_interval_of_its_share() -> None:
    expected = np.random.default_rng(0).integers(0, 2, 400)
    predicted = np.where(np.arange(400) < 320, expected, 1 - expected)
    golden = binomtest(320, 400).proportion_ci(0.95, method="wilson")
    assert metric_intervals(MRPC, predicted, expected)["accuracy"] == pytest.approx((golden.low, golden.high), abs=0.01)
    low, high = metric_intervals(TASKS["stsb"], expected + 0.1 * predicted, expected * 1.0)["pearson"]
    assert 0.9 < low < high <= 1


def test_a_metric_s_change_has_a_paired_interval() -> None:
    generator = np.random.default_rng(0)
    expected = generator.integers(0, 2, 400)
    before = np.where(generator.random(400) < 0.8, expected, 1 - expected)
    assert rise_intervals(MRPC, before, before, expected) == {"accuracy": (0, 0), "f1": (0, 0)}
    # Four rows become wrong that were right: the standard error of their share is a half of a percent.
    after = before.copy()
    right = np.flatnonzero(before == expected)[:4]
    after[right] = 1 - after[right]
    low, high = rise_intervals(MRPC, before, after, expected)["accuracy"]
    assert low == pytest.approx(-0.01 - 1.96 * 0.005, abs=0.003)
    assert high == pytest.approx(-0.01 + 1.96 * 0.005, abs=0.003)
