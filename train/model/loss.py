"""The loss of a classifier, by kind of task: what transformers computes from ``config.problem_type``."""

from typing import TYPE_CHECKING

from train.config import CLASSIFICATION, MULTI_LABEL, REGRESSION

if TYPE_CHECKING:
    import torch

PROBLEM_TYPES = {
    CLASSIFICATION: "single_label_classification",
    REGRESSION: "regression",
    MULTI_LABEL: "multi_label_classification",
}
"""Kinds of task → as a model's configuration in transformers names them."""


def mean_loss(
    problem_type: str | None,
    logits: "torch.Tensor",
    labels: "torch.Tensor",
    weights: "torch.Tensor | None" = None,
) -> "torch.Tensor":
    """The mean over rows, in fp32, of logits, shape = (n_batch, n_labels), and labels.

    Labels are numbers or class indices, shape = (n_batch,), or 1 for each label that a row has, shape = (n_batch, n_labels).
    ``weights`` are those of the classes, shape = (n_labels,), and of nothing else.
    """
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

    logits = logits.float()
    if problem_type == PROBLEM_TYPES[REGRESSION]:
        return mse_loss(logits[:, 0], labels.float())
    if problem_type == PROBLEM_TYPES[MULTI_LABEL]:
        return binary_cross_entropy_with_logits(logits, labels.float())
    return cross_entropy(logits, labels, weight=weights)
