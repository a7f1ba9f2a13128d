"""Labelled files of any kind (`train.data.files`), read in chunks of rows that remember their place in the file."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from train.common.errors import DataError, first_line
from train.common.folder_record import sha256_of_file
from train.data.files.arrow_rows import read_arrow
from train.data.files.chunks import Chunk, TextChunk
from train.data.files.csv_rows import NumberedRow, read_csv, sample_dialect
from train.data.files.dialect import Dialect
from train.data.files.find import ARROW, CSV, PARQUET, TSV, SourceFile, check_file, find_files
from train.data.files.json_rows import read_json
from train.data.files.options import Limits, ReadOptions
from train.data.files.text import Encoding, detect_encoding

_AS_GIVEN = ReadOptions()


@dataclass(frozen=True)
class Source:
    """Files of rows that were looked at: how each is written is known."""

    files: tuple[SourceFile, ...]
    written: "tuple[Written, ...]"
    """How each of the files is."""
    options: ReadOptions
    limits: Limits | None

    @property
    def description(self) -> str:
        """What was recognised, for people, in one line; empty where there was nothing to recognise."""
        alike: dict[str, list[str]] = {}
        samples: dict[str, str] = {}
        for file, written in zip(self.files, self.written, strict=True):
            alike.setdefault(str(written), []).append(file.name)
            if written.encoding is not None and written.encoding.sample:
                samples.setdefault(str(written), f", with words such as {written.encoding.sample!r:.40}")
        parts = [
            names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") + f": {words}{samples.get(words, '')}"
            for words, names in alike.items()
            if words
        ]
        return "; ".join(parts[:4]) + (" …" if len(parts) > 4 else "")


@dataclass(frozen=True)
class Written:
    """How a file is written: nothing for Parquet and Arrow, which say so themselves."""

    encoding: Encoding | None = None
    dialect: Dialect | None = None
    """Delimiter and quotes of a CSV file."""

    def __str__(self) -> str:
        """For people."""
        return ", ".join(str(part) for part in (self.encoding, self.dialect) if part is not None)


def find_source(
    path: Path, name: str = "", *, flag: str = "", options: ReadOptions = _AS_GIVEN, limits: Limits | None = None
) -> Source:
    """Find the files that a path, a folder or a pattern stands for, and recognise how they are written.

    Raises:
        DataError: a file is missing, empty, too large, of an unknown kind or in no known encoding. The message calls it
            ``name``, by default its path; one that is missing follows the ``flag`` that gave it.
    """
    name = name or str(path)
    files = find_files(path, f"{flag} {name}".lstrip())
    for file in files:
        check_file(file, limits)
    if len(files) == 1 and files[0].path == path:
        files = (replace(files[0], name=name),)
    return Source(files, tuple(_look(file, options, limits) for file in files), options, limits)


def sha256_of_rows(files: Iterable[SourceFile]) -> str:
    """One SHA-256 for the files of a source: a single file's own, else that of a list of theirs."""
    hashes = [sha256_of_file(file.path) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def sha256_of_path(path: Path) -> str:
    """The same for the files that a path stands for."""
    return sha256_of_rows(find_files(path, str(path)))


def _look(file: SourceFile, options: ReadOptions, limits: Limits | None) -> Written:
    if file.kind in {PARQUET, ARROW, ".feather"}:
        return Written()
    encoding = detect_encoding(file, options.encoding, limits)
    is_csv = file.kind in {CSV, TSV}
    return Written(encoding, sample_dialect(file, encoding, options, limits) if is_csv else None)


def read_chunks(source: Source, chunk_rows: int) -> Iterator[Chunk]:
    """Read files chunk by chunk, always the same chunks of the same files. Errors are `DataError`.

    A chunk holds rows of one file. With ``limits.rows`` rows in a chunk, a file within the limits is one chunk.
    """
    import pyarrow

    n_all, limits = 0, source.limits
    for file, written in zip(source.files, source.written, strict=True):
        n_rows = 0
        try:
            for chunk in _read_file(file, written, source, chunk_rows):
                n_rows += len(chunk)
                if limits is not None and n_rows > limits.rows:
                    raise DataError(
                        f"{file.name} has more than {limits.rows:,} rows, which is the most that is taken here. Give "
                        f"fewer, or {limits.advice}."
                    )
                yield chunk
        except (pyarrow.ArrowException, OSError) as cause:
            raise unreadable(file.name, n_rows, cause) from cause
        n_all += n_rows
    if not n_all:
        raise DataError(f"{source.files[0].name} has no rows. Give a file with at least one text.")


def _read_file(file: SourceFile, written: Written, source: Source, chunk_rows: int) -> Iterator[Chunk]:
    if written.encoding is None:
        return read_arrow(file, chunk_rows, source.limits)
    if written.dialect is None:
        rows = read_json(file, written.encoding, source.limits)
    else:
        is_forced = source.options.quote is not None
        rows = read_csv(file, written.encoding, written.dialect, source.limits, quote_is_forced=is_forced)
    return _in_chunks(rows, file.name, chunk_rows)


def unreadable(name: str, rows_read: int, cause: BaseException) -> DataError:
    """The error for a file that cannot be read on."""
    kind = Path(name).suffix.lower()[1:]
    after = f" after row {rows_read}" if rows_read else ""
    return DataError(f"{name} cannot be read as {kind}{after} ({first_line(cause):.300}). Write it anew.")


def _in_chunks(rows: Iterator[NumberedRow], name: str, chunk_rows: int) -> Iterator[TextChunk]:
    """Numbered rows → chunks."""
    start = 0
    while taken := list(islice(rows, chunk_rows)):
        reasons = {row: item.reason for row, item in enumerate(taken) if item.reason}
        yield TextChunk(name, start, [item.values for item in taken], [item.line for item in taken], reasons)
        start += len(taken)
