"""Which files a path, a folder or a pattern stands for, and of what kind they are."""

import glob
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.common.errors import DataError
from train.data.files.options import Limits

CSV, TSV, JSONL, JSON, PARQUET, ARROW = ".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow"
FILE_TYPES = (CSV, JSONL, PARQUET, TSV, JSON, ".ndjson", ARROW, ".feather")
PACKED = (".gz", ".zst")
"""Endings of compressed text files, after their own."""
_CHOICES = f"{', '.join((CSV, JSONL, PARQUET, TSV, JSON, ARROW))}; a text file also as {' or '.join(CSV + end for end in PACKED)}"
_STATE, _SPLITS = "state.json", "dataset_dict.json"
"""What `datasets.Dataset.save_to_disk` and `DatasetDict.save_to_disk` write beside the data."""
_SPLIT = re.compile(r"(?<![a-z])(?:(train)(?:ing)?|(test)|(dev|val(?:id(?:ation)?)?|eval(?:uation)?))(?![a-z])")
"""The word by which a file's name says of which split it is."""
_SHARD = re.compile(r"(.*?)(\d+)-of-(\d+)\b.*")
"""A file's name that says how many there are: train-00000-of-00002.parquet."""


@dataclass(frozen=True)
class SourceFile:
    """One file with rows."""

    path: Path
    name: str
    """For messages."""
    kind: str
    """One of `FILE_TYPES`."""
    packed: str
    """One of `PACKED`, or nothing."""


def split_suffix(path: Path) -> tuple[str, str]:
    """The endings of a file's name that say of what kind it is and how it is compressed: (".csv", ".gz")."""
    stem, last = _ending(path.name)
    return (_ending(stem)[1], last) if last in PACKED else (last, "")


def _ending(name: str) -> tuple[str, str]:
    """A name in two: "a" and ".csv"; of a file that is called ".csv" pathlib says that it has no ending."""
    stem, dot, end = name.rpartition(".")
    return stem, (dot + end).lower() if dot else ""


def find_files(path: Path, name: str) -> tuple[SourceFile, ...]:
    """The files of a path, of a folder, or of a pattern where no file has that name; of one kind, in their names' order.

    Raises:
        DataError: there is none, or none that can be read; its message begins with ``name``.
    """
    try:
        if path.is_dir():
            paths = _in_folder(path, name)
        elif path.exists() or not glob.has_magic(str(path)):
            return (_source_file(path, name),)
        else:
            paths = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())  # noqa: PTH207 -- an absolute pattern too
    except OSError as cause:
        raise DataError(f"{name} cannot be read ({cause.strerror or cause}).") from cause
    if not paths:
        raise DataError(f"{name}: there is no such file.")
    files = tuple(_source_file(file, str(file)) for file in paths)
    if other := [file for file in files if file.kind != files[0].kind]:
        raise DataError(f"{name}: {files[0].path.name} and {other[0].path.name} are of two kinds. Give files of one.")
    _refuse_copies(files, name)
    if path.is_dir() or not re.search(r"[\d?\[]", path.name):  # else a part of the shards may be meant
        _refuse_incomplete(files, name)
    return files


def _refuse_copies(files: Sequence[SourceFile], name: str) -> None:
    """Refuse a file that is there twice, also in compressed form: its rows would count twice."""
    seen: dict[Path, SourceFile] = {}
    for file in files:
        first = seen.setdefault(file.path.with_name(file.path.name.removesuffix(file.packed)), file)
        if first is not file:
            raise DataError(
                f"{name}: {first.path.name} and {file.path.name} have one name, as a file and a compressed copy of it. Move "
                "one of them away."
            )


def _refuse_incomplete(files: Sequence[SourceFile], name: str) -> None:
    """Refuse files of which there are fewer than their names say."""
    numbers: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if shard := _SHARD.fullmatch(file.path.name):
            numbers.setdefault((file.path.parent, shard[1], int(shard[3])), set()).add(int(shard[2]))
    for (_, start, count), found in numbers.items():
        if len(found) < count:
            raise DataError(
                f"{name}: of the {count} files {start}…-of-{count} there are {len(found)}. Fetch the others, or name the "
                "files that you want by a pattern with their numbers."
            )


def refuse_splits(path: Path, files: Sequence[SourceFile], name: str) -> None:
    """Refuse all files of a folder where their names are those of several splits, which are no one data set."""
    folder = path if path.is_dir() else path.parent
    if len(files) < 2 or not (path.is_dir() or re.fullmatch(r"\*(\.\w+)*", path.name)):
        return
    splits: dict[str, str] = {}
    for file in files:
        words = re.sub(r"([a-z])([A-Z])", r"\1 \2", file.path.name).lower()
        if found := _SPLIT.search(words):
            splits.setdefault(str(found.lastindex), found[0])
    if len(splits) > 1:
        word = splits.get("1", next(iter(splits.values())))
        raise DataError(
            f"{name} holds several splits ({', '.join(splits.values())}). Give the files of one by a pattern in quotes, "
            f"such as '{folder / f'*{word}*'}'."
        )


def _source_file(path: Path, name: str) -> SourceFile:
    kind, packed = split_suffix(path)
    if kind not in FILE_TYPES or (packed and kind in {PARQUET, ARROW, ".feather"}):
        raise DataError(f"{name}: give a file that ends in {_CHOICES}.")
    return SourceFile(path, name, kind, packed)


def _in_folder(folder: Path, name: str) -> list[Path]:
    if (folder / _SPLITS).is_file():
        splits = ", ".join(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
        raise DataError(f"{name} holds several splits ({splits:.200}). Give the folder of one.")
    if (folder / _STATE).is_file():
        try:
            state = json.loads((folder / _STATE).read_bytes())
            return [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
        except (ValueError, KeyError, TypeError) as cause:
            raise DataError(f"{folder / _STATE} is damaged. Write the data set anew.") from cause
    names = sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith((".", "_")))
    found = [entry for entry in names if split_suffix(entry)[0] in FILE_TYPES]
    if not found:
        raise DataError(f"{name} is a folder, and no file in it ends in {_CHOICES}.")
    return found


def check_file(file: SourceFile, limits: Limits | None = None) -> None:
    """Refuse a file that is missing, empty or too large."""
    name = file.name
    try:
        if not file.path.is_file():
            raise DataError(f"{name}: there is no such file.")
        n_bytes = file.path.stat().st_size
        with file.path.open("rb") as stream:
            is_empty = not stream.read(1)
    except OSError as cause:
        raise DataError(f"{name} cannot be read ({cause.strerror or cause}).") from cause
    if is_empty:
        raise DataError(f"{name} is empty. Give a file with at least one text.")
    if limits is not None and n_bytes > limits.file_bytes:
        raise DataError(
            f"{name} has {n_bytes:,} bytes; at most {limits.file_bytes:,} are taken here. Give fewer rows, or "
            f"{limits.advice}."
        )
