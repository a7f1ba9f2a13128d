"""From an adapter folder to a bundle folder: find, fold, compare, quantise, write."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.bundle.folder import (
    BUNDLE,
    FILES,
    FP16,
    FP32,
    GRAPH_FILES,
    INT8,
    TASK_IDS,
    Bundle,
    Gate,
    finish_bundle,
    load_bundle,
    precision_record,
    text_inputs,
)
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base, load_peft_model, load_prompted_classifier
from train.adapter.record import Adapter
from train.common.atomic_folder import check_target, new_folder
from train.common.console import say
from train.common.errors import AdapterError, ModelError, PrecisionError, UsageError
from train.common.folder_record import content_of, read_record, sha256_of_file
from train.common.limits import MAX_MODEL_BYTES
from train.data.load import load_split
from train.data.tasks import Task
from train.data.token_ids import texts_of
from train.model.find import BaseModel, text_limit
from train.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    from export.fold.gate import LabelledBatches
    from export.fold.many_tasks import SharedClassifier
    from export.fold.parity import ParityReport
    from export.runtime.tokenizer import TextTokenizer
    from train.model.prompted import PromptedClassifier


ONNX_FILE_LIMIT = 2**31
"""Bytes of one protobuf file, and so of one ONNX file without external data."""


AUTO = "auto"


PRECISIONS = (FP32, FP16, INT8, AUTO)
"""What ``--precision`` takes. Every bundle holds fp32; ``auto`` adds int8, and fp16 where there is a GPU for it."""


@dataclass(frozen=True)
class ExportConfig:
    """What shall be exported, and how.

    Attributes:
        adapters: folders that `python -m train` wrote; several of one base model become one graph for all.
        out: appears when everything was measured, or not at all.
        add: whether to add the adapters to the bundle that is at ``out``.
        precision: one of `PRECISIONS`.
        validation_files: of each adapter the labelled rows on which other precisions than fp32 are gated; none for
            the files that the adapters were validated with, where they still lie unchanged.
        text_columns: that file's, where they are not named as in training.
        label_column: the same of its labels.
        ungated: whether to make other precisions also where no labelled rows can say what they cost. Such a graph has
            no gate in the manifest and runs only where it is asked for by name.
        overwrite: whether an older bundle at ``out`` may be replaced.

    Raises:
        UsageError: a value cannot be used.
    """

    adapters: tuple[Path, ...]
    out: Path
    add: bool = False
    precision: str = AUTO
    validation_files: tuple[Path, ...] = ()
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    ungated: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"--precision {self.precision}: choose one of {', '.join(PRECISIONS)}.")
        if self.validation_files and len(self.validation_files) != len(self.adapters):
            raise UsageError(
                f"--validation-file names {len(self.validation_files)} files for {len(self.adapters)} adapters. "
                "Give one for each, in their order."
            )
        names = [task_name(folder) for folder in self.adapters]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(
                f"Two adapters are named {twice[0]}; in a bundle the folder's name is the task's. Rename one."
            )


def task_name(adapter_folder: Path) -> str:
    """What an adapter's task is called in a bundle."""
    return adapter_folder.resolve().name


@dataclass(frozen=True)
class _Job:
    """One adapter on its way into a bundle.

    Attributes:
        rows: labelled rows for the gate, and the file they are from; None for fp32 alone.
    """

    name: str
    number: int
    adapter: Adapter
    task: Task
    rows: "Dataset | None"
    file: Path | None


