"""The engines that `export.bench` compares, and the process in which one of them is loaded and timed.

    python -m export.bench.worker JOB ANSWER

`export.bench` starts it, not a person: one process for each engine and round. JOB and ANSWER are JSON files. Nothing
is imported here but NumPy, and in each function what its engine needs, so that the interpreter may be another
environment's, which has OpenVINO and none of promptfold's requirements.

What is measured, for every engine alike:

- load: from files to an engine that can answer, imports left out. Ours checks its files' hashes within that time.
- first run at a shape: with whatever is compiled or planned then.
- latency: NumPy arrays of token ids in, logits as a NumPy array out. After the first run comes a pause, so that no
  thread pool spins any more, a warm-up, and the timed burst.
- memory: the largest resident size of the process, libraries included; on a GPU also what it has taken there.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from export.bench.engines import (
    CPU,
    CUDA,
    ENGINES,
    OPENVINO,
    OURS,
    PEFT,
    PLAIN,
    Batch,
    Engine,
    Inputs,
    Job,
    Measured,
    Peak,
    Plan,
    Timed,
)
from train.common.machine import gpu_memory_used_mib, peak_memory_mib

WARM_UP_RUNS = 3
"""At most so many before a timed burst: the first ones after a pause are slower."""


def _as_it_is(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True)
class _Loaded:
    """An engine that can answer.

    Attributes:
        run: a batch → logits, shape = (n_batch, n_labels); it returns when they are there.
        files: what was loaded.
        library, note: see `Measured`.
        arrange: brings a batch into the form that ``run`` wants, before anything is timed.
    """

    run: Callable[[Batch], np.ndarray]
    files: Sequence[Path]
    library: str
    note: str = ""
    arrange: Callable[[Batch], Batch] = field(default=_as_it_is)


Load = Callable[[], _Loaded]
"""The part of loading that is timed."""


def _load_peft(job: Job, engine: Engine) -> Load:
    import torch

    from train.adapter.folder import load_adapter
    from train.adapter.peft import find_adapter_base
    from train.adapter.record import FILES

    torch.set_num_threads(job.threads)
    adapter = load_adapter(Path(job.adapter))
    base = find_adapter_base(adapter)
    device = torch.device(job.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[engine.precision]

    def load() -> _Loaded:
        model: Any = peft_for_batches(adapter.folder, base, adapter.labels, job.pad_token_id).to(device, dtype)
        if engine.compile_mode:
            model = torch.compile(model, mode=engine.compile_mode)

        def run(batch: Batch) -> np.ndarray:
            with torch.inference_mode():
                tensors = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
                logits: np.ndarray = model(**tensors).logits.float().cpu().numpy()
            if job.device == CUDA:
                torch.cuda.synchronize()
            return logits

        return _Loaded(
            run,
            files=[*base.folder.glob(base.gguf_file or "model*.safetensors"), adapter.folder / FILES.weights],
            library=f"PyTorch {torch.__version__.partition('+')[0]}",
            note=f"{model.config._attn_implementation} attention",
            arrange=padded_on_the_left if job.is_decoder else _as_it_is,
        )

    return load


def peft_for_batches(folder: Path, base: Any, labels: Sequence[str], pad_token_id: int) -> Any:
    """`train.adapter.peft.load_peft_model`, but a decoder takes batches too, padded on the left, as PEFT wants them.

    Its answers then depend on the padding that a text's neighbours bring, so that over a file some of its labels are
    not those which it gives to each text alone, and everybody else's are.

    Args:
        folder: the adapter's.
        base: a `train.model.find.BaseModel`.
    """
    from train.adapter.peft import load_peft_model

    model: Any = load_peft_model(folder, base, labels)
    if base.is_decoder:
        model.base_model.config.pad_token_id = pad_token_id
    return model


def padded_on_the_left(batch: Batch) -> Batch:
    """Move each row's padding from its end to its front."""
    mask = batch["attention_mask"]
    shifts = mask.shape[1] - mask.sum(axis=1)
    columns = (np.arange(mask.shape[1]) - shifts[:, None]) % mask.shape[1]
    return {name: np.take_along_axis(array, columns, axis=1) for name, array in batch.items()}


def _load_plain(job: Job, _: Engine) -> Load:
    import onnxruntime

    from export.runtime.session import open_session, run_session

    path = Path(job.graph)

    def load() -> _Loaded:
        session = open_session(path, threads=job.threads, use_cuda=job.device == CUDA)
        names = [item.name for item in session.get_inputs()]
        return _Loaded(
            lambda batch: run_session(session, {name: batch[name] for name in names}),
            files=[path, *path.parent.glob(f"{path.name}_data")],
            library=f"ONNX Runtime {onnxruntime.__version__}",
            note=session.get_providers()[0],
        )

    return load


