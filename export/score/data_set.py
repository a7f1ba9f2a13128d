"""A data set of many Parquet files, in folders or on S3: listed, cut into blocks, read block by block."""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from export.score.finished_chunks import chunk_name
from export.score.place import WILDCARD, Place
from train.common.errors import DataError, UsageError, first_line
from train.data.files.arrow_rows import open_parquet, parquet_batches
from train.data.files.chunks import ArrowChunk
from train.data.files.find import FILE_TYPES, JSON, PACKED
from train.data.read_rows import unreadable

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import fs, parquet

SUFFIX = ".parquet"

_OTHERS = (*(set(FILE_TYPES) - {SUFFIX, JSON}), *PACKED)
"""Endings of rows in other formats; a .json file beside Parquet files describes them."""
_LISTING_THREADS = 16
"""Files whose footers are read at a time: on S3 most of that is waiting."""
_BATCH_ROWS = 4096
"""Rows decoded at a time."""


@dataclass(frozen=True)
class SourceFile:
    """A Parquet file of a data set."""

    path: str
    n_bytes: int
    version: str
    """What changes when the file is written anew: its ETag on S3, else the time in nanoseconds."""
    rows: int


@dataclass(frozen=True)
class Block:
    """Rows of one file that follow one another: what is labelled, written and, after a crash, done again as a whole."""

    number: int
    """Its place in the data set."""
    file: int
    """Index in `DataSet.files`."""
    start: int
    """How many rows of the file come before."""
    rows: int


@dataclass(frozen=True)
class DataSet:
    """Files with the same columns, in the order of their names."""

    place: Place
    """As the user named them."""
    files: tuple[SourceFile, ...]
    schema: "pyarrow.Schema"

    @property
    def fingerprint(self) -> str:
        """A SHA-256 over every file's name, size and version."""
        lines = json.dumps([[file.path, file.n_bytes, file.version] for file in self.files])
        return hashlib.sha256(lines.encode()).hexdigest()

    def name(self, index: int) -> str:
        """Name of a file, for messages."""
        return self.place.name(self.files[index].path)

    def blocks(self, block_rows: int) -> list[Block]:
        """All rows, cut into blocks of at most so many."""
        cuts = [
            (index, start, min(block_rows, file.rows - start))
            for index, file in enumerate(self.files)
            for start in range(0, file.rows, block_rows)
        ]
        return [Block(number, *cut) for number, cut in enumerate(cuts)]


def find_data_set(place: Place, out: Place) -> DataSet:
    """List the files that ``--in`` names and read their footers; the output ``out`` may not be among them."""
    import pyarrow

    try:
        found = _list_files(place)
    except (OSError, pyarrow.ArrowException) as cause:
        raise DataError(f"--in {place} cannot be read ({first_line(cause)}).") from cause
    if out.scheme == place.scheme and _includes(place, f"{out.path}/{chunk_name(0, SUFFIX)}"):
        raise UsageError(f"--out {out} lies where --in {place} is read. Choose another folder.")
    with ThreadPoolExecutor(_LISTING_THREADS) as threads:
        # In order, so that of several broken files always the first is named.
        files, schemas = zip(*threads.map(lambda info: _read_footer(place, info), found), strict=True)
    data_set = DataSet(place, files, schemas[0])
    for index, schema in enumerate(schemas):
        if not schema.equals(schemas[0]):
            raise DataError(
                f"{data_set.name(index)} has other columns than {data_set.name(0)} "
                f"({_difference(schemas[0], schema)}). Label them one by one, or give them the same."
            )
    if not any(file.rows for file in files):
        raise DataError(f"--in {place} has no rows. Give files with at least one text.")
    return data_set


def _includes(place: Place, path: str) -> bool:
    """Whether a path lies in a folder or matches a pattern, which stands for whole paths."""
    is_match = PurePosixPath("/", path).match(f"/{place.path.lstrip('/')}")
    return path.startswith(f"{place.path}/") or (WILDCARD.search(place.path) is not None and is_match)


