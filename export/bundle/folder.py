"""The bundle folder: every file name once, save, load, check.

bundle/    model.onnx                     the graph in fp32, prompt and weights inside
           model_int8.onnx …              the same in other precisions, where they passed the gate
           config.json, tokenizer.json …  so that `ORTModelForSequenceClassification` and a pipeline load it
           manifest.json                  what it is, what was measured, SHA-256 of each file
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.common.errors import BundleError, UsageError
from train.common.folder_record import FolderKind, check_seal, read_record, reading, sha256_of_file, write_record
from train.common.limits import MAX_TOKENS, whole_number
from train.data.tasks import METRICS, Task


@dataclass(frozen=True)
class BundleFiles:
    """Names inside a bundle folder."""

    model: str = "model.onnx"
    model_int8: str = "model_int8.onnx"
    model_fp16: str = "model_fp16.onnx"
    config: str = "config.json"
    tokenizer: str = "tokenizer.json"
    manifest: str = "manifest.json"


FILES = BundleFiles()


TASK_IDS = "task_ids"
"""The input of a shared graph that names each row's task by its number."""


_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What a tokenizer makes."""


FP32, FP16, INT8 = "fp32", "fp16", "int8"


GRAPH_FILES = {FP32: FILES.model, FP16: FILES.model_fp16, INT8: FILES.model_int8}
"""By precision, the file that holds the graph."""


BUNDLE = FolderKind(
    name="bundle",
    record=FILES.manifest,
    needed=(FILES.model, FILES.tokenizer, FILES.config),
    format_version=4,
    error=BundleError,
    command="python -m export ADAPTER --out",
    remedy="Export it again: python -m export ADAPTER --out BUNDLE",
)


def text_inputs(inputs: Sequence[str]) -> tuple[str, ...]:
    """Of a graph's inputs those that a tokenizer makes."""
    return tuple(name for name in inputs if name != TASK_IDS)


@dataclass(frozen=True)
class Gate:
    """What a precision costs in quality, against fp32 on labelled rows.

    Attributes:
        file: what the rows came from.
        n_rows: how many.
        fp32: the task's metrics of the fp32 graph, by name.
        scores: those of this precision.
        label_flips: rows whose most probable label is another one.
        max_probability_difference: the largest one of any label of any row.
        tolerance: by how much each metric may fall.
        kept_fp32: layers that stay in fp32, as numbers from 0; empty where none had to.
        is_finite: whether every logit is a number. Of one that is none, argmax makes a label all the same.
    """

    file: str
    n_rows: int
    fp32: dict[str, float]
    scores: dict[str, float]
    label_flips: int
    max_probability_difference: float
    tolerance: float
    kept_fp32: tuple[int, ...] = ()
    is_finite: bool = True

    @property
    def passed(self) -> bool:
        """Whether every logit is a number and no metric falls by more than the tolerance."""
        # Rounded, as 0.005 has no exact form in binary.
        falls = (round(self.fp32[name] - value, 9) for name, value in self.scores.items())
        return self.is_finite and all(fall <= self.tolerance for fall in falls)

    def __str__(self) -> str:
        """For people: "accuracy 80.1 (fp32 80.4), F1 85.9 (fp32 86.0), 3 of 408 labels changed, layer 2 in fp32"."""
        parts = [
            f"{METRICS[name]} {100 * value:.1f} (fp32 {100 * self.fp32[name]:.1f})"
            for name, value in self.scores.items()
        ]
        parts.append(f"{self.label_flips} of {self.n_rows} labels changed")
        if not self.is_finite:
            parts.append("some logits are no numbers")
        if self.kept_fp32:
            layers = ", ".join(map(str, self.kept_fp32))
            parts.append(f"layer{'s' * (len(self.kept_fp32) > 1)} {layers} in fp32")
        return ", ".join(parts)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Gate":
        """From a manifest."""
        return cls(**{**record, "kept_fp32": tuple(record["kept_fp32"])})


@dataclass(frozen=True)
class GraphFile:
    """A graph of a bundle in one precision.

    Attributes:
        precision: one of the keys of `GRAPH_FILES`.
        file: its name.
        gates: one for each task; none for fp32, which is what others are held against, and none for a graph that was
            kept ungated.
    """

    precision: str
    file: str
    gates: tuple[Gate, ...]


@dataclass(frozen=True)
class BundleTask:
    """What one adapter brought into a bundle.

    Attributes:
        name: of the adapter's folder.
        number: of the task in a shared graph.
        adapter_sha256: `train.adapter.record.Adapter.sha256` of the adapter.
        task: what was learned.
        max_logit_difference: the largest one seen between the fp32 graph and `PeftModel.forward` at export.
    """

    name: str
    number: int
    adapter_sha256: str
    task: Task
    max_logit_difference: float


