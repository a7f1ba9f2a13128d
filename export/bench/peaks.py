"""The machine's peak in each precision: the fastest square matrix product, with as many threads as the engines have."""

import time
from collections.abc import Callable, Iterator
from functools import partial

from export.bench.engines import CPU, CUDA, Job, Peak

PRODUCT_SIZES = {CPU: (256, 1024, 2048), CUDA: (2048, 4096, 8192)}
"""Rows and columns of the matrices: the larger ones reach more of a peak, and a GPU's needs larger ones still."""
LONGEST_PRODUCT_SECONDS = 1.5
"""A product that would take longer, at the pace of the smaller ones, is not tried: where a processor lacks the
instructions, PyTorch multiplies in bf16 and int8 number by number, and the largest matrices would take minutes."""


def find_peaks(job: Job) -> list[Peak]:
    """The fastest product of each precision."""
    from torch.utils.benchmark import Timer

    best: dict[str, Peak] = {}
    pace: dict[str, float] = {}  # seconds a multiply-add
    for size in PRODUCT_SIZES[job.device]:
        for precision, product, multiply in _products(job, size):
            if size**3 * pace.get(product, 0) > LONGEST_PRODUCT_SECONDS:
                continue
            time.sleep(job.plan.pause_seconds)
            timer = Timer("multiply()", globals={"multiply": multiply}, num_threads=job.threads)
            seconds = min(timer.blocked_autorange(min_run_time=job.plan.budget_seconds / 4).times)
            pace[product] = seconds / size**3
            peak = Peak(precision, 2 * size**3 / seconds / 1e9, f"{product}, {size} × {size} × {size}")
            best[precision] = max(best.get(precision, peak), peak, key=lambda item: item.gflop_per_second)
    return list(best.values())


def _products(job: Job, size: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Precision, description and call of each kind of square matrix product."""
    import onnxruntime
    import torch
    from onnx import numpy_helper, parser

    device = torch.device(job.device)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16} | ({"fp16": torch.float16} if job.on_cuda else {})
    for precision, dtype in dtypes.items():
        # Random, because a GPU draws less power for ones and multiplies them faster.
        square = torch.randn(size, size, device=device).to(dtype)
        yield precision, f"torch.mm in {precision}", partial(torch.mm, square, square)
    whole = torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8)
    yield "int8", "torch._int_mm", partial(torch._int_mm, whole, whole)
    if not job.on_cuda:
        # Unsigned rows and a constant signed matrix, as in ONNX Runtime's int8 dense layers.
        model = parser.parse_model(
            f'<ir_version: 10, opset_import: ["": 18]> product (uint8[{size}, {size}] rows) => '
            f"(int32[{size}, {size}] product) {{ product = MatMulInteger(rows, matrix) }}"
        )
        model.graph.initializer.append(numpy_helper.from_array(whole.numpy(), "matrix"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job.threads
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        rows = whole.numpy().astype("uint8")
        yield "int8", "ONNX Runtime's MatMulInteger", partial(session.run, None, {"rows": rows})