def _list_files(place: Place) -> "list[fs.FileInfo]":
    # fsspec's glob asks once for each folder, and the refusal of an --out within --in needs `_includes` all the same.
    from pyarrow import fs

    exact = place.filesystem.get_file_info(place.path)
    if exact.is_file:
        found = [exact]
    else:
        base, wildcard = place.path, WILDCARD.search(place.path)
        if exact.type == fs.FileType.NotFound:
            if wildcard is None:
                raise DataError(f"--in {place}: there is no such file or folder.")
            base = place.path[: wildcard.start()].rpartition("/")[0]
        infos = place.filesystem.get_file_info(fs.FileSelector(base or "/", recursive=True, allow_not_found=True))
        found = [info for info in infos if info.is_file and _includes(place, info.path)]
        # Names that begin with _ or . are hidden, as to other programs that read data sets.
        found = [info for info in found if not re.search(r"/[_.]", f"/{info.path.removeprefix(base).lstrip('/')}")]
        if not found:
            raise DataError(f"--in {place}: there is no such file.")
    files = sorted((info for info in found if info.path.endswith(SUFFIX)), key=lambda info: str(info.path))
    if not files:
        raise DataError(
            f"--in {place}: no file there ends in {SUFFIX}, and --engine ray reads Parquet alone. --engine local reads CSV, "
            "JSON lines and Arrow files too, of any size."
        )
    if left := [info.path for info in found if PurePosixPath(info.path.lower()).name.endswith(_OTHERS)]:
        raise DataError(
            f"--in {place}: {place.name(left[0])} would be left out, as --engine ray reads {SUFFIX} files alone. Name those by a "
            "pattern, or convert the others."
        )
    return files


def _read_footer(place: Place, info: "fs.FileInfo") -> "tuple[SourceFile, pyarrow.Schema]":
    import pyarrow

    name = place.name(info.path)
    try:
        version = _version(place.filesystem, info)
        with place.filesystem.open_input_file(info.path) as stream, open_parquet(stream, name) as opened:
            return SourceFile(info.path, info.size, version, opened.metadata.num_rows), opened.schema_arrow
    except (pyarrow.ArrowException, OSError) as cause:
        raise unreadable(name, 0, cause) from cause


def _version(filesystem: "fs.FileSystem", info: "fs.FileInfo") -> str:
    from pyarrow import fs

    tag = None
    if isinstance(filesystem, fs.S3FileSystem):
        with filesystem.open_input_stream(info.path, compression=None) as stream:
            tag = stream.metadata().get(b"ETag")
    return str(info.mtime_ns) if tag is None else tag.decode()


def _difference(first: "pyarrow.Schema", second: "pyarrow.Schema") -> str:
    """The first column in which two schemas differ."""
    for name in dict.fromkeys([*first.names, *second.names]):
        kinds = [str(schema.field(name).type) if name in schema.names else "missing" for schema in (first, second)]
        if kinds[0] != kinds[1]:
            return f"{name!r}: {kinds[1]} instead of {kinds[0]}"
    return "in another order, or with other nulls"


class BlockReader:
    """Reads blocks. Going forward in a file decodes every row once at most; going back starts again at a row group."""

    def __init__(self, data_set: DataSet) -> None:
        self._data_set = data_set
        self._file = -1
        self._position = -1
        self._batches: Iterator[pyarrow.RecordBatch] = iter(())
        self._rest: pyarrow.RecordBatch | None = None

    def read(self, block: Block) -> ArrowChunk:
        """The rows of a block; a `DataError` if the file cannot be read or is not the one that was listed."""
        import pyarrow

        name = self._data_set.name(block.file)
        try:
            if block.file != self._file:
                self._open(block.file)
            self._go_to_group(block)
            for _ in self._take(block.start - self._position):
                pass
            return ArrowChunk(name, block.start, pyarrow.Table.from_batches(list(self._take(block.rows))))
        except (pyarrow.ArrowException, OSError) as cause:
            raise unreadable(name, max(0, self._position), cause) from cause

    def _open(self, index: int) -> None:
        place, file = self._data_set.place, self._data_set.files[index]
        info = place.filesystem.get_file_info(file.path)
        if (info.size, _version(place.filesystem, info) if info.is_file else "") != (file.n_bytes, file.version):
            raise _changed(place.name(file.path))
        stream = place.filesystem.open_input_file(file.path)
        self._opened: parquet.ParquetFile = open_parquet(stream, place.name(file.path))
        footer = self._opened.metadata
        group_rows = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        self._group_starts = list(accumulate(group_rows[:-1], initial=0))
        self._file, self._position = index, -1

    def _go_to_group(self, block: Block) -> None:
        """Be in the row group of the block's first row, at that row or before."""
        starts = self._group_starts
        group = bisect_right(starts, block.start) - 1
        if not starts[group] <= self._position <= block.start:
            groups = list(range(group, len(starts)))
            self._batches, self._rest = parquet_batches(self._opened, _BATCH_ROWS, groups), None
            self._position = starts[group]

    def _take(self, rows: int) -> "Iterator[pyarrow.RecordBatch]":
        """The next rows of the file."""
        while rows > 0:
            if not self._rest:
                self._rest = next(self._batches, None)
                if self._rest is None:
                    raise _changed(self._data_set.name(self._file))
            taken = self._rest.slice(0, rows)
            self._rest = self._rest.slice(len(taken))
            self._position += len(taken)
            rows -= len(taken)
            yield taken


def _changed(name: str) -> DataError:
    return DataError(
        f"{name} changed while it was read, or is another file on this machine. Start anew with --overwrite."
    )
