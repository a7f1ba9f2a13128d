"""Many tasks in one graph: adapters of the same base model share its backbone.

An adapter adds only a few constants to the graph, stacked over the tasks: the prompt and the head. ``task_ids`` picks
those of each row, so a batch may mix tasks, and another adapter is another row of each constant: neither needs the
backbone to be traced again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from transformers.activations import get_activation

from export.fold.rewrites.encoder import CpuEncoder
from export.fold.rewrites.gpu_encoder import GpuEncoder
from train.adapter.peft import load_prompted_classifier
from train.adapter.record import Adapter
from train.common.errors import UsageError
from train.model.architecture import head_modules
from train.model.find import ENCODERS, BaseModel
from train.model.prompted import EmbeddingPrompt, KeyValuePrompt, PromptedClassifier, has_absolute_positions

NO_LABEL = float(np.finfo(np.float32).min)
"""The logit of a label that a task does not have, where another has more."""

Constants = Mapping[str, torch.Tensor]
"""Prompt and head of one adapter by the names of the initializers, without the axis of the tasks."""


def is_rewritten(classifier: PromptedClassifier) -> bool:
    """Whether `CpuEncoder` and `GpuEncoder` know every layer of a classifier."""
    return classifier.config.model_type in ENCODERS and has_absolute_positions(classifier.config)


def take_constants(classifier: PromptedClassifier, *, for_gpu: bool = False) -> tuple[Constants, Any, Any]:
    """Take a classifier in evaluation mode apart: its constants, and what is the same for all adapters of a base model.

    Returns:
        the constants; the rest of the model, a `CpuEncoder` where it is rewritten, else the classifier itself; and the
        head's activation after its first dense layer, None if there is only one layer

    Raises:
        UsageError: the head is of another form.
    """
    backbone: Any
    if is_rewritten(classifier):
        backbone = (GpuEncoder if for_gpu else CpuEncoder)(classifier).eval()
        names = backbone.prompt_names
    else:
        backbone, names = classifier, classifier.freeze_prompt()
    # An embedding prompt is a table; all other constants have an axis for the batch.
    embeds = isinstance(backbone, EmbeddingPrompt)
    tensors = {name: getattr(backbone, name) if embeds else getattr(backbone, name)[0] for name in names}
    dense, activation, out = _head(classifier.model)
    if dense is not None:
        tensors |= {"head_dense_weight": dense.weight.detach().T.contiguous(), "head_dense_bias": dense.bias.detach()}
    tensors["head_out_weight"] = out.weight.detach().T.contiguous()
    n_labels = out.out_features
    tensors["head_out_bias"] = out.weight.new_zeros(n_labels) if out.bias is None else out.bias.detach()
    return tensors, backbone, activation


def load_constants(adapter: Adapter, base: BaseModel) -> Constants:
    """The constants of an adapter."""
    classifier = load_prompted_classifier(adapter, base, attention="eager")
    return take_constants(classifier)[0]


def _head(model: Any) -> tuple[torch.nn.Linear | None, Any, torch.nn.Linear]:
    """A classifier's head: its first dense layer, the activation after it, and the layer that gives the logits.

    The first layer reads row 0, a decoder's only layer the last row. What is taken for one and is not gives other logits,
    which the comparison with PEFT finds.
    """
    if hasattr(model, "score"):  # decoders
        return None, None, model.score
    if hasattr(model, "pre_classifier"):  # DistilBERT
        return model.pre_classifier, torch.relu, model.classifier
    if hasattr(model.classifier, "out_proj"):  # ELECTRA has a gelu, the others a tanh
        is_electra = model.config.model_type == "electra"
        return model.classifier.dense, get_activation("gelu") if is_electra else torch.tanh, model.classifier.out_proj
    if hasattr(model, "pooler"):  # DeBERTa's stands beside the backbone
        dense, activation = model.pooler.dense, get_activation(model.config.pooler_hidden_act)
    else:
        pooler = getattr(model.base_model, "pooler", None)
        dense, activation = getattr(pooler, "dense", pooler), torch.tanh  # ALBERT's is the layer itself
    if not (isinstance(dense, torch.nn.Linear) and isinstance(model.classifier, torch.nn.Linear)):
        raise UsageError(
            f"The head of a model of type {model.config.model_type!r} ({', '.join(head_modules(model))}) is not one or two "
            "dense layers on one row, and no graph of ours serves several of its adapters. Export each alone."
        )
    return dense, activation, model.classifier


class MultiTaskClassifier(torch.nn.Module):
    """A backbone with the constants of many tasks, whose names are ``names``."""

    def __init__(self, backbone: Any, activation: Any, tasks: Sequence[Constants]) -> None:
        """Stack the constants of adapters of one base model, with one method and one number of virtual tokens."""
        super().__init__()
        self.backbone = backbone
        self.config = backbone.config
        self._activation = activation
        self.names = tuple(tasks[0])
        self._prompt_names = tuple(name for name in self.names if not name.startswith("head_"))
        for name in self._prompt_names:
            # Without the backbone's own copy of the first task's.
            delattr(self.backbone, name)
        for name, tensor in stack_constants(tasks).items():
            self.register_buffer(name, tensor)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        task_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Classify each text of a batch by its own task, whose number is in ``task_ids``, shape = (n_batch,)

        Returns:
            ``logits``, shape = (n_batch, largest number of labels of a task); `NO_LABEL` where a task has fewer
        """
        assert task_ids is not None
        own = {name: getattr(self, name).index_select(0, task_ids) for name in self.names}
        prompt = {name: own[name] for name in self._prompt_names}
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if isinstance(self.backbone, EmbeddingPrompt):
            row = self.backbone.row(inputs, prompt["prompt_embeddings"])
        elif isinstance(self.backbone, KeyValuePrompt):
            layers = range(len(prompt) // 2)
            row = self.backbone.row(
                inputs, [(prompt[f"prompt_key_{layer}"], prompt[f"prompt_value_{layer}"]) for layer in layers]
            )
        else:
            row = self.backbone.pooled(input_ids, attention_mask, token_type_ids, prompt)
        if self._activation is not None:
            row = self._activation(_dense(row, own["head_dense_weight"], own["head_dense_bias"]))
        return {"logits": _dense(row, own["head_out_weight"], own["head_out_bias"])}


def _dense(rows: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """A dense layer with weights of its own for each row; shapes = (n_batch, n_in), (n_batch, n_in, n_out), (n_batch, n_out)"""
    return (rows[:, None] @ weights)[:, 0] + biases


def stack_constants(tasks: Sequence[Constants]) -> dict[str, torch.Tensor]:
    """The constants of each task → constants with the axis of the tasks in front; missing labels get `NO_LABEL`."""
    n_labels = max(len(task["head_out_bias"]) for task in tasks)

    def widened(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not name.startswith("head_out"):
            return tensor
        missing = (0, n_labels - tensor.shape[-1])
        return torch.nn.functional.pad(tensor, missing, value=NO_LABEL if name == "head_out_bias" else 0.0)

    return {name: torch.stack([widened(name, task[name]) for task in tasks]).contiguous() for name in tasks[0]}


def append_tasks(paths: Sequence[Path], adapters: Sequence[Adapter], base: BaseModel) -> None:
    """Add adapters to graphs for many tasks, whatever the precision of their dense layers; the files are written anew."""
    constants = [load_constants(adapter, base) for adapter in adapters]
    for path in paths:
        model = onnx.load(path, load_external_data=False)
        stored = {item.name: item for item in model.graph.initializer if item.name in constants[0]}
        arrays = {name: numpy_helper.to_array(item, str(path.parent)) for name, item in stored.items()}
        tables = {name: torch.from_numpy(array.copy()).float() for name, array in arrays.items()}
        n_tasks = len(tables["head_out_bias"])
        present = [{name: table[task] for name, table in tables.items()} for task in range(n_tasks)]
        stacked = stack_constants([*present, *constants])
        for name, item in stored.items():
            kind = arrays[name].dtype
            # `NO_LABEL` is too low for fp16.
            array = np.clip(stacked[name].numpy(), np.finfo(kind).min, np.finfo(kind).max).astype(kind)
            item.CopyFrom(numpy_helper.from_array(array, name))
        # The inferred shapes are those of the old number of labels.
        del model.graph.value_info[:]
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = stacked["head_out_bias"].shape[1]
        onnx.save(model, path)
