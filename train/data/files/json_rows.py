"""The rows of a JSON lines file, or of a JSON file that is one array of objects."""

import json
from collections.abc import Iterator
from itertools import chain
from typing import IO, Any

from train.common.errors import DataError
from train.common.limits import MIB
from train.data.files.csv_rows import NumberedRow
from train.data.files.find import SourceFile
from train.data.files.options import Limits
from train.data.files.text import Encoding, open_text


class _TwiceError(ValueError):
    """A JSON object that has a name twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        first = next(name for name in names if names.count(name) > 1)
        places = [place for place, name in enumerate(names, start=1) if name == first]
        raise _TwiceError(f"it has {first!r:.80} twice, as its {places[0]}. and its {places[1]}. name")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def read_json(file: SourceFile, encoding: Encoding, limits: Limits | None) -> Iterator[NumberedRow]:
    """The rows of a JSON file in order; a line that is no row is known by its reason, an array ends there."""
    with open_text(file, encoding, "\n", limits) as stream:
        for n_before, line in enumerate(stream):
            if line.strip():
                if line.lstrip().startswith("["):
                    yield from _read_array(file.name, line, stream, n_before)
                    return
                second = stream.readline()
                _refuse_one_object(file.name, line, second)
                yield from _read_lines(chain([line, second], stream), n_before)
                return


def _refuse_one_object(name: str, first: str, second: str) -> None:
    """Refuse a file whose first line begins an object of several lines, or holds whole columns."""
    remedy = "Write one object a row, each on a line of its own or all in one array (pandas: orient='records')."
    try:
        value = _DECODER.decode(first)
    except json.JSONDecodeError as cause:
        if cause.pos >= len(first.rstrip()) and second.strip() and not second.lstrip().startswith("{"):
            raise DataError(f"{name}, line 1: a JSON object goes on over several lines. {remedy}") from cause
        return
    except (ValueError, RecursionError):
        return  # a row that is named with all others
    is_container = isinstance(value, dict) and bool(value) and all(isinstance(v, list | dict) for v in value.values())
    if is_container and not second.strip():
        raise DataError(f"{name} holds one JSON object of columns, not rows. {remedy}")


def _read_lines(lines: Iterator[str], n_before: int) -> Iterator[NumberedRow]:
    for number, line in enumerate(lines, start=n_before + 1):
        if not line.strip():
            continue
        try:
            value = _DECODER.decode(line)
            reason = _fault(value, line)
        except _TwiceError as cause:
            reason = str(cause)
        except (ValueError, RecursionError) as cause:
            reason = f"it is no JSON ({cause})"
        yield NumberedRow(number, {} if reason else value, reason)


def _fault(value: Any, text: str) -> str:
    """Why a value is no row, or nothing."""
    if not isinstance(value, dict):
        return "it holds no JSON object, of which every line needs one"
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "it holds half a surrogate pair, which is no valid Unicode"
    return ""


def _read_array(name: str, first: str, stream: IO[str], n_before: int) -> Iterator[NumberedRow]:
    """The objects of an array, with as much of the text in memory as one of them has."""
    rest, line, position = first.lstrip()[1:], n_before + 1, 0
    expected = ""  # a comma, from the second object on
    while True:
        rest, skipped = _skip_blanks(rest, position, stream)
        line, position = line + skipped, 0
        if rest[:1] == "]" or not rest:
            if not rest or rest[1:].strip() or stream.read().strip():
                what = "more follows after the array" if rest else "the array has no end"
                raise DataError(f"{name}, line {line}: {what}. Write the file anew.")
            return
        if expected and rest[0] != expected:
            raise DataError(f"{name}, line {line}: there is no comma between two objects. Write the file anew.")
        if expected:
            rest, skipped = _skip_blanks(rest, 1, stream)
            line += skipped
        value, end, rest = _decode(name, rest, line, stream)
        reason = _fault(value, rest[:end])
        yield NumberedRow(line, {} if reason else value, reason)
        line += rest.count("\n", 0, end)
        position, expected = end, ","


def _skip_blanks(text: str, position: int, stream: IO[str]) -> tuple[str, int]:
    """The text from the next character that is not blank, read on where needed, and how many lines ended before."""
    n_lines = 0
    while True:
        rest = text[position:] if position else text
        stripped = rest.lstrip()
        n_lines += rest.count("\n", 0, len(rest) - len(stripped))
        if stripped or not (text := stream.read(MIB)):
            return stripped, n_lines
        position = 0


def _decode(name: str, text: str, line: int, stream: IO[str]) -> tuple[Any, int, str]:
    """The value with which a text begins, where it ends there, and the text, read on where needed."""
    step = MIB
    while True:
        try:
            value, end = _DECODER.raw_decode(text)
            if end < len(text):
                return value, end, text
            fault: Exception = ValueError("the array has no end")
        except _TwiceError as cause:
            raise DataError(f"{name}, line {line}: {cause}. Fix or remove the object.") from cause
        except (ValueError, RecursionError) as cause:
            fault = cause
        if isinstance(fault, RecursionError) or not (more := stream.read(step)):
            raise DataError(f"{name}, line {line} is no JSON ({fault}). Fix or remove it.") from fault
        text, step = text + more, 2 * step
