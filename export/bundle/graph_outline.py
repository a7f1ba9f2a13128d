"""What the graph of a bundle from elsewhere may hold, read from the file without loading it."""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train.common.errors import BundleError
from train.common.limits import MAX_MODEL_BYTES, MIB, check_file

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
