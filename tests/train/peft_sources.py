"""Adapters made by transformers and PEFT alone, as other people have them, and the logits that PEFT gives for them."""

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

N_LABELS = 3
VIRTUAL_TOKENS = 5
TASKS = 3
TASK = 2
"""The task of `MULTITASK_PROMPT_TUNING` that is taken."""

_PROMPT = {"num_virtual_tokens": VIRTUAL_TOKENS}
PROMPT_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("PromptEncoderConfig", _PROMPT | {"encoder_hidden_size": 16}),
    "lstm": ("PromptEncoderConfig", _PROMPT | {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"}),
    "prefix": ("PrefixTuningConfig", _PROMPT),
    "projection": ("PrefixTuningConfig", _PROMPT | {"prefix_projection": True, "encoder_hidden_size": 16}),
    "prompt": ("PromptTuningConfig", _PROMPT),
    "multitask": ("MultitaskPromptTuningConfig", _PROMPT | {"num_tasks": TASKS, "num_ranks": 2}),
}
"""PEFT's class of settings, and the settings, by a short name."""
MERGED_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # From 0.7 to 0.10 PEFT loses the biases that it trained: such an adapter is refused.
    "lora": ("LoraConfig", {"r": 4, "bias": "none" if version("peft") in {"0.6.2", "0.10.0"} else "lora_only"}),
    "ia3": ("IA3Config", {}),
    **{
        name: (f"{name_of_class}Config", {"target_modules": ["query", "value"]} | settings)
        for name, name_of_class, settings in (
            ("adalora", "AdaLora", {"total_step": 10}),
            ("loha", "LoHa", {"r": 4}),
            ("lokr", "LoKr", {"r": 4}),
            ("oft", "OFT", {"r": 0, "oft_block_size": 4}),
            ("boft", "BOFT", {"boft_block_size": 4}),
            ("hra", "HRA", {"r": 4}),
            ("fourierft", "FourierFT", {"n_frequency": 20}),
            ("ln_tuning", "LNTuning", {"target_modules": ["LayerNorm"]}),
            ("vera", "Vera", {}),
            ("vblora", "VBLoRA", {"vector_length": 8, "num_vectors": 16, "r": 2, "topk": 2}),
            ("randlora", "RandLora", {"r": 4}),
            ("miss", "Miss", {"r": 4}),
            ("c3a", "C3A", {"block_size": 8}),
            ("delora", "Delora", {"r": 4}),
            ("road", "Road", {"group_size": 8}),
        )
    },
}
"""The others are named for BERT's layers."""


def make_base_with_head(folder: Path, base: Path, n_labels: int, **settings: Any) -> Path:
    """A base model that is a classifier already, as those on the hub that were trained for a task of their own."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from train.common.console import quiet_transformers

    torch.manual_seed(4)
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=n_labels, **settings)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def list_mismatches_as(transformers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' loading info have the form that its version 4 or 5 gives it."""
    from transformers import AutoModelForSequenceClassification as Auto

    load = Auto.from_pretrained

    def changed(*words: Any, **named: Any) -> Any:
        loaded = load(*words, **named)
        if named.get("output_loading_info"):
            names = [entry if isinstance(entry, str) else entry[0] for entry in loaded[1]["mismatched_keys"]]
            loaded[1]["mismatched_keys"] = names if transformers == 4 else {(name, (1,), (2,)) for name in names}
        return loaded

    monkeypatch.setattr(Auto, "from_pretrained", changed)


def make_source(
    folder: Path,
    base: Path,
    kind: str,
    *,
    modules: list[str] | None = None,
    n_labels: int = N_LABELS,
    n_tokens: int | None = None,
    **changes: Any,
) -> Path:
    """Write what `PeftModel.save_pretrained` writes for an adapter with random weights.

    ``n_tokens`` is the size to which the vocabulary is changed before; ``changes`` are those of PEFT's settings.
    """
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification

    from train.common.console import quiet_transformers

    torch.manual_seed(3)
    with quiet_transformers():
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=n_labels, ignore_mismatched_sizes=True
        )
    if n_tokens is not None:
        model.resize_token_embeddings(n_tokens, mean_resizing=False)
    name, settings = (PROMPT_KINDS | MERGED_KINDS)[kind]
    # PEFT 0.3's prompts take no modules_to_save.
    extra = {} if modules is None else {"modules_to_save": modules}
    config = getattr(peft, name)(task_type="SEQ_CLS", **(extra | settings | changes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it corrects a setting for GPT-2's layers, and says so
        model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Fresh LoRA changes nothing.
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def golden_logits(source: Path, base: Path, sentences: tuple[str, ...], kind: str, **labels: int) -> np.ndarray:
    """What PEFT itself answers from a source, for one text without padding, shape = (n_labels,)"""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from train.common.console import quiet_transformers

    with quiet_transformers():
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=labels.get("n_labels", N_LABELS), ignore_mismatched_sizes=True
        )
    model = PeftModel.from_pretrained(model, source).eval()
    batch = AutoTokenizer.from_pretrained(base)(*sentences, return_tensors="pt")
    extra = {"task_ids": torch.tensor([TASK])} if kind == "multitask" else {}
    with torch.inference_mode():
        logits: np.ndarray = model(**batch, **extra).logits[0].numpy()
    return logits
