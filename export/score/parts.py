"""The finished chunks of a run, kept so that one that was interrupted can go on.

    OUT.partial/   run.json              what is labelled, by what, how
                   part-000000.jsonl     the first chunk, in the format of OUT
                   part-000000.json      written after it: it is whole, its SHA-256, what was counted in it

Every file appears by one rename once its bytes are on the disk, and so does OUT at the end. What is whole there
after a ``kill -9`` need not be done again.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.score.write_rows import join_parts
from train.common.atomic_folder import put, sync_folder, sync_path, write_trouble
from train.common.errors import UsageError
from train.common.folder_record import read_json_object, refuse_another_run, sha256_of_file


@dataclass(frozen=True)
class PartRecord:
    """What is kept of a finished chunk beside its rows.

    Attributes:
        rows: how many.
        texts_cut: how many of their texts lost their end.
        counts: ``[expected, predicted, n]`` of the class indices that met, where there are labels.
        sha256: of the part.
    """

    rows: int
    texts_cut: int
    counts: list[list[int]]
    sha256: str


def pairs_met(counts: np.ndarray) -> list[list[int]]:
    """The counts of a `PartRecord` from what `count_pairs` gives."""
    return [[int(i), int(j), int(counts[i, j])] for i, j in np.argwhere(counts)]


class Parts:
    """The folder OUT.partial with the finished chunks."""

    _RUN = "run.json"
    _NEW, _WHOLE = "new-", "whole"

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(f"{out.name}.partial")
        self._out = out

    def refuse_leftovers(self, *, resume: bool, overwrite: bool) -> None:
        """Before any work is done.

        Raises:
            UsageError: what lies there may not be touched.
        """
        if not os.path.lexists(self.folder):
            return
        if not resume and not overwrite:
            raise UsageError(
                f"{self.folder} holds an interrupted run. Add --resume to go on with it, or --overwrite to start anew."
            )
        if not self.folder.is_dir() or (
            not (self.folder / self._RUN).is_file() and any(path.suffix != ".new" for path in self.folder.iterdir())
        ):
            raise UsageError(f"{self.folder} holds something that is no interrupted run. Move it away.")

    def prepare(self, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder, or check that the one that is there belongs to this very run.

        Args:
            fingerprint: what decides the output's bytes. Plain JSON.

        Raises:
            UsageError: with ``resume``, it was another run or its record is damaged; or nothing can be written there.
        """
        record = self.folder / self._RUN
        if resume and record.is_file():
            before = read_json_object(record, UsageError, "Start anew: leave --resume out and add --overwrite.")
            refuse_another_run(self.folder, before, fingerprint)
            return
        with self._writing():
            self._remove()
            self.folder.mkdir(parents=True)
            self._write_json(record, fingerprint)

    def _path(self, number: int) -> Path:
        """Where the part of a chunk lies."""
        return self.folder / f"part-{number:06d}{self._out.suffix}"

    def find(self, number: int, rows: int) -> PartRecord | None:
        """The record of a chunk whose every byte is there, or None."""
        try:
            record = PartRecord(**json.loads(self._path(number).with_suffix(".json").read_text(encoding="utf-8")))
            is_whole = record.rows == rows and record.sha256 == sha256_of_file(self._path(number))
        except (OSError, ValueError, TypeError):
            return None
        return record if is_whole else None

    def add(self, number: int, write: Callable[[Path], None], *, rows: int, cut: int, counts: np.ndarray) -> PartRecord:
        """Write the part of a chunk, then the record that says it is whole.

        Args:
            counts: as for `score_counts`.
        """
        path = self._path(number)
        # The format follows the suffix, so what is under way is marked in front of it.
        new = path.with_name(f"{self._NEW}{path.name}")
        with self._writing():
            write(new)
            sync_path(new)
            new.rename(path)
            record = PartRecord(rows=rows, texts_cut=cut, counts=pairs_met(counts), sha256=sha256_of_file(path))
            self._write_json(path.with_suffix(".json"), asdict(record))
        return record

    def finish(self, n_parts: int) -> None:
        """Put the parts together into the output, which appears by one rename, and remove the folder."""
        whole = self.folder / f"{self._WHOLE}{self._out.suffix}"
        with self._writing():
            join_parts([self._path(number) for number in range(n_parts)], whole)
            sync_path(whole)
            put(whole, self._out)
        # The output is there; what cannot be removed is only in the way.
        with suppress(OSError):
            self._remove()

    def _remove(self) -> None:
        """Remove the folder; what says that it is a run's goes last, in case this is interrupted too."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name != self._RUN:
                    path.unlink()
            shutil.rmtree(self.folder)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a full or read-only disk into an error that says what is not lost; what was cut short is removed."""
        try:
            yield
        except OSError as cause:
            with suppress(OSError):
                self._remove_what_was_cut_short()
            raise UsageError(
                f"--out {self._out} cannot be written ({write_trouble(cause)}). Free some space and add --resume, "
                "or choose another place."
            ) from cause

    def _remove_what_was_cut_short(self) -> None:
        for path in self.folder.iterdir():
            if path.name.startswith((self._NEW, self._WHOLE)) or path.suffix == ".new":
                path.unlink()
        if not (self.folder / self._RUN).is_file():
            self.folder.rmdir()

    @staticmethod
    def _write_json(path: Path, value: Mapping[str, Any]) -> None:
        new = path.with_name(f"{path.name}.new")
        new.write_text(json.dumps(value) + "\n", encoding="utf-8")
        sync_path(new)
        new.replace(path)
        # Of the part as well, which was renamed before.
        sync_folder(path.parent)
