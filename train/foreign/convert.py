"""The import, step by step: find, read, check, write, compare, and only then the folder appears."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.adapter.folder import finish_adapter, load_adapter
from train.adapter.peft_config import MERGED_TYPES, PLAIN_SETTINGS
from train.adapter.record import ADAPTER, FILES, MERGED, Adapter
from train.common.atomic_folder import check_target, new_folder
from train.common.console import quiet_transformers, say
from train.common.errors import AdapterError, HubError, ModelError, UsageError
from train.common.folder_record import sha256_of_file
from train.config import CLASSIFICATION, MULTI_LABEL, REGRESSION
from train.data.load import load_split
from train.data.read_rows import sha256_of_path
from train.data.tasks import Scores, Task, custom_task
from train.foreign.compare import N_TEXTS, accepted_inputs, largest_difference, reference_model, write_peft_files
from train.foreign.config import ImportConfig
from train.foreign.head import count_labels, refuse_chance
from train.foreign.prompt import check_fit, config_of, prompt_of
from train.foreign.source import PROMPT_METHODS, Source, adapters_in, find_source
from train.foreign.tensors import PROMPT, TASK_COLUMNS, TASK_ROWS, read_tensors, todays_names
from train.foreign.tokenizer import source_tokenizer
from train.model.find import BASE_FLAG, BaseModel, find_base_model, text_limit
from train.model.loss import PROBLEM_TYPES

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Imported:
    """An adapter folder that was made from PEFT's."""

    adapter: Adapter
    max_logit_difference: float


@dataclass(frozen=True)
class _Content:
    """What an adapter folder gets."""

    tensors: "dict[str, torch.Tensor]"
    config: dict[str, Any]
    method: str
    virtual_tokens: int


def import_adapter(config: ImportConfig) -> Imported:
    """Turn an adapter of PEFT's into an adapter folder at ``config.out``.

    Raises:
        AdapterError: the source cannot be used, is for another task or base model, or lacks its head.
        UsageError, DataError, ModelError, HubError: a flag, a file, or the base model cannot be used.
        ParityError: the imported adapter's logits are not those of `PeftModel.from_pretrained`.
    """
    check_target(config.out, ADAPTER, overwrite=config.overwrite)
    source = find_source(config.source, allow_bin=config.allow_bin)
    say(f"{source.folder}: {source.peft_type}")
    if others := adapters_in(source.folder):
        some = ", ".join(path.name for path in others[:8])
        say(f"that is the adapter in the folder itself; {some} beside it can be imported by name: {others[0]}")
    stored = read_tensors(source)
    tensors = todays_names(source, stored)
    base = _find_base(source, config)
    settings = _settings_of(base)
    content = _content(source, tensors, base, settings, config.task_id)
    prefix = "base_model.model." if source.peft_type in MERGED_TYPES else "base_model."
    head = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    n_labels = count_labels(base, head)
    task = _task_of(config, settings, n_labels)
    file = config.validation_file
    rows = load_split(task, "validation", file, takes_labels=True) if file else None
    refuse_chance(source, base, task.labels, head)
    is_renamed = tensors.keys() != stored.keys()
    with reference_model(source, tensors, base, task.labels, is_renamed=is_renamed) as reference:
        max_length = text_limit(base, content.virtual_tokens, "Give the right base model with --base-model.")
        accepted = accepted_inputs(reference)
        tokenizer = source_tokenizer(source, base, max_length, accepted=accepted)
        with new_folder(config.out) as folder:
            write_peft_files(folder, content.tensors, content.config)
            tokenizer.save_pretrained(folder)
            record = _record(source, config, base, task, content=content, max_length=max_length)
            finish_adapter(folder, record)
            task_id = (config.task_id or 0) if TASK_COLUMNS in tensors else None
            difference = largest_difference(reference, tokenizer, load_adapter(folder), base, task_id)
            say(f"largest logit difference from PEFT's, {N_TEXTS} texts: {difference:.1e}")
            record["imported"]["max_logit_difference"] = difference
            if rows is not None:
                record |= _measured(folder, config, base, rows)
            (folder / FILES.training).unlink()
            finish_adapter(folder, record)
    return Imported(load_adapter(config.out), difference)


