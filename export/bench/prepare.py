"""What `export.bench` makes before anything is timed: inputs for all engines, PEFT's logits, the plain graphs.

It runs in a child process, which is gone before the first engine starts. torch is imported where it is used.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from export.bench.config import FILE, TUTORIAL, BenchConfig, Cell, Shape
from export.bench.engines import CUDA, ENGINES, INSTALLS, OPENVINO, OURS, PLAIN, Batch, Inputs, Job
from export.bench.models import count_multiply_adds, family_module, peft_for_batches, plain_graphs
from export.bench.random_model import RANDOM_ROWS, make_random_bundle
from export.bundle.folder import Bundle, load_bundle
from export.runtime.batches import in_batches, random_batch
from export.runtime.session import cuda_absence
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base
from train.adapter.record import Adapter
from train.common.console import say
from train.common.errors import BundleError, UsageError
from train.common.machine import describe_machine
from train.config import P_TUNING_V2
from train.data.tasks import Task

BATCH_SIZE = 32
"""Texts of a file in one batch, as in the tutorial."""
CALIBRATION_ROWS = 300
"""Texts for OpenVINO's quantizer, its default: the first ones of ``--file``, although they are scored too."""


@dataclass(frozen=True)
class Prepared:
    """What the engines' processes and the report need."""

    job: Job
    about: Mapping[str, Any]
    """Model, machine, versions and dimensions, as the JSON document has them."""
    cells: Sequence[Cell]
    multiply_adds: Mapping[str, Mapping[str, int]]
    """By family of engines and name of a cell, those of one pass."""
    graphs: Mapping[str, Path | str]
    """By name of an engine, the plain graph that it loads (OpenVINO quantizes it first), or why it cannot run."""
    task: Task
    expected: Sequence[int]
    """Classes of the file's rows; empty without one."""


def prepare(config: BenchConfig, work: Path, threads: int) -> Prepared:
    """Check everything that a user can have got wrong, and make in an empty folder what the engines need."""
    import torch

    torch.set_num_threads(threads)
    if config.device == CUDA:
        absence = cuda_absence() or ("" if torch.cuda.is_available() else "PyTorch sees no GPU")
        if absence:
            raise UsageError(f"--device {CUDA}: {absence}. Leave it out to compare on the CPU.")
    adapter, bundle, task_name = _load_folders(config, work)
    base = find_adapter_base(adapter)
    say("preparing inputs and PEFT's logits")
    pad_id, inputs_file = bundle.pad_token_id, work / "inputs"
    peft = peft_for_batches(adapter, base, pad_id)
    cells, inputs, expected = _make_inputs(config, adapter, bundle, peft, is_decoder=base.is_decoder)
    inputs_file.write_bytes(pickle.dumps(inputs))
    multiply_adds = {
        family: count_multiply_adds(family_module(family, adapter, base, pad_id), inputs.cells)
        for family in {ENGINES[name].family for name in config.all_engines}
    }
    graphs: dict[str, Path | str] = dict(_cannot_run(config, bundle))
    plain = [name for name in config.all_engines if ENGINES[name].family in {PLAIN, OPENVINO} and name not in graphs]
    if plain:
        say("exporting the same model the usual way")
        graphs |= plain_graphs(plain, adapter, base, work / "plain", inputs.calibration)
    folders = str(adapter.folder), adapter.model, str(bundle.folder)
    job = Job(config.device, threads, config.plan, *folders, task_name, pad_id, str(inputs_file))
    packages = ("torch", "transformers", "peft", "optimum", "optimum-onnx", "onnx")
    about = {
        "model": f"the shape of {config.shape_of}, random weights" if config.shape_of else str(adapter.folder),
        "machine": describe_machine(),
        "versions": {name: version(name) for name in packages},
        "dimensions": _dimensions(peft.base_model.config, adapter, is_decoder=base.is_decoder),
    }
    return Prepared(job, about, cells, multiply_adds, graphs, adapter.task, expected)


def _load_folders(config: BenchConfig, work: Path) -> tuple[Adapter, Bundle, str]:
    """The adapter, the bundle made from it, and the name of its task there."""
    folders = (config.adapter, config.bundle)
    if config.shape_of is not None:
        folders = make_random_bundle(config.shape_of, work, device=config.device)
    assert folders[0] and folders[1]  # as `BenchConfig` checks
    adapter, bundle = load_adapter(folders[0], config.base_model), load_bundle(folders[1])
    task = bundle.task_of(adapter.sha256)
    if task is None:
        raise BundleError(
            f"{bundle.folder} was not made from {adapter.folder}, so their figures could not be compared. "
            f"Export it: python -m export {adapter.folder} --out BUNDLE"
        )
    limit = bundle.max_length
    for shape in config.all_shapes:
        if shape.length > limit:
            raise UsageError(f"--shapes {shape}: {adapter.folder} reads at most {limit} tokens. Give shorter texts.")
    return adapter, bundle, task.name


