"""What `export.bench` makes before anything is timed: inputs for all engines, PEFT's logits, the plain graphs.

It runs in a process of its own, which is gone before the first engine starts. With ``--shape-of`` it also makes the
adapter and the bundle, around random weights. torch and optimum are imported inside the functions that need them.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.bench_arithmetic import Dimensions
from export.bench_engines import CALIBRATION_ROWS, CPU, CUDA, ENGINES, OPENVINO, PLAIN, Batch, Inputs, Plan
from export.bundle import FP16, INT8, Bundle, load_bundle
from train.adapter import ADAPTER, Adapter, find_adapter_base, load_adapter, load_prompted_classifier, save_weights
from train.config import P_TUNING, P_TUNING_V2, TrainConfig
from train.console import say
from train.errors import BundleError, ModelError, UsageError, first_line
from train.files import write_record
from train.model import ENCODERS, BaseModel
from train.tasks import Task, custom_task

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE, TUTORIAL = "file", "file-as-tutorial"
"""Names of the cells that are a whole file: batches of like length, and batches in the file's own order."""

BATCH_SIZE = 32
"""Texts of a file in one batch, as in the tutorial."""

SHAPES: dict[str, dict[str, Any]] = {
    "roberta-large": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }
}
"""By the names that ``--shape-of`` knows: configurations."""

RANDOM_ROWS = 64
"""Texts made up for a random model: the gate of its int8 graph, and OpenVINO's calibration."""

HEAD_BIAS = 8.0
"""A random model's head leans so far to its second label that it always gives it.

There is no quality to lose then, and the gate lets every dense layer become int8, which is what shall be timed.
"""


@dataclass(frozen=True)
class Shape:
    """A batch of texts that all have the same length in tokens, the prompt not counted."""

    batch_size: int
    length: int

    def __str__(self) -> str:
        """As in ``--shapes``: "8x60"."""
        return f"{self.batch_size}x{self.length}"

    @staticmethod
    def parse(text: str) -> "Shape":
        """The inverse of `__str__`.

        Raises:
            UsageError: it is no shape.
        """
        first, separator, second = text.partition("x")
        if not (separator and first.isdecimal() and second.isdecimal() and int(first) and int(second)):
            raise UsageError(f"--shapes {text}: write texts×tokens, such as 8x60 for eight texts of 60 tokens.")
        return Shape(int(first), int(second))


