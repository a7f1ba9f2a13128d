"""What holds for every program, whatever happens to it; the test files beside this one name the programs."""

import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tests.faults import Ended, Fault, Launcher
from tests.slow.faults.conftest import Inputs, Work
from train.common.atomic_folder import exchange
from train.common.errors import AdapterError, BundleError


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def check_nothing_broken_is_loadable(work: Work, place: Path) -> None:
    """Every folder or file that passes for a result is the older one or the new one, and whole."""
    for path in place.rglob("*"):
        if work.program in {"train", "export"}:
            # A hidden or a misplaced one too.
            if not path.is_dir():
                continue
            try:
                found = work.result(path)
            except (AdapterError, BundleError):
                continue
        elif path == place / work.out:
            found = work.result(path)
        else:
            continue
        assert found in (work.result(work.older), work.expected), path


def check_nothing_is_cut_short(place: Path) -> None:
    """After an error that was caught, only what is whole may stay: the output, and what --resume goes on from."""
    for path in place.rglob("*"):
        name = path.name
        assert not name.startswith((".", "new-", "whole")), path
        assert not name.endswith((".new", ".old")), path
        assert not name.endswith(".partial") or (path / "_run.json").is_file(), path
        if name.startswith("checkpoint-"):
            assert (path / "complete.json").is_file(), path
        if name.endswith(".checkpoints"):
            assert (path / "run.json").is_file(), path


def check_refusal(ended: Ended) -> None:
    """A clear sentence, and the status of what the user can put right."""
    assert ended.status == 2, ended.errors
    assert "Traceback" not in ended.errors, ended.errors
    assert ended.complaint.startswith("error: "), ended.errors


def finish(tool: Launcher, work: Work, words: list[str], place: Path) -> None:
    """Do what a user does: the same again, with the flag that the complaint names; it ends as an unbroken run does."""
    words = [*words, "--resume"] if work.program in {"train", "score"} else list(words)
    for _ in range(3):
        ended = tool.run(work.program, words)
        if ended.status == 0:
            break
        check_refusal(ended)
        named = re.search(r"[Aa]dd (--\w+)", ended.complaint)
        assert named, ended.errors
        assert named[1] not in words
        words.append(named[1])
    assert ended.status == 0, ended.errors
    assert work.result(place / work.out) == work.expected
    # And nothing is left of what was interrupted.
    assert [path.name for path in place.iterdir()] == [work.out]


def some_of(moments: tuple[str, ...], n: int) -> list[int]:
    """The numbers of all renames, and of so many others, spread evenly."""
    renames = [number for number, name in enumerate(moments, start=1) if name != "fsync"]
    spread = np.linspace(1, len(moments), min(n, len(moments))).round().astype(int).tolist()
    return sorted({*renames, *spread})


class Writes:
    """Claims about a program that writes a folder or a file."""

    program: str

    @pytest.fixture
    def work(self, works: dict[str, Work]) -> Work:
        return works[self.program]

    def test_killed_where_something_is_renamed_or_flushed_it_goes_on_to_the_same_result(
        self, work: Work, tool: Launcher, tmp_path: Path, soak: int
    ) -> None:
        place = work.new_place(tmp_path / "count", older=True)
        moments = tool.run(self.program, [*work.at(place), "--overwrite"]).moments
        assert {"fsync", "exchange"} <= set(moments)
        # Elsewhere than on Linux there is a moment between two renames; see the test of Triton's folders.
        one, other = (work.new_place(tmp_path / name, older=False) for name in "ab")
        is_never_gone = exchange(one, other)
        for number in some_of(moments, 4 * soak):
            place = work.new_place(tmp_path / str(number), older=True)
            words = [*work.at(place), "--overwrite"]
            assert tool.run(self.program, words, Fault(strike_at=number)).was_killed
            check_nothing_broken_is_loadable(work, place)
            assert (place / work.out).exists() or not is_never_gone
            finish(tool, work, words, place)

    @pytest.mark.parametrize("kind", ["no permission", "closed", "below a file"])
    def test_where_nothing_can_be_written_one_sentence_says_so(
        self, kind: str, work: Work, tool: Launcher, tmp_path: Path
    ) -> None:
        older = kind == "closed"
        place = work.new_place(tmp_path / "place", older=older)
        target = place
        if kind == "below a file":
            target = place / "file"
            target.write_text("mine")
        before = contents(place)
        if target == place:
            place.chmod(0 if kind == "closed" else 0o555)
        words = [*work.at(target), *(["--overwrite"] if older else [])]
        ended = tool.run(self.program, words, Fault(drop_rights=target == place))
        place.chmod(0o755)
        check_refusal(ended)
        assert contents(place) == before
        assert work.out in ended.complaint


