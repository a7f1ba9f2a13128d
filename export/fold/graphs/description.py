"""What an exporter is told of a folded model: its inputs, and the one batch that is traced."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from export.bundle.folder import TASK_IDS
from export.fold.fold import FoldedModel
from export.fold.graphs import files
from export.fold.rewrites.many_tasks import MultiTaskClassifier

if TYPE_CHECKING:
    import torch

OPSET = 18
TRACED_SHAPE = {"batch_size": 2, "sequence_length": 16}
"""The one shape that is traced; parity is measured on others."""
OUTPUTS = ("logits",)


@dataclass(frozen=True)
class Description:
    """A folded model as an exporter sees it."""

    module: Any
    """A `torch.nn.Module` that takes the inputs as keyword arguments and returns ``logits`` in a dictionary."""
    inputs: tuple[str, ...]

    @staticmethod
    def of(model: FoldedModel) -> "Description":
        """The inputs are those of the base model: token types where it tells them apart, and numbers of tasks."""
        names = ["input_ids", "attention_mask"]
        if model.base.takes_token_types:
            names.append("token_type_ids")
        if isinstance(model.module, MultiTaskClassifier):
            names.append(TASK_IDS)
        return Description(model.module, tuple(names))

    @property
    def is_large(self) -> bool:
        """Whether its numbers are too many for one ONNX file."""
        n_bytes: int = sum(tensor.nbytes for tensor in self.module.state_dict().values())
        return n_bytes >= files.LARGEST_FILE_BYTES

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """The axes of each input and output that have any length, by their names in the graph."""
        text = {0: "batch_size", 1: "sequence_length"}
        axes = {name: text if name != TASK_IDS else {0: "batch_size"} for name in self.inputs}
        return axes | {name: {0: "batch_size"} for name in OUTPUTS}

    def traced_batch(self) -> "dict[str, torch.Tensor]":
        """Token ids with padding on the right of one row; nothing of a graph may depend on them."""
        import torch

        shape = tuple(TRACED_SHAPE.values())
        batch = {name: torch.ones(shape, dtype=torch.long) for name in self.inputs}
        batch["input_ids"] = torch.arange(2 * shape[1]).view(shape) % self.module.config.get_text_config().vocab_size
        batch["attention_mask"][1, 3 * shape[1] // 4 :] = 0
        if TASK_IDS in batch:
            batch[TASK_IDS] = torch.zeros(shape[0], dtype=torch.long)
        if "token_type_ids" in batch:
            batch["token_type_ids"][:, : shape[1] // 2] = 0
        return batch
