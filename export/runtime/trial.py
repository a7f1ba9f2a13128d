"""The first opening of an untrusted bundle, in a process of its own with limits of memory and time."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from export.bundle.folder import FP16, Bundle, load_bundle
from train.common.errors import BundleError, PromptfoldError, first_line
from train.common.limits import MIB

ROOT = Path(__file__).parents[2]

TRIAL_SECONDS = 60.0
"""The limit for a trial; the bundles of the shipped adapters take one second."""
BASE_MIB = 512
"""Address space for Python, ONNX Runtime and the tokenizer."""
TIMES_THE_GRAPH = 4
"""Address space for a graph, in times its size: the file, the weights, and both once more while it is optimized."""


def try_bundle(bundle: Bundle, *, memory_mib: int | None = None, seconds: float = TRIAL_SECONDS) -> None:
    """Open the graphs of a bundle, and let each classify two short texts, in a process of its own.

    That process runs on the CPU, under limits of memory (address space; on Linux only) and of time, and writes no files.
    A graph that needs more memory than there is, never ends or crashes ONNX Runtime harms it alone. An fp16 graph is left
    out, as it is for GPUs. This is no sandbox: the process has its user's rights, and what misbehaves only with other
    texts is not found.

    Raises:
        BundleError: a graph cannot be opened or gives no logits within the limits.
    """
    if memory_mib is None:
        largest = max(bundle.graph_bytes(name) for name in bundle.precisions if name != FP16)
        memory_mib = BASE_MIB + int(TIMES_THE_GRAPH * largest / MIB)
    remedy = (
        f"It had a process of its own, {memory_mib} MiB of memory and {seconds:g} s. If you trust who made it, open it "
        "without this trial."
    )
    command = [sys.executable, "-B", "-m", "export.runtime.trial", bundle.folder.resolve(), memory_mib, seconds]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # One thread of each kind: every further one reserves address space.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
    try:
        child = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | threads | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as cause:
        raise BundleError(f"{bundle.folder} was not open after {seconds:g} s. {remedy}") from cause
    if child.returncode:
        try:
            trouble = str(json.loads(child.stdout)["trouble"])
        except (ValueError, KeyError, TypeError):
            trouble = _describe_exit(child.returncode)
        raise BundleError(f"{bundle.folder} cannot be opened: {trouble}. {remedy}")


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"its process ended with status {status}"
    with suppress(ValueError):
        name = signal.Signals(-status).name
        return "it took too long" if name == "SIGXCPU" else f"its process ended by {name}"
    return f"its process ended by signal {-status}"


def limit_process(memory_mib: int, seconds: float) -> None:
    """Limit this process for the rest of its life."""
    try:
        import resource
    except ImportError:  # not POSIX
        return
    n_bytes, cpu_seconds = memory_mib * MIB, max(1, round(seconds))
    limits = {resource.RLIMIT_AS: (n_bytes, n_bytes), resource.RLIMIT_FSIZE: (0, 0), resource.RLIMIT_CORE: (0, 0)}
    # At the first the process gets SIGXCPU, at the second SIGKILL.
    limits[resource.RLIMIT_CPU] = (cpu_seconds, cpu_seconds + 1)
    for limit, pair in limits.items():
        # macOS knows the limit of memory and refuses to set it.
        with suppress(ValueError, OSError):
            resource.setrlimit(limit, pair)


def _classify_two_texts(folder: Path) -> None:
    """Open every graph that is for a CPU, and run it for every task."""
    from export.runtime.classifier import OnnxClassifier, with_task

    bundle = load_bundle(folder)
    first = bundle.tasks[0].name
    for precision in [name for name in bundle.precisions if name != FP16]:
        classifier = OnnxClassifier(bundle, task=first, precision=precision, threads=1, use_cuda=False)
        for task in bundle.tasks:
            n_texts = len(task.task.text_columns)
            arrays = classifier.tokenize([("a",) * n_texts, ("a b c",) * n_texts]).arrays
            classifier.logits(with_task(arrays, task.number) if bundle.has_many_tasks else arrays)


def main(argv: list[str]) -> int:
    """The process of `try_bundle`: folder, MiB and seconds in, a JSON object out if there is trouble."""
    folder, memory_mib, seconds = Path(argv[0]), int(argv[1]), float(argv[2])
    limit_process(memory_mib, seconds)
    try:
        _classify_two_texts(folder)
    except MemoryError:
        trouble = "it needs more memory"
    except ImportError as cause:  # a library that finds no memory for its parts
        trouble = "its process could not start: " + (str(cause).strip().splitlines() or ["no module"])[-1]
    except PromptfoldError as error:
        trouble = str(error)
    except Exception as cause:  # any library's error over a malformed file
        trouble = first_line(cause)
    else:
        return 0
    print(json.dumps({"trouble": trouble[:500].rstrip(". ")}))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
