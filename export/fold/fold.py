"""Step 2, fold: adapters and their base model → the module that is traced, with the prompts as constants."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from export.fold.rewrites.encoder import CpuEncoder
from export.fold.rewrites.gpu_encoder import GpuEncoder
from export.fold.rewrites.many_tasks import MultiTaskClassifier, is_rewritten, load_constants, take_constants
from train.adapter.peft import load_prompted_classifier
from train.adapter.record import Adapter
from train.model.find import DECODERS, ENCODERS, BaseModel
from train.model.prompted import KeyValuePrompt

CONSTANT_ROWS, CONSTANT_KEYS_VALUES = "constant prompt rows", "constant keys and values"
ENCODER_FOR_CPU, ENCODER_FOR_GPU = "encoder for CPUs", "encoder for GPUs"
REWRITES = (CONSTANT_ROWS, CONSTANT_KEYS_VALUES, ENCODER_FOR_CPU, ENCODER_FOR_GPU)
"""What a manifest names: `export.fold.rewrites.encoder` explains each, and export/README.md has the table."""


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
    rewrites: tuple[str, ...]
    """What was folded, by the names of `REWRITES`; empty if the prompt's embeddings are put before every text."""

    @property
    def is_known(self) -> bool:
        """Whether its type is one whose layers and attention were rewritten or tried for all its graphs."""
        return self.base.model_type in ENCODERS + DECODERS


def fold_adapters(adapters: Sequence[Adapter], base: BaseModel, *, for_gpu: bool = False) -> FoldedModel:
    """The module of one adapter, or one for several, on a CPU or for a GPU.

    Raises:
        UsageError: no graph of ours serves several adapters of this base model.
    """
    classifier = load_prompted_classifier(adapters[0], base, attention=_attention(base, for_gpu=for_gpu))
    module: Any = classifier
    if len(adapters) > 1:
        first, backbone, activation = take_constants(classifier, for_gpu=for_gpu)
        others = [load_constants(adapter, base) for adapter in adapters[1:]]
        module = MultiTaskClassifier(backbone, activation, [first, *others])
        names = module.names
    elif is_rewritten(classifier):
        module = (GpuEncoder if for_gpu else CpuEncoder)(classifier)
        names = module.prompt_names
    else:
        names = classifier.freeze_prompt()
    rewrites = [CONSTANT_KEYS_VALUES if isinstance(classifier, KeyValuePrompt) else CONSTANT_ROWS] if names else []
    if is_rewritten(classifier):
        rewrites.append(ENCODER_FOR_GPU if for_gpu else ENCODER_FOR_CPU)
    elif not isinstance(classifier, KeyValuePrompt):
        rewrites = []
    return FoldedModel(module.eval(), base, names, adapters[0].virtual_tokens, for_gpu, tuple(rewrites))


def _attention(base: BaseModel, *, for_gpu: bool) -> str | None:
    """The implementation of attention that is traced.

    All operators of a known encoder's attention are written in `export.fold.rewrites`. BLOOM's has no other form than
    eager. Other types keep transformers' own choice, which PEFT runs: the forms are not always equal, as Gemma 2 limits
    its scores in the eager one alone.
    """
    if base.model_type not in ENCODERS + DECODERS:
        return None
    return "sdpa" if for_gpu and base.is_decoder and base.model_type != "bloom" else "eager"