def export_adapters(config: ExportConfig) -> Bundle:
    """Fold adapters into ONNX graphs and write the bundle, or add them to one.

    Raises:
        UsageError: ``out`` cannot be used, adapters do not fit together, or the precision needs labelled rows and
            there are none.
        AdapterError, ModelError, HubError: an adapter or its base model cannot be used.
        BundleError: the bundle to which they shall be added cannot be used.
        DataError: a validation file cannot be used.
        ParityError: the graph's logits are not PyTorch's.
        PrecisionError: the precision that was asked for scores worse than the gate allows.
    """
    if config.add:
        return _add_adapters(config)
    check_target(config.out, BUNDLE, overwrite=config.overwrite)
    jobs = _jobs(config, first_number=0)
    adapter = jobs[0].adapter
    for job in jobs[1:]:
        _check_fit(job.adapter, _traits(adapter), str(adapter.folder))
    base = _find_base(adapter)
    tokenizer = load_tokenizer(adapter.folder, adapter.max_length)

    # torch and optimum from here on
    from export.fold.trace import OPSET, TRACED, write_graph

    with new_folder(config.out) as folder:
        say(f"[2/5] folding {adapter.virtual_tokens} virtual tokens and tracing the graph")
        module = _module(jobs, base)
        settings = module.config
        architecture = _architecture_of(module)
        n_bytes = sum(tensor.nbytes for tensor in module.state_dict().values())
        if n_bytes >= ONNX_FILE_LIMIT:
            raise ModelError(
                f"{base.name} has {n_bytes / 1e9:.1f} GB of fp32 weights; one ONNX file holds "
                f"{ONNX_FILE_LIMIT / 1e9:.1f} GB. Take a smaller base model."
            )
        graph = write_graph(
            module, folder / FILES.model, is_decoder=base.is_decoder, virtual_tokens=adapter.virtual_tokens
        )
        del module

        providers, parities = _compare(jobs, base, folder / FILES.model, graph.inputs, settings.vocab_size)
        # That of the classifier: a base model's own says what it was saved as, and serving engines go by it.
        settings.architectures = [architecture]
        settings.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        graphs: dict[str, list[Gate]] = {FP32: []}
        refused: dict[str, list[Gate]] = {}
        data: list[LabelledBatches] = []
        is_judged = all(job.rows is not None for job in jobs)
        if config.precision == FP32 or not (is_judged or config.ungated):
            why = ": what another precision costs can be measured only with --validation-file"
            say(f"[4/5] fp32 alone{why if config.precision == AUTO else ''}")
        else:
            if is_judged:
                say(f"[4/5] other precisions, gated on {_row_counts(jobs)}")
                data = _gate_data(jobs, folder, tokenizer, graph.inputs)
            else:
                say("[4/5] other precisions, ungated: no labelled rows are here that could say what they cost")
            for precision, gates in _add_precisions(config, jobs, base, folder, data):
                (graphs if all(gate.passed for gate in gates) else refused)[precision] = gates

        say(f"[5/5] writing {config.out}")
        finish_bundle(
            folder,
            {
                "base_model": {"name": base.name, "hub_name": base.hub_name, "sha256": base.sha256},
                "tasks": [_task_record(job, parity) for job, parity in zip(jobs, parities, strict=True)],
                "method": adapter.method,
                "virtual_tokens": adapter.virtual_tokens,
                "max_length": adapter.max_length,
                "vocabulary_size": settings.vocab_size,
                "pad_token_id": tokenizer.pad_token_id,
                # A tokenizer may give none though the model takes them; it then takes all for the first.
                "token_types": "token_type_ids" in tokenizer.model_input_names,
                "inputs": list(graph.inputs),
                "outputs": list(graph.outputs),
                "prompt_initializers": list(graph.prompt_initializers),
                "opset": OPSET,
                "traced_shape": asdict(TRACED),
                "graphs": [precision_record(precision, gates) for precision, gates in graphs.items()],
                "refused": [precision_record(precision, gates) for precision, gates in refused.items()],
                "providers_tried": providers,
                "versions": _versions(),
            },
        )
    return load_bundle(config.out)


