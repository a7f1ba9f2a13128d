"""The bundle folder: names of its files, what manifest.json says, and `Bundle`, which is read from it.

bundle/    model.onnx                     the graph in fp32, prompt and weights inside
           model_int8.onnx …              the same in other precisions, where they passed the gate
           config.json, tokenizer.json …  so that `ORTModelForSequenceClassification` and a pipeline load it
           manifest.json                  what it is, what was measured, SHA-256 of each file
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, PlainValidator
from pydantic.dataclasses import dataclass as record

from train.common.errors import BundleError, UsageError
from train.common.folder_record import FolderKind, check_seal, read_json_object, read_record, reading, sha256_of_file
from train.common.limits import MAX_TOKENS
from train.common.records import parse_record
from train.config import REGRESSION
from train.data.tasks import METRICS, METRICS_OF, Task
from train.model.find import DECODERS
from train.untrusted.settings import refuse_settings


@dataclass(frozen=True)
class BundleFiles:
    """Names inside a bundle folder, except for those of `GRAPH_FILES`."""

    model: str = "model.onnx"
    config: str = "config.json"
    tokenizer: str = "tokenizer.json"
    manifest: str = "manifest.json"


FILES = BundleFiles()

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""The inputs of a graph that a tokenizer makes."""
TASK_IDS = "task_ids"
"""The input that holds the number of each row's task, in a graph for many tasks."""

FP32, FP16, INT8 = "fp32", "fp16", "int8"
GRAPH_FILES = {FP32: FILES.model, FP16: "model_fp16.onnx", INT8: "model_int8.onnx"}
"""The file that holds the graph, by precision."""


def data_path(graph: Path) -> Path:
    """The file beside a graph that holds the numbers of its tensors, where they are too many for one ONNX file."""
    return graph.with_name(f"{graph.name}_data")


BUNDLE = FolderKind(
    name="bundle",
    record=FILES.manifest,
    needed=(FILES.model, FILES.tokenizer, FILES.config),
    format_version=4,
    error=BundleError,
    command="python -m export ADAPTER --out",
    remedy="Export it again: python -m export ADAPTER --out BUNDLE",
)


@record(frozen=True, config=ConfigDict(extra="forbid"))
class Gate:
    """What a precision costs in quality, against fp32 on labelled rows."""

    file: str
    """The name of the file with the rows."""
    n_rows: int
    fp32: dict[str, float]
    """The task's metrics of the fp32 graph, by name."""
    scores: dict[str, float]
    """The same metrics of this precision."""
    label_flips: int
    """Rows whose labels changed; 0 for a regression."""
    max_probability_difference: float
    """Largest change of a probability; for a regression, of its number."""
    tolerance: float
    """By how much each metric may fall."""
    kept_fp32: tuple[int, ...] = ()
    """Transformer layers that stay in fp32, as numbers from 0, in bundles from before single products did (`Int8Form`)."""
    is_finite: bool = True
    """Whether every logit is a number: argmax makes a label of NaN as well."""
    changes: dict[str, tuple[float, float]] | None = None
    """95 % interval of how much each metric rises, by its name; the rows are the same for both. None in older bundles."""

    @property
    def passed(self) -> bool:
        """Whether every logit is a number and no metric falls by more than the tolerance."""
        # Rounded, as 0.005 has no exact form in binary.
        falls = (round(self.fp32[name] - value, 9) for name, value in self.scores.items())
        return self.is_finite and all(fall <= self.tolerance for fall in falls)

    def __str__(self) -> str:
        """For people: "accuracy 80.1 (fp32 80.4, change -1.0 to +0.5), …, 3 of 408 labels changed"."""
        parts = []
        for name, value in self.scores.items():
            low, high = (self.changes or {}).get(name, (0.0, 0.0))
            change = f", change {100 * low:+.1f} to {100 * high:+.1f}" if self.changes else ""
            parts.append(f"{METRICS[name]} {100 * value:.1f} (fp32 {100 * self.fp32[name]:.1f}{change})")
        if set(self.scores) <= set(METRICS_OF[REGRESSION]):
            parts.append(f"numbers at most {self.max_probability_difference:.2g} apart on {self.n_rows} rows")
        else:
            parts.append(f"{self.label_flips} of {self.n_rows} labels changed")
        if not self.is_finite:
            parts.append("some logits are no numbers")
        if self.kept_fp32:
            parts.append(f"layer{'s' * (len(self.kept_fp32) > 1)} {', '.join(map(str, self.kept_fp32))} in fp32")
        return ", ".join(parts)


