"""The steps of `tests.gpu.check`, each in a process of its own: ``python -m tests.gpu.steps STEP [NAME]``.

GPU_CHECK_DEVICE=cpu tries them without a GPU, at smaller shapes.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

# None of these imports torch or ONNX Runtime, whose order counts.
from demo.engines.timing import BurstPlan, timed_runs
from export.bench import prepare as preparation
from export.bench import random_model
from export.bench.config import BenchConfig, Shape
from export.bench.models import peft_for_batches
from export.bench.rounds import start_one, time_engines
from export.bundle.folder import BUNDLE, load_bundle
from export.runtime.classifier import OnnxClassifier
from export.runtime.session import cuda_absence, providers
from tests.gpu.kernels import attention, profile
from tests.gpu.places import ADAPTERS, DEVICE, ON_CUDA, ROWS, SHAPES, WORK, folders, tell
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base
from train.common.folder_record import read_record
from train.common.machine import gpu_memory, usable_cores

_BERT: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
_BERT |= {"num_hidden_layers": 3, "initializer_range": 0.2}
TINY: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT | {"num_attention_heads": 2, "type_vocab_size": 1, "max_position_embeddings": 258},
    "mpnet": _BERT | {"max_position_embeddings": 258},
    "distilbert": {"dim": 128, "n_heads": 4, "hidden_dim": 256, "n_layers": 3, "initializer_range": 0.2},
    "gpt2": {"n_embd": 128, "n_head": 4, "n_layer": 3, "n_positions": 256, "initializer_range": 0.2},
    "llama": _BERT | {"num_key_value_heads": 2, "max_position_embeddings": 256},
}
"""Sizes of a tiny model of each family; heads are 32 or 64 wide, as of minilm and roberta-large."""
TINY_KINDS = ("bert", "bert-v2", "roberta", "roberta-v2", "mpnet", "distilbert", "gpt2", "gpt2-v2", "llama-v2")


def machine() -> None:
    """Versions, GPU, providers; ONNX Runtime before torch, as `export.score` has it."""
    from importlib.metadata import version

    import onnxruntime
    from onnx import parser

    onnxruntime.preload_dlls()
    names = ("onnxruntime-gpu", "transformers", "peft", "optimum", "optimum-onnx", "onnx", "numpy")
    tell("versions", {"python": sys.version.split()[0], **{name: version(name) for name in names}})
    tell("why no CUDA in ONNX Runtime", cuda_absence())
    # Which providers are built in says nothing; whether one loads and computes shows only in a session.
    header = '<ir_version: 10, opset_import: ["": 18, "com.microsoft": 1]>'
    text = f"{header} g (float[2, 4] rows) => (float[2, 4] answer) {{ answer = com.microsoft.Gelu (rows) }}"
    model = parser.parse_model(text).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=[name for name, _ in providers(use_cuda=ON_CUDA)])
    sums = session.run(None, {"rows": np.ones((2, 4), np.float32)})[0].sum()
    tell("a session", {"providers": session.get_providers(), "eight times GELU(1) = 6.7308": float(sums)})
    import torch

    found: list[Any] = [torch.__version__, torch.version.cuda]
    if ON_CUDA:
        fields = "name,driver_version,memory.total,memory.used,clocks.sm,power.limit"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        tell("nvidia-smi", subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip())
        found += [torch.backends.cudnn.version(), torch.cuda.get_device_name(), torch.cuda.get_device_capability()]
    tell("torch", found)


def tiny(kinds: str = "") -> None:
    """Every family, so that a graph that CUDA computes otherwise, or cannot capture, is found in seconds."""
    from transformers import AutoConfig

    from export.fold.config import ExportConfig
    from export.fold.pipeline import export_adapters

    for kind in kinds.split(",") if kinds else TINY_KINDS:
        family, _, suffix = kind.partition("-")
        base, adapter, bundle = (WORK / "tiny" / kind / name for name in ("base", "adapter", "bundle"))
        method = "p-tuning-v2" if suffix else "p-tuning"
        try:
            settings = AutoConfig.for_model(family, vocab_size=200, pad_token_id=1, **TINY[family])
            random_model.write_random_base(settings, base)
            random_model.write_random_adapter(base, adapter, method=method, head_bias=0.0)
            export_adapters(ExportConfig((adapter,), out=bundle, precision="fp16", ungated=True))
            _compare(kind, adapter, bundle, ("1x7", "3x16", "2x33", "8x60"))
        except Exception as cause:  # the next kind may still say something
            tell(kind, f"{type(cause).__name__}: {cause}"[:900])


def graphs(name: str) -> None:
    """A bundle's graphs at the benchmark's shapes."""
    _compare(name, *folders(name), SHAPES)


def _compare(title: str, adapter_folder: Path, bundle_folder: Path, shapes: tuple[str, ...]) -> None:
    """`OnnxClassifier` in every way, against PEFT on the CPU.

    The shapes come round three times, each time with new texts: a CUDA graph that reads what another shape's run left
    behind is right the first time, and perhaps the second.
    """
    import torch

    adapter, bundle = load_adapter(adapter_folder), load_bundle(bundle_folder)
    base = find_adapter_base(adapter)
    peft: Any = peft_for_batches(adapter, base, bundle.pad_token_id)
    batches = list(_batches(bundle, shapes, padded=not base.is_decoder))
    device = "cuda" if ON_CUDA and title == "large" else "cpu"  # 256 × 60 through 24 layers takes a CPU minutes
    peft.to(device)
    with torch.inference_mode():
        expected = [
            peft(**{key: torch.from_numpy(value).to(device) for key, value in batch.items()}).logits.cpu().numpy()
            for batch in batches
        ]
    del peft
    if ON_CUDA:
        torch.cuda.empty_cache()
    spread = float(np.abs(np.concatenate(expected) - expected[0][0]).max())

    def difference(some: list[Any], others: list[Any]) -> float:
        return max(float(np.abs(one - other).max()) for one, other in zip(some, others, strict=True))

    for precision in ("fp32", "fp16"):
        plain: list[Any] = []
        for cuda_graphs in (False, True) if ON_CUDA else (False,):
            key = f"{title} {precision}{' with CUDA graphs' if cuda_graphs else ''}"
            before, began = gpu_memory(), time.monotonic()
            try:
                classifier = OnnxClassifier(bundle, precision=precision, use_cuda=ON_CUDA, cuda_graphs=cuda_graphs)
                load_seconds = time.monotonic() - began
                logits = [classifier.logits(batch) for batch in batches]
            except Exception as cause:
                tell(key, f"{type(cause).__name__}: {cause}"[:900])
                continue
            changed = [(one.argmax(1) != other.argmax(1)).sum() for one, other in zip(logits, expected, strict=True)]
            result = {
                "provider": classifier.execution.provider,
                "note": classifier.execution.note,
                "captured": bool(cuda_graphs and classifier.cuda_graphs is not None),
                "max_logit_difference": difference(logits, expected),
                "logits_spread": spread,
                "labels_changed": int(sum(changed)),
                "texts": sum(map(len, expected)),
                "load_seconds": round(load_seconds, 2),
                "gpu_mib": (after := gpu_memory()) and after.since(before),
            }
            if plain:
                result["max_difference_from_without"] = difference(logits, plain)
            plain = plain or logits
            tell(key, result)
            del classifier


def _batches(bundle: Any, shapes: tuple[str, ...], *, padded: bool) -> Iterator[dict[str, Any]]:
    """Each shape three times, all shapes before the first comes again."""
    generator = np.random.default_rng(1)
    for turn in range(3):
        for text in shapes:
            yield preparation.random_texts(generator, Shape.parse(text), bundle, padded=padded and turn > 0)


def _config(name: str, **changed: Any) -> BenchConfig:
    plan: dict[str, Any] = {"pause": 0.1, "min_runs": 7, "max_runs": 200, "budget_seconds": 0.25}
    return BenchConfig(*folders(name), shapes=SHAPES, rounds=2, device=DEVICE, **(plan | changed))


def engines(name: str) -> None:
    """Export, start every engine, and time them once `tests.gpu.check` says that nothing else runs.

    Files in the model's folder say how far it is: exported, ready, failed, done; ``go`` comes from outside.
    """
    folder = WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as at_end:
            config, prepared = _prepare(name, folder)
            began = time.monotonic()
            start = partial(start_one, config, prepared, work=folder / "bench", at_end=at_end)
            names = config.all_engines
            with ThreadPoolExecutor(len(names)) as pool:
                started = dict(zip(names, pool.map(start, names), strict=True))
            absent = {name: one for name, one in started.items() if isinstance(one, str)}
            tell("ready", {"absent": absent, "seconds": round(time.monotonic() - began, 1)})
            (folder / "ready").touch()
            while not (folder / "go").exists():
                time.sleep(0.1)
            _tell_timed(time_engines(config, prepared, folder / "bench", started))
            (folder / "done").touch()
    except BaseException:
        (folder / "failed").touch()
        raise


def _prepare(name: str, folder: Path) -> tuple[BenchConfig, preparation.Prepared]:
    from export.fold.config import ExportConfig
    from export.fold.pipeline import export_adapters

    began = time.monotonic()
    rows = ROWS if ROWS.is_file() and name != "large" else None
    if name == "large":
        shape = "roberta-large"
        if not ON_CUDA:
            from transformers import AutoConfig

            shape = str(folder / "small")
            AutoConfig.for_model("roberta", vocab_size=200, **TINY["roberta"]).save_pretrained(shape)
        random_model.make_random_bundle(shape, folder, device=DEVICE)
    else:
        gate: dict[str, Any] = {"validation_files": (rows,)} if rows else {"ungated": True}
        export_adapters(ExportConfig((ADAPTERS[name],), out=folder / "bundle", precision="fp16", **gate))
    (folder / "exported").touch()
    manifest = read_record(folder / "bundle", BUNDLE)
    gates = {graph.precision: list(map(str, graph.gates)) for graph in load_bundle(folder / "bundle").graphs}
    parity = manifest["tasks"][0]["parity"]["max_logit_difference"]
    found = {"fp32 against PEFT on the CPU": parity, "providers": manifest["providers_tried"], "gates": gates}
    tell("exported", found | {"seconds": round(time.monotonic() - began, 1)})
    (folder / "bench").mkdir()
    config = _config(name, file=rows)
    return config, preparation.prepare(config, folder / "bench", usable_cores())


def _tell_timed(found: dict[str, Any]) -> None:
    keys = ("library", "note", "status", "reason", "max_logit_difference", "gpu_memory_mib", "scores")
    columns = ("latency_ms", "speedup", "peak_share")
    for engine in found["engines"]:
        cells = {cell["cell"]: [cell[key] and round(cell[key], 3) for key in columns] for cell in engine["cells"]}
        tell(engine["engine"], {"median ms, × PEFT, of peak": cells, **{key: engine[key] for key in keys}})
    tell("peaks", found["peaks"])
    tell("whole", found)


def hidden() -> None:
    """`tests.gpu.check` hides the GPU from this process; then the driver's library as well, where root may."""
    tell("with CUDA_VISIBLE_DEVICES empty", cuda_absence())
    code = (
        "from export.bundle.folder import load_bundle; from export.runtime.classifier import OnnxClassifier; from pathlib import Path; "
        f"print(OnnxClassifier(load_bundle(Path({str(folders('v2')[1])!r}))).execution)"
    )
    tell("OnnxClassifier then", _last_line([sys.executable, "-c", code]))
    masked = (
        "for f in $(ldconfig -p | grep -o '/[^ ]*libcuda.so.1$') $(find / -xdev -name 'libcuda.so*' 2>/dev/null); do "
        'mount --bind /dev/null "$f"; done; exec "$@"'
    )
    words = ["unshare", "-m", "sh", "-c", masked, "sh", sys.executable, "-c", code]
    tell("with the driver's library masked", _last_line(words))


