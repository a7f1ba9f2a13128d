"""The output folder of a data set: one Parquet file a block, found again after an interruption."""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from export.score.data_set import Block, Place, part_name
from export.score.parts import PartRecord
from train.common.atomic_folder import sync_folder, sync_path
from train.common.errors import UsageError, first_line
from train.common.folder_record import refuse_another_run

if TYPE_CHECKING:
    from pyarrow import fs


# Out.


@dataclass(frozen=True)
class FoundPart:
    """A part that lies in the output, whole.

    Attributes:
        record: what was kept of it.
        n_bytes: its size.
    """

    record: PartRecord
    n_bytes: int


@dataclass(frozen=True)
class OutFolder:
    """The folder that is written.

    Attributes:
        place: where.
        run: the SHA-256 of what decides its bytes; empty before that is known.
    """

    place: Place
    run: str = ""

    _RUN, _PROGRESS, _SUCCESS, _NEW = "_run.json", "_progress", "_SUCCESS", ".new-"

    def refuse_leftovers(self, *, resume: bool, overwrite: bool) -> None:
        """Before any work is done.

        Raises:
            UsageError: what lies there may not be touched, or the place cannot be used.
        """
        from pyarrow import fs

        with self._writing():
            is_file = self.place.filesystem.get_file_info(self.place.path).type == fs.FileType.File
            there = set() if is_file else {PurePosixPath(info.path).name for info in self._files(recursive=False)}
        if is_file:
            raise UsageError(f"--out {self.place} is a file. --engine ray writes a folder of Parquet files: name one.")
        if self._SUCCESS in there:
            if not overwrite:
                raise UsageError(
                    f"--out {self.place} is there already, and whole. Add --overwrite to replace it, or choose another name."
                )
        elif self._RUN in there:
            if not resume and not overwrite:
                raise UsageError(
                    f"--out {self.place} holds an interrupted run. Add --resume to go on with it, or --overwrite to "
                    "start anew."
                )
        elif there:
            raise UsageError(
                f"--out {self.place} holds something that is no output of --engine ray. Choose a new or an empty folder."
            )

    def refuse_another_run(self, fingerprint: Mapping[str, Any]) -> None:
        """Refuse to go on with what lies there where it was not this very run.

        Raises:
            UsageError: it was another one, or its record is damaged.
        """
        if not self._holds_run():
            return
        with self._writing():
            content = self._read(self._RUN)
        try:
            before = json.loads(content)
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise UsageError(
                f"{self.place.name(self._path(self._RUN))} holds no JSON object. Start anew: leave --resume out and add "
                "--overwrite."
            )
        refuse_another_run(self.place, before, fingerprint)

    def prepare(self, fingerprint: Mapping[str, Any], *, resume: bool) -> "OutFolder":
        """Make the folder; an older output or, without ``resume``, an older run in it ends here.

        Args:
            fingerprint: what decides the output's bytes. Plain JSON.

        Returns:
            The folder as the workers need it

        Raises:
            UsageError: nothing can be written there.
        """
        content = json.dumps(fingerprint, sort_keys=True).encode()
        if not (resume and self._holds_run()):
            with self._writing():
                # Records bear the name of their run, so this one never takes an older one's. _SUCCESS goes before the
                # parts, and _run.json is there by then: at no moment half an output counts as whole or as nobody's.
                self._put(self._RUN, content)
                self._delete(lambda name: name == self._SUCCESS)
                self._delete(lambda name: name != self._RUN)
        return OutFolder(self.place, hashlib.sha256(content).hexdigest())

    def _holds_run(self) -> bool:
        with self._writing():
            return bool(self.place.filesystem.get_file_info(self._path(self._RUN)).is_file)

    def find(self, block: Block) -> FoundPart | None:
        """The part of a block that this run has written before and whose every byte is there, or None."""
        try:
            record = PartRecord(**json.loads(self._read(self._record_name(block))))
            content = self._read(part_name(block.number))
        except (OSError, ValueError, TypeError):
            return None
        is_whole = record.rows == block.rows and record.sha256 == hashlib.sha256(content).hexdigest()
        return FoundPart(record, len(content)) if is_whole else None

    def add(self, block: Block, content: Any, *, texts_cut: int, counts: list[list[int]]) -> FoundPart:
        """Write the part of a block, then the record that says it is whole.

        Args:
            content: of the Parquet file; bytes or a buffer.
            counts: as in `PartRecord`.

        Raises:
            UsageError: it cannot be written.
        """
        record = PartRecord(block.rows, texts_cut, counts, hashlib.sha256(content).hexdigest())
        with self._writing():
            self._put(part_name(block.number), content)
            self._put(self._record_name(block), json.dumps(asdict(record)).encode())
        return FoundPart(record, len(content))

    def finish(self, sizes: Sequence[int], summary: Mapping[str, Any]) -> None:
        """See that every part is there, remove all else, and say that the output is whole.

        Args:
            sizes: of each part in bytes.
            summary: what ``_SUCCESS`` shall hold. Plain JSON.

        Raises:
            UsageError: a part is missing or has another size, or nothing can be written there.
        """
        expected = {part_name(number): size for number, size in enumerate(sizes)}
        with self._writing():
            self._delete(lambda name: name not in {*expected, self._RUN, self._PROGRESS})
            found = {PurePosixPath(info.path).name: info.size for info in self._files(recursive=False)}
            for name, size in expected.items():
                if found.get(name) != size:
                    raise UsageError(
                        f"{self.place.name(self._path(name))} is missing or was changed while others were written. Add "
                        "--resume to write it again."
                    )
            self._put(self._SUCCESS, json.dumps(summary).encode())
        # The output is whole; what cannot be removed is only in the way.
        with suppress(OSError):
            self._delete(lambda name: name in {self._RUN, self._PROGRESS})

    def _record_name(self, block: Block) -> str:
        return f"{self._PROGRESS}/{self.run[:16]}-{block.number:08d}.json"

    def _path(self, name: str) -> str:
        return f"{self.place.path}/{name}"

    def _files(self, *, recursive: bool) -> "list[fs.FileInfo]":
        from pyarrow import fs

        selector = fs.FileSelector(self.place.path, recursive=recursive, allow_not_found=True)
        return list(self.place.filesystem.get_file_info(selector))

    def _delete(self, is_meant: Callable[[str], bool]) -> None:
        """Delete what lies in the folder, by its name there; a folder in it with all that it holds."""
        for info in self._files(recursive=False):
            if is_meant(PurePosixPath(info.path).name):
                (self.place.filesystem.delete_file if info.is_file else self.place.filesystem.delete_dir)(info.path)

    def _read(self, name: str) -> bytes:
        with self.place.filesystem.open_input_stream(self._path(name), compression=None) as stream:
            return bytes(stream.read())

    def _put(self, name: str, content: Any) -> None:
        if not self.place.is_local:
            with self.place.filesystem.open_output_stream(self._path(name), compression=None) as stream:
                stream.write(content)
            return
        path = Path(self._path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: a worker that is given up may still write the same part.
        new = path.with_name(f"{self._NEW}{uuid.uuid4().hex}")
        try:
            new.write_bytes(content)
            sync_path(new)
            new.replace(path)
        except OSError:
            with suppress(OSError):
                new.unlink()
            raise
        sync_folder(path.parent)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (OSError, pyarrow.ArrowException) as cause:
            reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else first_line(cause)
            raise UsageError(
                f"--out {self.place} cannot be written ({reason}). Make it writable and add --resume, or choose another "
                "place."
            ) from cause
