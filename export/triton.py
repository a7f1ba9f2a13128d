"""``python -m export.triton BUNDLE --out REPOSITORY``: a bundle as a model of NVIDIA's Triton Inference Server.

REPOSITORY/NAME/    config.pbtxt            inputs, outputs, dynamic batching, warm-up
                    1/model.onnx            one graph of the bundle
                    labels.txt              a label a line, in the order of the logits; Triton's classification reads it
                    tasks.json              instead of it, where the bundle holds several tasks
                    tokenizer.json …        for clients: Triton takes token ids
                    warmup/attention_mask   ones

Triton starts with ``tritonserver --model-repository REPOSITORY``. Fields: triton-inference-server/common,
protobuf/model_config.proto.
"""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from export.bundle.folder import FILES, FP16, INT8, Bundle, load_bundle
from export.bundle.graph_outline import check_graph
from export.runtime.classifier import best_precision
from train.common.atomic_folder import check_target, new_folder
from train.common.console import Parser, run_main, say
from train.common.errors import BundleError, UsageError
from train.common.folder_record import FolderKind


@dataclass(frozen=True)
class TritonFiles:
    """Names inside a model's folder."""

    config: str = "config.pbtxt"
    model: str = "1/model.onnx"
    labels: str = "labels.txt"
    tasks: str = "tasks.json"
    ones: str = "warmup/attention_mask"


TRITON_FILES = TritonFiles()

TRITON_MODEL = FolderKind(
    name="Triton model",
    record=TRITON_FILES.config,
    needed=(TRITON_FILES.model,),
    format_version=1,
    error=BundleError,
    command="python -m export.triton BUNDLE --out",
    remedy="Write it again: python -m export.triton BUNDLE --out REPOSITORY",
)

MAX_BATCH_SIZE = 32

PREFERRED_BATCH_SIZES = (8, 16, 32)

MAX_QUEUE_DELAY_MICROSECONDS = 1000

WARM_UP_TOKENS = 64

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def write_triton_repository(
    bundle: Bundle, out: Path, *, name: str | None = None, precision: str | None = None, overwrite: bool = False
) -> Path:
    """Write a bundle as a model of a Triton repository, beside the models that are there.

    Args:
        bundle: as from `load_bundle`.
        out: the repository; the model's folder in it appears whole or not at all.
        name: of the model; by default the bundle folder's.
        precision: which graph; by default fp16 where the bundle holds it, as it is made where there is a GPU, else
            int8, else fp32.
        overwrite: whether an older model of that name may be replaced.

    Returns:
        the model's folder

    Raises:
        UsageError: the name or the place cannot be used.
        BundleError: the bundle has no such graph, or the graph holds what none of ours does.
    """
    name = bundle.folder.resolve().name if name is None else name
    target = check_model_place(out, name, overwrite=overwrite)
    precision = precision or best_precision(bundle, on_cuda=FP16 in bundle.precisions)
    graph = bundle.graph_path(precision)
    check_graph(graph)
    with new_folder(target) as folder:
        (folder / TRITON_FILES.config).write_text(_config(bundle, graph, name, precision), encoding="utf-8")
        for file in (TRITON_FILES.model, TRITON_FILES.ones):
            (folder / file).parent.mkdir()
        shutil.copyfile(graph, folder / TRITON_FILES.model)
        np.ones(_warm_up_tokens(bundle), dtype="<i8").tofile(folder / TRITON_FILES.ones)
        _write_labels(bundle, folder)
        for path in bundle.folder.iterdir():
            # What is no graph and speaks of no other folder's files, as the manifest does, is the tokenizer's.
            if path.is_file() and path.suffix != ".onnx" and path.name != FILES.manifest:
                shutil.copyfile(path, folder / path.name)
    return target


