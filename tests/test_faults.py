"""Killed, starved, misled and damaged: nothing is lost that was there, and nothing broken is taken for whole.

Every fault is real where it can be: processes die of SIGKILL, disks are full, bits flip.
"""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import train.common.atomic_folder
from export.bundle.folder import Bundle, load_bundle
from tests.conftest import make_pairs, write_jsonl
from tests.faults import KILL, Ended, Fault, Launcher, launcher
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base
from train.adapter.record import Adapter
from train.common.atomic_folder import exchange, new_folder, write_whole
from train.common.errors import AdapterError, BundleError, PromptfoldError, UsageError
from train.common.folder_record import sha256_of_file

Folders = Callable[[str], Path]
Precisions = Callable[[str, str], Path]
Result = dict[str, Any]

KILLS = 20
FLIPS = 500
TRUNCATIONS = 100

PROGRAMS = ("train", "export", "score")


@dataclass(frozen=True)
class Work:
    """A command line of promptfold on tiny inputs, and what it makes.

    Attributes:
        program: one of `tests.faults.PROGRAMS`.
        words: of its command line, but for the output.
        out: name of the output.
        older: another result of the same kind.
        expected: the result of the unbroken run.
        unbroken: how that ended.
    """

    program: str
    words: tuple[str, ...]
    out: str
    older: Path
    expected: Result
    unbroken: Ended

    def at(self, place: Path) -> list[str]:
        """The whole command line, for an output in a folder."""
        return [*self.words, "--out", str(place if self.program == "triton" else place / self.out)]

    def put_older(self, place: Path) -> None:
        """Put the older result where the new one shall go."""
        copy: Callable[[Path, Path], object] = shutil.copytree if self.older.is_dir() else shutil.copyfile
        copy(self.older, place / self.out)