def _add_adapters(config: ExportConfig) -> Bundle:
    """Add adapters to a shared bundle: its graphs get further rows of their constants, and nothing is traced."""
    bundle = load_bundle(config.out)
    manifest = read_record(config.out, BUNDLE)
    if not bundle.is_shared:
        raise UsageError(
            f"{config.out} was exported for one task, and its graph cannot be told another. Export both adapters "
            f"together: python -m export {' '.join(map(str, (bundle.tasks[0].name, *config.adapters)))} --out BUNDLE"
        )
    taken = {task.name for task in bundle.tasks} & {task_name(folder) for folder in config.adapters}
    if taken:
        raise UsageError(f"{config.out} has a task {sorted(taken)[0]} already. Rename the adapter's folder.")
    jobs = _jobs(config, first_number=len(bundle.tasks), wants_rows=any(graph.gates for graph in bundle.graphs))
    traits = {
        "base model with SHA-256": manifest["base_model"]["sha256"],
        "method": bundle.method,
        "number of virtual tokens": bundle.virtual_tokens,
        "longest text": bundle.max_length,
        "tokenizer with SHA-256": manifest["sha256"][FILES.tokenizer],
    }
    for job in jobs:
        _check_fit(job.adapter, traits, str(config.out))
    base = _find_base(jobs[0].adapter)
    # torch from here on
    from export.fold.gate import measure_gates
    from export.fold.many_tasks import append_task
    from train.common.machine import usable_cores

    with new_folder(config.out) as folder:
        shutil.copytree(config.out, folder, dirs_exist_ok=True)
        (folder / FILES.manifest).unlink()
        say(f"[2/5] adding the constants of {', '.join(job.name for job in jobs)} to {', '.join(bundle.precisions)}")
        for job in jobs:
            constants = _constants(job.adapter, base)
            for graph in bundle.graphs:
                append_task(folder / graph.file, constants)
        _, parities = _compare(jobs, base, folder / FILES.model, bundle.inputs, bundle.vocabulary_size)
        records = {record["precision"]: record for record in manifest["graphs"]}
        if gated := [graph for graph in bundle.graphs if graph.gates]:
            say(f"[4/5] other precisions, gated on {_row_counts(jobs)}")
            data = _gate_data(jobs, folder, load_tokenizer(folder, bundle.max_length), bundle.inputs)
            for graph in gated:
                gates = measure_gates(
                    folder, graph.precision, data, threads=usable_cores(), kept_fp32=graph.gates[0].kept_fp32
                )
                _report(graph.precision, data, gates)
                if not all(gate.passed for gate in gates):
                    raise _too_lossy(graph.precision, gates)
                records[graph.precision]["gates"] += precision_record(graph.precision, gates)["gates"]
        say(f"[5/5] writing {config.out}")
        tasks = [*manifest["tasks"], *(_task_record(job, parity) for job, parity in zip(jobs, parities, strict=True))]
        finish_bundle(folder, content_of(manifest) | {"tasks": tasks, "graphs": list(records.values())})
    return load_bundle(config.out)


def _jobs(config: ExportConfig, *, first_number: int, wants_rows: bool = True) -> list[_Job]:
    """The adapters with the rows that judge them; every file is read before anything is computed."""
    jobs = []
    for index, folder in enumerate(config.adapters):
        adapter = load_adapter(folder)
        given = config.validation_files[index] if config.validation_files else None
        file = _validation_file(config, adapter, given) if wants_rows else None
        task = adapter.task.with_columns(config.text_columns, config.label_column, owner=adapter.folder)
        rows = None if file is None else load_split(task, "", file)
        if config.add and wants_rows and rows is None:
            raise UsageError(
                f"{config.out} holds other precisions than fp32, and nobody knows what they cost this task. Give "
                "labelled rows with --validation-file."
            )
        jobs.append(_Job(task_name(folder), first_number + index, adapter, task, rows, file))
    return jobs


def _validation_file(config: ExportConfig, adapter: Adapter, given: Path | None) -> Path | None:
    """The labelled rows for the gate: the file given, or the adapter's own where it is still what it was.

    Raises:
        UsageError: there are none, and without them the precision asked for cannot be judged.
    """
    if config.precision == FP32 and not config.add:
        return None
    if given is not None:
        return given
    own = adapter.validation_file
    if own is not None and _is_unchanged(own, adapter.validation_sha256):
        return own
    if config.precision == AUTO or config.ungated:
        return None
    raise UsageError(
        f"--precision {config.precision} is kept only if labelled rows show what it costs, and the file that "
        f"{adapter.folder} was validated with is not here. Give one with --validation-file, or take --precision {FP32}."
    )


def _is_unchanged(path: Path, sha256: str) -> bool:
    """Whether a file that an adapter names, on whatever machine that was, lies here and is the same."""
    try:
        # Rows for a gate are all held in memory.
        return path.is_file() and path.stat().st_size <= MAX_MODEL_BYTES and sha256_of_file(path) == sha256
    except OSError:  # in a folder that is not ours, for one
        return False


