"""The head of an adapter: how many labels it has, and whether anything of it would be left to chance."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train.common.console import quiet_transformers
from train.common.errors import AdapterError, ModelError, first_line
from train.foreign.source import Source
from train.model.classifier import load_with_random
from train.model.find import MALFORMED, BaseModel

if TYPE_CHECKING:
    import torch


def count_labels(base: BaseModel, head: "Mapping[str, torch.Tensor]") -> int:
    """The number of labels: the rows of the last layer that an adapter holds, else those of the base model's own head.

    ``head`` has the tensors by their names in the classifier.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    shapes: list[dict[str, tuple[int, ...]]] = []
    try:
        with quiet_transformers():
            settings: Any = AutoConfig.from_pretrained(**base.source)
            own = int(settings.num_labels)
            # The parameters whose shape follows the number of labels, whatever the class calls them.
            for number in (3, 5):
                settings.num_labels = number
                with torch.device("meta"):
                    model = AutoModelForSequenceClassification.from_config(settings, trust_remote_code=False)
                shapes.append({name: tuple(tensor.shape) for name, tensor in model.named_parameters()})
    except (*MALFORMED, RuntimeError, NotImplementedError) as cause:
        raise ModelError(f"Base model {base.name}: it cannot be made a classifier ({first_line(cause)}).") from cause
    first, second = shapes
    grown = [name for name, shape in first.items() if second[name] != shape]
    return next((len(head[name]) for name in grown if name in head), own)


def refuse_chance(source: Source, base: BaseModel, labels: Sequence[str], head: "Mapping[str, torch.Tensor]") -> None:
    """Refuse an adapter without weights that the base model lacks too: transformers would fill them with random numbers.

    Raises:
        AdapterError: naming the weights that are missing, or those that have another shape than the base model's.
    """
    model, random = load_with_random(base, labels)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    missing = sorted(name for name in random if name in shapes and name not in head)
    if missing:
        modules = sorted({name.partition(".")[0] for name in missing})
        raise AdapterError(
            f"{source.weights} holds no {', '.join(missing)[:200]}, and {base.name} has none either: PEFT would answer with "
            f"random numbers there. Save the adapter with modules_to_save={modules}, or give the --base-model that has it."
        )
    embeddings: Any = model.get_input_embeddings().weight
    for name, tensor in head.items():
        if name not in shapes:
            continue
        n_more = len(tensor) - len(embeddings)
        if model.get_parameter(name) is embeddings and tensor.shape[1:] == embeddings.shape[1:] and n_more > 0:
            raise AdapterError(
                f"{source.weights} holds {name} with {n_more} tokens more than {base.name} has: the base model was resized "
                "before the adapter was trained, and its new size is not in the adapter. Write the resized one with "
                f"model.resize_token_embeddings({len(tensor)}) and model.save_pretrained, and give its folder with --base-model."
            )
        if tuple(tensor.shape) != shapes[name]:
            raise AdapterError(
                f"{source.weights} holds {name} of shape {tuple(tensor.shape)}, which in {base.name} has {shapes[name]}. "
                "Give the right base model with --base-model."
            )
