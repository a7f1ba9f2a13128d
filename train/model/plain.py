"""A classifier without a prompt: base model and adapter merged into one set of weights."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from train.model.find import BaseModel
from train.model.prompted import EmbeddingPrompt


class PlainClassifier(EmbeddingPrompt):
    """A transformer with a head and a prompt of no rows: what LoRA leaves once it is merged."""

    def __init__(self, model: PreTrainedModel, base: BaseModel) -> None:
        super().__init__(model, torch.zeros(0, base.hidden_size), is_decoder=base.is_decoder)

    def _with_prompt(self, inputs: Mapping[str, torch.Tensor], _: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(inputs)

    def freeze_prompt(self) -> tuple[str, ...]:
        """See `PromptedClassifier`; there is none."""
        return ()
