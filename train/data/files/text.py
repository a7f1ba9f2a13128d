"""A text file's bytes → its lines: unpacked, and in the encoding that it has."""

import codecs
import gzip
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from train.common.errors import DataError
from train.common.limits import MIB
from train.data.files.find import SourceFile
from train.data.files.options import Limits, remedy
from train.data.files.western import WesternWords

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte-order marks, the longer first → the encoding that reads and drops them."""
UTF8, CP1252 = "utf-8", "cp1252"

_NO_CP1252 = re.compile(
    rb"[\x81\x8d\x8f\x90\x9d]|[A-Za-z\xc0-\xff][\xa1-\xac\xae-\xb3\xb5\xb6\xb8-\xbf][A-Za-z\xc0-\xff]"
    rb"|[A-Za-z][\x83\x84\x86-\x89\x8b\x93\x94\x98\x9b][A-Za-z]|[a-z][\x8a\x8c\x8e\x9f][a-z]"
)
"""Bytes that cp1252 does not have, or a sign or a capital letter within a word: another encoding (cp1250, that of DOS, of
the old Mac) has a small letter there.
"""
_UTF8_CHARACTER = re.compile(rb"[\xc3-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_LETTERS = bytes(range(65, 91)) + bytes(range(97, 123))
_HIGH = bytes(range(128, 256))
MOST_HIGH = 0.3
"""In a language that cp1252 writes, the letters beyond ASCII are at most so many of all."""


@dataclass(frozen=True)
class Encoding:
    """How a file's bytes become characters."""

    name: str
    """As Python names it."""
    has_bom: bool = False
    sample: str = field(default="", compare=False)
    """A word that shows whether it was recognised rightly; empty where there is no doubt."""

    def __str__(self) -> str:
        """For people."""
        name = {"utf-8-sig": "UTF-8", UTF8: "UTF-8", CP1252: "Windows-1252"}.get(self.name, self.name.upper())
        is_converted = not self.name.startswith(UTF8)
        return name + " with byte-order mark" * self.has_bom + ", read as Unicode" * is_converted


@contextmanager
def open_bytes(file: SourceFile, limits: Limits | None = None) -> Iterator[Any]:
    """Open a file, unpacked; within limits it cannot become longer than they allow. Errors are `DataError`."""
    import pyarrow

    try:
        with file.path.open("rb") as raw:
            stream: Any = raw
            if file.packed == ".gz":
                stream = gzip.GzipFile(fileobj=raw)
            elif file.packed == ".zst":
                stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
            yield stream if limits is None or not file.packed else _Bounded(stream, file.name, limits)
    except (EOFError, gzip.BadGzipFile, pyarrow.ArrowException) as cause:
        raise DataError(f"{file.name} cannot be unpacked ({cause}). Pack it anew.") from cause
    except OSError as cause:
        if file.packed and cause.errno is None:  # pyarrow's
            raise DataError(f"{file.name} cannot be unpacked ({cause}). Pack it anew.") from cause
        raise DataError(f"{file.name} cannot be read ({cause.strerror or cause}).") from cause


class _Bounded(io.RawIOBase):
    """An unpacked stream that ends in an error once it is too long: a few bytes may unpack to billions."""

    def __init__(self, stream: IO[bytes], name: str, limits: Limits) -> None:
        self._stream, self._name, self._limits, self._left = stream, name, limits, limits.decoded_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        self._left -= len(content)
        if self._left < 0:
            raise DataError(
                f"{self._name} is more than {self._limits.decoded_bytes:,} bytes long without compression. Give fewer "
                f"rows, or {self._limits.advice}."
            )
        buffer[: len(content)] = content
        return len(content)


def blocks(stream: IO[bytes]) -> Iterator[bytes]:
    """The rest of a stream, a MiB at a time."""
    while block := stream.read(MIB):
        yield bytes(block)


def detect_encoding(file: SourceFile, forced: str | None, limits: Limits | None) -> Encoding:
    """The encoding of a file, which is read to its end: UTF-8, what a byte-order mark names, UTF-16, or else cp1252.

    Raises:
        DataError: it is none of these, or the ``forced`` one does not fit.
    """
    with open_bytes(file, limits) as stream:
        head = bytes(stream.read(4096))
        named = next(((mark, name) for mark, name in _BOMS if head.startswith(mark)), None)
        if forced is not None:
            is_utf8 = codecs.lookup(forced).name == UTF8
            _check(file, forced, head, stream, limits)
            return Encoding("utf-8-sig" if is_utf8 and named else forced, has_bom=named is not None)
        if named is not None:
            _check(file, named[1], head, stream, limits)
            return Encoding(named[1], has_bom=True)
        if (wide := _wide(head)) is not None:
            _check(file, wide, head, stream, limits)
            return Encoding(wide)
        return _scan(file, head, stream, limits)


