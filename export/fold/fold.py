"""Step 2, fold: adapters and their base model → the module that is traced, with the prompts as constants."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from export.fold.rewrites.encoder import CpuEncoder
from export.fold.rewrites.gpu_encoder import GpuEncoder
from export.fold.rewrites.many_tasks import MultiTaskClassifier, load_constants, take_constants
from train.adapter.peft import load_prompted_classifier
from train.adapter.record import Adapter
from train.common.errors import UsageError
from train.model.find import BaseModel
from train.model.prompted import has_absolute_positions


@dataclass(frozen=True)
class FoldedModel:
    """A module in evaluation mode whose prompts are constants."""

    module: Any
    """A `torch.nn.Module` with the base model's configuration in ``config``."""
    base: BaseModel
    prompt_names: tuple[str, ...]
    """Names of the buffers that hold the prompts."""
    virtual_tokens: int
    for_gpu: bool
    """Whether the graph gets the operators that a GPU wants."""


def fold_adapters(adapters: Sequence[Adapter], base: BaseModel, *, for_gpu: bool = False) -> FoldedModel:
    """The module of one adapter, or one for several, on a CPU or for a GPU.

    Raises:
        UsageError: no graph of ours serves several adapters of this base model.
    """
    # All operators of an encoder's attention are written in `export.fold.rewrites`. BLOOM's has no other form than eager.
    attention = "sdpa" if for_gpu and base.is_decoder and base.model_type != "bloom" else "eager"
    classifier = load_prompted_classifier(adapters[0], base, attention=attention)
    settings = classifier.config
    is_rewritten = not base.is_decoder and has_absolute_positions(settings)
    module: Any = classifier
    if len(adapters) > 1:
        if not (is_rewritten or base.is_decoder):
            raise UsageError(
                f"{base.name} has relative positions ({settings.position_embedding_type}), and no graph of ours "
                "serves several of its adapters. Export each alone."
            )
        first, backbone, activation = take_constants(classifier, is_decoder=base.is_decoder, for_gpu=for_gpu)
        others = [load_constants(adapter, base) for adapter in adapters[1:]]
        module = MultiTaskClassifier(backbone, activation, [first, *others])
        names = module.names
    elif is_rewritten:
        module = (GpuEncoder if for_gpu else CpuEncoder)(classifier)
        names = module.prompt_names
    else:
        names = classifier.freeze_prompt()
    return FoldedModel(module.eval(), base, names, adapters[0].virtual_tokens, for_gpu)