def _traits(adapter: Adapter) -> dict[str, object]:
    """What adapters in one graph have in common, by names for people."""
    return {
        "base model with SHA-256": adapter.model_sha256,
        "method": adapter.method,
        "number of virtual tokens": adapter.virtual_tokens,
        "longest text": adapter.max_length,
        "tokenizer with SHA-256": sha256_of_file(adapter.folder / FILES.tokenizer),
    }


def _check_fit(adapter: Adapter, traits: dict[str, object], owner: str) -> None:
    for name, value in _traits(adapter).items():
        if value != traits[name]:
            raise UsageError(
                f"{adapter.folder} has another {name} ({value}) than {owner} ({traits[name]}), so one graph cannot "
                "serve both. Train it alike, or export it alone."
            )


def _find_base(adapter: Adapter) -> BaseModel:
    say(f"[1/5] reading the base model {adapter.model}")
    base = find_adapter_base(adapter)
    if adapter.max_length > text_limit(base, adapter.virtual_tokens):
        raise AdapterError(
            f"{adapter.folder} allows texts of {adapter.max_length} tokens, more than {base.name} has positions "
            "for. Train the adapter again."
        )
    return base


def _module(jobs: Sequence[_Job], base: BaseModel, *, fused: bool = False) -> "PromptedClassifier | SharedClassifier":
    """What is traced: the classifier of an adapter, or one for several."""
    from export.fold.many_tasks import SharedClassifier, task_constants
    from train.model.prompted import has_absolute_positions

    # Of an encoder's attention we write every operator ourselves. BLOOM's knows no other form.
    attention = "sdpa" if fused and base.is_decoder and base.model_type != "bloom" else "eager"
    classifier = load_prompted_classifier(jobs[0].adapter, base, attention=attention)
    if len(jobs) == 1:
        return classifier
    if not base.is_decoder and not has_absolute_positions(classifier.config):
        raise UsageError(
            f"{base.name} has relative positions ({classifier.config.position_embedding_type}), and no graph of ours "
            "serves several of its adapters. Export each alone."
        )
    return SharedClassifier(
        task_constants(classifier, is_decoder=base.is_decoder, fused=fused),
        [_constants(job.adapter, base) for job in jobs[1:]],
    )


