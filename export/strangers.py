"""Bundles that somebody else made: what a graph may hold, and a first opening in a process of its own.

`check_graph` reads a graph's outline, without loading it: ``export.runtime.open_session`` calls it for every graph.
`try_bundle` then opens a bundle where it can do no harm but to a process that is made for it, under limits of memory
and time. Neither is a proof that its answers are right: that is a question of who made it.
"""

import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.errors import BundleError, PromptfoldError, first_line
from train.limits import MAX_MODEL_BYTES, MIB, check_file

if TYPE_CHECKING:
    from export.bundle import Bundle

ROOT = Path(__file__).parent.parent

_REMEDY = "promptfold writes no such graph: take a bundle from somebody you trust, or export it yourself."

# The outline of a graph


MAX_OUTLINE_BYTES = 16 * MIB
"""Of a graph without the bytes of its tensors. In memory an empty node takes a hundred times its two bytes."""

MAX_FIELDS = 1_000_000
"""Of that outline; a graph of ours has ten thousand."""

_DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Whose operators ONNX Runtime brings itself."""

_MODEL, _OPSET, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR = "model", "opset", "graph", "node", "attribute", "tensor"

# Fields by their numbers in onnx/onnx.proto.
_CHILDREN = {
    (_MODEL, 7): _GRAPH,
    (_MODEL, 8): _OPSET,
    (_GRAPH, 1): _NODE,
    (_GRAPH, 5): _TENSOR,
    (_NODE, 5): _ATTRIBUTE,
    (_ATTRIBUTE, 5): _TENSOR,
    (_ATTRIBUTE, 10): _TENSOR,
}
_REFUSED = {
    (_MODEL, 20): "a part for training",
    (_MODEL, 25): "functions of its own",
    (_GRAPH, 15): "sparse tensors",
    (_ATTRIBUTE, 6): "a graph within the graph, as loops and branches are",
    (_ATTRIBUTE, 11): "a graph within the graph, as loops and branches are",
    (_ATTRIBUTE, 22): "sparse tensors",
    (_ATTRIBUTE, 23): "sparse tensors",
    (_TENSOR, 13): "a tensor whose numbers are in another file",
}
_DOMAIN_FIELDS = ((_OPSET, 1), (_NODE, 7))
_OPERATOR = (_NODE, 4)
_RAW_DATA = (_TENSOR, 9)
_DATA_LOCATION = (_TENSOR, 14)

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def check_graph(path: Path) -> None:
    """Refuse a graph that reads other files, never ends, or needs code or memory that no graph of ours does.

    Only the outline is read, a few milliseconds even for a large graph. What is left for a process of its own
    (`try_bundle`): tensors that are computed and too large for this machine.

    Raises:
        BundleError: the file is no plain file, too large, no ONNX graph, or holds what it must not.
    """
    check_file(path, MAX_MODEL_BYTES, BundleError, _REMEDY)
    if not path.stat().st_size:
        raise BundleError(f"ONNX Runtime cannot load {path} (it is empty). Export the bundle again.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Outline(path, data).check()


@dataclass(frozen=True)
class _Field:
    """A field of a protobuf message.

    Attributes:
        number: its number.
        kind: of the encoding.
        value: of a varint; else 0.
        start: where its bytes begin.
        end: and end.
    """

    number: int
    kind: int
    value: int
    start: int
    end: int


class _Outline:
    """A walk through an ONNX file that knows just enough of protobuf's encoding, and is stricter than its parsers."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._fields = 0
        self._outline_bytes = len(data)

    def check(self) -> None:
        """Walk through the file.

        Raises:
            BundleError: as `check_graph`.
        """
        self._walk(_MODEL, 0, len(self._data))
        if self._outline_bytes > MAX_OUTLINE_BYTES:
            raise self._refused(f"{self._outline_bytes / MIB:,.0f} MiB beside the bytes of its tensors")

    def _walk(self, message: str, start: int, end: int) -> None:
        # As deep as `_CHILDREN` goes: what would nest without end is refused.
        for field in self._fields_of(start, end):
            place = (message, field.number)
            if place in _REFUSED:
                raise self._refused(_REFUSED[place])
            if place == _DATA_LOCATION and (field.kind != _VARINT or field.value):
                raise self._refused(_REFUSED[_TENSOR, 13])
            if field.kind != _BYTES:
                continue
            if place in _CHILDREN:
                self._walk(_CHILDREN[place], field.start, field.end)
            elif place == _RAW_DATA:
                self._outline_bytes -= field.end - field.start
            elif place in _DOMAIN_FIELDS and self._text(field) not in _DOMAINS:
                raise self._refused(f"operators of {self._text(field)!r}")
            elif place == _OPERATOR and self._text(field) == "EPContext":
                raise self._refused("a part that is compiled for one device")

    def _fields_of(self, start: int, end: int) -> Iterator[_Field]:
        while start < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise self._refused(f"more than {MAX_FIELDS:,} fields")
            tag = self._varint(start, end, max_bytes=5)
            number, kind = tag.value >> 3, tag.value & 7
            start = tag.end
            value = 0
            if kind == _VARINT:
                varint = self._varint(start, end, max_bytes=10)
                value, stop = varint.value, varint.end
            elif kind == _BYTES:
                length = self._varint(start, end, max_bytes=5)
                start = length.end
                stop = start + length.value
            elif kind == _FIXED64:
                stop = start + 8
            elif kind == _FIXED32:
                stop = start + 4
            else:
                raise self._broken()
            if not number or stop > end:
                raise self._broken()
            yield _Field(number, kind, value, start, stop)
            start = stop

    def _varint(self, start: int, end: int, *, max_bytes: int) -> "_Varint":
        value = 0
        for index, position in enumerate(range(start, min(end, start + max_bytes))):
            byte = self._data[position]
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                return _Varint(value, position + 1)
        raise self._broken()

    def _text(self, field: _Field) -> str:
        # What is longer than any name is none that is known.
        return self._data[field.start : min(field.end, field.start + 40)].decode("utf-8", "replace")

    def _refused(self, what: str) -> BundleError:
        return BundleError(f"{self._path} is not opened: it holds {what}. {_REMEDY}")

    def _broken(self) -> BundleError:
        return BundleError(f"ONNX Runtime cannot load {self._path} (it is no ONNX graph). Export the bundle again.")


@dataclass(frozen=True)
class _Varint:
    """A number of a protobuf message, and where it ends."""

    value: int
    end: int


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
    from export.bundle import FP16

    if memory_mib is None:
        largest = max(bundle.graph_path(name).stat().st_size for name in bundle.precisions if name != FP16)
        memory_mib = _BASE_MIB + int(_TIMES_THE_GRAPH * largest / MIB)
    limits = f"{memory_mib} MiB of memory and {seconds:g} s"
    remedy = f"It had a process of its own, {limits}. If you trust who made it, open it without this trial."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # One thread of each kind: every further one reserves address space.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
    environment = os.environ | threads | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-B", "-m", "export.strangers", str(bundle.folder.resolve())]
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
    from export.bundle import FP16, load_bundle
    from export.runtime import OnnxClassifier, with_task

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