class Reads(Writes):
    """Claims about a program that reads data, and may run for hours."""

    source: str
    """Name of the folder that it reads."""
    inputs_of_its_own: ClassVar[tuple[str, ...]]
    smallest_limit: ClassVar[int] = 12
    """Exponent of a file size in bytes; what training and export read is copied first, by datasets."""

    def test_a_full_disk_ends_with_one_sentence_and_costs_nothing(
        self, work: Work, tool: Launcher, tmp_path: Path, soak: int
    ) -> None:
        """No file may grow beyond a limit. That is no full disk, but fails like one, everywhere and at any byte."""
        generator, failed = random.Random(f"limit {self.program}"), 0  # noqa: S311 -- test data
        for trial in range(6 * soak):
            older = bool(trial % 2)
            place = work.new_place(tmp_path / str(trial), older=older)
            words = [*work.at(place), *(["--overwrite"] if older else [])]
            # Less than the largest file has.
            limit = int(2 ** generator.uniform(self.smallest_limit, 16)) if trial else 0
            ended = tool.run(self.program, words, Fault(file_limit=limit))
            if ended.status == 0:
                assert work.result(place / work.out) == work.expected
                continue
            failed += 1
            check_refusal(ended)
            check_nothing_is_cut_short(place)
            check_nothing_broken_is_loadable(work, place)
            if older:
                assert work.result(place / work.out) == work.result(work.older)
            else:
                assert not (place / work.out).exists()
            if not trial and self.program != "score":
                assert "temporary folder" in ended.complaint
            if failed % 3 == 0:
                finish(tool, work, words, place)
        assert failed >= 3

    def test_what_may_not_be_read_is_named(
        self, works: dict[str, Work], inputs: Inputs, tool: Launcher, tmp_path: Path
    ) -> None:
        folder = tmp_path / "inputs"
        folder.mkdir()
        copies = {"base": inputs.base} | {name: Path(works[name].words[0]) for name in ("export", "score")}
        source = Path(shutil.copytree(copies.get(self.program, inputs.base), folder / self.source))
        words = Inputs.write(folder, inputs.base).words(self.program, source)
        for name in (*self.inputs_of_its_own, self.source, ""):
            mode = (folder / name).stat().st_mode
            (folder / name).chmod(0)
            command = [*words, "--out", str(tmp_path / works[self.program].out)]
            ended = tool.run(self.program, command, Fault(drop_rights=True))
            (folder / name).chmod(mode)
            check_refusal(ended)
            assert str(folder / name) in ended.complaint
            assert [path.name for path in tmp_path.iterdir()] == ["inputs"]

    def test_a_clock_that_jumps_back_changes_nothing(
        self, work: Work, inputs: Inputs, tool: Launcher, tmp_path: Path
    ) -> None:
        folder = tmp_path / "inputs"
        folder.mkdir()
        own = Inputs.write(folder, inputs.base)
        place = work.new_place(tmp_path / "place", older=True)
        source = inputs.base if self.program == "train" else Path(work.words[0])
        words = [*own.words(self.program, source), "--out", str(place / work.out), "--overwrite"]
        age(folder, years=10)
        age(place, years=10)
        # Killed in the middle; what it left is from the future when it is taken up.
        back = Fault(clock_goes_back=True)
        tool.run(self.program, words, replace(back, kill_after=0.7 * work.unbroken.seconds))
        age(place, years=10)
        ended = tool.run(self.program, [*words, *(["--resume"] if self.program != "export" else [])], back)
        assert ended.status == 0, ended.errors
        assert work.result(place / work.out) == work.expected
        assert [path.name for path in place.iterdir()] == [work.out]


def age(folder: Path, *, years: int) -> None:
    """Let all files of a folder be from another year, those that sort first the newest."""
    for number, path in enumerate(sorted(folder.rglob("*"))):
        when = path.stat().st_mtime + years * 365 * 86400 - number
        os.utime(path, (when, when))


class KeepsItsPlace:
    """Claims about a program that keeps what is under way beside its output."""

    program: str
    under_way: str
    """Name of the folder for what is under way."""

    @pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]], ids=["plain", "resume", "overwrite"])
    def test_a_foreign_file_in_the_place_of_what_is_under_way_is_left_alone(
        self, flags: list[str], works: dict[str, Work], tool: Launcher, tmp_path: Path
    ) -> None:
        (tmp_path / self.under_way).write_text("mine")
        check_refusal(tool.run(self.program, [*works[self.program].at(tmp_path), *flags]))
        assert contents(tmp_path) == {self.under_way: b"mine"}
