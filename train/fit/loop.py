"""Fitting one seed, with the best epoch kept, resumable after any checkpoint; and scoring a classifier."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.common.console import say
from train.common.errors import DataError, UsageError
from train.common.limits import MAX_BASE_BYTES
from train.common.processes import from_main_process, is_main_process, process_count
from train.config import TrainConfig
from train.data.intervals import metric_intervals
from train.data.load import Splits, class_weights, load_splits
from train.data.tasks import Scores, Task, score
from train.data.token_ids import Encoded, LengthGroupedSampler, encode
from train.fit.checkpoint import Progress, newest_checkpoint, read_progress, saving
from train.model.add_prompt import add_prompt, check_method, try_prompt
from train.model.classifier import load_classifier, put_prompt_before
from train.model.find import BaseModel, find_base_model, text_limit
from train.model.tokenizer import base_tokenizer

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast, TrainingArguments

    from train.model.prompted import PromptedClassifier

# What the Trainer imports for a reporter; where it is missing, nothing is reported.
_REPORTER_MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio"}


def check_machine(config: TrainConfig) -> None:
    """Refuse settings that cannot be used on this machine, before any work is done."""
    import torch

    if config.precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("--precision fp16 needs an NVIDIA GPU, and there is none. Take fp32 or bf16.")
    n_processes = process_count()
    if config.batch_size % n_processes:
        raise UsageError(
            f"--batch-size {config.batch_size} cannot be shared out among {n_processes} processes. Give a multiple."
        )
    if config.report_to != "none":
        try:
            import_module(_REPORTER_MODULES[config.report_to])
        except ImportError as cause:
            raise UsageError(
                f"--report-to {config.report_to}: it is not installed ({cause}). "
                f"Run: pip install -r requirements.txt {config.report_to}"
            ) from cause


@dataclass(frozen=True)
class Prepared:
    """A run's rows as token ids, and the model that reads them."""

    config: TrainConfig
    splits: Splits
    base: BaseModel
    max_length: int
    tokenizer: "PreTrainedTokenizerFast"
    train: Encoded
    validation: Encoded
    text_ids: tuple[int, ...]
    """Token ids of the first training rows, without special and unknown ones: the prompt starts from them."""
    class_weights: tuple[float, ...]
    """Weights of the classes in the loss; empty where all weigh the same."""


def prepare(config: TrainConfig) -> Prepared:
    """Find and check all that a run reads."""
    splits = load_splits(config)  # first, as a wrong file should not cost a download of the model
    base = find_base_model(config.model)
    check_method(base, config.method)
    if 4 * base.n_numbers > MAX_BASE_BYTES and is_main_process():
        say(
            f"{base.name} cannot be exported: in fp32 its graph would have {4 * base.n_numbers / 2**30:,.1f} GiB, and a bundle "
            f"holds {MAX_BASE_BYTES / 2**30:,.0f} at most; python -m train.evaluate runs the adapter in PyTorch"
        )
    limit = text_limit(base, config.virtual_tokens)
    if config.max_length is not None and config.max_length > limit:
        raise UsageError(
            f"--max-length {config.max_length}: {base.name} has {base.positions} positions and the prompt takes "
            f"{config.virtual_tokens}. Give at most {limit}."
        )
    tokenizer = base_tokenizer(base, config.max_length or limit)
    train = encode(splits.train, splits.task, tokenizer, swap=config.swap_sentences)
    validation = encode(splits.validation, splits.task, tokenizer)
    weights = class_weights(splits.task, splits.train) if config.class_weights != "none" else ()
    try_prompt(base, config, splits.task.labels, train.rows[0]["input_ids"])
    text_ids = _known_ids(base, splits.task, tokenizer, train)
    return Prepared(
        config, splits, base, config.max_length or limit, tokenizer, train, validation, text_ids, tuple(weights)
    )


def _known_ids(base: BaseModel, task: Task, tokenizer: "PreTrainedTokenizerFast", train: Encoded) -> tuple[int, ...]:
    """The token ids of the first 100 rows that have any beside special and unknown ones."""
    special = set(tokenizer.all_special_ids)
    known = ([token for token in row["input_ids"] if token not in special] for row in train.rows)
    text_ids = tuple(token for ids in islice(filter(None, known), 100) for token in ids)
    if not text_ids:
        raise DataError(
            f"The tokenizer of {base.name} knows no token of the {len(train.rows)} training texts in "
            f"{', '.join(task.text_columns)}. Check what these columns hold, or take a base model of their language."
        )
    return text_ids


def fit(run: Prepared, *, seed: int, checkpoints: Path, log_folder: Path) -> "tuple[PeftModel, Progress]":
    """Train one seed, from the newest whole checkpoint in its folder if there is one; ``log_folder`` is the reporter's.

    The best epoch's state is in place in the model, which is in evaluation mode.
    """
    import torch
    from transformers import DataCollatorWithPadding, set_seed

    from train.fit.trainer import PromptTrainer

    config, task, base, tokenizer, train = run.config, run.splits.task, run.base, run.tokenizer, run.train
    if is_main_process():
        with saving(checkpoints):
            checkpoints.mkdir(parents=True, exist_ok=True)  # the Trainer would too, but outside of `saving`
    arguments = _arguments(config, seed, checkpoints, log_folder)
    set_seed(seed)
    peft_model, classifier = _new_classifier(config, task, base, run.text_ids)
    if run.class_weights:
        classifier.class_weights = torch.tensor(run.class_weights)
    if is_main_process():
        trainable, frozen = (
            sum(tensor.numel() for tensor in classifier.parameters() if tensor.requires_grad is learned)
            for learned in (True, False)
        )
        say(f"learning {trainable:,} of {trainable + frozen:,} parameters, seed {seed}")
        if process_count() > 1:
            say(f"{process_count()} processes share each batch")
    checkpoint = _shared_checkpoint(checkpoints)
    progress = read_progress(checkpoint) if checkpoint is not None else Progress()
    lengths = [len(row["input_ids"]) for row in train.rows]
    trainer = PromptTrainer(
        config=config,
        task=task,
        progress=progress,
        sampler=LengthGroupedSampler(lengths, batch_size=config.batch_size, seed=seed, swap=config.swap_sentences),
        model=classifier,
        args=arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train.rows + train.swapped,
        # Sorted by length, a batch has next to no padding. No metric depends on the order.
        eval_dataset=sorted(run.validation.rows, key=lambda row: len(row["input_ids"])),
        optimizers=(_optimizer(classifier, config), None),
    )
    if not progress.finished:
        with saving(checkpoints):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    classifier.load_state_dict(progress.best, strict=False)
    return peft_model.eval(), progress


