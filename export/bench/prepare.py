"""What `export.bench` makes before anything is timed: inputs for all engines, PEFT's logits, the plain graphs.

It runs in a process of its own, which is gone before the first engine starts. With ``--shape-of`` it also makes the
adapter and the bundle, around random weights. torch and optimum are imported inside the functions that need them.
"""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.bench.config import FILE, TUTORIAL, BenchConfig, Cell, Shape
from export.bench.engines import CALIBRATION_ROWS, CUDA, ENGINES, OPENVINO, PLAIN, Batch, Inputs
from export.bench.flops import Dimensions
from export.bench.plain import export_plain, halve_plain, quantize_plain
from export.bench.random_model import RANDOM_ROWS, make_random_bundle
from export.bundle.folder import Bundle, load_bundle
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base
from train.adapter.record import Adapter
from train.common.console import say
from train.common.errors import BundleError, UsageError, first_line
from train.config import P_TUNING_V2
from train.data.tasks import Task
from train.model.find import BaseModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig


BATCH_SIZE = 32
"""Texts of a file in one batch, as in the tutorial."""


@dataclass(frozen=True)
class Prepared:
    """What the engines' processes and the report need.

    Attributes:
        adapter, bundle: the folders.
        task_name: of the adapter's task in the bundle.
        model: for people.
        inputs: file with `Inputs`.
        cells: in order.
        dimensions: of the model.
        pad_token_id, is_decoder: see `Job`.
        graphs: by name of an engine of the plain family, its file; of OpenVINO, the one to quantise.
        absent: by name of an engine that cannot run, why.
        task: with whose metrics predictions are scored.
        expected: classes of the file's rows; empty without one.
        machine: where this runs.
        versions: of the libraries.
    """

    adapter: Path
    bundle: Path
    task_name: str
    model: str
    inputs: Path
    cells: tuple[Cell, ...]
    dimensions: Dimensions
    pad_token_id: int
    is_decoder: bool
    graphs: dict[str, Path]
    absent: dict[str, str]
    task: Task
    expected: tuple[int, ...]
    machine: str
    versions: dict[str, str]


def prepare(config: BenchConfig, work: Path, threads: int) -> Prepared:
    """Check everything that a user can have got wrong, and make what the engines need.

    Args:
        work: an empty folder.

    Raises:
        UsageError: the device is not there, or a shape is too long.
        AdapterError, BundleError, ModelError, DataError: a folder or the file cannot be used.
    """
    import torch

    from train.common.machine import describe_machine

    _check_device(config.device)
    torch.set_num_threads(threads)
    if config.shape_of is None:
        assert config.adapter is not None
        assert config.bundle is not None
        adapter_folder, bundle_folder = config.adapter, config.bundle
    else:
        adapter_folder, bundle_folder = make_random_bundle(config.shape_of, work, device=config.device)
    adapter, bundle = load_adapter(adapter_folder), load_bundle(bundle_folder)
    task = bundle.task_of(adapter.sha256)
    if task is None:
        raise BundleError(
            f"{bundle_folder} was not made from {adapter_folder}, so their figures could not be compared. "
            f"Export it: python -m export {adapter_folder} --out BUNDLE"
        )
    base = find_adapter_base(adapter)
    for shape in config.all_shapes:
        if shape.length > bundle.max_length:
            raise UsageError(
                f"--shapes {shape}: {adapter_folder} reads at most {bundle.max_length} tokens. Give shorter texts."
            )
    say("preparing inputs and PEFT's logits")
    cells, inputs, expected = _inputs(config, adapter, bundle, is_decoder=base.is_decoder)
    reference, settings = _reference(adapter, base, bundle, inputs.check)
    path = work / "inputs.npz"
    Inputs(inputs.cells, inputs.rows, inputs.calibration, inputs.check, reference).save(path)
    graphs, absent = _graphs(config, adapter, base, work)
    for name in config.all_engines:
        engine = ENGINES[name]
        if config.device not in engine.devices:
            absent[name] = f"runs on {' and '.join(engine.devices)} only"
        elif name.startswith("ours-") and engine.precision not in bundle.precisions:
            absent[name] = f"{bundle_folder} holds no {engine.precision} graph, only {', '.join(bundle.precisions)}"
    return Prepared(
        adapter=adapter_folder,
        bundle=bundle_folder,
        task_name=task.name,
        model=f"the shape of {config.shape_of}, random weights" if config.shape_of else str(adapter_folder),
        inputs=path,
        cells=tuple(cells),
        dimensions=Dimensions.of(
            settings,
            labels=len(adapter.labels),
            is_decoder=base.is_decoder,
            virtual_tokens=adapter.virtual_tokens,
            in_every_layer=adapter.method == P_TUNING_V2,
        ),
        pad_token_id=bundle.pad_token_id,
        is_decoder=base.is_decoder,
        graphs=graphs,
        absent=absent,
        task=adapter.task,
        expected=tuple(expected),
        machine=describe_machine(),
        versions={name: version(name) for name in ("torch", "transformers", "peft", "optimum", "optimum-onnx", "onnx")},
    )


def _check_device(device: str) -> None:
    """Refuse a GPU that is not there, rather than time the CPU under its name.

    Raises:
        UsageError: it is not.
    """
    if device != CUDA:
        return
    import torch

    from export.runtime.session import cuda_absence

    absence = cuda_absence() or ("" if torch.cuda.is_available() else "PyTorch sees no GPU")
    if absence:
        raise UsageError(f"--device {CUDA}: {absence}. Leave it out to compare on the CPU.")


