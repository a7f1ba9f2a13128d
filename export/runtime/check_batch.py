"""Checks arrays before a graph runs on them: token ids of the model, in rows padded on the right."""

from collections.abc import Mapping

import numpy as np

from export.bundle.folder import TASK_IDS, Bundle
from train.common.errors import TextError

_REMEDY = "Make it with the bundle's own tokenizer."


def check_batch(bundle: Bundle, arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse what the graph would answer with a crash, or with the wrong row of a table.

    Raises:
        TextError: the arrays are no batch of texts that the bundle's model can read.
    """
    names = bundle.text_inputs
    missing = [name for name in names if name not in arrays]
    if missing:
        raise TextError(f"The batch lacks {', '.join(missing)}. {_REMEDY}")
    for name in {*names, *({TASK_IDS} & set(arrays))}:
        if arrays[name].dtype != np.int64:
            raise TextError(f"{name} holds {arrays[name].dtype}, not int64. {_REMEDY}")
    ids = arrays["input_ids"]
    if ids.ndim != 2 or not ids.size:
        raise TextError(f"input_ids of shape {ids.shape} hold no text. Give at least one text of one token.")
    if ids.shape[1] > bundle.max_length:
        raise TextError(
            f"input_ids hold texts of {ids.shape[1]} tokens; this model reads {bundle.max_length}. Cut them."
        )
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest >= bundle.vocabulary_size:
        wrong = smallest if smallest < 0 else largest
        raise TextError(f"input_ids hold {wrong}, outside the vocabulary of {bundle.vocabulary_size} tokens. {_REMEDY}")
    for name in names:
        if arrays[name].shape != ids.shape:
            raise TextError(f"{name} has shape {arrays[name].shape}, input_ids {ids.shape}. Give both alike.")
        # A mask of 2 shifts the scores, and a type of -1 is the last row of its table: neither would be an error.
        if name != "input_ids" and (arrays[name].min() < 0 or arrays[name].max() > 1):
            raise TextError(f"{name} holds other numbers than 0 and 1. {_REMEDY}")
    # Positions, a decoder's last token and a GPU's attention are found by each text's length.
    if (np.diff(arrays["attention_mask"], axis=1) > 0).any():
        raise TextError("attention_mask has a 1 behind a 0. Pad texts on the right.")
    if TASK_IDS in arrays:
        _check_task_ids(bundle, arrays[TASK_IDS], len(ids))


def _check_task_ids(bundle: Bundle, task_ids: np.ndarray, n_batch: int) -> None:
    n_tasks = len(bundle.tasks)
    if not bundle.has_many_tasks:
        raise TextError(f"{bundle.folder} holds one task and takes no {TASK_IDS}. Leave them out.")
    if task_ids.shape != (n_batch,):
        raise TextError(f"{TASK_IDS} has shape {task_ids.shape}. Give one number for each of {n_batch} texts.")
    if task_ids.min() < 0 or task_ids.max() >= n_tasks:
        raise TextError(f"{TASK_IDS} must be from 0 to {n_tasks - 1}: the bundle holds {n_tasks} tasks.")