@dataclass(frozen=True)
class Bundle:
    """A bundle folder that was checked.

    Attributes:
        folder: where it lies.
        base_model: name of the base model.
        tasks: one for each adapter that is in it.
        method: "p-tuning" or "p-tuning-v2".
        virtual_tokens: length of the prompt inside the graph.
        max_length: longest text in tokens, beside the prompt.
        vocabulary_size: token ids are below it.
        pad_token_id: what fills the end of shorter texts in a batch.
        token_types: whether a pair's sentences were of two types in training, where the graph takes types at all.
        inputs: names of the graph's inputs, in order.
        graphs: one for each precision; fp32 first.
    """

    folder: Path
    base_model: str
    tasks: tuple[BundleTask, ...]
    method: str
    virtual_tokens: int
    max_length: int
    vocabulary_size: int
    pad_token_id: int
    token_types: bool
    inputs: tuple[str, ...]
    graphs: tuple[GraphFile, ...]

    @property
    def is_shared(self) -> bool:
        """Whether its graph is told the task of every row."""
        return TASK_IDS in self.inputs

    @property
    def text_inputs(self) -> tuple[str, ...]:
        """The inputs that a tokenizer makes."""
        return text_inputs(self.inputs)

    @property
    def manifest_sha256(self) -> str:
        """The SHA-256 of its manifest, which holds that of every other file: the name of exactly this model.

        Raises:
            BundleError: the manifest is gone.
        """
        try:
            return sha256_of_file(self.folder / FILES.manifest)
        except OSError as cause:
            raise BundleError(f"{self.folder} cannot be read any more ({cause.strerror or cause}).") from cause

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer."""
        return self.folder / FILES.tokenizer

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those in which there is a graph."""
        return tuple(graph.precision for graph in self.graphs)

    def find_task(self, name: str | None = None) -> BundleTask:
        """A task by its name, or the only one.

        Raises:
            UsageError: there is no such task, or there are several and none is named.
        """
        names = ", ".join(task.name for task in self.tasks)
        if name is None:
            if len(self.tasks) == 1:
                return self.tasks[0]
            raise UsageError(f"{self.folder} holds {len(self.tasks)} tasks ({names}). Name one of them with --task.")
        for task in self.tasks:
            if task.name == name:
                return task
        raise UsageError(f"--task {name}: {self.folder} holds no such task, only {names}.")

    def task_of(self, adapter_sha256: str) -> BundleTask | None:
        """The task that an adapter brought, by `train.adapter.record.Adapter.sha256`."""
        return next((task for task in self.tasks if task.adapter_sha256 == adapter_sha256), None)

    def graph_path(self, precision: str) -> Path:
        """The graph in a precision.

        Raises:
            BundleError: there is none.
        """
        for graph in self.graphs:
            if graph.precision == precision:
                return self.folder / graph.file
        raise BundleError(
            f"{self.folder} holds no {precision} graph, only {', '.join(self.precisions)}. Export it again with "
            f"--precision {precision}."
        )


def finish_bundle(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json, with the format version and the hash of every file already in ``folder``."""
    write_record(folder, BUNDLE, manifest)


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle folder and check it file by file, without loading the graph.

    Raises:
        BundleError: it is not there, is no bundle, is of another format, or a file of it was changed.
    """
    manifest = read_record(folder, BUNDLE)
    with reading(folder, BUNDLE):
        bundle = Bundle(
            folder=folder,
            base_model=str(manifest["base_model"]["name"]),
            tasks=tuple(
                BundleTask(
                    name=str(record["name"]),
                    number=number,
                    adapter_sha256=str(record["adapter_sha256"]),
                    task=Task.from_json(record["task"]),
                    max_logit_difference=float(record["parity"]["max_logit_difference"]),
                )
                for number, record in enumerate(manifest["tasks"])
            ),
            method=str(manifest["method"]),
            virtual_tokens=whole_number(manifest, "virtual_tokens", 1, MAX_TOKENS),
            max_length=whole_number(manifest, "max_length", 1, MAX_TOKENS),
            vocabulary_size=whole_number(manifest, "vocabulary_size", 1, MAX_TOKENS),
            pad_token_id=whole_number(manifest, "pad_token_id", 0, MAX_TOKENS),
            token_types=bool(manifest["token_types"]),
            inputs=_inputs(manifest["inputs"]),
            graphs=_graphs(manifest),
        )
    check_seal(folder, manifest, BUNDLE)
    return bundle


def precision_record(precision: str, gates: Sequence[Gate]) -> dict[str, Any]:
    """What a manifest says of a graph."""
    return {"precision": precision, "file": GRAPH_FILES[precision], "gates": [asdict(gate) for gate in gates]}


def _inputs(names: Sequence[object]) -> tuple[str, ...]:
    """A graph's inputs in a manifest: some of those that we know how to make."""
    inputs = tuple(str(name) for name in names)
    if not {"input_ids", "attention_mask"} <= set(inputs) <= {*_INPUTS, TASK_IDS}:
        raise ValueError(f"inputs among {', '.join((*_INPUTS, TASK_IDS))}")
    return inputs


def _graphs(manifest: dict[str, Any]) -> tuple[GraphFile, ...]:
    graphs = tuple(_graph(record, manifest["sha256"]) for record in manifest["graphs"])
    if FP32 not in [graph.precision for graph in graphs]:
        raise ValueError(f"a graph in {FP32}")
    return graphs


def _graph(record: dict[str, Any], hashes: dict[str, str]) -> GraphFile:
    """A graph's record in a manifest, whose file must be ours and checked: nothing else is ever opened."""
    precision = str(record["precision"])
    if GRAPH_FILES[precision] not in hashes:
        raise KeyError(f"the SHA-256 of {GRAPH_FILES[precision]}")
    gates = tuple(Gate.from_json(gate) for gate in record["gates"])
    return GraphFile(precision=precision, file=GRAPH_FILES[precision], gates=gates)