def result_in(program: str, out: Path) -> Result:
    """What has to come out the same, to the last bit.

    Raises:
        PromptfoldError: it is not whole.
    """
    if program == "train":
        load_adapter(out)
        training = json.loads((out / "training.json").read_text())
        # Not the seconds that it took.
        return {name: training[name] for name in ("sha256", "epochs", "best_epoch", "validation")}
    if program == "export":
        load_bundle(out)
    if out.is_file():
        return {"": sha256_of_file(out)}
    return {str(path.relative_to(out)): sha256_of_file(path) for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def soak(request: pytest.FixtureRequest) -> int:
    """How many times as much is tried as by default."""
    return 10 if request.config.getoption("--soak") else 1


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with launcher(tmp_path_factory.mktemp("scratch")) as running:
        yield running


@dataclass(frozen=True)
class Inputs:
    """What the command lines read."""

    base: Path
    train_file: Path
    validation_file: Path
    long_file: Path

    def train(self, *, base: Path | None = None) -> tuple[str, ...]:
        files = ("--train-file", str(self.train_file), "--validation-file", str(self.validation_file))
        sizes = ["--virtual-tokens", "4", "--encoder-hidden-size", "16", "--batch-size", "8", "--learning-rate", "1e-2"]
        return ("--model", str(base or self.base), *files, *sizes, "--epochs", "2", "--checkpoint-steps", "3")

    def export(self, adapter: Path) -> tuple[str, ...]:
        return (str(adapter), "--validation-file", str(self.validation_file))

    def score(self, bundle: Path) -> tuple[str, ...]:
        sizes = ["--threads", "1", "--chunk-rows", "50", "--batch-size", "4"]
        return (str(bundle), "--in", str(self.long_file), *sizes)


def write_inputs(folder: Path, base: Path) -> Inputs:
    return Inputs(
        base,
        write_jsonl(folder / "train.jsonl", make_pairs(32, seed=1)),
        write_jsonl(folder / "validation.jsonl", make_pairs(24, seed=2)),
        write_jsonl(folder / "long.jsonl", make_pairs(400, seed=3)),
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, base_model: Folders) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"), base_model("bert"))


@pytest.fixture(scope="module")
def works(tool: Launcher, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Work]:
    """One of each program, run once without any fault."""
    older, whole = tmp_path_factory.mktemp("older"), tmp_path_factory.mktemp("whole")

    def run(program: str, words: tuple[str, ...], out: Path) -> Ended:
        ended = tool.run(program, [*words, "--out", str(out)])
        assert ended.status == 0, ended.errors
        return ended

    run("train", (*inputs.train(), "--seed", "1", "--epochs", "1"), older / "adapter")
    run("export", (str(older / "adapter"), "--precision", "fp32"), older / "bundle")
    run("triton", (str(older / "bundle"), "--name", "served"), older)
    (older / "out.csv").write_text("older\n")
    made = {}
    for program, words, out in (
        ("train", inputs.train(), "adapter"),
        ("export", inputs.export(whole / "adapter"), "bundle"),
        ("score", inputs.score(whole / "bundle"), "out.csv"),
        ("triton", (str(whole / "bundle"), "--name", "served"), "served"),
    ):
        ended = run(program, words, whole if program == "triton" else whole / out)
        expected = result_in(program, whole / out)
        assert expected != result_in(program, older / out)
        made[program] = Work(program, words, out, older / out, expected, ended)
    return made


# What has to hold whatever happens.


def check_nothing_broken_is_loadable(work: Work, place: Path) -> None:
    """Every folder or file that passes for a result is the older one or the new one, and whole."""
    older = result_in(work.program, work.older)
    for path in place.rglob("*"):
        if work.program in {"train", "export"}:
            # A hidden or a misplaced one too.
            if not path.is_dir():
                continue
            try:
                found = result_in(work.program, path)
            except (AdapterError, BundleError):
                continue
        elif path == place / work.out:
            found = result_in(work.program, path)
        else:
            continue
        assert found in (older, work.expected), path


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
    """A clear sentence, and the status of what the user can mend."""
    assert ended.status == 2, ended.errors
    assert "Traceback" not in ended.errors, ended.errors
    assert ended.complaint.startswith("error: "), ended.errors


def check_it_failed_and_cost_nothing(ended: Ended, work: Work, place: Path, *, older: bool) -> None:
    check_refusal(ended)
    check_nothing_is_cut_short(place)
    check_nothing_broken_is_loadable(work, place)
    if older:
        assert result_in(work.program, place / work.out) == result_in(work.program, work.older)
    else:
        assert not (place / work.out).exists()


def finish(tool: Launcher, work: Work, words: list[str], place: Path) -> None:
    """Do what a user does: the same again, with the flag that the complaint names; the result is that of an unbroken run."""
    words = list(words)
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
    assert result_in(work.program, place / work.out) == work.expected
    # And nothing is left of what was interrupted.
    assert [path.name for path in place.iterdir()] == [work.out]


def new_place(folder: Path, work: Work, *, older: bool) -> Path:
    folder.mkdir()
    if older:
        work.put_older(folder)
    return folder


RESUMABLE = ("train", "score")
"""Programs with ``--resume``."""


def again(program: str, words: list[str]) -> list[str]:
    return [*words, "--resume"] if program in RESUMABLE else words


@pytest.mark.parametrize("program", PROGRAMS)
def test_killed_at_any_time_and_run_again_it_ends_as_if_nothing_had_been(
    program: str, works: dict[str, Work], tool: Launcher, tmp_path: Path, soak: int
) -> None:
    work, generator = works[program], random.Random(f"kill {program}")  # noqa: S311 -- test data
    kills, n = 0, KILLS * soak
    for trial in range(n):
        # One in each of as many equal spans, so that they lie everywhere.
        seconds = work.unbroken.seconds * (trial + generator.random()) / n
        older = bool(generator.getrandbits(1))
        place = new_place(tmp_path / str(trial), work, older=older)
        words = [*work.at(place), *(["--overwrite"] if older else [])]
        ended = tool.run(program, words, Fault(kill_after=seconds))
        assert ended.was_killed or ended.status == 0, ended.errors
        kills += ended.was_killed
        assert (place / work.out).exists() or not older
        check_nothing_broken_is_loadable(work, place)
        finish(tool, work, again(program, words), place)
    assert kills


def some_of(moments: tuple[str, ...], n: int) -> list[int]:
    """The numbers of all renames, and of so many others, spread evenly."""
    renames = [number for number, name in enumerate(moments, start=1) if name != "fsync"]
    spread = np.linspace(1, len(moments), min(n, len(moments))).round().astype(int).tolist()
    return sorted({*renames, *spread})


@pytest.mark.parametrize("strike", [KILL, "ENOSPC"])
@pytest.mark.parametrize("program", [*PROGRAMS, "triton"])
def test_struck_where_something_is_renamed_or_flushed(
    program: str, strike: str, works: dict[str, Work], tool: Launcher, tmp_path: Path, soak: int
) -> None:
    work = works[program]
    place = new_place(tmp_path / "count", work, older=True)
    words = [*work.at(place), "--overwrite"]
    moments = tool.run(program, words).moments
    assert {"fsync", "exchange"} <= set(moments)
    # Elsewhere than on Linux there is a moment between two renames; see the next test.
    is_never_gone = exchange(new_place(tmp_path / "a", work, older=False), new_place(tmp_path / "b", work, older=False))
    for number in some_of(moments, 4 * soak):
        place = new_place(tmp_path / str(number), work, older=True)
        words = [*work.at(place), "--overwrite"]
        ended = tool.run(program, words, Fault(strike_at=number, strike=strike))
        check_nothing_broken_is_loadable(work, place)
        assert (place / work.out).exists() or not is_never_gone
        if strike == KILL:
            assert ended.was_killed
        else:
            check_it_failed_and_cost_nothing(ended, work, place, older=True)
            assert os.strerror(errno.ENOSPC) in ended.complaint
        finish(tool, work, again(program, words), place)


def test_where_folders_cannot_change_places_an_older_one_is_put_back(
    works: dict[str, Work], tool: Launcher, tmp_path: Path
) -> None:
    """Killed between the two renames that it takes there, a run leaves the older folder under another name."""
    work = works["triton"]
    place = new_place(tmp_path / "count", work, older=True)
    without = Fault(no_exchange=True)
    moments = tool.run("triton", [*work.at(place), "--overwrite"], without).moments
    assert moments[-3:] == ("rename", "rename", "fsync")
    for number in (len(moments) - 1, len(moments)):
        place = new_place(tmp_path / str(number), work, older=True)
        words = [*work.at(place), "--overwrite"]
        assert tool.run("triton", words, replace(without, strike_at=number)).was_killed
        ((aside,),) = [list(path.iterdir()) for path in place.glob(".*.old")]
        assert result_in("triton", aside) == result_in("triton", work.older)
        # Another run puts it back, also where that one fails.
        failed = tool.run("triton", words, replace(without, strike_at=2, strike="ENOSPC"))
        kept = work.older if number < len(moments) else place / work.out
        check_refusal(failed)
        assert [path.name for path in place.iterdir()] == [work.out]
        assert result_in("triton", place / work.out) == result_in("triton", kept)
        finish(tool, work, words, place)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_full_disk_ends_with_one_sentence_and_costs_nothing(
    program: str, works: dict[str, Work], tool: Launcher, tmp_path: Path, soak: int
) -> None:
    """No file may grow beyond a limit. That is no full disk, but fails like one, everywhere and at any byte."""
    work, generator = works[program], random.Random(f"limit {program}")  # noqa: S311 -- test data
    failed = 0
    for trial in range(6 * soak):
        older = bool(trial % 2)
        place = new_place(tmp_path / str(trial), work, older=older)
        words = [*work.at(place), *(["--overwrite"] if older else [])]
        # Less than the largest file has; what training and export read is copied first, by datasets.
        limit = int(2 ** generator.uniform(7 if program == "score" else 12, 16)) if trial else 0
        ended = tool.run(program, words, Fault(file_limit=limit))
        if ended.status == 0:
            assert result_in(program, place / work.out) == work.expected
            continue
        failed += 1
        check_it_failed_and_cost_nothing(ended, work, place, older=older)
        if not trial and program != "score":
            assert "temporary folder" in ended.complaint
        if failed % 3 == 0:
            finish(tool, work, again(program, words), place)
    assert failed >= 3


@contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[Path | None]:
    """A disk of its own, or None where this process may mount none."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={n_bytes}", "promptfold-faults", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True, check=False)  # noqa: S607
    if mounted.returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=True)  # noqa: S607


DISK = 8 << 20


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_disk_that_fills_up_costs_nothing(
    program: str, works: dict[str, Work], tool: Launcher, tmp_path: Path, soak: int
) -> None:
    """On a disk that is really full. Who may mount none has the test above, which runs everywhere."""
    work, generator = works[program], random.Random(f"disk {program}")  # noqa: S311 -- test data
    with small_disk(tmp_path / "disk", DISK) as disk:
        for trial in range(0 if disk is None else 6 * soak):
            assert disk is not None
            older = bool(trial % 2)
            place = new_place(disk / str(trial), work, older=older)
            words = [*work.at(place), *(["--overwrite"] if older else [])]
            used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*"))
            free = int(2 ** generator.uniform(12, 18)) if trial else 0
            (disk / "ballast").write_bytes(bytes(DISK - used - free))
            ended = tool.run(program, words)
            (disk / "ballast").unlink()
            if ended.status == 0:
                assert result_in(program, place / work.out) == work.expected
            else:
                check_it_failed_and_cost_nothing(ended, work, place, older=older)
                if trial % 3 == 0:
                    finish(tool, work, again(program, words), place)
            shutil.rmtree(place)


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("older", [True, False], ids=["older", "new"])
@pytest.mark.parametrize("kind", ["read-only", "no permission", "closed", "below a file"])
@pytest.mark.parametrize("program", [*PROGRAMS, "triton"])
def test_where_nothing_can_be_written_one_sentence_says_so(
    program: str, kind: str, older: bool, works: dict[str, Work], tool: Launcher, tmp_path: Path
) -> None:
    work = works[program]
    with small_disk(tmp_path / "disk", DISK) if kind == "read-only" else no_disk(tmp_path / "folder") as disk:
        # Where nothing can be mounted, permission bits have to do; `drop_rights` lets them bind root too.
        place = new_place((disk or tmp_path) / "place", work, older=older)
        before = contents(place)
        target = place
        if kind == "below a file":
            target = place / "file"
            target.write_text("mine")
            before = contents(place)
        elif kind == "read-only" and disk is not None:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True, check=True)  # noqa: S607
        else:
            place.chmod(0 if kind == "closed" else 0o555)
        words = [*work.at(target), *(["--overwrite"] if older else [])]
        ended = tool.run(program, words, Fault(drop_rights=kind != "below a file"))
        if kind != "read-only" or disk is None:
            place.chmod(0o755)  # or nobody could look
        check_refusal(ended)
        assert contents(place) == before
        assert work.out in ended.complaint or "served" in ended.complaint


@contextmanager
def no_disk(folder: Path) -> Iterator[Path | None]:
    folder.mkdir()
    yield folder


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("train", "train.jsonl"),
        ("train", "base/model.safetensors"),
        ("train", "base/config.json"),
        ("train", "base"),
        ("train", ""),
        ("export", "adapter/training.json"),
        ("export", "adapter/adapter_model.safetensors"),
        ("export", "adapter"),
        ("export", "validation.jsonl"),
        ("export", ""),
        ("score", "bundle/manifest.json"),
        ("score", "bundle/model_int8.onnx"),
        ("score", "bundle"),
        ("score", "long.jsonl"),
        ("score", ""),
    ],
)
def test_what_may_not_be_read_is_named(
    program: str, name: str, works: dict[str, Work], inputs: Inputs, tool: Launcher, tmp_path: Path
) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    own = write_inputs(folder, Path(shutil.copytree(inputs.base, folder / "base")))
    words: tuple[str, ...] = own.train()
    if program == "export":
        copy = shutil.copytree(Path(works["export"].words[0]), folder / "adapter")
        words = own.export(Path(copy))
    elif program == "score":
        words = own.score(Path(shutil.copytree(Path(works["score"].words[0]), folder / "bundle")))
    (folder / name).chmod(0)
    ended = tool.run(program, [*words, "--out", str(tmp_path / works[program].out)], Fault(drop_rights=True))
    (folder / name).chmod(0o755)
    check_refusal(ended)
    assert str(folder / name) in ended.complaint
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]], ids=["plain", "resume", "overwrite"])
@pytest.mark.parametrize(("program", "name"), [("train", "adapter.checkpoints"), ("score", "out.csv.partial")])
def test_somebodys_file_in_the_place_of_what_is_under_way_is_left_alone(
    program: str, name: str, flags: list[str], works: dict[str, Work], tool: Launcher, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("mine")
    check_refusal(tool.run(program, [*works[program].at(tmp_path), *flags]))
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("name", ["two  words", "Grüße aus Łódź – 文書 🙂", 'it\'s "100%" $HOME;*?[a]', "-x"])
def test_a_path_may_have_any_name(
    name: str, works: dict[str, Work], inputs: Inputs, tool: Launcher, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    own = write_inputs(folder, Path(shutil.copytree(inputs.base, folder / "base")))
    for program, words, out in (
        ("train", own.train(), folder / "adapter"),
        ("export", own.export(folder / "adapter"), folder / "bundle"),
        ("score", own.score(folder / "bundle"), folder / "out.csv"),
    ):
        ended = tool.run(program, [*words, "--out", str(out)])
        assert ended.status == 0, ended.errors
        expected, found = works[program].expected, result_in(program, out)
        if program == "train":
            # PEFT's configuration names the base model, which lies elsewhere here.
            for result in (expected := json.loads(json.dumps(expected)), found):
                del result["sha256"]["adapter_config.json"]
        elif program == "export":
            expected, found = (
                {key: value for key, value in result.items() if "onnx" in key} for result in (expected, found)
            )
        assert found == expected
    assert {path.name for path in folder.iterdir()} == {
        *("base", "train.jsonl", "validation.jsonl", "long.jsonl", "adapter", "bundle", "out.csv")
    }


def test_a_pattern_for_a_name_reads_no_other_file(tmp_path: Path) -> None:
    """The library below takes a path for a pattern."""
    from train.data.load import load_split
    from train.data.tasks import MRPC

    wanted = write_jsonl(tmp_path / "a*.jsonl", make_pairs(4, seed=1))
    write_jsonl(tmp_path / "ab.jsonl", make_pairs(9, seed=2))
    assert len(load_split(MRPC, "", wanted)) == 4
    table = pyarrow.Table.from_pylist(make_pairs(5, seed=3))
    parquet.write_table(table, tmp_path / "[a].parquet")
    assert len(load_split(MRPC, "", tmp_path / "[a].parquet")) == 5


def age(folder: Path, *, years: int) -> None:
    """Let all files of a folder be from another year, those that sort first the newest."""
    for number, path in enumerate(sorted(folder.rglob("*"))):
        when = path.stat().st_mtime + years * 365 * 86400 - number
        os.utime(path, (when, when))


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_clock_that_jumps_back_changes_nothing(
    program: str, works: dict[str, Work], inputs: Inputs, tool: Launcher, tmp_path: Path
) -> None:
    work = works[program]
    folder = tmp_path / "inputs"
    folder.mkdir()
    own = write_inputs(folder, inputs.base)
    age(folder, years=10)
    place = new_place(tmp_path / "place", work, older=True)
    age(place, years=10)
    words = {
        "train": own.train(),
        "export": own.export(Path(work.words[0])),
        "score": own.score(Path(work.words[0])),
    }[program]
    line = [*words, "--out", str(place / work.out), "--overwrite"]
    back = Fault(clock_goes_back=True)
    # Killed in the middle; what it left is from the future when it is taken up.
    tool.run(program, line, replace(back, kill_after=0.7 * work.unbroken.seconds))
    age(place, years=10)
    ended = tool.run(program, again(program, line), back)
    assert ended.status == 0, ended.errors
    assert result_in(program, place / work.out) == work.expected
    assert [path.name for path in place.iterdir()] == [work.out]


# How whole files and folders appear.


@dataclass
class Disk:
    """The calls of `train.common.folder_record` that make something last, in their order; one of them fails."""

    fails_at: int
    calls: list[str]

    def __call__(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        self.calls.append(f"{name} {Path(arguments[0]).name}")
        if len(self.calls) == self.fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call(*arguments)

    def patch(self, patch: pytest.MonkeyPatch, *, can_exchange: bool) -> None:
        rename, replace_file, sync, swap = (
            os.rename,
            os.replace,
            train.common.atomic_folder.sync_path,
            train.common.atomic_folder.exchange,
        )
        patch.setattr(os, "rename", lambda *arguments: self("rename", rename, *arguments))
        patch.setattr(os, "replace", lambda *arguments: self("replace", replace_file, *arguments))
        patch.setattr(train.common.atomic_folder, "sync_path", lambda path: self("sync", sync, path))
        if can_exchange:
            patch.setattr(train.common.atomic_folder, "exchange", lambda *both: self("exchange", swap, *both))
        else:
            patch.setattr(train.common.atomic_folder, "exchange", lambda *_: False)


def write_folder(target: Path) -> None:
    with new_folder(target) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("new")
        (folder / "file").write_text("new")


NOTHING: dict[str, bytes] = {}
OLDER = {"target/file": b"older", "target/more": b"older"}


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "no exchange"])
@pytest.mark.parametrize("before", [NOTHING, OLDER], ids=["nothing", "older"])
def test_a_folder_appears_whole_or_not_at_all(
    before: dict[str, bytes], can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its calls fails; and each file is on the disk before the name is there, and then the name too."""
    for fails_at in range(1, 100):
        place = tmp_path / str(fails_at)
        place.mkdir()
        for name, content in before.items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(content)
        disk = Disk(fails_at, [])
        error = ""
        with monkeypatch.context() as patch:
            disk.patch(patch, can_exchange=can_exchange)
            try:
                write_folder(place / "target")
            except UsageError as raised:
                error = str(raised)
        if not error:
            break
        assert "No space left on device" in error
        assert contents(place) == before
        assert {path.name for path in place.iterdir()} == ({"target"} if before else set())
    assert contents(place) == {"target/deep/file": b"new", "target/file": b"new"}
    assert [path.name for path in place.iterdir()] == ["target"]
    assert fails_at == len(disk.calls) + 1
    steps = [call for call in disk.calls if not call.startswith("sync")]
    assert len(steps) == (2 if before and not can_exchange else 1)
    flushed = disk.calls[: disk.calls.index(steps[0])]
    assert sorted(call.partition(" ")[2] for call in flushed if ".partial" not in call) == ["deep", "file", "file"]
    assert len(flushed) == 4  # and the folder itself
    assert disk.calls[-1] == f"sync {place.name}"


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "no exchange"])
@pytest.mark.parametrize("before", [NOTHING, {"file": b"older"}], ids=["nothing", "older"])
def test_a_file_appears_whole_or_not_at_all(
    before: dict[str, bytes], can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    step = "rename" if not before else "exchange" if can_exchange else "replace"
    for fails_at in (1, 2, 3):
        for name, content in before.items():
            (tmp_path / name).write_bytes(content)
        disk = Disk(fails_at, [])
        with monkeypatch.context() as patch:
            disk.patch(patch, can_exchange=can_exchange)
            with pytest.raises(OSError, match="No space left on device"):
                write_whole(path, b"new")
        # Without an exchange the older one is gone by then: all that failed is to make sure of its successor's name.
        assert contents(tmp_path) == ({"file": b"new"} if (step, fails_at) == ("replace", 3) else before)
        calls = [call.partition(" ")[0] for call in disk.calls]
        assert calls[:3] == ["sync", step, "sync"][:fails_at]
    write_whole(path, b"new")
    assert contents(tmp_path) == {"file": b"new"}


def test_an_older_folder_behind_a_link_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / "target").symlink_to(tmp_path / "mine")
    write_folder(tmp_path / "target")
    assert not (tmp_path / "target").is_symlink()
    assert (tmp_path / "target" / "file").read_text() == "new"
    assert (tmp_path / "mine" / "file").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "target"}