def _find_base(source: Source, config: ImportConfig) -> BaseModel:
    """The base model that the command or the adapter names; an error where it cannot be had."""
    name = config.base_model or source.base_model
    if name is None:
        raise UsageError(f"{source.folder / FILES.config} names no base model. Give it with --base-model.")
    revision = source.config.get("revision")
    if config.base_model is None and revision not in {None, "main"} and not Path(name).is_dir():
        raise UsageError(
            f"{source.folder / FILES.config} names revision {revision!r:.40} of {name}. Give a folder with that one with "
            "--base-model."
        )
    try:
        return find_base_model(name, BASE_FLAG)
    except (ModelError, HubError) as cause:
        if config.base_model:
            raise
        raise type(cause)(f"{source.folder} names a base model that cannot be had. {cause}") from cause


def _settings_of(base: BaseModel) -> "PretrainedConfig":
    from transformers import AutoConfig

    with quiet_transformers():
        return AutoConfig.from_pretrained(**base.source)


def _content(
    source: Source,
    tensors: "dict[str, torch.Tensor]",
    base: BaseModel,
    settings: "PretrainedConfig",
    task_id: int | None,
) -> _Content:
    """PEFT's two files as the adapter folder has them: a prompt as a table, anything else as it is."""
    if source.peft_type in MERGED_TYPES:
        if task_id is not None:
            raise UsageError(f"--task-id {task_id}: {source.folder} holds no prompt. Leave it out.")
        if not any(_is_adapter_tensor(name) for name in tensors):
            raise AdapterError(f"{source.weights} holds no tensor of {source.peft_type}. Take an unbroken copy.")
        # Settings of another version of PEFT would be a warning wherever the folder is loaded.
        config = {name: setting for name, setting in source.config.items() if name in PLAIN_SETTINGS}
        config |= {"base_model_name_or_path": base.hub_name, "inference_mode": True}
        return _Content(tensors, config, f"{source.peft_type.lower()}{MERGED}", 0)
    table = prompt_of(source, tensors, task_id)
    sizes = check_fit(source, table, base, settings)
    head = {name: tensor.float() for name, tensor in tensors.items() if name not in {PROMPT, TASK_COLUMNS, TASK_ROWS}}
    method = PROMPT_METHODS[source.peft_type]
    return _Content({PROMPT: table, **head}, config_of(source, table, base, sizes), method, len(table))


def _is_adapter_tensor(name: str) -> bool:
    return not name.startswith(("base_model.model.classifier.", "base_model.model.score."))


def _task_of(config: ImportConfig, settings: "PretrainedConfig", n_labels: int) -> Task:
    """The task, from what the command and the base model say; what was assumed is printed."""
    if not (config.single or config.pair or config.text_columns):
        say("a text is taken for one sentence (--pair says that it is two)")
    kind = _kind_of(config, settings, n_labels)
    if kind == REGRESSION:
        return custom_task(config.columns, config.label_column, (), REGRESSION)
    labels = config.labels
    if labels and len(labels) != n_labels:
        raise UsageError(
            f"--labels names {len(labels)} labels ({','.join(labels):.80}), and the adapter's head has {n_labels}. "
            "Name as many, in the order of the logits."
        )
    if not labels:
        known = settings.id2label or {}
        named = tuple(str(known.get(number, "")) for number in range(n_labels))
        if len(known) == n_labels and not any(label.startswith("LABEL_") or not label for label in named):
            labels = named
            say(f"labels of the base model: {', '.join(labels)} (--labels names others)")
        else:
            labels = tuple(f"label_{number}" for number in range(n_labels))
            say(f"the adapter does not name its {n_labels} labels: {', '.join(labels[:8])} (--labels names them)")
    return custom_task(config.columns, config.label_column, labels, kind)