def _load_ours(job: Job, engine: Engine) -> Load:
    from export.bundle.folder import load_bundle
    from export.runtime.classifier import OnnxClassifier

    def load() -> _Loaded:
        bundle = load_bundle(Path(job.bundle))
        classifier = OnnxClassifier(
            bundle,
            task=job.task,
            precision=engine.precision,
            threads=job.threads,
            use_cuda=job.device == CUDA,
            cuda_graphs=engine.cuda_graphs,
        )
        execution = classifier.execution
        return _Loaded(
            classifier.logits,
            files=[bundle.graph_path(engine.precision)],
            library=execution.engine,
            note="; ".join(part for part in (execution.provider, execution.note) if part),
        )

    return load


def _load_openvino(job: Job, _: Engine) -> Load:
    # No import statement: promptfold's own environment, in which types are checked, has no OpenVINO.
    openvino: Any = importlib.import_module("openvino")
    path = Path(job.graph)

    def load() -> _Loaded:
        compiled = openvino.Core().compile_model(
            str(path), "CPU", {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
        )
        request = compiled.create_infer_request()
        names = [item.any_name for item in compiled.inputs]

        def run(batch: Batch) -> np.ndarray:
            answer = request.infer({name: batch[name] for name in names})
            # A copy, as everywhere else: the next request overwrites it.
            return np.array(answer["logits"])

        return _Loaded(
            run,
            files=[path, path.with_suffix(".bin")],
            library=f"OpenVINO {openvino.__version__.partition('-')[0]}",
            note=f"what is not int8 runs in {compiled.get_property('INFERENCE_PRECISION_HINT').to_string()}",
        )

    return load


LOADERS: dict[str, Callable[[Job, Engine], Load]] = {
    PEFT: _load_peft,
    PLAIN: _load_plain,
    OPENVINO: _load_openvino,
    OURS: _load_ours,
}
"""By family: import what is needed and return the part that is timed."""


def measure(job: Job) -> Measured:
    """Load an engine and time it on every cell."""
    engine = ENGINES[job.engine]
    inputs = Inputs.load(Path(job.inputs))
    load = LOADERS[engine.family](job, engine)
    gpu_mib_before = gpu_memory_used_mib() if job.device == CUDA else None
    start = time.perf_counter()
    loaded = load()
    load_seconds = time.perf_counter() - start
    cells: dict[str, Timed] = {}
    predictions: dict[str, list[int]] = {}
    for name in job.cells:
        batches = [loaded.arrange(batch) for batch in inputs.cells[name]]
        passes = time_passes(loaded.run, batches, job.plan)
        cells[name], logits = passes.timed, passes.logits
        if name in inputs.rows:
            order = np.concatenate(inputs.rows[name])
            classes = np.empty(len(order), np.int64)
            classes[order] = np.concatenate([batch.argmax(axis=1) for batch in logits])
            predictions[name] = classes.tolist()
    # Last: torch.compile takes the first shape it meets for the only one, and that shall be a measured one.
    logits_of_check = loaded.run(loaded.arrange(inputs.check))
    difference = float(np.abs(logits_of_check.astype(np.float64) - inputs.reference).max())
    gpu_mib = None if gpu_mib_before is None else gpu_memory_used_mib()
    return Measured(
        library=loaded.library,
        note=loaded.note,
        load_seconds=load_seconds,
        peak_memory_mib=peak_memory_mib(),
        gpu_memory_mib=None if gpu_mib is None or gpu_mib_before is None else gpu_mib - gpu_mib_before,
        file_bytes=sum(path.stat().st_size for path in loaded.files),
        # JSON knows no NaN, and an engine that gives no number is as wrong as can be.
        max_logit_difference=difference if np.isfinite(difference) else sys.float_info.max,
        cells=cells,
        predictions=predictions,
    )


@dataclass(frozen=True, eq=False)
class Passes:
    """Passes over the batches of a cell.

    Attributes:
        timed: how long they took.
        logits: of the first one; of each batch float32, shape = (n_batch, n_labels)
    """

    timed: Timed
    logits: list[np.ndarray]


def time_passes(run: Callable[[Batch], np.ndarray], batches: Sequence[Batch], plan: Plan) -> Passes:
    """Time passes over the batches of a cell."""

    def one_pass() -> tuple[float, list[np.ndarray]]:
        start = time.perf_counter()
        logits = [run(batch) for batch in batches]
        return 1000 * (time.perf_counter() - start), logits

    first_run_ms, logits = one_pass()
    time.sleep(plan.pause_seconds)
    # Of what takes long, one run warms up as well as three.
    end = time.perf_counter() + plan.budget_seconds / 4
    for _ in range(WARM_UP_RUNS):
        one_pass()
        if time.perf_counter() >= end:
            break
    latencies_ms: list[float] = []
    end = time.perf_counter() + plan.budget_seconds
    while len(latencies_ms) < plan.min_runs or (len(latencies_ms) < plan.max_runs and time.perf_counter() < end):
        latencies_ms.append(one_pass()[0])
    return Passes(Timed(first_run_ms, tuple(latencies_ms)), logits)


def calibrate(job: Job) -> None:
    """Quantise the plain graph for OpenVINO as optimum-intel does, by NNCF with its preset for transformers."""
    openvino: Any = importlib.import_module("openvino")
    nncf: Any = importlib.import_module("nncf")
    texts = Inputs.load(Path(job.inputs)).calibration
    model = openvino.Core().read_model(job.source)
    names = [item.any_name for item in model.inputs]
    dataset = nncf.Dataset(texts, lambda batch: {name: batch[name] for name in names})
    quantized = nncf.quantize(
        model,
        dataset,
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(texts),
    )
    openvino.save_model(quantized, job.graph, compress_to_fp16=False)


PRODUCT_SIZES = {CPU: (256, 1024, 2048), CUDA: (2048, 4096, 8192)}
"""Rows and columns of the matrices: the larger ones reach more of a peak, and a GPU's needs larger ones still."""


LONGEST_PRODUCT_SECONDS = 1.5
"""What would take longer, at the pace of the smaller ones, is not tried: where a processor lacks the instructions, PyTorch
multiplies in bf16 and int8 number by number, and the largest matrices would take minutes."""


def find_peaks(job: Job) -> list[Peak]:
    """The fastest square matrix products here, with the same number of threads as the engines have."""
    import torch

    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16} | ({"fp16": torch.float16} if job.device == CUDA else {})
    best: dict[str, Peak] = {}
    seconds_per_cell: dict[str, float] = {}

    def try_product(precision: str, product: str, size: int, multiply: Callable[[], object]) -> None:
        if size**3 * seconds_per_cell.get(product, 0) > LONGEST_PRODUCT_SECONDS:
            return
        seconds = _fastest_seconds(multiply, job)
        seconds_per_cell[product] = seconds / size**3
        rate = 2 * size**3 / seconds / 1e9
        if precision not in best or rate > best[precision].gflop_per_second:
            best[precision] = Peak(precision, rate, f"{product}, {size} × {size} × {size}")

    for size in PRODUCT_SIZES[job.device]:
        for precision, dtype in kinds.items():
            # Of ones a GPU multiplies faster than of numbers: it draws less power.
            square = torch.randn(size, size, device=device).to(dtype)
            try_product(precision, f"torch.mm in {precision}", size, partial(torch.mm, square, square))
        whole = torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8)
        try_product("int8", "torch._int_mm", size, partial(torch._int_mm, whole, whole))
        if job.device == CPU:
            try_product("int8", "ONNX Runtime's MatMulInteger", size, _integer_product(size, job.threads))
    return list(best.values())


