"""Step 1, read: the adapters, their labelled rows, the base model and the tokenizer, before anything is computed."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from export.bundle.folder import FILES, FP32, Bundle, load_bundle
from export.fold.config import ExportConfig, task_name
from export.fold.precision.texts import CalibrationTexts, read_texts, unchanged_file
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base
from train.adapter.record import Adapter
from train.common.console import say
from train.common.errors import AdapterError, UsageError
from train.common.folder_record import sha256_of_file
from train.data.load import load_split
from train.data.tasks import Task
from train.foreign.direct import import_if_foreign
from train.model.find import BaseModel, text_limit
from train.model.tokenizer import fit_vocabulary, load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class LabelledRows:
    """Rows that show what a precision costs."""

    file: Path
    task: Task
    """The adapter's task with the file's column names."""
    dataset: "Dataset"


@dataclass(frozen=True)
class ExportTask:
    """An adapter that becomes a task of the bundle."""

    name: str
    number: int
    adapter: Adapter
    rows: LabelledRows | None
    texts: CalibrationTexts | None
    """None where no precision but fp32 is wanted."""


@dataclass(frozen=True)
class Sources:
    """Everything that an export reads: adapters of one base model, and the bundle to which they are added."""

    tasks: tuple[ExportTask, ...]
    base: BaseModel
    tokenizer: "PreTrainedTokenizerFast"
    old: Bundle | None

    @property
    def adapters(self) -> list[Adapter]:
        return [task.adapter for task in self.tasks]

    @property
    def has_token_types(self) -> bool:
        """Whether the tokenizer gives token types; if not, a model that takes them gets type 0 for both sentences."""
        return "token_type_ids" in self.tokenizer.model_input_names


def read_sources(config: ExportConfig) -> Sources:
    """Read and check everything that an export needs; its errors are those of `export.fold.pipeline.export_adapters`."""
    old = _read_old_bundle(config) if config.add else None
    n_old = len(old.tasks) if old else 0
    files = config.validation_files or (None,) * len(config.adapters)
    is_wanted = any(graph.is_judged for graph in old.graphs) if old else config.precision != FP32
    tasks = []
    for number, (folder, file) in enumerate(zip(config.adapters, files, strict=True), start=n_old):
        adapter = load_adapter(import_if_foreign(folder, config.base_model), config.base_model)
        if adapter.is_merged and len(config.adapters) + n_old > 1:
            raise UsageError(
                f"{folder} ({adapter.method}) changes the base model's weights, so no other adapter can share its graph. "
                "Export it alone."
            )
        rows = _read_rows(adapter, file, config, old) if is_wanted else None
        tasks.append(ExportTask(task_name(folder), number, adapter, rows, None))
    first = tasks[0].adapter
    for task in tasks:
        _check_fit(task.adapter, old or first)
    tokenizer = load_tokenizer((old or first).folder, first.max_length)
    if is_wanted:
        given = config.calibration_files or (None,) * len(tasks)
        tasks = [
            replace(task, texts=read_texts(task.adapter, file, tokenizer))
            for task, file in zip(tasks, given, strict=True)
        ]
    say(f"[1/5] reading the base model {first.model}")
    base = find_adapter_base(first)
    fit_vocabulary(tokenizer, base, (old or first).folder, AdapterError, "Train the adapter again.")
    if first.max_length > text_limit(base, first.virtual_tokens, "Train the adapter again."):
        raise AdapterError(
            f"{first.folder} allows texts of {first.max_length} tokens, more than {base.name} has positions for. "
            "Train the adapter again."
        )
    return Sources(tuple(tasks), base, tokenizer, old)


def _read_old_bundle(config: ExportConfig) -> Bundle:
    bundle = load_bundle(config.out)
    if not bundle.has_many_tasks:
        raise UsageError(
            f"{config.out} was exported for one task, and its graph cannot be told another. Export both adapters "
            f"together: python -m export {' '.join(map(str, (bundle.tasks[0].name, *config.adapters)))} --out BUNDLE"
        )
    taken = {task.name for task in bundle.tasks} & {task_name(adapter) for adapter in config.adapters}
    if taken:
        raise UsageError(f"{config.out} has a task {min(taken)} already. Rename the adapter's folder.")
    return bundle


def _read_rows(adapter: Adapter, file: Path | None, config: ExportConfig, old: Bundle | None) -> LabelledRows | None:
    """The labelled rows of an adapter: of a given file, or of the one it was validated with."""
    task = adapter.task.with_columns(config.text_columns, config.label_column, owner=adapter.folder)
    if file is not None:
        return LabelledRows(file, task, load_split(task, "validation", file))
    if (file := unchanged_file(adapter.validation_file, adapter.validation_sha256)) is not None:
        return LabelledRows(file, task, load_split(task, "", file, adapter.read_options))
    if old and any(graph.gates for graph in old.graphs):
        raise UsageError(
            f"{config.out} holds other precisions than fp32, and what they cost this task is unknown, and the file that "
            f"{adapter.folder} was validated with is not here. Give one with --validation-file."
        )
    return None


def _check_fit(adapter: Adapter, other: Adapter | Bundle) -> None:
    """Refuse an adapter that cannot be in one graph with another, or with those of a bundle."""
    others = _common_traits(other)
    for name, value in _common_traits(adapter).items():
        if value != others[name]:
            raise UsageError(
                f"{adapter.folder} has another {name} ({value}) than {other.folder} ({others[name]}), so one graph cannot "
                "serve both. Train it alike, or export it alone."
            )


def _common_traits(owner: Adapter | Bundle) -> dict[str, object]:
    """What all adapters in one graph have in common, by names for people."""
    return {
        "base model with SHA-256": owner.model_sha256 if isinstance(owner, Adapter) else owner.base_model_sha256,
        "method": owner.method,
        "number of virtual tokens": owner.virtual_tokens,
        "longest text": owner.max_length,
        "tokenizer with SHA-256": sha256_of_file(owner.folder / FILES.tokenizer),
    }