def _inputs(
    config: BenchConfig, adapter: Adapter, bundle: Bundle, *, is_decoder: bool
) -> tuple[list[Cell], Inputs, list[int]]:
    """The cells, their arrays without the reference, and the classes that a file's rows should have."""
    generator = np.random.default_rng(0)
    cells, batches, rows = [], {}, {}
    for shape in config.all_shapes:
        name, texts = str(shape), shape.batch_size
        cells.append(Cell(name, f"{texts} × {shape.length} tokens", texts, (shape,)))
        batches[name] = [random_batch(generator, shape, bundle)]
    expected: list[int] = []
    if config.file is None:
        shape = Shape(1, min(60, bundle.max_length))
        calibration = [random_batch(generator, shape, bundle) for _ in range(RANDOM_ROWS)]
    else:
        from export.runtime.batches import in_batches
        from export.runtime.tokenizer import bundle_tokenizer
        from train.data.load import load_split
        from train.data.token_ids import texts_of

        task = adapter.task.with_columns(config.text_columns, config.label_column, owner=adapter.folder)
        split = load_split(task, "", config.file)
        texts_of_file = texts_of(split, task)
        expected = list(split[task.label_column])
        tokenize = bundle_tokenizer(bundle)
        numbers = list(range(len(expected)))
        in_order = [numbers[start : start + BATCH_SIZE] for start in range(0, len(numbers), BATCH_SIZE)]
        for name, what, grouping in (
            (FILE, "batches of like length", list(in_batches(texts_of_file, BATCH_SIZE))),
            (TUTORIAL, "as the tutorial does, in the file's order", in_order),
        ):
            rows[name] = [np.array(group) for group in grouping]
            batches[name] = [tokenize([texts_of_file[row] for row in group]).arrays for group in grouping]
            shapes = tuple(Shape(*batch["input_ids"].shape) for batch in batches[name])
            cells.append(Cell(name, f"{len(numbers)} rows of {config.file.name}, {what}", len(numbers), shapes))
        calibration = [tokenize([text]).arrays for text in texts_of_file[:CALIBRATION_ROWS]]
    check = random_batch(generator, Shape(3, min(24, bundle.max_length)), bundle)
    if not is_decoder:
        # PEFT's decoder pads on the other side, where its positions are other ones.
        check["attention_mask"] = np.tril(check["attention_mask"], k=check["attention_mask"].shape[1] // 2)
    return cells, Inputs(batches, rows, calibration, check, np.zeros(0)), expected


def random_batch(generator: np.random.Generator, shape: Shape, bundle: Bundle) -> Batch:
    """Full rows of random ids, none of them padding's, which some models number differently."""
    size = (shape.batch_size, shape.length)
    ids = generator.integers(0, bundle.vocabulary_size, size)
    ids[ids == bundle.pad_token_id] = (bundle.pad_token_id + 1) % bundle.vocabulary_size
    batch = {
        "input_ids": ids,
        "attention_mask": np.ones(size, np.int64),
        "token_type_ids": np.broadcast_to(np.arange(shape.length) >= shape.length // 2, size).astype(np.int64),
    }
    return {name: batch[name] for name in bundle.text_inputs}


def _reference(
    adapter: Adapter, base: BaseModel, bundle: Bundle, check: Batch
) -> tuple[np.ndarray, "PretrainedConfig"]:
    """PEFT's logits of a batch, in fp32 on the CPU, and the model's configuration."""
    import torch

    from export.bench.worker import peft_for_batches

    model = peft_for_batches(adapter.folder, base, adapter.labels, bundle.pad_token_id)
    with torch.inference_mode():
        logits = model(**{name: torch.from_numpy(array) for name, array in check.items()}).logits
    return logits.numpy(), model.base_model.config


def _graphs(
    config: BenchConfig, adapter: Adapter, base: BaseModel, work: Path
) -> tuple[dict[str, Path], dict[str, str]]:
    """The plain graphs that the wanted engines load, and of each that cannot be made, why."""
    wanted = [
        name
        for name in config.all_engines
        if ENGINES[name].family in {PLAIN, OPENVINO} and config.device in ENGINES[name].devices
    ]
    absent: dict[str, str] = {}
    for name in list(wanted):
        if ENGINES[name].family == OPENVINO and config.openvino_python is None:
            absent[name] = "--openvino-python names no environment with OpenVINO (pip install openvino nncf)"
            wanted.remove(name)
    if not wanted:
        return {}, absent
    say("exporting the same model the usual way")
    folder = work / "plain"
    folder.mkdir()
    try:
        graph = export_plain(adapter, base, folder)
    except Exception as cause:  # other libraries' code; what it cannot do is a line of the report
        return {}, absent | dict.fromkeys(
            wanted, f"the plain export failed ({type(cause).__name__}: {first_line(cause)})"
        )
    graphs = dict.fromkeys(wanted, graph)
    for name, convert in (("plain-int8", quantize_plain), ("plain-fp16", halve_plain)):
        if name not in wanted:
            continue
        try:
            graphs[name] = convert(graph)
        except Exception as cause:  # the same
            absent[name] = f"the plain graph cannot be converted ({type(cause).__name__}: {first_line(cause)})"
    return graphs, absent