def _new_classifier(
    config: TrainConfig, task: Task, base: BaseModel, text_ids: Sequence[int]
) -> "tuple[PeftModel, PromptedClassifier]":
    """A model with an untrained prompt: as PEFT writes it, and as it is trained. The two share their tensors."""
    import torch

    # On a CPU the backward pass of PyTorch's fused attention takes ten times as long in bf16 as in fp32 (PyTorch 2.14:
    # 327 against 28 ms for six layers of minilm), which outweighs the faster matrix products.
    attention = "eager" if config.precision == "bf16" and not torch.cuda.is_available() else None
    model = load_classifier(base, task.labels, kind=task.kind, attention=attention)
    peft_model: Any = add_prompt(model, base, config, text_ids=text_ids)
    prompt_encoder = peft_model.prompt_encoder[peft_model.active_adapter]
    classifier = put_prompt_before(peft_model.base_model, base, config.method, prompt_encoder)
    # Frozen tensors are converted once; autocast would convert them again in every step.
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    for parameter in classifier.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return peft_model, classifier


def _shared_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint from which every process goes on."""
    checkpoint = from_main_process(newest_checkpoint(checkpoints) if is_main_process() else None)
    if checkpoint is not None and not checkpoint.is_dir():
        raise UsageError(
            f"{checkpoint} is not on this machine. Where several train together, --out has to lie on storage that "
            "all of them share."
        )
    if checkpoint is not None and is_main_process():
        say(f"going on from {checkpoint}")
    return checkpoint


def _arguments(config: TrainConfig, seed: int, checkpoints: Path, log_folder: Path) -> "TrainingArguments":
    import torch
    from transformers import TrainingArguments

    on_cuda = torch.cuda.is_available()
    n_processes = process_count()
    # Only --precision decides: not accelerate's configuration, nor an earlier run in this process.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    # transformers 5 has no argument for it; 4 reads the argument alone.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(log_folder)
    named = {field.name for field in fields(TrainingArguments)}
    logs: dict[str, Any] = {"logging_dir": str(log_folder)} if "logging_dir" in named else {}
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size // n_processes,
        per_device_eval_batch_size=config.batch_size,
        eval_strategy="epoch",
        logging_strategy="epoch",
        **logs,
        save_strategy="epoch" if config.checkpoint_steps is None else "steps",
        save_steps=config.checkpoint_steps or 500,
        seed=seed,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        use_cpu=not on_cuda,
        ddp_backend=None if on_cuda or n_processes == 1 else "gloo",
        ddp_find_unused_parameters=False,
        label_names=["labels"],
        remove_unused_columns=False,  # there are none
        dataloader_pin_memory=on_cuda,
        report_to=config.report_to,
        run_name=config.out.name,
    )
    # One process uses one GPU: with two in sight the Trainer would take torch's DataParallel and double the batch.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _optimizer(classifier: "PromptedClassifier", config: TrainConfig) -> "torch.optim.Optimizer":
    """AdamW with one group for the prompt and one for the head."""
    import torch

    prompt: dict[str, Any] = {"params": [], "lr": config.prompt_learning_rate or config.learning_rate}
    head: dict[str, Any] = {"params": [], "lr": config.learning_rate}
    for name, parameter in classifier.named_parameters():
        if parameter.requires_grad:
            (prompt if name.startswith("prompt_encoder.") else head)["params"].append(parameter)
    return torch.optim.AdamW([prompt, head], weight_decay=config.weight_decay)


def evaluate(
    classifier: "PromptedClassifier",
    task: Task,
    tokenizer: "PreTrainedTokenizerFast",
    rows: "Sequence[dict[str, Any]]",
    *,
    batch_size: int = 32,
) -> Scores:
    """Score a classifier on encoded rows, with 95 % intervals, on a GPU where there is one."""
    predicted = predict(classifier, task, tokenizer, rows, batch_size=batch_size)
    expected = np.array([row["labels"] for row in rows])
    return replace(score(task, predicted, expected), intervals=metric_intervals(task, predicted, expected))


def predict(
    classifier: "PromptedClassifier",
    task: Task,
    tokenizer: "PreTrainedTokenizerFast",
    rows: "Sequence[dict[str, Any]]",
    *,
    batch_size: int = 32,
) -> np.ndarray:
    """A classifier's predictions for encoded rows, in their order, as from `Task.predict`; on a GPU where there is one."""
    import torch
    from transformers import DataCollatorWithPadding

    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifier.to(device).eval()
    collate: Any = DataCollatorWithPadding(tokenizer)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    logits: list[torch.Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = collate([rows[index] for index in order[start : start + batch_size]]).to(device)
            del batch["labels"]
            logits.append(classifier(**batch)["logits"].float().cpu())
    return task.predict(torch.cat(logits).numpy())[np.argsort(order)]
