"""Ten texts through PEFT on the source itself and through the imported adapter: the logits have to be the same."""

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from train.adapter.peft import load_peft_model, load_prompted_classifier
from train.adapter.record import FILES, Adapter
from train.common.errors import AdapterError, ParityError, first_line
from train.foreign.source import Source
from train.foreign.tensors import todays_names
from train.model.find import MALFORMED, BaseModel
from train.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

N_TEXTS = 10
TOLERANCE = 1e-5
"""Largest difference of a logit; relative to the largest logit where that is above 1."""
_LONGEST_WORDS = 40


@contextmanager
def reference_model(
    source: Source, tensors: "Mapping[str, torch.Tensor]", base: BaseModel, labels: tuple[str, ...], *, is_renamed: bool
) -> "Iterator[Any]":
    """PEFT's model on the source itself, or on a copy with today's names where PEFT no longer reads those in the file.

    Raises an AdapterError where it does not fit, or for tensors that are missing or have no place.
    """
    from peft.utils import get_peft_model_state_dict

    with TemporaryDirectory() as copied:
        folder = source.folder
        # A task of `MULTITASK_PROMPT_TUNING` may start from a file; the weights are then read from the adapter.
        if is_renamed or source.config.get("prompt_tuning_init_state_dict_path"):
            folder = Path(copied)
            start = {"prompt_tuning_init": "RANDOM"} if "prompt_tuning_init" in source.config else {}
            write_peft_files(folder, tensors, source.config | start)
        model: Any = load_peft_model(folder, base, labels)
        expected = todays_names(source, get_peft_model_state_dict(model, save_embedding_layers=False))
        missing = sorted(expected.keys() - tensors.keys())
        if missing:
            raise AdapterError(
                f"{source.weights} lacks {len(missing)} of {len(expected)} tensors, such as {missing[0]:.100}. Take an "
                "unbroken copy, or give the right base model with --base-model."
            )
        known = expected.keys() | model.state_dict().keys()
        spare = sorted(name for name in tensors if name not in known)
        if spare:
            raise AdapterError(
                f"{source.weights} holds {spare[0]:.100}, which {base.name} has no place for. Give the right base model "
                "with --base-model."
            )
        yield model


def write_peft_files(folder: Path, tensors: "Mapping[str, torch.Tensor]", config: Mapping[str, Any]) -> None:
    """Write PEFT's own two files."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILES.weights, {"format": "pt"})
    (folder / FILES.config).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def accepted_inputs(model: Any) -> set[str]:
    """Names of what a tokenizer gives and the classifier takes: GPT-2's tokenizers may give token types, Llama takes none."""
    return set(inspect.signature(model.get_base_model().forward).parameters)


def largest_difference(
    reference: Any, tokenizer: "PreTrainedTokenizerFast", adapter: Adapter, base: BaseModel, task_id: int | None
) -> float:
    """The largest difference of a logit between PEFT's model with its tokenizer and an adapter folder, text by text.

    Where it is above `TOLERANCE` in fp32, both models compute again in fp64: what remains there is no rounding.

    Raises:
        AdapterError: PEFT itself cannot run the source.
        ParityError: the difference is above `TOLERANCE`, or a logit is no number.
    """
    for is_double in (False, True):
        expected, found = _both_logits(reference, tokenizer, adapter, base, task_id, is_double=is_double)
        difference = float(np.abs(expected - found).max())
        if difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
            return difference
    raise ParityError(
        f"The imported adapter differs from PEFT by {difference:.3g} in a logit of {N_TEXTS} texts; {TOLERANCE:g} is "
        f"allowed. Nothing was written. Please report the base model ({base.name}), the peft_type and the versions."
    )


def _both_logits(
    reference: Any,
    tokenizer: "PreTrainedTokenizerFast",
    adapter: Adapter,
    base: BaseModel,
    task_id: int | None,
    *,
    is_double: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's logits and the adapter folder's, each of shape = (n_texts, n_labels); an AdapterError where PEFT has none."""
    import torch

    ours = load_prompted_classifier(adapter, base, is_double=is_double)
    if is_double:
        reference.double()
    own_tokenizer = load_tokenizer(adapter.folder, adapter.max_length)
    extra = {} if task_id is None else {"task_ids": torch.tensor([task_id])}
    expected, found = [], []
    with torch.inference_mode():
        for sentences in _random_texts(tokenizer, is_pair=adapter.task.is_pair):
            try:
                batch = tokenizer(*sentences, truncation="longest_first", return_tensors="pt")
                expected.append(reference(**batch, **extra).logits[0].double().numpy())
            except (*MALFORMED, RuntimeError) as cause:
                raise AdapterError(
                    f"PEFT itself cannot run {adapter.method} with {base.name} ({first_line(cause)}). Give the right base "
                    "model with --base-model."
                ) from cause
            batch = own_tokenizer(*sentences, truncation="longest_first", return_tensors="pt")
            found.append(ours(**batch)["logits"][0].double().numpy())
    return np.array(expected), np.array(found)


def _random_texts(tokenizer: "PreTrainedTokenizerFast", *, is_pair: bool) -> Iterator[tuple[str, ...]]:
    """Texts of words of the tokenizer's own vocabulary, from short to long."""
    generator = np.random.default_rng(0)
    for number in range(N_TEXTS):
        sentences = []
        for _ in range(1 + is_pair):
            n_words = 2 + number * (_LONGEST_WORDS - 2) // (N_TEXTS - 1)
            ids = generator.integers(0, len(tokenizer), n_words).tolist()
            sentences.append(tokenizer.decode(ids, skip_special_tokens=True).strip() or "a")
        yield tuple(sentences)
