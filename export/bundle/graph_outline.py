"""Checks the graph of an untrusted bundle in its file, before ONNX Runtime loads it."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from export.bundle.folder import data_path
from train.common.errors import BundleError
from train.common.limits import MAX_BASE_BYTES, MAX_MODEL_BYTES, MIB, check_file

_REMEDY = "promptfold writes no such graph: take a bundle from somebody you trust, or export it yourself."

MAX_OUTLINE_BYTES = 16 * MIB
"""Upper bound for a graph without the bytes of its tensors. In memory an empty node takes a hundred times its two bytes."""
MAX_FIELDS = 1_000_000
"""Upper bound for the fields of that outline; a graph of ours has ten thousand."""

_DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Domains of the operators that ONNX Runtime itself has."""

_MODEL, _OPSET, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR = "model", "opset", "graph", "node", "attribute", "tensor"
_ELSEWHERE = "elsewhere"
# Fields by their numbers in onnx/onnx.proto.
_CHILDREN = {
    (_MODEL, 7): _GRAPH,
    (_MODEL, 8): _OPSET,
    (_GRAPH, 1): _NODE,
    (_GRAPH, 5): _TENSOR,
    (_NODE, 5): _ATTRIBUTE,
    (_ATTRIBUTE, 5): _TENSOR,
    (_ATTRIBUTE, 10): _TENSOR,
    (_TENSOR, 13): _ELSEWHERE,
}
_REFUSED = {
    (_MODEL, 20): "a part for training",
    (_MODEL, 25): "functions of its own",
    (_GRAPH, 15): "sparse tensors",
    (_ATTRIBUTE, 6): "a graph within the graph, as loops and branches are",
    (_ATTRIBUTE, 11): "a graph within the graph, as loops and branches are",
    (_ATTRIBUTE, 22): "sparse tensors",
    (_ATTRIBUTE, 23): "sparse tensors",
}
_DOMAIN_FIELDS = ((_OPSET, 1), (_NODE, 7))
_OPERATOR = (_NODE, 4)
_RAW_DATA = (_TENSOR, 9)
_DATA_KEY, _DATA_VALUE = (_ELSEWHERE, 1), (_ELSEWHERE, 2)

# Encodings of a field in protobuf.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _Field(NamedTuple):
    """A field of a protobuf message; ``value`` is that of a varint, ``start`` and ``end`` are where its bytes are."""

    place: tuple[str, int]
    encoding: int
    value: int
    start: int
    end: int


def check_graph(path: Path) -> None:
    """Refuse a graph that reads other files, never ends, or needs code or memory that no graph of ours does.

    The one other file that it may read is `data_path`, beside it: `export.bundle.folder.load_bundle` has compared its hash.
    Only the outline is read, a few milliseconds even for a large graph. What this cannot see, tensors that are computed
    and too large for this machine, is left to the separate process of `export.runtime.trial`.

    Raises:
        BundleError: the file is no plain file, too large, no ONNX graph, or holds what it must not.
    """
    check_file(path, MAX_MODEL_BYTES, BundleError, _REMEDY)
    if not path.stat().st_size:
        raise BundleError(f"ONNX Runtime cannot load {path} (it is empty). Export the bundle again.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            trouble = _find_trouble(data, data_path(path))
        except ValueError as cause:
            raise BundleError(f"ONNX Runtime cannot load {path} ({cause}). Export the bundle again.") from cause
    if trouble:
        raise BundleError(f"{path} is not opened: it holds {trouble}. {_REMEDY}")


def _find_trouble(data: mmap.mmap, others: Path) -> str:
    """What a graph holds that it must not; empty if there is nothing. ``others`` is where tensors' numbers may be."""
    outline_bytes = len(data)
    key = b""
    if others.exists():
        check_file(others, MAX_BASE_BYTES, BundleError, _REMEDY)
    for n_fields, field in enumerate(_fields_of(data, _MODEL, 0, len(data)), start=1):
        if n_fields > MAX_FIELDS:
            return f"more than {MAX_FIELDS:,} fields"
        if field.place in _REFUSED:
            return _REFUSED[field.place]
        if field.encoding != _BYTES:
            continue
        if field.place in {_DATA_KEY, _DATA_VALUE}:
            value = data[field.start : min(field.end, field.start + 256)]
            if field.place == _DATA_VALUE and not _is_allowed(key, value, others):
                return "a tensor whose numbers are in another file"
            key = value if field.place == _DATA_KEY else b""
        elif field.place == _RAW_DATA:
            outline_bytes -= field.end - field.start
        elif field.place in {*_DOMAIN_FIELDS, _OPERATOR}:
            # No known name has more than 40 bytes.
            name = data[field.start : min(field.end, field.start + 40)].decode("utf-8", "replace")
            if field.place == _OPERATOR and name == "EPContext":
                return "a part that is compiled for one device"
            if field.place != _OPERATOR and name not in _DOMAINS:
                return f"operators of {name!r}"
    return (
        f"{outline_bytes / MIB:,.0f} MiB beside the bytes of its tensors" if outline_bytes > MAX_OUTLINE_BYTES else ""
    )


def _is_allowed(key: bytes, value: bytes, others: Path) -> bool:
    """Whether an entry on where a tensor's numbers are names the file beside the graph, and a place within it."""
    if key == b"location":
        return value == others.name.encode() and others.exists()
    is_number = value.isdigit() and len(value) < 16
    return key in {b"offset", b"length"} and is_number and others.exists() and int(value) <= others.stat().st_size


def _fields_of(data: mmap.mmap, message: str, start: int, end: int) -> Iterator[_Field]:
    """The fields of a message and of those within it, or a ValueError where protobuf's parsers might still read on.

    The recursion is as deep as `_CHILDREN` goes: a field that could nest without end is refused.
    """
    while start < end:
        tag, start = _varint(data, start, end, max_bytes=5)
        place, encoding, value = (message, tag >> 3), tag & 7, 0
        if encoding == _VARINT:
            value, stop = _varint(data, start, end, max_bytes=10)
        elif encoding == _BYTES:
            length, start = _varint(data, start, end, max_bytes=5)
            stop = start + length
        elif encoding in {_FIXED32, _FIXED64}:
            stop = start + (4 if encoding == _FIXED32 else 8)
        if encoding not in {_VARINT, _BYTES, _FIXED32, _FIXED64} or not place[1] or stop > end:
            raise ValueError("it is no ONNX graph")
        yield _Field(place, encoding, value, start, stop)
        if encoding == _BYTES and place in _CHILDREN:
            yield from _fields_of(data, _CHILDREN[place], start, stop)
        start = stop


def _varint(data: mmap.mmap, start: int, end: int, *, max_bytes: int) -> tuple[int, int]:
    """The number at a position, and the position after it."""
    value = 0
    for index, position in enumerate(range(start, min(end, start + max_bytes))):
        value |= (data[position] & 0x7F) << 7 * index
        if data[position] < 0x80:
            return value, position + 1
    raise ValueError("it is no ONNX graph")
