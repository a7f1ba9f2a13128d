"""A first opening of a bundle from elsewhere, in a process of its own with limits of memory and time."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from train.common.errors import BundleError, PromptfoldError, first_line
from train.common.limits import MIB

if TYPE_CHECKING:
    from export.bundle.folder import Bundle


ROOT = Path(__file__).parents[2]


# A first opening


TRIAL_SECONDS = 60.0
"""For a first opening; the shipped adapters' bundles take one."""


_BASE_MIB = 512
"""Of address space, for Python, ONNX Runtime and the tokenizer."""


_TIMES_THE_GRAPH = 4
"""How many times a graph's size its opening may take: the file, the weights, and both once more while it is optimised."""


def try_bundle(bundle: "Bundle", *, memory_mib: int | None = None, seconds: float = TRIAL_SECONDS) -> None:
    """Open the graphs of a bundle for the first time, and let each answer two short texts, in a process of its own.

    That process runs on the CPU, under limits of memory and time, and writes no files. A graph that wants more memory
    than there is, never ends or brings ONNX Runtime down harms it alone. An fp16 graph is left out, as it is for GPUs.
    This is no sandbox: the process has its user's rights, and what misbehaves only with other texts is not found.
    The limit of memory needs Linux; elsewhere the time alone is limited.

    Args:
        bundle: as from `load_bundle`.
        memory_mib: of address space; by default 512 and four times the largest graph.
        seconds: of time, and of processor time.

    Raises:
        BundleError: a graph cannot be opened or gives no logits within the limits.
    """
    from export.bundle.folder import FP16

    if memory_mib is None:
        largest = max(bundle.graph_path(name).stat().st_size for name in bundle.precisions if name != FP16)
        memory_mib = _BASE_MIB + int(_TIMES_THE_GRAPH * largest / MIB)
    limits = f"{memory_mib} MiB of memory and {seconds:g} s"
    remedy = f"It had a process of its own, {limits}. If you trust who made it, open it without this trial."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # One thread of each kind: every further one reserves address space.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
    environment = os.environ | threads | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-B", "-m", "export.runtime.trial", str(bundle.folder.resolve())]
    try:
        child = subprocess.run(
            [*command, str(memory_mib), str(seconds)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as cause:
        raise BundleError(f"{bundle.folder} was not open after {seconds:g} s. {remedy}") from cause
    if child.returncode == 0:
        return
    try:
        trouble = str(json.loads(child.stdout)["trouble"])
    except (ValueError, KeyError, TypeError):
        trouble = _ending(child.returncode)
    raise BundleError(f"{bundle.folder} cannot be opened: {trouble}. {remedy}")


def _ending(status: int) -> str:
    """How a process ended that said nothing."""
    if status >= 0:
        return f"its process ended with status {status}"
    with suppress(ValueError):
        name = signal.Signals(-status).name
        return "it took too long" if name == "SIGXCPU" else f"its process ended by {name}"
    return f"its process ended by signal {-status}"


def _limit(memory_mib: int, seconds: float) -> None:
    """Limit this process for the rest of its life."""
    try:
        import resource
    except ImportError:  # not POSIX
        return
    n_bytes, cpu_seconds = memory_mib * MIB, max(1, round(seconds))
    limits = {
        resource.RLIMIT_AS: (n_bytes, n_bytes),
        # At the first the process gets SIGXCPU, at the second SIGKILL.
        resource.RLIMIT_CPU: (cpu_seconds, cpu_seconds + 1),
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_CORE: (0, 0),
    }
    for limit, pair in limits.items():
        # macOS knows the limit of memory and refuses to set it.
        with suppress(ValueError, OSError):
            resource.setrlimit(limit, pair)


def _open(folder: Path) -> None:
    """Open every graph that is for a CPU, and let it answer."""
    from export.bundle.folder import FP16, load_bundle
    from export.runtime.classifier import OnnxClassifier, with_task

    bundle = load_bundle(folder)
    for precision in bundle.precisions:
        if precision == FP16:
            continue
        first = bundle.tasks[0].name
        classifier = OnnxClassifier(bundle, task=first, precision=precision, threads=1, use_cuda=False)
        for task in bundle.tasks:
            n_texts = len(task.task.text_columns)
            arrays = classifier.tokenize([("a",) * n_texts, ("a b c",) * n_texts]).arrays
            classifier.logits(with_task(arrays, task.number) if bundle.is_shared else arrays)


def main(argv: list[str]) -> int:
    """What the process of `try_bundle` does: folder, MiB and seconds in, a JSON object out where there is trouble."""
    folder, memory_mib, seconds = Path(argv[0]), int(argv[1]), float(argv[2])
    _limit(memory_mib, seconds)
    try:
        _open(folder)
    except MemoryError:
        trouble = "it needs more memory"
    except ImportError as cause:  # as a library says it that finds no memory for its parts
        trouble = "its process could not start: " + (str(cause).strip().splitlines() or ["no module"])[-1]
    except PromptfoldError as error:
        trouble = str(error)
    except Exception as cause:  # whatever a library makes of what it was given
        trouble = first_line(cause)
    else:
        return 0
    print(json.dumps({"trouble": trouble[:500].rstrip(". ")}))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