def _wide(head: bytes) -> str | None:
    """UTF-16 without a mark: mostly Latin letters, of which every other byte is 0."""
    zeros = (head[::2].count(0), head[1::2].count(0))
    half = len(head) / 2
    if half < 2 or max(zeros) < 0.5 * half or min(zeros) > 0.05 * half:
        return None
    return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"


def _check(file: SourceFile, encoding: str, head: bytes, stream: IO[bytes], limits: Limits | None) -> None:
    """Refuse a file that an encoding does not read."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        decoder.decode(head)
        for block in blocks(stream):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeError as cause:
        if codecs.lookup(encoding).name in {UTF8, "utf-8-sig"}:
            raise _no_text(file, limits) from cause
        what = remedy(limits, "Name its --encoding", "Save it in UTF-8")
        raise DataError(f"{file.name} is no text in {encoding} ({cause}). {what}.") from cause


def _scan(file: SourceFile, head: bytes, stream: IO[bytes], limits: Limits | None) -> Encoding:
    """UTF-8, or cp1252 where no byte speaks against it."""
    decoder = codecs.getincrementaldecoder(UTF8)()
    is_utf8, is_cp1252, high, letters, words = True, True, 0, 0, WesternWords()
    block = head
    while block:
        if 0 in block:  # valid in both, but in no text: the file is of another kind
            raise _no_text(file, limits)
        if not block.isascii() or decoder.getstate()[0]:
            if is_utf8:
                try:
                    decoder.decode(block)
                except UnicodeDecodeError:
                    is_utf8 = False
            is_cp1252 = is_cp1252 and not _NO_CP1252.search(block) and not _UTF8_CHARACTER.search(block)
        if is_cp1252:
            words.add(block)
        high += len(block) - len(block.translate(None, _HIGH))
        letters += len(block) - len(block.translate(None, _LETTERS))
        if not is_utf8 and not is_cp1252:
            raise _no_text(file, limits)
        block = bytes(stream.read(MIB))
    if is_utf8 and not decoder.getstate()[0]:
        return Encoding(UTF8)
    if not is_cp1252 or high > MOST_HIGH * (high + letters):
        raise _no_text(file, limits)
    if words.complaint:
        what = remedy(
            limits, "Name its --encoding, such as cp1250 or cp1254, or cp1252 if the word is right", "Save it in UTF-8"
        )
        raise DataError(
            f"{file.name} is not UTF-8, and read as Windows-1252 it holds {words.complaint}, which looks like a word in "
            f"another encoding. {what}."
        )
    return Encoding(CP1252, sample=words.sample)


def _no_text(file: SourceFile, limits: Limits | None) -> DataError:
    """The error for a file that is not text in UTF-8, with the place of the first byte that shows it."""
    offset = 0
    with open_bytes(file) as stream:
        for number, line in enumerate(io.BufferedReader(stream) if file.packed else stream, start=1):
            bad = line.find(b"\0")
            try:
                line.decode()
            except UnicodeDecodeError as cause:
                bad = cause.start
            if bad >= 0:
                return DataError(
                    f"{file.name}, line {number:,}, byte {offset + bad + 1:,} of the file is not UTF-8 text. Is it really a "
                    f"{file.kind} file? Save it as such, in UTF-8{remedy(limits, ', or name its --encoding', '')}."
                )
            offset += len(line)
    return DataError(f"{file.name} changed while it was read.")


@contextmanager
def open_text(file: SourceFile, encoding: Encoding, newline: str, limits: Limits | None = None) -> Iterator[IO[str]]:
    """Open a text file whose lines end in ``newline`` as `open` takes it. Errors are `DataError`."""
    with open_bytes(file, limits) as stream:
        try:
            yield io.TextIOWrapper(stream, encoding=encoding.name, newline=newline)
        except UnicodeError as cause:
            raise DataError(f"{file.name} changed while it was read, or is no {encoding.name} ({cause}).") from cause
