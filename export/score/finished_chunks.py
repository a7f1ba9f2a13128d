"""The finished chunks of a run, kept so that an interrupted run can go on.

FOLDER/   _run.json                     what is labelled, by what, how
          part-00000000.parquet         the first chunk, labelled, in the format of the output
          _progress/RUN-00000000.json   written after it: it is whole, its SHA-256, what was counted in it
          _SUCCESS                      only where the folder itself is the output: every chunk is there

Every file appears by one rename once its bytes are on the disk (on S3, once it is complete): what is whole there after
a ``kill -9`` is not labelled again. A run of one file has the folder OUT.partial; a data set's output is such a folder.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from export.score.place import S3, Place
from export.score.write_rows import join_files
from train.common.atomic_folder import held_folder, put, sync_folder, sync_path
from train.common.errors import UsageError, first_line
from train.common.folder_record import refuse_another_run

if TYPE_CHECKING:
    from pyarrow import fs

RUN, PROGRESS, SUCCESS = "_run.json", "_progress", "_SUCCESS"
_INCOMPLETE = ".new-"


def chunk_name(number: int, suffix: str) -> str:
    """The file name of a chunk; names sort in the order of the chunks."""
    return f"part-{number:08d}{suffix}"


@dataclass(frozen=True)
class ChunkRecord:
    """What is known of a finished chunk."""

    rows: int
    texts_cut: int
    """How many rows were longer than the model reads and lost their end."""
    counts: Sequence[Sequence[int]]
    """``[row, column, n]``: what is not 0 in `train.data.tasks.count_pairs`; empty without labels."""
    n_bytes: int
    sha256: str
    numbers: Sequence[Sequence[float]] = ()
    """``[expected, predicted]`` of each row of a regression with labels."""


@dataclass(frozen=True)
class FinishedChunks:
    """The folder of a run's finished chunks."""

    place: Place
    out: str
    """The output as the user named it, for messages."""
    suffix: str
    """File name ending of the chunks."""
    run: str = ""
    """SHA-256 of what decides the output's bytes, set by `start`; in records' names, so no run takes another's."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the folder within the block; S3 has no locks, there `finish_folder` finds what they wrote."""
        with ExitStack() as at_end:
            with self._writing():
                if self.place.filesystem.get_file_info(self.place.path).is_file:
                    raise UsageError(f"{self.place} is a file, not a folder. Move it away, or choose another --out.")
                if self.place.scheme != S3:
                    at_end.enter_context(held_folder(Path(self.place.path), f"--out {self.out}"))
            yield

    def refuse_leftovers(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder with a whole output or an interrupted run, unless a flag allows it, or with anything else."""
        with self._writing():
            there = {PurePosixPath(info.path).name for info in self._files()}
        if SUCCESS in there:
            if not overwrite:
                raise UsageError(
                    f"--out {self.out} is there already, and whole. Add --overwrite to replace it, or choose another."
                )
        elif RUN in there:
            if not resume and not overwrite:
                raise UsageError(
                    f"{self.place} holds an interrupted run. Add --resume to go on, or --overwrite to start anew."
                )
        elif any(not name.startswith(_INCOMPLETE) for name in there):
            raise UsageError(
                f"{self.place} holds something that is no run of export.score. Move it away, or choose another --out."
            )

    def refuse_another_run(self, fingerprint: Mapping[str, Any]) -> None:
        """Refuse to go on with what is there if it was another run, or if its record is damaged."""
        with self._writing():
            if not self._holds_run():
                return
            content = self._read(RUN)
        try:
            before = json.loads(content)
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise UsageError(
                f"{self.place.name(self._path(RUN))} holds no JSON object. Start anew: leave --resume out and add "
                "--overwrite."
            )
        refuse_another_run(self.place, before, fingerprint)

    def start(self, fingerprint: Mapping[str, Any], *, resume: bool) -> "FinishedChunks":
        """Prepare the folder for a run; an older output and, without ``resume``, an interrupted run are deleted."""
        content = json.dumps(fingerprint, sort_keys=True).encode()
        started = replace(self, run=hashlib.sha256(content).hexdigest())
        with self._writing():
            if resume and self._holds_run():
                self._put(RUN, content)
                self._delete(started._is_of_another_run, PROGRESS)
            else:
                # In this order half an output is never taken for a whole one, or for something that is no run.
                self._put(RUN, content)
                self._delete(lambda name: name == SUCCESS)
                self._delete(lambda name: name != RUN)
        return started

    def find(self, number: int, rows: int) -> ChunkRecord | None:
        """The record of a chunk that this run wrote before and whose every byte is there, or None."""
        record, _ = self._whole(number) or (None, b"")
        return record if record is not None and record.rows == rows else None

    def _whole(self, number: int) -> tuple[ChunkRecord, bytes] | None:
        """A chunk's record and content, or None where the one is not that of the other."""
        try:
            record = ChunkRecord(**json.loads(self._read(self._record_name(number))))
            content = self._read(chunk_name(number, self.suffix))
        except (OSError, ValueError, TypeError):
            return None
        return (record, content) if record.sha256 == hashlib.sha256(content).hexdigest() else None

    def add(
        self,
        number: int,
        content: bytes,
        *,
        rows: int,
        texts_cut: int,
        counts: Sequence[Sequence[int]],
        numbers: Sequence[Sequence[float]] = (),
    ) -> ChunkRecord:
        """Write a chunk, then the record that says that it is whole."""
        record = ChunkRecord(rows, texts_cut, counts, len(content), hashlib.sha256(content).hexdigest(), numbers)
        with self._writing():
            self._put(chunk_name(number, self.suffix), content)
            self._put(self._record_name(number), json.dumps(asdict(record)).encode())
        return record

    def finish_file(self, n_chunks: int, out: Path) -> None:
        """Join the chunks into one file, which appears by one rename, and remove the folder."""
        folder = Path(self.place.path)
        whole = folder / f"{_INCOMPLETE}whole"
        with self._writing():
            try:
                join_files(map(self._joined, range(n_chunks)), whole, self.suffix)
                sync_path(whole)
                put(whole, out)
            finally:
                with suppress(OSError):
                    whole.unlink(missing_ok=True)
        # The output is there; what cannot be removed is only in the way. The record last, in case this is interrupted.
        with suppress(OSError):
            self._delete(lambda name: name != RUN)
            self.place.filesystem.delete_dir(self.place.path)

    def _joined(self, number: int) -> bytes:
        """A chunk's content, which is refused where it is not what was recorded."""
        found = self._whole(number)
        if found is None:
            raise self._changed(chunk_name(number, self.suffix))
        return found[1]

    def _changed(self, name: str) -> UsageError:
        return UsageError(
            f"{self.place.name(self._path(name))} is missing or was changed while others were written. Add --resume to "
            "write it again."
        )

    def finish_folder(self, sizes: Sequence[int], summary: Mapping[str, Any]) -> None:
        """Check the size in bytes of every chunk, delete all else, and mark the folder as whole by ``_SUCCESS``.

        A UsageError where another run wrote into the folder meanwhile.
        """
        expected = {chunk_name(number, self.suffix): n_bytes for number, n_bytes in enumerate(sizes)}
        with self._writing():
            records = (PurePosixPath(info.path).name for info in self._files(PROGRESS))
            is_own = hashlib.sha256(self._read(RUN)).hexdigest() == self.run
            if not is_own or any(map(self._is_of_another_run, records)):
                raise UsageError(
                    f"--out {self.out}: another run wrote there too, so what is there may be of either. When the other one "
                    "has ended, start anew with --overwrite."
                )
            self._delete(lambda name: name not in {*expected, RUN, PROGRESS})
            found = {PurePosixPath(info.path).name: info.size for info in self._files()}
            for name, n_bytes in expected.items():
                if found.get(name) != n_bytes:
                    raise self._changed(name)
            self._put(SUCCESS, json.dumps(summary).encode())
        # The output is whole; what cannot be removed is only in the way.
        with suppress(OSError):
            self._delete(lambda name: name in {RUN, PROGRESS})

    def _record_name(self, number: int) -> str:
        return f"{PROGRESS}/{self.run[:16]}-{number:08d}.json"

    def _is_of_another_run(self, name: str) -> bool:
        """Whether a file of `PROGRESS` is another run's record."""
        return not name.startswith((f"{self.run[:16]}-", _INCOMPLETE))

    def _path(self, name: str) -> str:
        return f"{self.place.path}/{name}"

    def _holds_run(self) -> bool:
        return bool(self.place.filesystem.get_file_info(self._path(RUN)).is_file)

    def _files(self, folder: str = "") -> "list[fs.FileInfo]":
        from pyarrow import fs

        place = self._path(folder) if folder else self.place.path
        return list(self.place.filesystem.get_file_info(fs.FileSelector(place, allow_not_found=True)))

    def _delete(self, is_meant: Callable[[str], bool], folder: str = "") -> None:
        """Delete files and folders by their names, in the folder or one of its folders."""
        for info in self._files(folder):
            if is_meant(PurePosixPath(info.path).name):
                (self.place.filesystem.delete_file if info.is_file else self.place.filesystem.delete_dir)(info.path)

    def _read(self, name: str) -> bytes:
        with self.place.filesystem.open_input_stream(self._path(name), compression=None) as stream:
            return bytes(stream.read())

    def _put(self, name: str, content: bytes) -> None:
        if self.place.scheme == S3:
            with self.place.filesystem.open_output_stream(self._path(name), compression=None) as stream:
                stream.write(content)
            return
        path = Path(self._path(name))
        is_new_folder = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: a worker that was given up may still write the same chunk.
        new = path.with_name(f"{_INCOMPLETE}{uuid.uuid4().hex}")
        try:
            new.write_bytes(content)
            sync_path(new)
            new.replace(path)
        except OSError:
            with suppress(OSError):
                new.unlink(missing_ok=True)
                if is_new_folder:
                    path.parent.rmdir()
            raise
        sync_folder(path.parent)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a full or read-only disk into an error that says what is not lost."""
        import pyarrow

        try:
            yield
        except (OSError, pyarrow.ArrowException) as cause:
            reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else first_line(cause)
            raise UsageError(
                f"--out {self.out} cannot be written ({reason}). Make room or make it writable and add --resume, or "
                "choose another place."
            ) from cause
