"""One backbone, many tasks: adapters of the same base model as one graph, which is told of each row its task.

What an adapter adds to the graph are a few constants, stacked over the tasks: the prompt as the graph wants it, and the
head. A row of a batch takes its own by ``task_ids``, so a batch may mix tasks, and another adapter is another row of
each constant: neither needs the backbone to be traced again.

Heavy: import it where it is used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from transformers.activations import get_activation

from export.fold.encoder import FoldedEncoder
from export.fold.gpu_encoder import FusedEncoder
from train.model.prompted import KeyValuePrompt, PromptedClassifier

NO_LABEL = float(np.finfo(np.float32).min)
"""The logit of a label that a task does not have, where another has more."""


@dataclass(frozen=True)
class TaskConstants:
    """What one adapter adds to a shared graph.

    Attributes:
        backbone: what the constants belong to; it is the same for every adapter of a base model.
        tensors: the prompt's and the head's, by the names of the initializers, without the axis of the tasks.
        activation: of the head's first dense layer; None where it has only one.
    """

    backbone: FoldedEncoder | KeyValuePrompt
    tensors: dict[str, torch.Tensor]
    activation: Any


def task_constants(classifier: PromptedClassifier, *, is_decoder: bool, fused: bool = False) -> TaskConstants:
    """The constants of a classifier; its prompt becomes constant first.

    Args:
        classifier: in evaluation mode.
        is_decoder: whether the model is causal.
        fused: whether the backbone of an encoder is written for a GPU.
    """
    backbone: FoldedEncoder | KeyValuePrompt
    if is_decoder:
        assert isinstance(classifier, KeyValuePrompt)
        backbone, names = classifier, classifier.freeze_prompt()
    else:
        backbone = (FusedEncoder if fused else FoldedEncoder)(classifier).eval()
        names = backbone.prompt_names
    tensors = {name: getattr(backbone, name)[0] for name in names}
    dense, activation, out = _head(classifier.model)
    if dense is not None:
        tensors["head_dense_weight"] = dense.weight.detach().T.contiguous()
        tensors["head_dense_bias"] = dense.bias.detach()
    tensors["head_out_weight"] = out.weight.detach().T.contiguous()
    n_labels = out.out_features
    tensors["head_out_bias"] = out.weight.new_zeros(n_labels) if out.bias is None else out.bias.detach()
    return TaskConstants(backbone, tensors, activation)


def _head(model: Any) -> tuple[torch.nn.Linear | None, Any, torch.nn.Linear]:
    """A classifier's head: its first dense layer, the function after it, and the layer that gives the logits."""
    if hasattr(model, "score"):  # decoders
        return None, None, model.score
    if hasattr(model, "pre_classifier"):  # DistilBERT
        return model.pre_classifier, torch.relu, model.classifier
    if hasattr(model.classifier, "out_proj"):  # ELECTRA's has a gelu, the others' a tanh
        is_electra = model.config.model_type == "electra"
        return model.classifier.dense, get_activation("gelu") if is_electra else torch.tanh, model.classifier.out_proj
    return model.base_model.pooler.dense, torch.tanh, model.classifier


class SharedClassifier(torch.nn.Module):
    """A backbone with the constants of many tasks.

    Attributes:
        config: the base model's configuration.
        names: of the constants, in order.
    """

    def __init__(self, first: TaskConstants, others: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Stack the constants of adapters of one base model, with one method and one number of virtual tokens.

        Args:
            first: of task 0, with the backbone for all.
            others: `TaskConstants.tensors` of the further tasks.
        """
        super().__init__()
        self.backbone = first.backbone
        self.config = self.backbone.config
        self._activation = first.activation
        self.names = tuple(first.tensors)
        self._prompt_names = tuple(name for name in self.names if not name.startswith("head_"))
        for name in self._prompt_names:
            # The backbone's own would be a second copy of the first task's.
            delattr(self.backbone, name)
        for name, tensor in stack_constants([first.tensors, *others]).items():
            self.register_buffer(name, tensor)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        task_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Classify a batch, of each text by its own task.

        Args:
            input_ids, attention_mask, token_type_ids: see `PromptedClassifier.forward`
            task_ids: numbers of the tasks, shape = (n_batch,)

        Returns:
            ``logits``, shape = (n_batch, largest number of labels of a task); `NO_LABEL` where a task has fewer
        """
        if task_ids is None:
            raise TypeError("task_ids are needed")
        own = {name: getattr(self, name).index_select(0, task_ids) for name in self.names}
        prompt = {name: own[name] for name in self._prompt_names}
        if isinstance(self.backbone, FoldedEncoder):
            row = self.backbone.pooled(input_ids, attention_mask, token_type_ids, prompt)
        else:
            layers = range(len(prompt) // 2)
            row = self.backbone.pooled(
                {"input_ids": input_ids, "attention_mask": attention_mask},
                [(prompt[f"prompt_key_{layer}"], prompt[f"prompt_value_{layer}"]) for layer in layers],
            )
        if self._activation is not None:
            row = self._activation(_dense(row, own["head_dense_weight"], own["head_dense_bias"]))
        return {"logits": _dense(row, own["head_out_weight"], own["head_out_bias"])}


def _dense(rows: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """Each row by its own matrix; shapes = (n_batch, n_in), (n_batch, n_in, n_out), (n_batch, n_out)"""
    return (rows[:, None] @ weights)[:, 0] + biases


def stack_constants(tasks: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Constants of each task → constants with the axis of the tasks in front; missing labels get `NO_LABEL`."""
    n_labels = max(len(task["head_out_bias"]) for task in tasks)

    def widened(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not name.startswith("head_out"):
            return tensor
        missing = (0, n_labels - tensor.shape[-1])
        return torch.nn.functional.pad(tensor, missing, value=NO_LABEL if name == "head_out_bias" else 0.0)

    return {name: torch.stack([widened(name, task[name]) for task in tasks]).contiguous() for name in tasks[0]}


def append_task(path: Path, constants: Mapping[str, torch.Tensor]) -> None:
    """Add a task to a shared graph, in whatever precision its dense layers are.

    Args:
        path: the graph; it is written anew.
        constants: `TaskConstants.tensors` of the task.
    """
    model = onnx.load(path, load_external_data=False)
    stored = {item.name: item for item in model.graph.initializer if item.name in constants}
    tables = {name: torch.from_numpy(numpy_helper.to_array(item).copy()) for name, item in stored.items()}
    n_tasks = len(tables["head_out_bias"])
    present = [{name: table[task].float() for name, table in tables.items()} for task in range(n_tasks)]
    stacked = stack_constants([*present, constants])
    for name, item in stored.items():
        kind = numpy_helper.to_array(item).dtype
        # `NO_LABEL` is beyond what fp16 holds.
        array = np.clip(stacked[name].numpy(), np.finfo(kind).min, np.finfo(kind).max).astype(kind)
        item.CopyFrom(numpy_helper.from_array(array, name))
    # What was inferred of shapes holds for the old number of labels.
    del model.graph.value_info[:]
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = stacked["head_out_bias"].shape[1]
    onnx.save(model, path)