def _last_line(words: list[str]) -> str:
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    return ((ended.stdout + ended.stderr).strip().splitlines() or [""])[-1][:600]


def demo() -> None:
    """`PyTorchBackend` in its modes, held against the graph in fp32."""
    from demo.engines.pytorch import PyTorchBackend

    onnx = OnnxClassifier(load_bundle(folders("v2")[1]), precision="fp32", use_cuda=ON_CUDA)
    texts = [("Coast redwoods are tall.", "The tallest trees are redwoods."), ("It rains.", "The sun shines.")]
    arrays = onnx.tokenize(texts).arrays
    expected = onnx.logits(arrays)
    for mode in ("eager", "bf16", "compiled"):
        try:
            engine = PyTorchBackend(ADAPTERS["v2"], len(os.sched_getaffinity(0)), mode=mode)
            difference = float(np.abs(engine.logits(arrays) - expected).max())
            latency = float(np.median(timed_runs(partial(engine.logits, arrays), BurstPlan(20, 100, 0.5))))
        except Exception as cause:
            tell(mode, f"{type(cause).__name__}: {cause}"[:600])
            continue
        found = {"max_logit_difference": difference, "median_ms": round(latency, 3)}
        tell(mode, {"provider": engine.execution.provider, **found})


STEPS: dict[str, Callable[..., None]] = {
    step.__name__: step for step in (machine, tiny, engines, graphs, attention, profile, hidden, demo)
}

if __name__ == "__main__":
    STEPS[sys.argv[1]](*sys.argv[2:])