@dataclass(frozen=True)
class BenchConfig:
    """What shall be compared, and how.

    Attributes:
        adapter: folder that `python -m train` wrote; None with ``shape_of``.
        bundle: folder that `python -m export` wrote from it; None with ``shape_of``.
        shape_of: a name of `SHAPES`, or a folder with config.json: of what size random weights shall be.
        file: labelled rows to score as a whole.
        text_columns: that file's, where they are not named as in training.
        label_column: the same of its labels.
        shapes: as `Shape.parse` takes them.
        engines: names of `ENGINES`; none for all that can run on the device.
        rounds: how often every engine has its turn.
        device: `CPU` or `CUDA`.
        threads: for every engine; None for all usable cores.
        openvino_python: the interpreter of an environment with OpenVINO and NNCF.
        png: where the chart goes.
        plan: of each burst.

    Raises:
        UsageError: a value cannot be used.
    """

    adapter: Path | None
    bundle: Path | None
    plan: Plan
    shape_of: str | None = None
    file: Path | None = None
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    shapes: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    rounds: int = 2
    device: str = CPU
    threads: int | None = None
    openvino_python: Path | None = None
    png: Path | None = None

    def __post_init__(self) -> None:
        self._check_model()
        for name, number in (
            ("rounds", self.rounds),
            ("threads", 1 if self.threads is None else self.threads),
            ("min-runs", self.plan.min_runs),
            ("max-runs", self.plan.max_runs),
        ):
            if number < 1:
                raise UsageError(f"--{name} {number}: give a whole number of at least 1.")
        for name, seconds in (("pause", self.plan.pause_seconds), ("budget-seconds", self.plan.budget_seconds)):
            if not 0 <= seconds < 3600:
                raise UsageError(f"--{name} {seconds:g}: give seconds, from 0 to below 3600.")
        if self.device not in {CPU, CUDA}:
            raise UsageError(f"--device {self.device}: choose {CPU} or {CUDA}.")
        unknown = [name for name in self.engines if name not in ENGINES]
        if unknown:
            raise UsageError(f"--engines {unknown[0]}: there is no such engine. Choose from {', '.join(ENGINES)}.")
        if not self.all_shapes and self.file is None:
            raise UsageError("There is nothing to time. Give --shapes, such as 1x60, or --file.")
        if self.openvino_python is not None and not self.openvino_python.is_file():
            raise UsageError(
                f"--openvino-python {self.openvino_python}: there is no such program. Give the interpreter of an "
                "environment in which `pip install openvino nncf` was run."
            )
        if self.png is not None and not (self.png.suffix == ".png" and self.png.absolute().parent.is_dir()):
            raise UsageError(f"--png {self.png}: give a name that ends in .png, in a folder that exists.")

    def _check_model(self) -> None:
        if self.shape_of is None:
            if self.adapter is None or self.bundle is None:
                raise UsageError("Give an ADAPTER and the BUNDLE that was exported from it, or --shape-of.")
            return
        if self.adapter is not None:
            raise UsageError(f"--shape-of {self.shape_of} makes its own adapter. Leave {self.adapter} out.")
        if self.file is not None:
            raise UsageError(f"--shape-of {self.shape_of} has random weights, which score nothing. Leave --file out.")
        if self.shape_of not in SHAPES and not (Path(self.shape_of) / "config.json").is_file():
            raise UsageError(
                f"--shape-of {self.shape_of}: give {', '.join(SHAPES)}, or a folder that holds a model's config.json."
            )

    @property
    def all_shapes(self) -> list[Shape]:
        """What is to be timed beside a file, each once.

        Raises:
            UsageError: one of them is no shape.
        """
        return list(dict.fromkeys(Shape.parse(text) for text in self.shapes))

    @property
    def all_engines(self) -> list[str]:
        """Names, in the order in which they take turns; PEFT's comes first, as all others are held against it."""
        return [
            name
            for name, engine in ENGINES.items()
            if (name in self.engines if self.engines else self.device in engine.devices)
        ]


@dataclass(frozen=True)
class Cell:
    """One thing that every engine does: a shape, or a whole file.

    Attributes:
        name: "8x60", `FILE` or `TUTORIAL`.
        what: for people.
        texts: how many it answers.
        shapes: of its batches.
    """

    name: str
    what: str
    texts: int
    shapes: tuple[Shape, ...]


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

    from train.run import describe_machine

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

    from export.runtime import cuda_absence

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
        from export.predict import in_batches
        from export.runtime import bundle_tokenizer
        from train.data import load_split, texts_of

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

    from export.bench_engines import peft_for_batches

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


def export_plain(adapter: Adapter, base: BaseModel, folder: Path) -> Path:
    """Base and prompt as one module, written by optimum with its defaults and none of our rewrites.

    As optimum's command line does it: transformers' own choice of attention, optimum's opset, every row of every
    layer, and the prompt put in front by the graph, for every request. (A decoder's goes in as keys and values, without
    which its answers would depend on padding. ONNX Runtime folds what follows from constants.)

    Args:
        folder: config.json is written beside the graph, for the quantiser.
    """
    from optimum.exporters.onnx.convert import export_pytorch

    from export.graph import describe_architecture
    from train.prompted import PooledRowLayer

    classifier = load_prompted_classifier(adapter, base)
    encoder: Any = getattr(classifier.model.base_model, "encoder", None)
    if encoder is not None and isinstance(encoder.layer[-1], PooledRowLayer):
        encoder.layer[-1] = encoder.layer[-1].layer
    settings = describe_architecture(classifier.config)
    path = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see `export.graph.write_graph`
        export_pytorch(classifier, settings, opset=settings.DEFAULT_ONNX_OPSET, output=path)
    classifier.config.save_pretrained(folder)
    return path


def quantize_plain(graph: Path) -> Path:
    """A graph in int8 by optimum's dynamic quantisation, with its own choice of operators."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    ORTQuantizer.from_pretrained(graph.parent, file_name=graph.name).quantize(
        AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True),
        save_dir=graph.parent,
        file_suffix="int8",
    )
    return graph.with_name("model_int8.onnx")


def halve_plain(graph: Path) -> Path:
    """A graph in fp16 by ONNX Runtime's converter, with inputs and logits as they were."""
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = OnnxModel(onnx.load(graph))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see `export.precision.make_fp16`
        model.convert_float_to_float16(keep_io_types=True)
    path = graph.with_name("model_fp16.onnx")
    model.save_model_to_file(str(path))
    return path


