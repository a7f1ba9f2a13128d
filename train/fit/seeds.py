"""One command's worth of training: data, baselines, every seed, and the adapter folder that is kept."""

import hashlib
import json
import math
import shutil
import statistics
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.adapter.folder import finish_adapter, load_adapter, save_weights
from train.adapter.peft import read_weights
from train.adapter.record import ADAPTER, FILES, Adapter
from train.common.atomic_folder import check_target, new_folder
from train.common.console import say
from train.common.errors import AdapterError, UsageError
from train.common.folder_record import content_of, sha256_of_file
from train.common.machine import describe_machine
from train.common.processes import from_main_process, is_main_process, process_count
from train.config import TrainConfig
from train.data.load import Splits, load_splits
from train.data.tasks import METRICS, Scores, Task
from train.data.token_ids import Encoded, encode
from train.fit.checkpoint import check_checkpoints, prepare_checkpoints, remove_checkpoints, seed_folder
from train.fit.curves import draw_curves
from train.fit.loop import Fitted, check_machine, evaluate, fit
from train.model.add_prompt import check_method
from train.model.baselines import Baselines
from train.model.classifier import load_classifier, prompted_classifier
from train.model.find import BaseModel, find_base_model, text_limit
from train.model.tokenizer import base_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of the sample) of one metric over the seeds."""

    mean: float
    std: float


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        adapter: the folder, complete and checked.
        best_epoch: the epoch that was kept, from 1.
        n_epochs: how many there were.
        seed: the one that was kept.
        seed_scores: of every seed, in the order given.
    """

    adapter: Adapter
    best_epoch: int
    n_epochs: int
    seed: int
    seed_scores: dict[int, Scores]

    @property
    def spread(self) -> dict[str, Spread]:
        """Of each metric over the seeds."""
        return _spread(list(self.seed_scores.values()))


def _spread(scores: list[Scores]) -> dict[str, Spread]:
    columns = {name: [item.values[name] for item in scores] for name in scores[0].values}
    return {
        name: Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for name, values in columns.items()
    }


@dataclass(frozen=True)
class _Prepared:
    """All that the seeds of a run have in common."""

    config: TrainConfig
    command: str
    task: Task
    base: BaseModel
    tokenizer: "PreTrainedTokenizerFast"
    train: Encoded
    validation: Encoded
    validation_split: "Dataset"
    max_length: int
    fingerprint: dict[str, Any]
    baselines: Baselines
    baseline_scores: dict[str, Scores]


def train(config: TrainConfig, *, command: str) -> TrainResult | None:
    """Run a training and write the adapter to ``config.out``.

    Args:
        command: the command line for the model card.

    Returns:
        what it gave; None in all processes but the main one, where several train together.

    Raises:
        PromptfoldError: UsageError, DataError, HubError, ModelError; nothing is left at ``config.out`` then.
    """
    main = is_main_process()
    check_machine(config)
    if main:
        check_target(config.out, ADAPTER, overwrite=config.overwrite)
    # Data first: a wrong file should not cost a download of the model.
    splits = load_splits(config)
    base = find_base_model(config.model)
    check_method(base, config.method)
    run = _prepare(config, command, splits, base)
    if main:
        prepare_checkpoints(config, run.fingerprint)
        say(f"{len(run.train.rows)} training and {len(run.validation.rows)} validation rows on {base.name}")
        for name, scores in run.baseline_scores.items():
            say(f"to beat on validation: {name}: {scores}")
        for name, split in (("train", run.train), ("validation", run.validation)):
            if split.texts_cut:
                say(f"{split.texts_cut} {name} texts are longer than {run.max_length} tokens and lose their end")
    finished = from_main_process(_finished(config) if main else {})
    for seed in config.all_seeds:
        if seed in finished:
            continue
        fitted = fit(
            config,
            seed=seed,
            task=run.task,
            base=base,
            tokenizer=run.tokenizer,
            train=run.train,
            validation=run.validation,
            checkpoints=seed_folder(config.out, seed),
            log_folder=config.out.absolute().parent / f"{config.out.name}.runs" / f"seed-{seed}",
        )
        if main:
            with new_folder(seed_folder(config.out, seed) / "adapter") as folder:
                _write_adapter(folder, run, fitted, seed)
            finished[seed] = load_adapter(seed_folder(config.out, seed) / "adapter")
    if not main:
        return None
    return _keep(run, finished)


def _prepare(config: TrainConfig, command: str, splits: Splits, base: BaseModel) -> _Prepared:
    max_length = _max_length(config, base)
    tokenizer = base_tokenizer(base, max_length)
    train = encode(splits.train, splits.task, tokenizer, swap=config.swap_sentences)
    validation = encode(splits.validation, splits.task, tokenizer)
    fingerprint = _fingerprint(config, base, train, validation)
    if is_main_process():
        # Before the baselines, which take minutes with a large base model.
        check_checkpoints(config, fingerprint)
    baselines = Baselines.fit(splits.task, base, splits.train)
    return _Prepared(
        config=config,
        command=command,
        task=splits.task,
        base=base,
        tokenizer=tokenizer,
        validation_split=splits.validation,
        train=train,
        validation=validation,
        max_length=max_length,
        fingerprint=fingerprint,
        baselines=baselines,
        baseline_scores=baselines.score(splits.task, base, splits.validation),
    )


def _max_length(config: TrainConfig, base: BaseModel) -> int:
    limit = text_limit(base, config.virtual_tokens)
    if config.max_length is None:
        return limit
    if config.max_length > limit:
        raise UsageError(
            f"--max-length {config.max_length}: {base.name} has {base.positions} positions and the prompt takes "
            f"{config.virtual_tokens}. Give at most {limit}."
        )
    return config.max_length


