"""Is the graph the model? Its logits against `PeftModel.forward`, over shapes that were not traced.

Heavy: import it where it is used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel

from train.common.errors import ParityError

TOLERANCE_FP32 = 1e-4
"""Largest difference of a logit, absolute, that an fp32 graph may show."""


LONGEST = 1024
"""No longer text is compared: the scores of attention grow with the square of it, to gigabytes beyond."""


@dataclass(frozen=True)
class ParityRow:
    """One batch: its shape, how many of its tokens were padding, and the largest logit difference."""

    batch_size: int
    sequence_length: int
    padding_tokens: int
    max_logit_difference: float


@dataclass(frozen=True)
class ParityReport:
    """All batches, the tolerance, and the largest difference over all of them."""

    tolerance: float
    max_logit_difference: float
    rows: tuple[ParityRow, ...]


def measure_parity(
    peft_model: PeftModel,
    run_graph: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    *,
    inputs: tuple[str, ...],
    vocabulary_size: int,
    max_length: int,
    one_by_one: bool,
    tolerance: float = TOLERANCE_FP32,
    seed: int = 0,
) -> ParityReport:
    """Compare logits on random texts of several shapes, each batch padded on the right.

    Args:
        peft_model: the reference, in evaluation mode.
        run_graph: input arrays by name → logits, shape = (n_batch, n_labels).
        inputs: names of the graph's inputs.
        vocabulary_size: token ids are drawn below it.
        max_length: longest text in tokens; it is tried too, or `LONGEST` tokens of it.
        one_by_one: give the reference each text of a batch alone, without its padding. So a decoder wants it:
            PEFT takes the last row, which is padding where there is some.

    Raises:
        ParityError: the shapes differ, a logit is not finite, or one differs by more than the tolerance.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for batch_size, wanted_length in ((1, 1), (1, 7), (3, 5), (4, 33), (7, 61), (2, LONGEST)):
        length = min(wanted_length, max_length)
        batch = _random_batch(generator, (batch_size, length), vocabulary_size, inputs)
        expected = _pefts_logits(peft_model, batch, one_by_one=one_by_one)
        actual = run_graph(batch)
        where = f"at batch size {batch_size} and length {length}"
        if actual.shape != expected.shape:
            raise ParityError(
                f"The exported graph gives logits of shape {actual.shape} {where}, PyTorch {expected.shape}. "
                "Nothing was written."
            )
        difference = float(np.max(np.abs(actual - expected)))
        # "not <=", so that NaN fails too.
        if not difference <= tolerance:
            raise ParityError(
                f"The exported graph differs from PyTorch by {difference:.3g} in a logit {where}; "
                f"{tolerance:g} is allowed. Nothing was written. Please report the base model and the versions."
            )
        padding = int(batch["attention_mask"].size - batch["attention_mask"].sum())
        rows.append(ParityRow(batch_size, length, padding, difference))
    return ParityReport(tolerance, max(row.max_logit_difference for row in rows), tuple(rows))


def _pefts_logits(peft_model: PeftModel, batch: Mapping[str, np.ndarray], *, one_by_one: bool) -> np.ndarray:
    """The reference's logits, shape = (n_batch, n_labels)."""
    parts = [batch]
    if one_by_one:
        lengths = batch["attention_mask"].sum(axis=1)
        parts = [
            {name: array[row : row + 1, :length] for name, array in batch.items()} for row, length in enumerate(lengths)
        ]
    with torch.inference_mode():
        logits = [
            peft_model(**{name: torch.from_numpy(array) for name, array in part.items()}).logits for part in parts
        ]
        return torch.cat(logits).float().cpu().numpy()


def _random_batch(
    generator: np.random.Generator, shape: tuple[int, int], vocabulary_size: int, inputs: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Random ids; the first row fills the length, the others end somewhere before it.

    Padding holds random ids as well: what the mask hides must not matter.
    """
    batch_size, length = shape
    lengths = np.concatenate([[length], generator.integers(1, length + 1, batch_size - 1)])
    columns = np.arange(length)
    batch = {
        "input_ids": generator.integers(0, vocabulary_size, shape),
        "attention_mask": (columns < lengths[:, None]).astype(np.int64),
        "token_type_ids": np.broadcast_to(columns >= length // 2, shape).astype(np.int64),
    }
    return {name: batch[name] for name in inputs}