def _kind_of(config: ImportConfig, settings: "PretrainedConfig", n_labels: int) -> str:
    """The kind of task: what the flags say, else the base model's problem_type, else one class a text."""
    stated = getattr(settings, "problem_type", None)
    is_stated_multi = stated == PROBLEM_TYPES[MULTI_LABEL]
    another = (
        "If the adapter was trained for another kind of task, give --base-model a copy of the base model whose config.json "
        "has its problem_type: {}."
    )
    if n_labels == 1:
        for flag, is_given in (("--labels", config.labels), ("--multi-label", config.multi_label)):
            if is_given:
                raise UsageError(f"{flag}: the adapter's head gives one number, which is a regression. Leave it out.")
        if is_stated_multi:
            raise AdapterError(
                f"The adapter's head gives one number, and the base model's config.json has problem_type {stated!r}, of "
                f"which promptfold takes two labels or more. {another.format(PROBLEM_TYPES[REGRESSION])}"
            )
        say("the adapter's head gives one number: a regression")
        return REGRESSION
    if stated == PROBLEM_TYPES[REGRESSION] and settings.num_labels == n_labels:
        raise AdapterError(
            f"The adapter's head gives {n_labels} numbers, and the base model's config.json has problem_type {stated!r}, of "
            f"which promptfold takes one number. {another.format(f'{PROBLEM_TYPES[CLASSIFICATION]} or {PROBLEM_TYPES[MULTI_LABEL]}')}"
        )
    if config.multi_label:
        # transformers writes single_label_classification into a model's settings whenever it was trained so.
        return MULTI_LABEL
    if stated in {PROBLEM_TYPES[CLASSIFICATION], PROBLEM_TYPES[MULTI_LABEL]}:
        what = "any number of the labels" if is_stated_multi else "one label"
        say(f"a text has {what}, as the base model's config.json says (problem_type {stated})")
    return MULTI_LABEL if is_stated_multi else CLASSIFICATION


def _record(
    source: Source, config: ImportConfig, base: BaseModel, task: Task, *, content: _Content, max_length: int
) -> dict[str, Any]:
    """The content of training.json; what cannot be known of an adapter made elsewhere is left out."""
    return {
        "model": base.as_json(),
        "task": task.as_json(),
        "method": content.method,
        "virtual_tokens": content.virtual_tokens,
        "max_length": max_length,
        "imported": {
            # Only the folder's name: where it was on this machine means nothing elsewhere.
            "source": Path(config.source).name if Path(config.source).exists() else config.source,
            "peft_type": source.peft_type,
            "peft_version": source.config.get("peft_version"),
            "task_id": config.task_id,
            "sha256": sha256_of_file(source.weights),
            "texts": N_TEXTS,
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _measured(folder: Path, config: ImportConfig, base: BaseModel, rows: "Dataset") -> dict[str, Any]:
    """The entries of training.json on the validation rows."""
    from train.adapter.peft import load_prompted_classifier
    from train.data.token_ids import encode, sentences_of, tokens_per_word
    from train.fit.loop import evaluate
    from train.model.tokenizer import load_tokenizer

    assert config.validation_file is not None
    adapter = load_adapter(folder)
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(folder, adapter.max_length)
    encoded = encode(rows, adapter.task, tokenizer)
    scores: Scores = evaluate(load_prompted_classifier(adapter, base), adapter.task, tokenizer, encoded.rows)
    return {
        "validation": scores.values,
        "intervals": scores.intervals,
        "tokens_per_word": tokens_per_word(tokenizer, sentences_of(rows, adapter.task)),
        "recalls": {"validation": scores.recalls},
        "n_validation": len(encoded.rows),
        "config": {"validation_file": str(config.validation_file.resolve())},
        "data_sha256": {"validation": sha256_of_path(config.validation_file)},
    }