_NOT_SETTINGS = ("out", "overwrite", "resume", "checkpoint_steps", "report_to")
"""Fields of `TrainConfig` that do not change what is learned."""


def _plain_config(config: TrainConfig) -> dict[str, object]:
    """The settings for training.json; in which folders the files lay is nobody's business."""
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_SETTINGS}
    return {name: value.name if isinstance(value, Path) else value for name, value in settings.items()}


def _fingerprint(config: TrainConfig, base: BaseModel, train: Encoded, validation: Encoded) -> dict[str, Any]:
    """What decides the weights of a run, by the names that a complaint shall use."""
    settings = {f"--{name.replace('_', '-')}": value for name, value in _plain_config(config).items()}
    rows = json.dumps([train.rows, train.swapped, validation.rows]).encode()
    return settings | {
        "a number of processes of": process_count(),
        "data with SHA-256": hashlib.sha256(rows).hexdigest(),
        "a base model with SHA-256": base.sha256,
    }


def _finished(config: TrainConfig) -> dict[int, Adapter]:
    """The adapters of those seeds that an interrupted run had finished, where they are whole."""
    found: dict[int, Adapter] = {}
    for seed in config.all_seeds:
        with suppress(AdapterError):
            found[seed] = load_adapter(seed_folder(config.out, seed) / "adapter")
    return found


def _write_adapter(folder: Path, run: _Prepared, fitted: Fitted, seed: int) -> None:
    """The adapter of one seed, scored as it was written and not as it was in memory."""
    config, task, base = run.config, run.task, run.base
    save_weights(folder, fitted.peft_model, base_tokenizer(base, run.max_length))
    state = read_weights(folder, config.virtual_tokens)
    written = prompted_classifier(load_classifier(base, task.labels), base, config.method, state)
    # By the tokenizer as others will load it, which need not be the one in memory.
    tokenizer = load_tokenizer(folder, run.max_length)
    scores = evaluate(written, task, tokenizer, encode(run.validation_split, task, tokenizer).rows)
    draw_curves(folder / FILES.curves, fitted.epochs, fitted.best_epoch, run.baseline_scores)
    n_validation = len(run.validation.rows)
    finish_adapter(
        folder,
        {
            "model": {"name": base.name, "hub_name": base.hub_name, "sha256": base.sha256},
            "task": task.as_json(),
            "method": config.method,
            "virtual_tokens": config.virtual_tokens,
            "max_length": run.max_length,
            "validation": scores.values,
            "baselines": {name: baseline.values for name, baseline in run.baseline_scores.items()},
            "baseline_rules": run.baselines.as_json(),
            "best_epoch": fitted.best_epoch,
            "epochs": [epoch.as_json() for epoch in fitted.epochs],
            "n_train": len(run.train.rows),
            "n_validation": n_validation,
            "limits": _limits(scores, run.baseline_scores, n_validation, base),
            "command": run.command,
            "seed": seed,
            "seeds": [seed],
            "seed_summary": {},
            "seconds": fitted.seconds,
            "machine": describe_machine(),
            "config": _plain_config(config),
            "data_sha256": {
                name: sha256_of_file(file)
                for name, file in (("train", config.train_file), ("validation", config.validation_file))
                if file is not None
            },
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "datasets")},
        },
    )


def _keep(run: _Prepared, finished: dict[int, Adapter]) -> TrainResult:
    """Move the median seed's adapter to ``--out``, with the spread of all of them in its record and card.

    The median and not the best: the best of several runs is the one that luck favoured most on these rows.
    """
    seeds = list(run.config.all_seeds)
    scores = {seed: finished[seed].scores for seed in seeds}
    # The lower middle of an even number.
    kept = sorted(seeds, key=lambda seed: scores[seed].key)[(len(seeds) - 1) // 2]
    training = content_of(json.loads((finished[kept].folder / FILES.training).read_text(encoding="utf-8")))
    training["seeds"] = seeds
    training["seed_summary"] = {
        name: asdict(spread) | {"values": [scores[seed].values[name] for seed in seeds]}
        for name, spread in _spread(list(scores.values())).items()
    }
    with new_folder(run.config.out) as folder:
        for path in finished[kept].folder.iterdir():
            if path.name not in (FILES.training, FILES.card):
                shutil.copyfile(path, folder / path.name)
        finish_adapter(folder, training)
    with suppress(OSError):
        remove_checkpoints(run.config.out)
    return TrainResult(
        adapter=load_adapter(run.config.out),
        best_epoch=training["best_epoch"],
        n_epochs=len(training["epochs"]),
        seed=kept,
        seed_scores=scores,
    )


def _limits(scores: Scores, baselines: dict[str, Scores], n_validation: int, base: BaseModel) -> list[str]:
    """What a reader of the model card should know before trusting the scores."""
    limits = [
        "The same rows chose the epoch, so these scores flatter the adapter somewhat. No test set was used.",
    ]
    if "accuracy" in scores.values:
        accuracy = scores.values["accuracy"]
        half = 196 * math.sqrt(accuracy * (1 - accuracy) / n_validation)
        limits.append(
            f"With {n_validation} rows the 95 % confidence interval of the accuracy is about ±{half:.1f} points."
        )
    name, best = max(baselines.items(), key=lambda item: item[1].key)
    first = next(iter(scores.values))
    gap = 100 * (scores.values[first] - best.values[first])
    limits.append(
        f"Its {METRICS[first]} is {abs(gap):.1f} points {'above' if gap >= 0 else 'BELOW'} that of the best baseline "
        f"({name})."
    )
    if base.gguf_file is not None:
        limits.append(
            f"It was learned on the quantised weights of {base.gguf_file}, turned back into fp32; on the original "
            "weights its scores will differ."
        )
    return limits