def _fastest_seconds(multiply: Callable[[], object], job: Job) -> float:
    multiply()
    time.sleep(job.plan.pause_seconds)
    seconds: list[float] = []
    end = time.perf_counter() + job.plan.budget_seconds / 4
    while len(seconds) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        multiply()
        if job.device == CUDA:
            import torch

            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _integer_product(size: int, threads: int) -> Callable[[], object]:
    """ONNX Runtime's product of unsigned rows with a constant signed matrix, which its int8 dense layers are."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    matrix = numpy_helper.from_array(np.ones((size, size), np.int8), "matrix")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["rows", "matrix"], ["product"])],
        "product",
        [helper.make_tensor_value_info("rows", TensorProto.UINT8, [size, size])],
        [helper.make_tensor_value_info("product", TensorProto.INT32, [size, size])],
        [matrix],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rows = np.ones((size, size), np.uint8)
    return lambda: session.run(None, {"rows": rows})


def _answer(job: Job) -> dict[str, Any]:
    """Do a job; what went wrong is an answer too.

    An engine is other people's code on a machine we do not know: without a compiler, with a model that it cannot
    take. Whatever it raises, the other engines shall still be measured, and its line in the table says why it is empty.
    """
    try:
        if job.work == "peaks":
            return {"peaks": [asdict(peak) for peak in find_peaks(job)]}
        if job.work == "calibrate":
            calibrate(job)
            return {}
        return {"measured": asdict(measure(job))}
    except Exception as cause:
        import traceback

        traceback.print_exc()
        lines = str(cause).strip().splitlines()
        return {"error": f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__}


def main(argv: Sequence[str]) -> int:
    """Run a process for `export.bench`: the job's file, then where the answer goes."""
    job_file, answer_file = map(Path, argv)
    job = Job.from_json(json.loads(job_file.read_text(encoding="utf-8")))
    answer_file.write_text(json.dumps(_answer(job)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
