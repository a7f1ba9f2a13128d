"""The process in which one engine of `export.bench` is loaded and timed: python -m export.bench.worker

Its calls and answers are pickles. At its top this file imports NumPy alone, and each function what its engine needs:
OpenVINO's environment has none of promptfold's requirements.

What is measured, for every engine alike:

- load: from files to an engine that can answer, imports left out. Our engines check their files' hashes within it.
- first run at a shape: with whatever is compiled or planned then.
- latency: from NumPy arrays of token ids to logits as a NumPy array, in bursts. Before each there is a pause, in which
  the thread pool of the engine before stops spinning, and a warm-up.
- memory: the largest resident size of the process until then, libraries included, and the GPU memory that it has taken.
"""

import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.bench.engines import (
    ENGINES,
    OPENVINO,
    OURS,
    PEFT,
    PLAIN,
    TORCHAO,
    Batch,
    Engine,
    Inputs,
    Job,
    Measured,
    Plan,
    Timed,
)
from train.common.errors import first_line
from train.common.machine import gpu_memory, peak_memory_mib

WARM_UP_RUNS = 3
"""Upper bound for the runs before a timed burst: the first ones after a pause are slower."""
Run = Callable[[Batch], np.ndarray]
"""A batch → logits, shape = (n_batch, n_labels); it returns when they are there."""


@dataclass(frozen=True)
class Loaded:
    """An engine that can answer."""

    run: Run
    files: Sequence[Path]
    library: str
    note: str
    start: float
    """When loading began, after the imports, as `time.perf_counter` says."""
    pads_left: bool = False
    """Whether it wants a batch's padding before the texts."""


def _load_peft(job: Job, engine: Engine, _: Path) -> Loaded:
    import torch

    from export.bench.models import peft_for_batches
    from train.adapter.folder import load_adapter
    from train.adapter.peft import find_adapter_base
    from train.adapter.record import FILES

    torch.set_num_threads(job.threads)
    adapter = load_adapter(Path(job.adapter), job.base_model)
    base = find_adapter_base(adapter)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}
    start = time.perf_counter()
    model: Any = peft_for_batches(adapter, base, job.pad_token_id).to(job.device, dtypes[engine.precision])
    if engine.needs == TORCHAO:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    if engine.compile_mode:
        model = torch.compile(model, mode=engine.compile_mode)

    def run(batch: Batch) -> np.ndarray:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(job.device) for name, array in batch.items()}
            return np.asarray(model(**tensors).logits.float().cpu())

    return Loaded(
        run,
        files=[*base.folder.glob(base.gguf_file or "model*.safetensors"), adapter.folder / FILES.weights],
        library=f"PyTorch {torch.__version__.partition('+')[0]}",
        note=f"{model.config._attn_implementation} attention",
        start=start,
        pads_left=base.is_decoder,
    )


def padded_on_the_left(batch: Batch) -> Batch:
    """Move each row's padding from its end to its front."""
    mask = batch["attention_mask"]
    shifts = mask.shape[1] - mask.sum(axis=1)
    columns = (np.arange(mask.shape[1]) - shifts[:, None]) % mask.shape[1]
    return {name: np.take_along_axis(array, columns, axis=1) for name, array in batch.items()}


def _load_plain(job: Job, _: Engine, graph: Path) -> Loaded:
    import onnxruntime

    from export.runtime.session import open_session, run_session

    start = time.perf_counter()
    session = open_session(graph, threads=job.threads, use_cuda=job.on_cuda)
    names = [item.name for item in session.get_inputs()]
    return Loaded(
        lambda batch: run_session(session, {name: batch[name] for name in names}),
        files=[graph, *graph.parent.glob(f"{graph.name}_data")],
        library=f"ONNX Runtime {onnxruntime.__version__}",
        note=session.get_providers()[0],
        start=start,
    )


def _load_ours(job: Job, engine: Engine, _: Path) -> Loaded:
    from export.bundle.folder import load_bundle
    from export.runtime.classifier import OnnxClassifier

    start = time.perf_counter()
    bundle = load_bundle(Path(job.bundle))
    classifier = OnnxClassifier(
        bundle,
        task=job.task,
        precision=engine.precision,
        threads=job.threads,
        use_cuda=job.on_cuda,
        cuda_graphs=engine.cuda_graphs,
    )
    execution = classifier.execution
    return Loaded(
        classifier.logits,
        files=[bundle.graph_path(engine.precision)],
        library=execution.engine,
        note="; ".join(part for part in (execution.provider, execution.note) if part),
        start=start,
    )


def _load_openvino(job: Job, _: Engine, graph: Path) -> Loaded:
    import openvino

    start = time.perf_counter()
    settings = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(graph), "CPU", settings)
    request = compiled.create_infer_request()
    names = [item.any_name for item in compiled.inputs]
    return Loaded(
        # The next request overwrites the result, so it is copied, as in all other engines.
        lambda batch: np.array(request.infer({name: batch[name] for name in names})["logits"]),
        files=[graph, graph.with_suffix(".bin")],
        library=f"OpenVINO {openvino.__version__.partition('-')[0]}",
        note=f"what is not int8 runs in {compiled.get_property('INFERENCE_PRECISION_HINT').to_string()}",
        start=start,
    )