def make_random_bundle(shape_of: str, work: Path, *, device: str) -> tuple[Path, Path]:
    """An adapter and its bundle around random weights: latency does not depend on the values.

    Everything is made by what makes the real ones, the other precisions' gate included (see `HEAD_BIAS`).

    Args:
        shape_of: see `BenchConfig`.
        device: the graph beside fp32 is int8 for `CPU`, fp16 for `CUDA`.

    Returns:
        the folders of the adapter and of the bundle

    Raises:
        ModelError: it is no encoder.
    """
    from transformers import AutoConfig

    from export.fold import ExportConfig, export_adapters

    if shape_of in SHAPES:
        settings = AutoConfig.for_model(**SHAPES[shape_of])
    else:
        settings = AutoConfig.from_pretrained(shape_of, local_files_only=True)
    if settings.model_type not in ENCODERS:
        raise ModelError(
            f"--shape-of {shape_of} is of type {settings.model_type!r}. Give an encoder's: {', '.join(ENCODERS)}."
        )
    say(f"making random weights in the shape of {shape_of}")
    words = [f"word{number}" for number in range(32)]
    base_folder, adapter_folder = work / "base", work / "adapter"
    _write_random_base(settings, words, base_folder)
    task = custom_task(("text",), "label", ("first", "second"))
    _write_random_adapter(base_folder, task, adapter_folder)
    generator = np.random.default_rng(0)
    rows = work / "rows.jsonl"
    texts = (" ".join(generator.choice(words, generator.integers(4, 24))) for _ in range(RANDOM_ROWS))
    rows.write_text("".join(json.dumps({"text": text, "label": "second"}) + "\n" for text in texts), encoding="utf-8")
    precision = FP16 if device == CUDA else INT8
    export_adapters(ExportConfig((adapter_folder,), work / "bundle", precision=precision, validation_files=(rows,)))
    return adapter_folder, work / "bundle"


def _write_random_base(settings: "PretrainedConfig", words: Sequence[str], folder: Path) -> None:
    """A base model with random weights and a tokenizer of a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    AutoModel.from_config(settings).save_pretrained(folder)
    tokens = ["<s>", "</s>", "<unk>", *words]
    tokens.insert(settings.pad_token_id or 0, "<pad>")
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))  # noqa: S106 -- no password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, tokens.index(token)) for token in ("<s>", "</s>")]
    )
    names = ["input_ids", "attention_mask", "token_type_ids"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="<s>",  # noqa: S106
        sep_token="</s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106 -- which decoders want
        pad_token="<pad>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        model_input_names=names if getattr(settings, "type_vocab_size", 1) > 1 else names[:2],
    ).save_pretrained(folder)


def _write_random_adapter(
    base_folder: Path, task: Task, folder: Path, *, method: str = P_TUNING, head_bias: float = HEAD_BIAS
) -> None:
    """An adapter as training begins with it: a prompt of 20 tokens, and a head that leans to its second label."""
    import torch

    from train.baselines import Baselines
    from train.model import add_prompt, base_tokenizer, find_base_model, load_classifier, text_limit

    base = find_base_model(str(base_folder))
    config = TrainConfig(out=folder, method=method)
    limit = text_limit(base, config.virtual_tokens)
    model = load_classifier(base, task.labels)
    if head_bias:
        head: Any = model.classifier
        with torch.no_grad():
            getattr(head, "out_proj", head).bias[1] = head_bias
    folder.mkdir()
    save_weights(folder, add_prompt(model, base, config, text_ids=[0]), base_tokenizer(base, limit))
    write_record(
        folder,
        ADAPTER,
        {
            "model": {"name": base.name, "sha256": base.sha256},
            "task": task.as_json(),
            "method": method,
            "virtual_tokens": config.virtual_tokens,
            "max_length": limit,
            "validation": {},
            "baselines": {},
            "baseline_rules": Baselines(constant=1, cosine=None).as_json(),
            "n_validation": 0,
            "config": {},
            "data_sha256": {},
        },
    )