def _architecture_of(module: "PromptedClassifier | SharedClassifier") -> str:
    """The name of transformers' class for a base model with a head for classification."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return str(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[module.config.model_type])


def _constants(adapter: Adapter, base: BaseModel) -> "dict[str, torch.Tensor]":
    from export.fold.many_tasks import task_constants

    classifier = load_prompted_classifier(adapter, base, attention="eager")
    return task_constants(classifier, is_decoder=base.is_decoder).tensors


def _compare(
    jobs: Sequence[_Job],
    base: BaseModel,
    path: Path,
    inputs: tuple[str, ...],
    vocabulary_size: int,
    *,
    use_cuda: bool | None = None,
) -> "tuple[list[str], list[ParityReport]]":
    """Hold a graph in fp32 against PEFT, task by task; the providers that ran it, and what was found."""
    from export.fold.parity import measure_parity
    from export.runtime.session import open_session, run_session
    from train.common.machine import usable_cores

    say("[3/5] comparing its logits with PEFT's on shapes that were not traced")
    session = open_session(path, threads=usable_cores(), use_cuda=use_cuda)
    reports = []
    for job in jobs:

        def run_graph(arrays: Mapping[str, np.ndarray], job: _Job = job) -> np.ndarray:
            return run_session(session, _for_task(arrays, job.number, inputs))[:, : len(job.task.labels)]

        report = measure_parity(
            load_peft_model(job.adapter.folder, base, job.adapter.labels),
            run_graph,
            inputs=text_inputs(inputs),
            vocabulary_size=vocabulary_size,
            max_length=job.adapter.max_length,
            one_by_one=base.is_decoder,
        )
        say(f"      {job.name}: largest logit difference {report.max_logit_difference:.1e}")
        reports.append(report)
    return session.get_providers(), reports


def _for_task(arrays: Mapping[str, np.ndarray], number: int, inputs: tuple[str, ...]) -> dict[str, np.ndarray]:
    """A batch with the number of its task, where the graph asks for it."""
    from export.runtime.classifier import with_task

    return with_task(arrays, number) if TASK_IDS in inputs else dict(arrays)


def _gate_data(
    jobs: Sequence[_Job], folder: Path, tokenizer: "PreTrainedTokenizerFast", inputs: tuple[str, ...]
) -> "list[LabelledBatches]":
    from export.fold.gate import labelled_batches
    from export.runtime.tokenizer import TextTokenizer

    # Adapters in one graph have one tokenizer and one limit.
    tokenize = TextTokenizer(
        folder / FILES.tokenizer,
        max_length=jobs[0].adapter.max_length,
        pad_token_id=tokenizer.pad_token_id,
        token_types="token_type_ids" in tokenizer.model_input_names,
        inputs=text_inputs(inputs),
    )
    data = []
    for job in jobs:
        assert job.rows is not None
        assert job.file is not None
        texts = texts_of(job.rows, job.task)
        data.append(
            labelled_batches(
                job.file,
                job.task,
                partial(_encode, tokenize, job.number, inputs),
                texts,
                job.rows[job.task.label_column],
            )
        )
    return data


def _encode(
    tokenize: "TextTokenizer", number: int, inputs: tuple[str, ...], texts: Sequence[tuple[str, ...]]
) -> dict[str, np.ndarray]:
    return _for_task(tokenize(texts).arrays, number, inputs)


def _row_counts(jobs: Sequence[_Job]) -> str:
    return ", ".join(f"the {len(job.rows or ())} rows of {job.file}" for job in jobs)


def _add_precisions(
    config: ExportConfig, jobs: Sequence[_Job], base: BaseModel, folder: Path, data: "Sequence[LabelledBatches]"
) -> Iterator[tuple[str, list[Gate]]]:
    """Write the other graphs into the folder, and remove those that fail the gate.

    Raises:
        PrecisionError: one that was asked for by name failed.
    """
    from export.fold.quantize import make_fp16, make_int8
    from export.runtime.session import cuda_absence
    from train.common.machine import usable_cores

    wanted = [INT8, FP16] if config.precision == AUTO else [config.precision]
    for precision in wanted:
        if precision == INT8:
            gates = make_int8(folder, data, threads=usable_cores(), report=say)
        elif config.precision == AUTO and cuda_absence():
            continue
        else:
            _write_fused(jobs, base, folder / GRAPH_FILES[FP16])
            gates = make_fp16(folder, data, threads=usable_cores())
        _report(precision, data, gates)
        if not all(gate.passed for gate in gates):
            (folder / GRAPH_FILES[precision]).unlink()
            if config.precision == precision:
                raise _too_lossy(precision, gates)
        yield precision, gates


def _write_fused(jobs: Sequence[_Job], base: BaseModel, path: Path) -> None:
    """The graph for a GPU, so far in fp32, and equal to PEFT like the other one."""
    from export.fold.trace import write_graph

    module = _module(jobs, base, fused=True)
    virtual_tokens = jobs[0].adapter.virtual_tokens
    graph = write_graph(module, path, is_decoder=base.is_decoder, virtual_tokens=virtual_tokens, fused=True)
    # On the CPU: a GPU computes attention by other kernels in fp32 than in fp16, which is the one that counts.
    _compare(jobs, base, path, graph.inputs, module.config.vocab_size, use_cuda=False)


def _report(precision: str, data: "Sequence[LabelledBatches]", gates: Sequence[Gate]) -> None:
    for batches, gate in zip(data, gates, strict=True):
        say(f"      {precision} on {batches.file}: {gate}")


def _too_lossy(precision: str, gates: Sequence[Gate]) -> PrecisionError:
    failed = next(gate for gate in gates if not gate.passed)
    return PrecisionError(
        f"{precision} on {failed.file}: {failed}. More than {100 * failed.tolerance:g} points may not be lost, so nothing "
        f"was written. Take --precision {AUTO} or {FP32}."
    )


def _task_record(job: _Job, parity: "ParityReport") -> dict[str, object]:
    adapter = job.adapter
    return {
        "name": job.name,
        "adapter_sha256": adapter.sha256,
        "task": adapter.task.as_json(),
        "parity": asdict(parity),
        "quality": {
            "n_validation": adapter.n_validation,
            "validation": adapter.scores.values,
            "baselines": {name: scores.values for name, scores in adapter.baselines.items()},
        },
    }


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "optimum", "optimum-onnx", "onnx")
    versions = {name: version(name) for name in names}
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