def random_texts(generator: np.random.Generator, shape: Shape, bundle: Bundle, *, padded: bool = False) -> Batch:
    """A batch of random token ids for a bundle."""
    return random_batch(
        generator,
        (shape.batch_size, shape.length),
        inputs=bundle.text_inputs,
        vocabulary_size=bundle.vocabulary_size,
        pad_token_id=bundle.pad_token_id,
        padded=padded,
    )


def _make_inputs(
    config: BenchConfig, adapter: Adapter, bundle: Bundle, peft: Any, *, is_decoder: bool
) -> tuple[list[Cell], Inputs, list[int]]:
    """The cells, their arrays, and the classes that a file's rows should have."""
    import torch

    generator = np.random.default_rng(0)
    cells = [
        Cell(str(shape), f"{shape.batch_size} × {shape.length} tokens", shape.batch_size, (shape,))
        for shape in config.all_shapes
    ]
    batches = {cell.name: [random_texts(generator, cell.shapes[0], bundle)] for cell in cells}
    rows: dict[str, np.ndarray] = {}
    expected: list[int] = []
    if config.file is None:
        shape = Shape(1, min(60, bundle.max_length))
        calibration = [random_texts(generator, shape, bundle) for _ in range(RANDOM_ROWS)]
    else:
        from export.runtime.tokenizer import bundle_tokenizer
        from train.data.load import load_split
        from train.data.token_ids import sentences_of

        task = adapter.task.with_columns(config.text_columns, config.label_column, owner=adapter.folder)
        split = load_split(task, "", config.file)
        texts, expected = sentences_of(split, task), list(split[task.label_column])
        tokenize = bundle_tokenizer(bundle)
        n_rows = len(texts)
        in_order = np.split(np.arange(n_rows), range(BATCH_SIZE, n_rows, BATCH_SIZE))
        for name, what, groups in (
            (FILE, "batches of like length", list(in_batches(texts, BATCH_SIZE))),
            (TUTORIAL, "as the tutorial does, in the file's order", in_order),
        ):
            rows[name] = np.concatenate(groups)
            batches[name] = [tokenize([texts[row] for row in group]).arrays for group in groups]
            shapes = tuple(Shape(*batch["input_ids"].shape) for batch in batches[name])
            cells.append(Cell(name, f"{n_rows} rows of {config.file.name}, {what}", n_rows, shapes))
        calibration = [tokenize([text]).arrays for text in texts[:CALIBRATION_ROWS]]
    # PEFT's decoder pads on the left, where its positions are other ones.
    check = random_texts(generator, Shape(3, min(24, bundle.max_length)), bundle, padded=not is_decoder)
    with torch.inference_mode():
        reference = peft(**{name: torch.from_numpy(array) for name, array in check.items()}).logits.numpy()
    return cells, Inputs(batches, rows, calibration, check, reference), expected


def _cannot_run(config: BenchConfig, bundle: Bundle) -> dict[str, str]:
    """By name of a wanted engine that the device, the bundle or the settings exclude, the reason."""
    absent = {}
    for engine in (ENGINES[name] for name in config.all_engines):
        if config.device not in engine.devices:
            absent[engine.name] = f"runs on {' and '.join(engine.devices)} only"
        elif engine.family == OURS and engine.precision not in bundle.precisions:
            absent[engine.name] = (
                f"{bundle.folder} holds no {engine.precision} graph, only {', '.join(bundle.precisions)}"
            )
        elif engine.needs and config.interpreters[engine.needs] is None:
            absent[engine.name] = f"--{engine.needs}-python names no environment with it ({INSTALLS[engine.needs]})"
    return absent


def _dimensions(settings: Any, adapter: Adapter, *, is_decoder: bool) -> dict[str, int]:
    """Sizes of the model from its `transformers.PretrainedConfig`."""
    hidden, heads = settings.hidden_size, settings.num_attention_heads
    names = ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner")  # the same thing in different model types
    return {
        "hidden": hidden,
        "wide": next((width for name in names if (width := getattr(settings, name, None))), 4 * hidden),
        "wide_products": 3 if settings.model_type == "llama" else 2,
        "keys": hidden * (getattr(settings, "num_key_value_heads", None) or heads) // heads,
        "heads": heads,
        "layers": settings.num_hidden_layers,
        "labels": len(adapter.labels),
        "is_decoder": is_decoder,
        "has_dense_head": not is_decoder,
        "virtual_tokens": adapter.virtual_tokens,
        "in_every_layer": adapter.method == P_TUNING_V2,
    }
