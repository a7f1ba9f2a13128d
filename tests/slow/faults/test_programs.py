"""What holds for every program, whatever happens to it: killed, starved and misled, it leaves nothing broken."""

import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
import pytest

from export.bundle.folder import load_bundle
from tests.conftest import ON_CPU, ROOT, Folders, make_pairs, write_jsonl
from tests.faults import Ended, Fault, Launcher, contents
from train.adapter.folder import load_adapter
from train.common.atomic_folder import exchange
from train.common.errors import AdapterError, BundleError
from train.common.folder_record import sha256_of_file

Result = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A command line, all its words but those for the output, and what it makes."""

    program: str
    words: tuple[str, ...]
    out: str  # name of the output
    older: Path  # another result of the same kind
    expected: Result  # that of the unbroken run
    unbroken: Ended

    @property
    def source(self) -> Path:
        """The base model, adapter or bundle that it reads."""
        return Path(self.words[1 if self.program == "train" else 0])

    def at(self, place: Path) -> list[str]:
        """The whole command line, for an output in a folder."""
        return [*self.words, "--out", str(place if self.program == "triton" else place / self.out)]

    def new_place(self, folder: Path, *, older: bool) -> tuple[Path, list[str]]:
        """Make a folder for the output, with an older one where the new one shall go or without; the command line."""
        folder.mkdir()
        if older:
            copy: Callable[[Path, Path], object] = shutil.copytree if self.older.is_dir() else shutil.copyfile
            copy(self.older, folder / self.out)
        return folder, [*self.at(folder), *(["--overwrite"] if older else [])]

    def result(self, out: Path) -> Result:
        return result_in(self.program, out)


Works = dict[str, Work]


def result_in(program: str, out: Path) -> Result:
    """What has to come out the same, to the last bit; a PromptfoldError where it is not whole."""
    if program == "train":
        load_adapter(out)
        training = json.loads((out / "training.json").read_text())
        # Not the seconds that it took.
        return {name: training[name] for name in ("sha256", "epochs", "best_epoch", "validation")}
    if program == "export":
        load_bundle(out)
    paths = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): sha256_of_file(path) for path in paths}


def write_inputs(folder: Path) -> Path:
    for seed, (name, n_rows) in enumerate({"train": 32, "validation": 24, "long": 400}.items(), start=1):
        write_jsonl(folder / f"{name}.jsonl", make_pairs(n_rows, seed=seed))
    return folder


def words_for(program: str, source: Path, inputs: Path) -> tuple[str, ...]:
    """The words of a program that reads the base model, adapter or bundle at ``source``."""
    if program == "score":
        sizes = "--threads 1 --chunk-rows 50 --batch-size 4"
        return (str(source), "--in", f"{inputs}/long.jsonl", *sizes.split())
    rows = ("--validation-file", f"{inputs}/validation.jsonl")
    if program == "export":
        return (str(source), *rows)
    sizes = "--virtual-tokens 4 --encoder-hidden-size 16 --batch-size 8 --learning-rate 1e-2 --epochs 2"
    files = ("--train-file", f"{inputs}/train.jsonl", *rows)
    return ("--model", str(source), *files, *sizes.split(), "--checkpoint-steps", "3")


@pytest.fixture(scope="module")
def soak(request: pytest.FixtureRequest) -> int:
    """How many times as much is tried as by default."""
    return 10 if request.config.getoption("--soak") else 1


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """The temporary files of runs that are killed lie in a folder of their own."""
    environment = os.environ | ON_CPU | {"TMPDIR": str(tmp_path_factory.mktemp("scratch"))}
    command = [sys.executable, "-m", "tests.faults"]
    with Popen(command, cwd=ROOT, env=environment, stdin=PIPE, stdout=PIPE, text=True) as process:
        yield Launcher(process)


@pytest.fixture(scope="module")
def works(tool: Launcher, base_model: Folders, tmp_path_factory: pytest.TempPathFactory) -> Works:
    """One of each program, run once without any fault."""
    older, whole, inputs = (tmp_path_factory.mktemp(name) for name in ("older", "whole", "inputs"))
    write_inputs(inputs)

    def run(program: str, words: tuple[str, ...], out: Path) -> Ended:
        ended = tool.run(program, [*words, "--out", str(out)])
        assert ended.status == 0, ended.errors
        return ended

    train = words_for("train", base_model("bert"), inputs)
    run("train", (*train, "--seed", "1", "--epochs", "1"), older / "adapter")
    run("export", (str(older / "adapter"), "--precision", "fp32"), older / "bundle")
    run("triton", (str(older / "bundle"), "--name", "served"), older)
    (older / "out.csv").write_text("older\n")
    made = {}
    for program, words, out in (
        ("train", train, "adapter"),
        ("export", words_for("export", whole / "adapter", inputs), "bundle"),
        ("score", words_for("score", whole / "bundle", inputs), "out.csv"),
        ("triton", (str(whole / "bundle"), "--name", "served"), "served"),
    ):
        ended = run(program, words, whole if program == "triton" else whole / out)
        expected = result_in(program, whole / out)
        assert expected != result_in(program, older / out)
        made[program] = Work(program, words, out, older / out, expected, ended)
    return made


@pytest.fixture
def work(request: pytest.FixtureRequest, works: Works) -> Work:
    return works[request.param]


all_programs = pytest.mark.parametrize("work", ["train", "export", "score", "triton"], indirect=True)
readers = pytest.mark.parametrize("work", ["train", "export", "score"], indirect=True)


def check_nothing_broken_is_loadable(work: Work, place: Path) -> None:
    """Every folder or file that passes for a result is the older one or the new one, and whole."""
    may_be_hidden = work.program in {"train", "export"}  # or misplaced
    for path in place.rglob("*"):
        if path.is_dir() if may_be_hidden else path == place / work.out:
            try:
                found = work.result(path)
            except (AdapterError, BundleError):
                assert may_be_hidden
                continue
            assert found in (work.result(work.older), work.expected), path


def check_nothing_is_cut_short(place: Path) -> None:
    """After an error that was caught, only what is whole may stay: the output, and what --resume goes on from."""
    for path in place.rglob("*"):
        name = path.name
        assert not name.startswith((".", "new-", "whole")), path
        assert not name.endswith((".new", ".old")), path
        assert not name.endswith(".partial") or (path / "_run.json").is_file(), path
        assert not name.startswith("checkpoint-") or (path / "complete.json").is_file(), path
        assert not name.endswith(".checkpoints") or (path / "run.json").is_file(), path


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
    check_done(ended, work, place)


def check_done(ended: Ended, work: Work, place: Path) -> None:
    """The result is that of the unbroken run, and nothing is left of what was interrupted."""
    assert ended.status == 0, ended.errors
    assert work.result(place / work.out) == work.expected
    assert [path.name for path in place.iterdir()] == [work.out]


@all_programs
def test_killed_at_a_rename_or_a_flush_it_goes_on(work: Work, tool: Launcher, tmp_path: Path, soak: int) -> None:
    _, words = work.new_place(tmp_path / "count", older=True)
    moments = tool.run(work.program, words).moments
    assert {"fsync", "exchange"} <= set(moments)
    # Elsewhere than on Linux there is a moment between two renames; see tests/test_faults.py.
    is_never_gone = exchange(*(work.new_place(tmp_path / name, older=False)[0] for name in "ab"))
    # All renames, and so many others, spread evenly.
    renames = [number for number, name in enumerate(moments, start=1) if name != "fsync"]
    spread = np.linspace(1, len(moments), min(4 * soak, len(moments))).round().astype(int).tolist()
    for number in sorted({*renames, *spread}):
        place, words = work.new_place(tmp_path / str(number), older=True)
        assert tool.run(work.program, words, Fault(kill_at=number)).was_killed
        check_nothing_broken_is_loadable(work, place)
        assert (place / work.out).exists() or not is_never_gone
        finish(tool, work, words, place)


def test_killed_at_any_time_an_export_goes_on(works: Works, tool: Launcher, tmp_path: Path, soak: int) -> None:
    generator, kills, n = random.Random("kill export"), 0, 8 * soak  # noqa: S311 -- test data
    work = works["export"]
    for trial in range(n):
        # One in each of as many equal spans, so that they lie everywhere.
        seconds = work.unbroken.seconds * (trial + generator.random()) / n
        older = bool(generator.getrandbits(1))
        place, words = work.new_place(tmp_path / str(trial), older=older)
        ended = tool.run("export", words, Fault(kill_after=seconds))
        assert ended.was_killed or ended.status == 0, ended.errors
        kills += ended.was_killed
        assert (place / work.out).exists() or not older
        check_nothing_broken_is_loadable(work, place)
        finish(tool, work, words, place)
    assert kills


@all_programs
@pytest.mark.parametrize("kind", ["no permission", "closed", "below a file"])
def test_one_sentence_says_where_nothing_can_be_written(kind: str, work: Work, tool: Launcher, tmp_path: Path) -> None:
    place, words = work.new_place(tmp_path / "place", older=kind == "closed")
    if kind == "below a file":
        (place / "file").write_text("mine")
        words = work.at(place / "file")
    before = contents(place)
    place.chmod({"closed": 0, "no permission": 0o555}.get(kind, 0o755))
    ended = tool.run(work.program, words, Fault(drop_rights=kind != "below a file"))
    place.chmod(0o755)
    check_refusal(ended)
    assert contents(place) == before
    assert work.out in ended.complaint


@readers
def test_a_full_disk_costs_one_sentence(work: Work, tool: Launcher, tmp_path: Path, soak: int) -> None:
    """No file may grow beyond a limit. That is no full disk, but fails like one, everywhere and at any byte."""
    generator, failed = random.Random(f"limit {work.program}"), 0  # noqa: S311 -- test data
    # Exponents of a size in bytes. Scores are the smallest of the files that are written.
    smallest, largest = 7 if work.program == "score" else 12, 16
    for trial in range(6 * soak):
        older = bool(trial % 2)
        place, words = work.new_place(tmp_path / str(trial), older=older)
        # Less than the largest file has.
        limit = int(2 ** generator.uniform(smallest, largest)) if trial else 0
        ended = tool.run(work.program, words, Fault(file_limit=limit))
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
        if failed % 3 == 0:
            finish(tool, work, words, place)
    assert failed >= 3


READ = {
    "train": ("base", "train.jsonl", "base/model.safetensors", "base/config.json"),
    "export": ("adapter", "adapter/training.json", "adapter/adapter_model.safetensors", "validation.jsonl"),
    "score": ("bundle", "bundle/manifest.json", "bundle/model_int8.onnx", "long.jsonl"),
}


@readers
def test_what_may_not_be_read_is_named(work: Work, tool: Launcher, tmp_path: Path) -> None:
    (folder := tmp_path / "inputs").mkdir()
    source = Path(shutil.copytree(work.source, folder / READ[work.program][0]))
    command = [*words_for(work.program, source, write_inputs(folder)), "--out", str(tmp_path / work.out)]
    for path in (folder, *(folder / name for name in READ[work.program])):
        mode = path.stat().st_mode
        path.chmod(0)
        ended = tool.run(work.program, command, Fault(drop_rights=True))
        path.chmod(mode)
        check_refusal(ended)
        assert str(path) in ended.complaint
        assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


def age(folder: Path) -> None:
    """Let all files of a folder be from ten years ahead, those that sort first the newest."""
    for number, path in enumerate(sorted(folder.rglob("*"))):
        when = path.stat().st_mtime + 10 * 365 * 86400 - number
        os.utime(path, (when, when))


@readers
def test_a_clock_that_jumps_back_changes_nothing(work: Work, tool: Launcher, tmp_path: Path) -> None:
    (folder := tmp_path / "inputs").mkdir()
    place, _ = work.new_place(tmp_path / "place", older=True)
    command = words_for(work.program, work.source, write_inputs(folder))
    words = [*command, "--out", str(place / work.out), "--overwrite"]
    age(folder)
    age(place)
    # Killed in the middle; what it left is from the future when it is taken up.
    back = Fault(clock_goes_back=True)
    tool.run(work.program, words, replace(back, kill_after=0.7 * work.unbroken.seconds))
    age(place)
    check_done(tool.run(work.program, [*words, *(["--resume"] if work.program != "export" else [])], back), work, place)


@pytest.mark.parametrize(("program", "under_way"), [("train", "adapter.checkpoints"), ("score", "out.csv.partial")])
@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]], ids=["plain", "resume", "overwrite"])
def test_a_foreign_file_is_left_alone(
    flags: list[str], program: str, under_way: str, works: Works, tool: Launcher, tmp_path: Path
) -> None:
    """In the place of what is under way."""
    (tmp_path / under_way).write_text("mine")
    check_refusal(tool.run(program, [*works[program].at(tmp_path), *flags]))
    assert contents(tmp_path) == {under_way: b"mine"}


@pytest.mark.parametrize("name", ['Grüße  aus Łódź – 文書 🙂 it\'s "100%" $HOME;*?[a]', "-x"])
def test_a_path_may_have_any_name(name: str, works: Works, tool: Launcher, tmp_path: Path) -> None:
    """Also one whose characters mean something to a shell, a pattern or a flag."""
    (folder := tmp_path / name).mkdir()
    write_inputs(folder)
    shutil.copytree(works["train"].source, folder / "base")
    for program, (source, *_) in READ.items():
        work = works[program]
        out = folder / work.out
        ended = tool.run(program, [*words_for(program, folder / source, folder), "--out", str(out)])
        assert ended.status == 0, ended.errors
        expected, found = json.loads(json.dumps([work.expected, work.result(out)]))
        for result in (expected, found):
            if program == "train":
                # PEFT's configuration names the base model, which lies elsewhere here.
                del result["sha256"]["adapter_config.json"]
            elif program == "export":
                for key in [key for key in result if "onnx" not in key]:
                    del result[key]
        assert found == expected
    names = "base train.jsonl validation.jsonl long.jsonl adapter bundle out.csv"
    assert {path.name for path in folder.iterdir()} == set(names.split())
