"""``python -m export.triton BUNDLE --out REPOSITORY``: a bundle as a model of NVIDIA's Triton Inference Server.

REPOSITORY/NAME/    config.pbtxt            inputs, outputs, dynamic batching, warm-up
                    1/model.onnx            one graph of the bundle
                    labels.txt              a label a line, in the order of the logits; Triton's classification reads it
                    tasks.json              instead of labels.txt, where the bundle holds several tasks
                    tokenizer.json …        for clients: Triton takes token ids
                    warmup/attention_mask   ones

Triton starts with ``tritonserver --model-repository REPOSITORY``. Fields: triton-inference-server/common,
protobuf/model_config.proto.
"""

import json
import re
import shutil
import sys
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from export.bundle.folder import FILES, FP16, INT8, Bundle, BundleTask, data_path, load_bundle
from export.bundle.graph_outline import check_graph
from export.runtime.classifier import best_precision
from train.common.atomic_folder import check_target, new_folder
from train.common.command_line import Command
from train.common.console import say
from train.common.errors import BundleError, UsageError
from train.common.folder_record import FolderKind

CONFIG, MODEL, LABELS, TASKS, ONES = "config.pbtxt", "1/model.onnx", "labels.txt", "tasks.json", "warmup/attention_mask"
"""Names of the files in a model's folder."""

TRITON_MODEL = FolderKind(
    name="Triton model",
    record=CONFIG,
    needed=(MODEL,),
    format_version=1,
    error=BundleError,
    command="python -m export.triton BUNDLE --out",
    remedy="Write it again: python -m export.triton BUNDLE --out REPOSITORY",
)

MAX_BATCH_SIZE = 32
WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class TritonConfig:
    """Lay a bundle out as a model of NVIDIA's Triton Inference Server."""

    bundle: Path
    """folder that `python -m export` wrote"""
    _: KW_ONLY
    out: Path
    """the model repository"""
    name: str | None = None
    """name of the model (default: the bundle folder's)"""
    precision: str | None = None
    """precision of the graph (default: fp16, int8 or fp32, the first that the bundle holds)"""
    overwrite: bool = False
    """replace an older model of that name"""


def write_triton_repository(config: TritonConfig) -> Path:
    """Write a bundle as a model of a Triton repository, beside the models that are there; the model's new folder.

    Raises:
        UsageError: the name or the place cannot be used.
        BundleError: the bundle has no such graph, or the graph holds operators that no graph of ours has.
    """
    bundle = load_bundle(config.bundle)
    name = bundle.folder.resolve().name if config.name is None else config.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(
            f"--name {name}: Triton's model names stand in URLs. Take letters, digits, '.', '_' and '-' only."
        )
    check_target(config.out / name, TRITON_MODEL, overwrite=config.overwrite)
    precision = config.precision or best_precision(bundle, on_cuda=FP16 in bundle.precisions)
    graph = bundle.graph_path(precision)
    check_graph(graph)
    with new_folder(config.out / name) as folder:
        (folder / CONFIG).write_text(_config_text(bundle, graph, name, precision), encoding="utf-8")
        for file in (MODEL, ONES):
            (folder / file).parent.mkdir()
        shutil.copyfile(graph, folder / MODEL)
        if data_path(graph).exists():
            # The graph names it, so its name stays.
            shutil.copyfile(data_path(graph), (folder / MODEL).with_name(data_path(graph).name))
        np.ones(_warm_up_tokens(bundle), dtype="<i8").tofile(folder / ONES)
        _write_labels(bundle, folder)
        for path in bundle.folder.iterdir():
            # The tokenizer's files: neither graphs nor the manifest, which has the hashes of the bundle's own files.
            if path.is_file() and path.suffix not in {".onnx", ".onnx_data"} and path.name != FILES.manifest:
                shutil.copyfile(path, folder / path.name)
    return config.out / name


def _kind_of(task: BundleTask) -> dict[str, object]:
    """What a client has to know to read logits that are no classification's."""
    return {
        name: value
        for name, value in task.task.as_json().items()
        if name in {"kind", "threshold"} and value is not None
    }


