"""The chart of a training run."""

from pathlib import Path

from train.config import CLASSIFICATION, MULTI_LABEL, REGRESSION
from train.data.tasks import METRICS, Scores, Task
from train.fit.checkpoint import EpochScores

_LOSS_NAMES = {CLASSIFICATION: "cross entropy", REGRESSION: "squared error", MULTI_LABEL: "binary cross entropy"}
_LOWEST_PERCENT = -100


def draw_curves(
    path: Path, task: Task, epochs: list[EpochScores], best_epoch: int, baselines: dict[str, Scores]
) -> None:
    """Draw loss and scores per epoch as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no window system is touched

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = [epoch.epoch for epoch in epochs]
    marker = "o" if len(epochs) < 30 else ""
    left.plot(numbers, [epoch.train_loss for epoch in epochs], marker=marker, label="training")
    left.plot(numbers, [epoch.validation_loss for epoch in epochs], marker=marker, label="validation")
    left.set(xlabel="epoch", ylabel=_LOSS_NAMES[task.kind], title="loss")
    for index, name in enumerate(epochs[0].scores):
        color = f"C{index}"
        values = [100 * epoch.scores[name] for epoch in epochs]
        right.plot(numbers, values, marker=marker, color=color, label=METRICS[name])
        best = max(scores.values[name] for scores in baselines.values())
        right.axhline(100 * best, color=color, linestyle=":", label=f"{METRICS[name]}, best baseline")
    right.set(xlabel="epoch", ylabel="percent", title="validation")
    if right.get_ylim()[0] < _LOWEST_PERCENT:  # R² has no lower bound, and one bad epoch would flatten all others
        right.set_ylim(bottom=_LOWEST_PERCENT)
    for axes in (left, right):
        axes.axvline(best_epoch, color="gray", linewidth=0.8, linestyle="--", label="kept")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
