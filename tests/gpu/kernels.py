"""Which kernels a request launches on a GPU, and how long attention takes by which of them: steps of `tests.gpu.steps`."""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

# None of these imports torch or ONNX Runtime, whose order counts.
from demo.engines.timing import BurstPlan, timed_runs
from export.bench import prepare as preparation
from export.bench.config import Shape
from export.bench.models import peft_for_batches
from export.bundle.folder import load_bundle
from export.runtime import session
from export.runtime.classifier import OnnxClassifier
from tests.gpu.places import DEVICE, ON_CUDA, SHAPES, folders, tell
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base

FASTEST = "fp16" if ON_CUDA else "fp32"
"""Without a GPU the bundle of random weights has no fp16."""


def attention(name: str) -> None:
    """The fp16 graph with ONNX Runtime's own attention and with cuDNN's: first runs, medians, and a batch with padding."""
    bundle = load_bundle(folders(name)[1])
    batches = {text: preparation.random_texts(np.random.default_rng(3), Shape.parse(text), bundle) for text in SHAPES}
    padded = preparation.random_texts(np.random.default_rng(4), Shape(5, 40), bundle, padded=True)
    plan = BurstPlan(20, 100, 0.2)
    for cuda_graphs in (False, True) if ON_CUDA else (False,):
        of_padded: list[Any] = []
        for by_cudnn in (False, True):
            session.takes_cudnn_attention = partial(_answer, by_cudnn)
            classifier = OnnxClassifier(bundle, precision=FASTEST, use_cuda=ON_CUDA, cuda_graphs=cuda_graphs)
            of_padded.append(classifier.logits(padded))
            found: dict[str, Any] = {"note": classifier.execution.note}
            for text, batch in batches.items():
                began = time.perf_counter()
                classifier.logits(batch)
                first_ms = 1e3 * (time.perf_counter() - began)
                time.sleep(0.1)
                median_ms = float(np.median(timed_runs(partial(classifier.logits, batch), plan)))
                found[text] = {"first_ms": round(first_ms, 1), "median_ms": round(median_ms, 3)}
            found["max_logit_difference_where_padded"] = float(np.abs(of_padded[-1] - of_padded[0]).max())
            tell(f"{'cuDNN' if by_cudnn else 'own'}{' with CUDA graphs' if cuda_graphs else ''}", found)
            del classifier


def _answer(answer: bool, **_: object) -> bool:
    return answer


def profile(name: str) -> None:
    """Kernels, launches and copies of a request, counted by CUPTI through PyTorch's profiler, which sees ONNX Runtime's."""
    import torch

    adapter_folder, bundle_folder = folders(name)
    adapter, bundle = load_adapter(adapter_folder), load_bundle(bundle_folder)

    def ours(precision: str, *, cuda_graphs: bool = False) -> Callable[[dict[str, Any]], Any]:
        return OnnxClassifier(bundle, precision=precision, use_cuda=ON_CUDA, cuda_graphs=cuda_graphs).logits

    def peft_eager(dtype: torch.dtype) -> Callable[[dict[str, Any]], Any]:
        model: Any = peft_for_batches(adapter, find_adapter_base(adapter), bundle.pad_token_id)
        model.to(DEVICE, dtype)

        def run(batch: dict[str, Any]) -> Any:
            with torch.inference_mode():
                return model(**{key: torch.from_numpy(value).to(DEVICE) for key, value in batch.items()}).logits.cpu()

        return run

    ways: dict[str, Callable[[], Callable[[dict[str, Any]], Any]]] = {
        "ours-fp16": partial(ours, "fp16"),
        "ours-graphs-fp16": partial(ours, "fp16", cuda_graphs=True),
        "ours-fp32": partial(ours, "fp32"),
        "peft-eager-fp16": partial(peft_eager, torch.float16),
    }
    generator = np.random.default_rng(2)
    for way, make in ways.items():
        run = make()
        for text in (SHAPES[1], SHAPES[-1]):
            batch = preparation.random_texts(generator, Shape.parse(text), bundle)
            for _ in range(3):
                run(batch)
            tell(f"{way} {text}", _profiled(partial(run, batch)))
        del run


def _profiled(request: Callable[[], Any], n_requests: int = 5) -> dict[str, Any]:
    """One request's kernels by time, and its calls to CUDA, as means over a few requests."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    began = time.perf_counter()
    for _ in range(n_requests):
        request()
    wall_us = 1e6 * (time.perf_counter() - began) / n_requests
    with profiler(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * ON_CUDA) as found:
        for _ in range(n_requests):
            request()
    calls, kernels, times = Counter[str](), Counter[str](), Counter[str]()
    for event in found.events():
        if str(event.device_type).endswith("CUDA"):
            kernels[event.name] += 1
            times[event.name] += event.device_time
        elif event.name.startswith(("cudaLaunch", "cudaGraphLaunch", "cudaMemcpy", "cuLaunch", "cudaMemset")):
            calls[event.name] += 1
    longest = [[key[:110], kernels[key] / n_requests, round(us / n_requests, 1)] for key, us in times.most_common(16)]
    return {
        "wall_us": round(wall_us),
        "gpu_us": round(sum(times.values()) / n_requests),
        "calls": {key: count / n_requests for key, count in calls.items()},
        "kernels_and_copies": sum(kernels.values()) / n_requests,
        "longest": longest,
    }
