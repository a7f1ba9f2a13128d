"""A whole training run: data, baselines, every seed, and the adapter folder that is kept."""

import hashlib
import json
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
from train.common.errors import AdapterError
from train.common.folder_record import content_of
from train.common.machine import describe_machine
from train.common.processes import from_main_process, is_main_process, process_count
from train.config import TrainConfig, flag
from train.data.read_rows import sha256_of_path
from train.data.tasks import METRICS, Scores, best_scores
from train.data.token_ids import encode, sentences_of, tokens_per_word
from train.fit.checkpoint import (
    Progress,
    check_checkpoints,
    checkpoints_held,
    prepare_checkpoints,
    remove_checkpoints,
    seed_folder,
)
from train.fit.curves import draw_curves
from train.fit.loop import Prepared, check_machine, evaluate, fit, prepare
from train.model.baselines import Baselines
from train.model.classifier import load_classifier, prompted_classifier
from train.model.find import BaseModel
from train.model.tokenizer import base_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Spread:
    """One metric over the seeds: mean, sample standard deviation, and each value."""

    mean: float
    std: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class TrainResult:
    """The adapter that was written, and how the run went."""

    adapter: Adapter
    best_epoch: int
    n_epochs: int
    seed: int
    """The seed that was kept."""
    seed_scores: dict[int, Scores]
    spread: dict[str, Spread]
    """By metric."""


@dataclass(frozen=True)
class _Run(Prepared):
    """Everything that the seeds of a run have in common."""

    command: str
    baselines: Baselines
    baseline_scores: dict[str, Scores]


def train(config: TrainConfig, *, command: str) -> TrainResult | None:
    """Run a training and write the adapter to ``config.out``; ``command`` is the command line for the model card.

    Where several processes train together, only the main one has a result.
    """
    main = is_main_process()
    check_machine(config)
    if not main:
        return _train(config, command=command)
    check_target(config.out, ADAPTER, overwrite=config.overwrite)
    with checkpoints_held(config.out):
        check_target(config.out, ADAPTER, overwrite=config.overwrite)  # again, as another run may have ended since
        return _train(config, command=command)


def _train(config: TrainConfig, *, command: str) -> TrainResult | None:
    main = is_main_process()
    prepared = prepare(config)
    task, base, splits = prepared.splits.task, prepared.base, prepared.splits
    fingerprint = _fingerprint(prepared)
    if main:
        # Before the baselines, which take minutes with a large base model.
        check_checkpoints(config, fingerprint)
    baselines = Baselines.fit(task, base, splits.train)
    run = _Run(
        **vars(prepared),
        command=command,
        baselines=baselines,
        baseline_scores=baselines.score(task, base, splits.validation),
    )
    if main:
        prepare_checkpoints(config, fingerprint)
        _announce(run)
    finished: dict[int, Adapter] = {}
    for seed in config.all_seeds if main else ():
        # Those that an interrupted run had finished.
        with suppress(AdapterError):
            finished[seed] = load_adapter(_seed_adapter(config, seed))
    finished = from_main_process(finished)
    for seed in config.all_seeds:
        if seed in finished:
            continue
        log_folder = config.out.absolute().parent / f"{config.out.name}.runs" / f"seed-{seed}"
        peft_model, progress = fit(run, seed=seed, checkpoints=seed_folder(config.out, seed), log_folder=log_folder)
        if main:
            with new_folder(_seed_adapter(config, seed)) as folder:
                _write_adapter(folder, run, peft_model, progress, seed)
            finished[seed] = load_adapter(_seed_adapter(config, seed))
    return _keep_median(run, finished) if main else None


def _announce(run: _Run) -> None:
    say(f"{len(run.train.rows)} training and {len(run.validation.rows)} validation rows on {run.base.name}")
    for name, scores in run.baseline_scores.items():
        say(f"to beat on validation: {name}: {scores.with_recalls()}")
    if run.class_weights:
        weights = zip(run.splits.task.labels, run.class_weights, strict=True)
        say(f"weights of the classes: {', '.join(f'{name} {weight:.2f}' for name, weight in weights)}")
    for name, split in (("train", run.train), ("validation", run.validation)):
        if split.texts_cut:
            say(f"{split.texts_cut} {name} texts are longer than {run.max_length} tokens and lose their end")


def _plain_config(config: TrainConfig) -> dict[str, object]:
    """The settings that change what is learned, with the names of files alone, as their folders are private."""
    others = {"out", "overwrite", "resume", "checkpoint_steps", "report_to"}
    settings = {name: value for name, value in asdict(config).items() if name not in others}
    return {name: value.name if isinstance(value, Path) else value for name, value in settings.items()}