def test_what_a_killed_run_left_is_removed_and_what_another_one_writes_is_not(tmp_path: Path) -> None:
    left = tmp_path / ".target.abcdefgh.partial"
    left.mkdir()
    (left / "half").write_text("a file")
    others = [tmp_path / name for name in (".target.partial", ".target.x.abcdefgh.partial", "target.abcdefgh.partial")]
    for path in others:
        path.mkdir()
    with new_folder(tmp_path / "target") as first:
        assert not left.exists()
        (first / "file").write_text("first")
        with new_folder(tmp_path / "target") as second:
            (second / "file").write_text("second")
        assert first.exists()
        assert (tmp_path / "target" / "file").read_text() == "second"
    # Who is ready last is right.
    assert (tmp_path / "target" / "file").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"target", *(path.name for path in others)}


def test_a_chart_of_the_benchmark_is_whole_or_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.bench.prepare import Prepared
    from export.bench.report import draw

    path = tmp_path / "bench.png"
    path.write_bytes(b"older")
    cell = SimpleNamespace(name="1x8", what="1 text of 8 tokens")
    prepared = cast(Prepared, SimpleNamespace(cells=[cell]))
    report = {"engines": [], "model": "tiny", "machine": "this one"}
    with monkeypatch.context() as patch:
        Disk(1, []).patch(patch, can_exchange=True)
        with pytest.raises(UsageError, match=r"--png .*bench\.png cannot be written \(No space left on device\)"):
            draw(path, prepared, report)
    assert contents(tmp_path) == {"bench.png": b"older"}
    draw(path, prepared, report)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [found.name for found in tmp_path.iterdir()] == ["bench.png"]