def check_model_place(out: Path, name: str, *, overwrite: bool) -> Path:
    """Refuse a model's name or place before any work is done.

    Returns:
        the model's folder in the repository ``out``

    Raises:
        UsageError: the name or the place cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--name {name}: Triton's model names stand in URLs. Take letters, digits, '.', '_' and '-' only."
        )
    target = out / name
    check_target(target, TRITON_MODEL, overwrite=overwrite)
    return target


def _write_labels(bundle: Bundle, folder: Path) -> None:
    if bundle.has_many_tasks:
        # A label file belongs to an output, and what a logit means depends on the row's task.
        tasks = [{"task_id": task.number, "name": task.name, "labels": task.task.labels} for task in bundle.tasks]
        (folder / TRITON_FILES.tasks).write_text(
            json.dumps(tasks, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return
    # A label that has line breaks would be several.
    lines = [" ".join(label.split()) for label in bundle.find_task().task.labels]
    (folder / TRITON_FILES.labels).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _warm_up_tokens(bundle: Bundle) -> int:
    return min(WARM_UP_TOKENS, bundle.max_length)


def _config(bundle: Bundle, graph: Path, name: str, precision: str) -> str:
    """The text of config.pbtxt."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    inputs = [_Tensor.of(item) for item in model.graph.input]
    (logits,) = [_Tensor.of(item) for item in model.graph.output]
    # The fused graph does not say how many there are.
    logits = replace(logits, dims=(max(len(task.task.labels) for task in bundle.tasks),))
    label_file = "" if bundle.has_many_tasks else f'\n    label_filename: "{TRITON_FILES.labels}"'
    tensors = ",\n".join(f"  {{\n    {tensor.text}\n  }}" for tensor in inputs)
    return f"""# The {precision} graph of a bundle by promptfold. It reads texts of up to {bundle.max_length} tokens; cut longer ones.
name: "{name}"
backend: "onnxruntime"
max_batch_size: {MAX_BATCH_SIZE}
input [
{tensors}
]
output [
  {{
    {logits.text}{label_file}
  }}
]
# Only requests of the same shape share a batch. So clients had better pad to a few lengths, on the right and with an
# attention_mask of 0. {_padding(precision)}
dynamic_batching {{
  preferred_batch_size: {list(PREFERRED_BATCH_SIZES)}
  max_queue_delay_microseconds: {MAX_QUEUE_DELAY_MICROSECONDS}
}}
{_instance_group(precision)}# One text, and a full batch. Token 0 is in every vocabulary; random numbers would not be, and a mask of zeros would
# leave nothing to compute.
model_warmup [
{_warm_up("one text", 1, inputs, bundle)},
{_warm_up("full batch", MAX_BATCH_SIZE, inputs, bundle)}
]
"""


def _padding(precision: str) -> str:
    if precision == INT8:
        return "int8 scales the numbers of a whole batch alike, so that probabilities move a little with their batch."
    return "No prediction depends on its padding, or on what else is in its batch."


def _instance_group(precision: str) -> str:
    """Where the graph runs; of fp32 Triton's own choice, a GPU where there is one, is right."""
    if precision == INT8:
        return "# int8 is for CPUs: no GPU takes its matrix products.\ninstance_group [ { kind: KIND_CPU } ]\n"
    if precision == FP16:
        return "instance_group [ { kind: KIND_GPU } ]\n"
    return ""


def _warm_up(name: str, batch_size: int, inputs: "Sequence[_Tensor]", bundle: Bundle) -> str:
    lines = []
    for tensor in inputs:
        dims = [_warm_up_tokens(bundle) if size == -1 else size for size in tensor.dims]
        is_mask = tensor.name == "attention_mask"
        data = f'input_data_file: "{Path(TRITON_FILES.ones).name}"' if is_mask else "zero_data: true"
        lines.append(
            f'    inputs {{ key: "{tensor.name}" value {{ data_type: {tensor.data_type} dims: {dims} {data} }} }}'
        )
    return "\n".join(["  {", f'    name: "{name}"', f"    batch_size: {batch_size}", *lines, "  }"])


@dataclass(frozen=True)
class _Tensor:
    """An input or output as Triton describes it; ``dims`` leave the batch out, and -1 is any length."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    is_reshaped: bool

    @classmethod
    def of(cls, item: Any) -> "_Tensor":
        """From an ONNX graph's `ValueInfoProto`."""
        from onnx import TensorProto

        types = {TensorProto.INT64: "TYPE_INT64", TensorProto.FLOAT: "TYPE_FP32", TensorProto.FLOAT16: "TYPE_FP16"}
        kind = item.type.tensor_type
        dims = tuple(-1 if size.dim_param else size.dim_value for size in kind.shape.dim[1:])
        # One number a row: Triton knows no tensor without dims beside the batch's.
        return cls(item.name, types[kind.elem_type], dims or (1,), is_reshaped=not dims)

    @property
    def text(self) -> str:
        reshape = "\n    reshape { shape: [ ] }" if self.is_reshaped else ""
        return f'name: "{self.name}"\n    data_type: {self.data_type}\n    dims: {list(self.dims)}{reshape}'


def _command(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m export.triton",
        description="Lay a bundle out as a model of NVIDIA's Triton Inference Server.",
        epilog="example: python -m export.triton bundles/minilm-mrpc --out models",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that `python -m export` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="REPOSITORY", help="the model repository")
    parser.add_argument("--name", help="of the model (default: the bundle folder's)")
    parser.add_argument(
        "--precision", help="which of the bundle's graphs (default: fp16, int8 or fp32, as it has them)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an older model of that name")
    options = parser.parse_args(argv)
    folder = write_triton_repository(
        load_bundle(options.bundle),
        options.out,
        name=options.name,
        precision=options.precision,
        overwrite=options.overwrite,
    )
    say(f"{folder}: serve it with tritonserver --model-repository {options.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