@record(frozen=True, config=ConfigDict(extra="forbid"))
class Fidelity:
    """How near a precision's answers are to those of fp32 on texts without labels."""

    texts: str
    """Where the texts come from."""
    n_texts: int
    equal_labels: int
    """Texts whose most probable label is fp32's."""
    interval: tuple[float, float]
    """95 % interval of the share of equal labels."""
    rms_logit_difference: float
    max_logit_difference: float
    least_equal: float
    """Share of equal labels that is asked for where there are no labelled rows."""
    is_finite: bool = True
    """Whether every logit is a number."""

    @property
    def passed(self) -> bool:
        return self.is_finite and self.equal_labels >= self.least_equal * self.n_texts

    def __str__(self) -> str:
        """For people: "297 of 300 labels equal (99.0 %, 97.1 to 99.7), logits differ by 0.08 (RMS), 0.31 at most"."""
        if not self.is_finite:
            return "some logits are no numbers"
        share, (low, high) = self.equal_labels / self.n_texts, self.interval
        return (
            f"{self.equal_labels} of {self.n_texts} labels equal ({100 * share:.1f} %, {100 * low:.1f} to "
            f"{100 * high:.1f}), logits differ by {self.rms_logit_difference:.2g} (RMS), "
            f"{self.max_logit_difference:.2g} at most"
        )


WeightBits = Literal[7, 8]


@record(frozen=True, config=ConfigDict(extra="forbid"))
class Int8Form:
    """How a graph in int8 was made."""

    activations: Literal["dynamic", "static"]
    """Scales of activations: of each batch at run time, or of the calibration texts; then rows do not depend on their
    batch."""
    alpha: float | None
    """SmoothQuant's α; None without smoothing."""
    kept_fp32: tuple[str, ...]
    """Names of the dense products that stay in fp32."""
    calibration: str
    """Where the calibration texts come from."""
    n_texts: int
    wide: bool = False
    """Whether tensors between the feed-forward layers are smoothed too."""
    dynamic_ms: float | None = None
    """Median time of one text with dynamic scales on the exporting machine, where both were tried."""
    static_ms: float | None = None
    weight_bits: WeightBits | None = None
    """None in bundles from before it was written down."""

    def __str__(self) -> str:
        """For people: "static scales, smoothed with α 0.5, every dense product in int8"."""
        throughout = " throughout" if self.wide else ""
        smoothing = "not smoothed" if self.alpha is None else f"smoothed{throughout} with α {self.alpha:g}"
        n_kept = len(self.kept_fp32)
        kept = f"{n_kept} dense product{'s' * (n_kept > 1)} in fp32" if n_kept else "every dense product in int8"
        weights = "7-bit weights, " if self.weight_bits == 7 else ""
        return f"{self.activations} scales, {weights}{smoothing}, {kept}"


@record(frozen=True)
class GraphFile:
    """A graph of a bundle in one precision."""

    precision: Literal["fp32", "fp16", "int8"]
    gates: tuple[Gate, ...]
    """One for each task; none for fp32, which the others are compared with, and none without labelled rows."""
    fidelity: tuple[Fidelity, ...] = ()
    """One for each task, or none."""
    int8: Int8Form | None = None
    """None for other precisions, and in bundles from before there was a choice."""
    no_fidelity: str = ""
    """Why texts without labels cannot say what it costs; empty where they can."""

    @property
    def is_judged(self) -> bool:
        """Whether it was measured what it costs; a graph kept ungated was not."""
        return bool(self.gates or self.fidelity)


@record(frozen=True)
class BundleTask:
    """A task of a bundle: what one adapter learned."""

    name: str
    """The name of the adapter's folder."""
    number: int
    """Its place among the bundle's tasks, for ``task_ids``."""
    adapter_sha256: str
    """`train.adapter.record.Adapter.sha256`"""
    task: Annotated[Task, PlainValidator(lambda value: value if isinstance(value, Task) else Task.from_json(value))]
    max_logit_difference: float
    """The largest one between the fp32 graph and `PeftModel.forward` at export."""


def _known_inputs(inputs: tuple[str, ...]) -> tuple[str, ...]:
    if not {"input_ids", "attention_mask"} <= set(inputs) <= {*TEXT_INPUTS, TASK_IDS}:
        raise ValueError(
            f"input_ids and attention_mask are needed, and only {', '.join((*TEXT_INPUTS, TASK_IDS))} known"
        )
    return inputs


def _with_fp32(graphs: tuple[GraphFile, ...]) -> tuple[GraphFile, ...]:
    if FP32 not in [graph.precision for graph in graphs]:
        raise ValueError("a graph in fp32 is needed")
    return graphs


Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