# Bits that flip, and files that end early.


@dataclass(frozen=True)
class Kind:
    """An adapter or a bundle.

    Attributes:
        record: the file that describes the others.
        unhashed: files that decide no answer, which a person may edit.
        load: reads and checks a folder.
        error: what it raises.
        logits: what it answers.
    """

    record: str
    unhashed: tuple[str, ...]
    load: Callable[[Path], Adapter | Bundle]
    error: type[PromptfoldError]
    logits: Callable[[Any], np.ndarray]


TEXTS = [tuple(str(row[name]) for name in ("sentence1", "sentence2")) for row in make_pairs(6, seed=9)]


def bundle_logits(bundle: Bundle) -> np.ndarray:
    from export.runtime.classifier import OnnxClassifier

    classifier = OnnxClassifier(bundle, threads=1, use_cuda=False)
    return classifier.logits(classifier.tokenize(TEXTS).arrays)


def adapter_logits(adapter: Adapter) -> np.ndarray:
    """As scoring and exporting load it, its base model too."""
    import torch

    from train.adapter.peft import load_prompted_classifier
    from train.model.tokenizer import load_tokenizer

    base = find_adapter_base(adapter)
    tokenizer = load_tokenizer(adapter.folder, adapter.max_length)
    encoded = tokenizer(*map(list, zip(*TEXTS, strict=True)), truncation="longest_first", padding=True)
    with torch.inference_mode():
        logits = load_prompted_classifier(adapter, base)(**encoded.convert_to_tensors("pt"))["logits"]
    return np.asarray(logits)