LOADERS = {PEFT: _load_peft, PLAIN: _load_plain, OPENVINO: _load_openvino, OURS: _load_ours}


@dataclass(frozen=True)
class Started:
    """The engine of this process, and what it is timed on."""

    run: Run
    cells: Mapping[str, Sequence[Batch]]
    plan: Plan

    def one_pass(self, cell: str) -> tuple[float, list[np.ndarray]]:
        """Latency in ms of a pass over a cell's batches, and their logits."""
        start = time.perf_counter()
        logits = [self.run(batch) for batch in self.cells[cell]]
        return 1000 * (time.perf_counter() - start), logits


_started: list[Started] = []
"""What `start_engine` leaves for `time_burst`, which is called later in the same process."""


def start_engine(job: Job, name: str, cells: Sequence[str], graph: str) -> Measured:
    """Load an engine and run it once on each cell; ``graph`` is the file of the engines that load no folder."""
    engine = ENGINES[name]
    inputs: Inputs = pickle.loads(Path(job.inputs).read_bytes())  # noqa: S301 -- written by the benchmark itself
    gpu_before = gpu_memory() if job.on_cuda else None
    loaded = LOADERS[engine.family](job, engine, Path(graph))
    load_seconds = time.perf_counter() - loaded.start
    arranged = padded_on_the_left if loaded.pads_left else dict
    started = Started(loaded.run, {cell: [arranged(batch) for batch in inputs.cells[cell]] for cell in cells}, job.plan)
    _started.append(started)
    timed: dict[str, Timed] = {}
    predictions: dict[str, list[int]] = {}
    for cell in cells:
        first_run_ms, logits = started.one_pass(cell)
        timed[cell] = Timed(first_run_ms)
        # argmax would make a class of NaN as well: such an engine has no predictions.
        if cell in inputs.rows and all(np.isfinite(batch).all() for batch in logits):
            classes = np.concatenate([batch.argmax(axis=1) for batch in logits])
            predictions[cell] = classes[np.argsort(inputs.rows[cell])].tolist()
    # The check comes last: torch.compile specializes on the first shape it meets, which shall be a measured one.
    difference = np.abs(loaded.run(arranged(inputs.check)).astype(np.float64) - inputs.reference).max()
    gpu_after = gpu_memory() if job.on_cuda else None
    return Measured(
        library=loaded.library,
        note=loaded.note,
        load_seconds=load_seconds,
        peak_memory_mib=peak_memory_mib(),
        gpu_memory_mib=gpu_after.since(gpu_before) if gpu_after else None,
        file_mib=sum(path.stat().st_size for path in loaded.files) / 2**20,
        # JSON has no NaN, and an engine whose logits are not numbers is as wrong as can be.
        max_logit_difference=float(np.nan_to_num(difference, nan=sys.float_info.max)),
        cells=timed,
        predictions=predictions,
    )


def time_burst(cell: str) -> tuple[float, ...]:
    """Latencies in ms of a burst of passes over a cell."""
    (started,) = _started
    plan = started.plan
    time.sleep(plan.pause_seconds)
    # Where a pass takes long, one warms up as well as three.
    end = time.perf_counter() + plan.budget_seconds / 4
    for _ in range(WARM_UP_RUNS):
        started.one_pass(cell)
        if time.perf_counter() >= end:
            break
    latencies_ms: list[float] = []
    end = time.perf_counter() + plan.budget_seconds
    while len(latencies_ms) < plan.min_runs or (len(latencies_ms) < plan.max_runs and time.perf_counter() < end):
        latencies_ms.append(started.one_pass(cell)[0])
    return tuple(latencies_ms)


def calibrate(job: Job, source: str, graph: str) -> None:
    """Quantize a plain graph for OpenVINO as optimum-intel does, by NNCF with its preset for transformers."""
    import nncf
    import openvino

    texts = pickle.loads(Path(job.inputs).read_bytes()).calibration  # noqa: S301 -- written by the benchmark itself
    model = openvino.Core().read_model(source)
    names = [item.any_name for item in model.inputs]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(texts, lambda batch: {name: batch[name] for name in names}),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(texts),
    )
    openvino.save_model(quantized, graph, compress_to_fp16=False)


def main() -> None:
    """Make each call that comes from standard input as a pickle, and send what it returns to standard output as another.

    An error is sent as a string: that of an engine's library is a line of the report, and the others are still measured.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # for what libraries print
    while True:
        try:
            call = pickle.load(sys.stdin.buffer)  # noqa: S301 -- from the process that started this one
        except EOFError:
            return
        try:
            answer = call()
        except Exception as cause:
            traceback.print_exc()
            answer = f"{type(cause).__name__}: {first_line(cause)}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