@record(frozen=True)
class Bundle:
    """A bundle folder that was checked."""

    base_model: str
    base_model_sha256: str
    tasks: Annotated[tuple[BundleTask, ...], Field(min_length=1)]
    method: str
    virtual_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)]
    """0 for a method without a prompt."""
    max_length: Count
    """Longest text in tokens, without the prompt."""
    vocabulary_size: Count
    pad_token_id: Annotated[int, Field(ge=0, le=MAX_TOKENS)]
    token_types: bool
    """Whether the two sentences of a pair had different token types in training, where the graph takes types at all."""
    inputs: Annotated[tuple[str, ...], AfterValidator(_known_inputs)]
    """Names of the graph's inputs, in order."""
    graphs: Annotated[tuple[GraphFile, ...], AfterValidator(_with_fp32)]
    """One for each precision; fp32 first."""
    is_decoder: bool
    """Whether the base model is causal: PEFT runs such a model one text at a time."""
    exporter: str | None = None
    """Which exporter wrote its fp32 graph; None in bundles from before the manifest said so, as for ``rewrites``."""
    rewrites: tuple[str, ...] | None = None
    """What was folded into the graph; empty if every request puts the prompt's embeddings before its text."""
    folder: Path = Path()

    @property
    def has_many_tasks(self) -> bool:
        """Whether its graph takes the task of every row as an input."""
        return TASK_IDS in self.inputs

    @property
    def text_inputs(self) -> tuple[str, ...]:
        """The inputs that a tokenizer makes."""
        return tuple(name for name in self.inputs if name != TASK_IDS)

    @property
    def n_labels(self) -> int:
        """The number of logits a row: the labels of the task with the most."""
        return max(len(task.task.labels) for task in self.tasks)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions in which it holds a graph."""
        return tuple(graph.precision for graph in self.graphs)

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

    def find_task(self, name: str | None = None) -> BundleTask:
        """A task by its name, or the only one.

        Raises:
            UsageError: there is no such task, or there are several and none is named.
        """
        names = ", ".join(task.name for task in self.tasks)
        if name is None and len(self.tasks) > 1:
            raise UsageError(f"{self.folder} holds {len(self.tasks)} tasks ({names}). Name one of them with --task.")
        for task in self.tasks:
            if name in {None, task.name}:
                return task
        raise UsageError(f"--task {name}: {self.folder} holds no such task, only {names}.")

    def task_of(self, adapter_sha256: str) -> BundleTask | None:
        """The task that an adapter brought, by `train.adapter.record.Adapter.sha256`."""
        return next((task for task in self.tasks if task.adapter_sha256 == adapter_sha256), None)

    def graph_path(self, precision: str) -> Path:
        """The graph in a precision, or a BundleError that says which ones there are."""
        if precision in self.precisions:
            return self.folder / GRAPH_FILES[precision]
        raise BundleError(
            f"{self.folder} holds no {precision} graph, only {', '.join(self.precisions)}. Export it again with "
            f"--precision {precision}."
        )

    def graph_bytes(self, precision: str) -> int:
        """The size of a graph with the numbers of its tensors, whether they are in one file or in two."""
        path = self.graph_path(precision)
        return sum(file.stat().st_size for file in (path, data_path(path)) if file.exists())


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle folder and check it file by file, without loading the graph.

    Raises:
        BundleError: it is not there, is no bundle, is of another format, a file of it was changed, or its settings,
            which transformers and optimum would read, hold anything but plain data.
    """
    content: dict[str, Any] = read_record(folder, BUNDLE)
    where = folder / FILES.manifest
    with reading(folder, BUNDLE):
        tasks = [
            {**task, "number": number, "max_logit_difference": task["parity"]["max_logit_difference"]}
            for number, task in enumerate(content["tasks"])
        ]
        base = {"base_model": content["base_model"]["name"], "base_model_sha256": content["base_model"]["sha256"]}
        if "is_decoder" not in content:  # bundles written before the manifest said so
            config = read_json_object(folder / FILES.config, BundleError, BUNDLE.remedy)
            base["is_decoder"] = config.get("model_type") in DECODERS
        bundle = parse_record(Bundle, {**content, **base, "tasks": tasks}, BundleError, str(where), BUNDLE.remedy)
    # Only the files of GRAPH_FILES and their data are ever opened, and only with a hash that was compared.
    for graph in bundle.graphs:
        if GRAPH_FILES[graph.precision] not in content["sha256"]:
            raise BundleError(f"{where} has no SHA-256 of {GRAPH_FILES[graph.precision]}. {BUNDLE.remedy}")
        data = data_path(folder / GRAPH_FILES[graph.precision])
        if data.exists() and data.name not in content["sha256"]:
            raise BundleError(f"{where} has no SHA-256 of {data.name}. {BUNDLE.remedy}")
    check_seal(folder, content, BUNDLE)
    refuse_settings(folder, BundleError)
    return replace(bundle, folder=folder)