ADAPTERS = Kind("training.json", ("README.md", "curves.png"), load_adapter, AdapterError, adapter_logits)
BUNDLES = Kind("manifest.json", (), load_bundle, BundleError, bundle_logits)


@dataclass
class Damaged:
    """A copy of a folder, and what became of the damages that were done to it, one at a time.

    Attributes:
        outcomes: how often each happened.
    """

    kind: Kind
    folder: Path
    outcomes: Counter[str]

    def __post_init__(self) -> None:
        self.files = sorted(path.name for path in self.folder.iterdir())
        self._loaded = self.kind.load(self.folder)
        self._logits = self.kind.logits(self._loaded)

    def damage(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Damage a file, and see to it that no answer changes without a word."""
        path = self.folder / name
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        try:
            outcome = self._outcome(name)
        finally:
            path.write_bytes(whole)
        self.outcomes[outcome] += 1

    def _outcome(self, name: str) -> str:
        try:
            loaded = self.kind.load(self.folder)
        except self.kind.error as error:
            # A record may be damaged where it speaks of another file.
            assert str(self.folder / ("" if name == self.kind.record else name)) in str(error)
            return "refused"
        assert name in (*self.kind.unhashed, self.kind.record)
        try:
            logits = self.kind.logits(loaded)
        except PromptfoldError:
            # The record names another base model, which is not there.
            assert isinstance(loaded, Adapter)
            assert isinstance(self._loaded, Adapter)
            assert loaded.model != self._loaded.model
            return "refused before the first answer"
        assert np.array_equal(logits, self._logits)
        if isinstance(loaded, Adapter):
            # What these few texts might not show.
            assert isinstance(self._loaded, Adapter)
            assert (loaded.task, loaded.max_length) == (self._loaded.task, self._loaded.max_length)
        else:
            assert loaded == self._loaded
        return "changes no answer"


def flip(generator: random.Random) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        flipped = bytearray(content)
        flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        return bytes(flipped)

    return change


def cut_short(generator: random.Random) -> Callable[[bytes], bytes]:
    return lambda content: content[: generator.randrange(len(content))]


@pytest.mark.parametrize("kind", [ADAPTERS, BUNDLES], ids=["adapter", "bundle"])
def test_no_damage_changes_an_answer_without_a_word(
    kind: Kind, adapter: Folders, bundle_in: Precisions, tmp_path: Path, soak: int
) -> None:
    source = adapter("bert") if kind is ADAPTERS else bundle_in("bert", "int8")
    damaged = Damaged(kind, Path(shutil.copytree(source, tmp_path / "copy")), Counter())
    generator = random.Random(f"damage {kind.record}")  # noqa: S311 -- test data
    assert len(damaged.files) >= 7
    for _ in range(FLIPS * soak):
        damaged.damage(generator.choice(damaged.files), flip(generator))
    for _ in range(TRUNCATIONS * soak):
        damaged.damage(generator.choice(damaged.files), cut_short(generator))
    # As often again in the one file that no other one vouches for.
    for _ in range(FLIPS * soak):
        damaged.damage(kind.record, flip(generator))
    assert damaged.outcomes["refused"] > FLIPS
    kind.load(damaged.folder)  # all damages are undone


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder's files and writes nothing to the terminal."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def content_of(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


DOWNLOADER = """
import pathlib, sys, urllib.request
address, folder, *names = sys.argv[1:]
for name in names:
    to = pathlib.Path(folder, name)
    to.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(f"{address}/{name}") as answer, to.open("wb") as file:
        while True:
            print(end=".", flush=True)
            sys.stdin.read(1)
            if not (chunk := answer.read(16384)):
                break
            file.write(chunk)
            file.flush()
"""
"""Writes to the final names, as the simplest of tools do, and waits before each piece until it may go on."""


@pytest.mark.parametrize("kind", [ADAPTERS, BUNDLES], ids=["adapter", "bundle"])
def test_a_download_killed_at_any_time_is_refused_until_it_is_done_again(
    kind: Kind, adapter: Folders, bundle: Folders, tmp_path: Path, soak: int
) -> None:
    source = (adapter if kind is ADAPTERS else bundle)("bert")
    names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    # What decides no answer comes first: the folder would be whole without it.
    names.sort(key=lambda name: name not in kind.unhashed)
    n_unhashed = sum(name in kind.unhashed for name in names)
    moments = sum(-(-(source / name).stat().st_size // 16384) + 1 for name in names)
    whole = {name: content_of(source / name) for name in names[n_unhashed:]}
    generator, refusals = random.Random(f"download {kind.record}"), 0  # noqa: S311 -- test data
    handler = partial(QuietHandler, directory=str(source))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for trial in range(KILLS * soak):
            rest = names[n_unhashed:]
            generator.shuffle(rest)
            names[n_unhashed:] = rest
            to = tmp_path / str(trial)
            # One in each of as many equal spans, so that they lie everywhere.
            pieces = int(moments * (trial + generator.random()) / (KILLS * soak))
            words = [sys.executable, "-c", DOWNLOADER, f"http://127.0.0.1:{server.server_port}", str(to), *names]
            with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as download:
                assert download.stdin is not None
                assert download.stdout is not None
                for _ in range(pieces):
                    assert download.stdout.read(1) == b"."
                    download.stdin.write(b" ")
                    download.stdin.flush()
                assert download.stdout.read(1) == b"."
                download.kill()
            if {name: content_of(to / name) for name in names[n_unhashed:]} == whole:
                kind.load(to)
            else:
                refusals += 1
                with pytest.raises(kind.error, match=re.escape(str(to))):
                    kind.load(to)
            subprocess.run(words, input=b" " * moments, stdout=subprocess.DEVNULL, check=True)
            kind.load(to)
            assert all(content_of(to / name) == content_of(source / name) for name in names)
        server.shutdown()
    assert refusals >= 0.8 * KILLS * soak


def set_deep(record: dict[str, Any], keys: tuple[str | int, ...], value: object) -> None:
    inner: Any = record
    for key in keys[:-1]:
        inner = inner[key]
    assert inner[keys[-1]] != value
    inner[keys[-1]] = value


@pytest.mark.parametrize(
    ("kind", "keys", "value"),
    [
        (ADAPTERS, ("max_length",), 12),
        (ADAPTERS, ("task", "labels", 0), "nod_equivalent"),
        (ADAPTERS, ("task", "positive_label"), "not_equivalent"),
        (ADAPTERS, ("model", "sha256"), "0" * 64),
        (ADAPTERS, ("baseline_rules", "constant"), 0),
        (BUNDLES, ("max_length",), 12),
        (BUNDLES, ("pad_token_id",), 3),
        (BUNDLES, ("token_types",), False),
        (BUNDLES, ("tasks", 0, "task", "labels", 1), "equivalens"),
        (BUNDLES, ("tasks", 0, "parity", "max_logit_difference"), 0.0),
        (BUNDLES, ("graphs", 1, "gates"), []),
        (BUNDLES, ("graphs", 1, "gates", 0, "n_rows"), 4000),
    ],
)
def test_a_record_that_says_something_else_is_refused(
    kind: Kind, keys: tuple[str | int, ...], value: object, adapter: Folders, bundle_in: Precisions, tmp_path: Path
) -> None:
    """Each of these is well-formed, and all files are those of the record."""
    copy = Path(shutil.copytree(adapter("bert") if kind is ADAPTERS else bundle_in("bert", "int8"), tmp_path / "copy"))
    record = json.loads((copy / kind.record).read_text())
    set_deep(record, keys, value)
    (copy / kind.record).write_text(json.dumps(record))
    with pytest.raises(kind.error, match=rf"{kind.record} is damaged"):
        kind.load(copy)
    del record["record_sha256"]
    (copy / kind.record).write_text(json.dumps(record))
    with pytest.raises(kind.error, match=rf"{kind.record} is damaged"):
        kind.load(copy)


def test_an_adapters_scores_and_card_may_be_corrected(adapter: Folders, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter("bert"), tmp_path / "copy"))
    before = load_adapter(copy)
    record = json.loads((copy / "training.json").read_text())
    set_deep(record, ("validation", "accuracy"), 0.123)
    (copy / "training.json").write_text(json.dumps(record))
    (copy / "README.md").write_text("my own card")
    (copy / "curves.png").unlink()
    after = load_adapter(copy)
    assert after.scores.values["accuracy"] == 0.123
    assert replace(after, scores=before.scores) == before