def _write_labels(bundle: Bundle, folder: Path) -> None:
    if bundle.has_many_tasks:
        # A label file belongs to an output, and what a logit means depends on the row's task.
        tasks = [
            {"task_id": task.number, "name": task.name, "labels": task.task.labels, **_kind_of(task)}
            for task in bundle.tasks
        ]
        (folder / TASKS).write_text(json.dumps(tasks, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    # A label with line breaks would be several.
    lines = [" ".join(label.split()) for label in bundle.find_task().task.labels]
    (folder / LABELS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@dataclass(frozen=True)
class _Tensor:
    """An input or output as Triton describes it."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    """Sizes beside the batch's; -1 is any length."""

    @classmethod
    def read(cls, item: Any) -> "_Tensor":
        """Read an ONNX graph's `ValueInfoProto`."""
        from onnx import TensorProto

        types = {TensorProto.INT64: "TYPE_INT64", TensorProto.FLOAT: "TYPE_FP32", TensorProto.FLOAT16: "TYPE_FP16"}
        kind = item.type.tensor_type
        dims = tuple(-1 if size.dim_param else size.dim_value for size in kind.shape.dim[1:])
        return cls(item.name, types[kind.elem_type], dims)

    @property
    def text(self) -> str:
        # Triton wants a size beside the batch's, also where a row has one number.
        reshape = "" if self.dims else " reshape { shape: [ ] }"
        return f'name: "{self.name}" data_type: {self.data_type} dims: {list(self.dims or (1,))}{reshape}'

    def warm_up(self, n_tokens: int) -> str:
        """The values of one row for a warm-up request."""
        dims = [n_tokens if size == -1 else size for size in self.dims or (1,)]
        data = f'input_data_file: "{Path(ONES).name}"' if self.name == "attention_mask" else "zero_data: true"
        return f'inputs {{ key: "{self.name}" value {{ data_type: {self.data_type} dims: {dims} {data} }} }}'


def _warm_up_tokens(bundle: Bundle) -> int:
    return min(WARM_UP_TOKENS, bundle.max_length)


def _config_text(bundle: Bundle, graph: Path, name: str, precision: str) -> str:
    """The text of config.pbtxt."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    inputs = [_Tensor.read(item) for item in model.graph.input]
    # A graph for several tasks does not tell how many logits it has.
    n_labels = max(len(task.task.labels) for task in bundle.tasks)
    logits = replace(_Tensor.read(model.graph.output[0]), dims=(n_labels,))
    label_file = "" if bundle.has_many_tasks else f' label_filename: "{LABELS}"'
    tensors = ",\n".join(f"  {{ {tensor.text} }}" for tensor in inputs)
    row = "\n    ".join(tensor.warm_up(_warm_up_tokens(bundle)) for tensor in inputs)
    warm_up = ",\n".join(
        f'  {{\n    name: "{size} at once"\n    batch_size: {size}\n    {row}\n  }}' for size in (1, MAX_BATCH_SIZE)
    )
    return f"""# The {precision} graph of a bundle by promptfold. It reads texts of up to {bundle.max_length} tokens; cut longer ones.
name: "{name}"
backend: "onnxruntime"
max_batch_size: {MAX_BATCH_SIZE}
input [
{tensors}
]
output [
  {{ {logits.text}{label_file} }}
]
# Only requests of the same shape share a batch, so clients should pad to a few lengths, on the right and with an
# attention_mask of 0. {_int8_words(bundle) if precision == INT8 else _EXACT_BATCH}
dynamic_batching {{
  preferred_batch_size: [8, 16, {MAX_BATCH_SIZE}]
  max_queue_delay_microseconds: 1000
}}
{_INSTANCE_GROUP.get(precision, "")}# One text, and a full batch. Token 0 is in every vocabulary; random numbers would not be, and a mask of zeros would
# leave nothing to compute.
model_warmup [
{warm_up}
]
"""


def _int8_words(bundle: Bundle) -> str:
    """What a graph in int8 needs that Triton cannot give it: comments of config.pbtxt, begun in a line of one."""
    form = next(graph.int8 for graph in bundle.graphs if graph.precision == INT8)
    words = _EXACT_BATCH if form is not None and form.activations == "static" else _INT8_BATCH
    return words if form is not None and form.weight_bits == 7 else f"{words}\n{_OVERFLOW}"


_EXACT_BATCH = "No prediction depends on its padding, or on what else is in its batch."
_INT8_BATCH = "int8 scales the numbers of a whole batch alike, so that probabilities move a little with their batch."
_OVERFLOW = """\
# On an x86 processor without VNNI, ONNX Runtime lets products of 8-bit weights overflow, and Triton has no parameter for
# session.x64quantprecision, which prevents it: serve another precision there, or export the bundle there."""
_INSTANCE_GROUP = {
    INT8: "# int8 is for CPUs: no GPU takes its matrix products.\ninstance_group [ { kind: KIND_CPU } ]\n",
    FP16: "instance_group [ { kind: KIND_GPU } ]\n",
}
"""Where a graph runs, by precision. For fp32 Triton's own choice is right: a GPU where there is one."""


def _run(config: TritonConfig) -> None:
    say(f"{write_triton_repository(config)}: serve it with tritonserver --model-repository {config.out}")


main = Command(
    TritonConfig,
    _run,
    "python -m export.triton",
    example="example: python -m export.triton bundles/minilm-mrpc --out models",
)

if __name__ == "__main__":
    sys.exit(main())