def _fingerprint(run: Prepared) -> dict[str, Any]:
    """Everything that determines the weights of a run, by the names that an error message uses."""
    settings = {flag(name): value for name, value in _plain_config(run.config).items()}
    rows = json.dumps([run.train.rows, run.train.swapped, run.validation.rows]).encode()
    return settings | {
        "a number of processes of": process_count(),
        "data with SHA-256": hashlib.sha256(rows).hexdigest(),
        "a base model with SHA-256": run.base.sha256,
    }


def _seed_adapter(config: TrainConfig, seed: int) -> Path:
    return seed_folder(config.out, seed) / "adapter"


def _write_adapter(folder: Path, run: _Run, peft_model: "PeftModel", progress: Progress, seed: int) -> None:
    """Write the adapter of one seed, with the scores that it has when loaded from there."""
    config, task, base = run.config, run.splits.task, run.base
    save_weights(folder, peft_model, base_tokenizer(base, run.max_length))
    state = read_weights(folder, config.virtual_tokens)
    written = prompted_classifier(load_classifier(base, task.labels, kind=task.kind), base, config.method, state)
    # The tokenizer as others will load it, which may differ from the one in memory.
    tokenizer = load_tokenizer(folder, run.max_length)
    scores, *more = (
        evaluate(written, task, tokenizer, encode(split, task, tokenizer).rows)
        for split in (run.splits.validation, *run.splits.more.values())
    )
    draw_curves(folder / FILES.curves, task, progress.epochs, progress.best_epoch, run.baseline_scores)
    record = _training_record(run, progress, seed, scores)
    record["tokens_per_word"] = tokens_per_word(tokenizer, sentences_of(run.splits.train, task))
    if more:
        record["more_validation"] = {name: part.values for name, part in zip(run.splits.more, more, strict=True)}
    finish_adapter(folder, record)


def _training_record(run: _Run, progress: Progress, seed: int, scores: Scores) -> dict[str, Any]:
    """The content of training.json."""
    config, base = run.config, run.base
    n_validation = len(run.validation.rows)
    files = {"train": config.train_file, "validation": config.validation_file}
    return {
        "model": base.as_json(),
        "task": run.splits.task.as_json(),
        "method": config.method,
        "virtual_tokens": config.virtual_tokens,
        "max_length": run.max_length,
        "validation": scores.values,
        "intervals": scores.intervals,
        "baselines": {name: baseline.values for name, baseline in run.baseline_scores.items()},
        "recalls": {
            "validation": scores.recalls,
            "baselines": {name: baseline.recalls for name, baseline in run.baseline_scores.items()},
        },
        "baseline_rules": asdict(run.baselines),
        "best_epoch": progress.best_epoch,
        "epochs": [asdict(epoch) for epoch in progress.epochs],
        "n_train": len(run.train.rows),
        "n_validation": n_validation,
        "limits": _limits(scores, run.baseline_scores, n_validation, base),
        "command": run.command,
        "seed": seed,
        "seeds": [seed],
        "seed_summary": {},
        "seconds": progress.seconds,
        "machine": describe_machine(),
        "config": _plain_config(config),
        "data_sha256": {name: sha256_of_path(file) for name, file in files.items() if file is not None},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "datasets")},
    }


def _keep_median(run: _Run, finished: dict[int, Adapter]) -> TrainResult:
    """Move the median seed's adapter to ``--out``: the best one's scores are partly luck on these rows.

    Its record and card get the spread over all seeds.
    """
    scores = {seed: finished[seed].scores for seed in run.config.all_seeds}
    # The lower middle of an even number.
    kept = sorted(scores, key=lambda seed: scores[seed].key)[(len(scores) - 1) // 2]
    spread: dict[str, Spread] = {}
    for name in run.splits.task.metrics:
        values = tuple(item.values[name] for item in scores.values())
        spread[name] = Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, values)
    training = content_of(json.loads((finished[kept].folder / FILES.training).read_text(encoding="utf-8")))
    training["seeds"] = list(scores)
    training["seed_summary"] = {name: asdict(item) for name, item in spread.items()}
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
        spread=spread,
    )


def _limits(scores: Scores, baselines: dict[str, Scores], n_validation: int, base: BaseModel) -> list[str]:
    """What a reader of the model card should know before trusting the scores."""
    limits = ["The same rows chose the epoch, so these scores flatter the adapter somewhat. No test set was used."]
    if scores.intervals:
        limits.append(
            f"With {n_validation} rows chance alone moves the scores; 95 % intervals (bootstrap): {scores.interval_words}."
        )
    name, best = best_scores(baselines)
    first = next(iter(scores.values))
    gap = 100 * (scores.values[first] - best.values[first])
    limits.append(
        f"Its {METRICS[first]} is {abs(gap):.1f} points {'above' if gap >= 0 else 'BELOW'} that of the best baseline "
        f"({name})."
    )
    if base.gguf_file is not None:
        limits.append(
            f"It was learned on the quantized weights of {base.gguf_file}, turned back into fp32; on the original "
            "weights its scores will differ."
        )
    return limits
