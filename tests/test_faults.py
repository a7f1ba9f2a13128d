"""Starved and damaged: nothing is lost that was there, and nothing broken is taken for whole. Kills are in tests/slow."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import train.common.atomic_folder
from export.bench.report import draw
from export.bundle.folder import BUNDLE
from tests.conftest import Folders, Precisions, make_pairs, write_jsonl
from tests.faults import contents
from tests.test_untrusted import Patch, load
from train.adapter.folder import load_adapter
from train.adapter.record import ADAPTER
from train.common.atomic_folder import new_folder, write_whole
from train.common.errors import UsageError
from train.common.folder_record import FolderKind
from train.data.load import load_split
from train.data.tasks import MRPC

Files = dict[str, bytes]
Keys = tuple[str | int, ...]


def test_a_pattern_for_a_name_reads_no_other_file(tmp_path: Path) -> None:
    """The library below takes a path for a pattern."""
    wanted = write_jsonl(tmp_path / "a*.jsonl", make_pairs(4, seed=1))
    write_jsonl(tmp_path / "ab.jsonl", make_pairs(9, seed=2))
    assert len(load_split(MRPC, "", wanted)) == 4
    pd.DataFrame(make_pairs(5, seed=3)).to_parquet(tmp_path / "[a].parquet")
    assert len(load_split(MRPC, "", tmp_path / "[a].parquet")) == 5


@dataclass
class Disk:
    """The calls of `train.common.atomic_folder` that make something last, in their order; one of them fails."""

    fails_at: int
    calls: list[str]

    def __call__(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        self.calls.append(f"{name} {Path(arguments[0]).name}")
        if len(self.calls) == self.fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call(*arguments)

    def patch(self, patch: Patch, *, can_exchange: bool) -> None:
        folders = train.common.atomic_folder
        named = (("rename", os, "rename"), ("replace", os, "replace"), ("sync", folders, "sync_path"))
        for name, module, attribute in named:
            patch.setattr(module, attribute, partial(self, name, getattr(module, attribute)))
        swap = partial(self, "exchange", folders.exchange)
        patch.setattr(folders, "exchange", swap if can_exchange else lambda *_: False)


def write_folder(target: Path) -> None:
    with new_folder(target) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("new")
        (folder / "file").write_text("new")


with_or_without = pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "no exchange"])


@with_or_without
@pytest.mark.parametrize("before", [{}, {"target/file": b"older", "target/more": b"older"}], ids=["nothing", "older"])
def test_a_folder_appears_whole_or_not(before: Files, can_exchange: bool, tmp_path: Path, monkeypatch: Patch) -> None:
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


@with_or_without
@pytest.mark.parametrize("before", [{}, {"file": b"older"}], ids=["nothing", "older"])
def test_a_file_appears_whole_or_not(before: Files, can_exchange: bool, tmp_path: Path, monkeypatch: Patch) -> None:
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


def test_two_runs_that_write_one_file_do_not_mix(tmp_path: Path, monkeypatch: Patch) -> None:
    path, sync = tmp_path / "file", train.common.atomic_folder.sync_path
    (tmp_path / ".file.abcdefgh.partial").write_text("a killed run's")
    others = iter([b"second"])

    def sync_while_another_writes(part: Path) -> None:
        for content in others:
            write_whole(path, content)
            assert path.read_bytes() == content
        sync(part)

    monkeypatch.setattr(train.common.atomic_folder, "sync_path", sync_while_another_writes)
    (tmp_path / "usual").touch()
    write_whole(path, b"the first one's")
    assert contents(tmp_path) == {"file": b"the first one's", "usual": b""}
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_older_folder_behind_a_link_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / "target").symlink_to(tmp_path / "mine")
    write_folder(tmp_path / "target")
    assert not (tmp_path / "target").is_symlink()
    assert contents(tmp_path) == {"mine/file": b"mine", "target/file": b"new", "target/deep/file": b"new"}


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
    # Killed between the two renames that it takes without an exchange, a run leaves the older folder under another name.
    (aside := tmp_path / ".target.abcdefgh.old").mkdir()
    (tmp_path / "target").rename(aside / "target")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "target"):
        1 / 0  # noqa: B018 -- another run puts it back, also where that one fails
    assert contents(tmp_path) == {"target/file": b"first"}


def test_a_chart_of_the_benchmark_is_whole_or_the_older_one(tmp_path: Path, monkeypatch: Patch) -> None:
    (path := tmp_path / "bench.png").write_bytes(b"older")
    prepared: Any = SimpleNamespace(cells=[SimpleNamespace(name="1x8", what="1 text of 8 tokens")])
    report = {"engines": [], "model": "tiny", "machine": "this one"}
    with monkeypatch.context() as patch:
        Disk(1, []).patch(patch, can_exchange=True)
        with pytest.raises(UsageError, match=r"--png .*bench\.png cannot be written \(No space left on device\)"):
            draw(path, prepared, report)
    assert contents(tmp_path) == {"bench.png": b"older"}


Copy = Callable[[FolderKind], Path]
UNHASHED = {ADAPTER.name: ("README.md", "curves.png"), BUNDLE.name: ()}
"""Files that decide no answer, which a person may edit."""


def decisive(found: Any) -> object:
    """All that decides an answer, of an adapter or a bundle."""
    names = ("model_sha256", "task", "method", "virtual_tokens", "max_length", "baseline_rules")
    return [getattr(found, name) for name in names] if hasattr(found, "model_sha256") else found


@pytest.fixture
def copy_of(adapter: Folders, bundle_in: Precisions, tmp_path: Path) -> Copy:
    """A function from a kind to a copy of such a folder."""

    def get(kind: FolderKind) -> Path:
        source = adapter("bert") if kind is ADAPTER else bundle_in("bert", "int8")
        return Path(shutil.copytree(source, tmp_path / "copy"))

    return get


both_kinds = pytest.mark.parametrize("kind", [ADAPTER, BUNDLE], ids=["adapter", "bundle"])


@both_kinds
def test_no_damage_changes_an_answer_without_a_word(kind: FolderKind, copy_of: Copy) -> None:
    """Flip bits and cut files short, one at a time: what is not refused decides as before.

    As often again in the one file that no other one vouches for.
    """
    folder = copy_of(kind)
    generator = random.Random(f"damage {kind.record}")  # noqa: S311 -- test data

    before, refused = decisive(load(folder, kind)), 0
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) >= 7
    for number in range(500):
        name = kind.record if number % 2 else generator.choice(files)
        whole = (folder / name).read_bytes()
        damaged, place = bytearray(whole), generator.randrange(len(whole))
        damaged[place] ^= 1 << generator.randrange(8)
        (folder / name).write_bytes(damaged if number % 5 else whole[:place])
        try:
            assert decisive(load(folder, kind)) == before
            assert name in (*UNHASHED[kind.name], kind.record)
        except kind.error as error:
            # A record may be damaged where it speaks of another file.
            assert str(folder / ("" if name == kind.record else name)) in str(error)
            refused += 1
        (folder / name).write_bytes(whole)
    assert refused > 200
    load(folder, kind)  # all damages are undone


@both_kinds
def test_a_killed_download_is_refused_until_it_is_done_again(kind: FolderKind, copy_of: Copy, tmp_path: Path) -> None:
    """Files come one after the other under their final names, as the simplest of tools write them."""
    source = copy_of(kind)
    # What decides no answer comes first: the folder would be whole without it.
    names = sorted((path.name for path in source.iterdir()), key=lambda name: name not in UNHASHED[kind.name])
    to = tmp_path / "download"
    for n_whole in (len(names) // 2, len(names) - 1):
        to.mkdir()
        for name in names[:n_whole]:
            shutil.copyfile(source / name, to / name)
        (to / names[n_whole]).write_bytes((source / names[n_whole]).read_bytes()[:100])
        with pytest.raises(kind.error, match=str(to)):
            load(to, kind)
        shutil.copytree(source, to, dirs_exist_ok=True)
        load(to, kind)
        shutil.rmtree(to)


@pytest.mark.parametrize(
    ("kind", "keys", "value"),
    [
        (ADAPTER, ("max_length",), 12),
        (ADAPTER, ("task", "labels", 0), "nod_equivalent"),
        (ADAPTER, ("task", "positive_label"), "not_equivalent"),
        (ADAPTER, ("model", "sha256"), "0" * 64),
        (ADAPTER, ("baseline_rules", "constant"), 0),
        (BUNDLE, ("max_length",), 12),
        (BUNDLE, ("pad_token_id",), 3),
        (BUNDLE, ("token_types",), False),
        (BUNDLE, ("tasks", 0, "task", "labels", 1), "equivalens"),
        (BUNDLE, ("tasks", 0, "parity", "max_logit_difference"), 0.0),
        (BUNDLE, ("graphs", 1, "gates"), []),
        (BUNDLE, ("graphs", 1, "gates", 0, "n_rows"), 4000),
    ],
)
def test_a_record_that_says_something_else_is_refused(
    kind: FolderKind, keys: Keys, value: object, copy_of: Copy
) -> None:
    """Each of these is well-formed, and all files are those of the record. So is one without a hash of itself."""
    folder = copy_of(kind)
    record = json.loads((folder / kind.record).read_text())
    inner: Any = record
    for key in keys[:-1]:
        inner = inner[key]
    assert inner[keys[-1]] != value
    inner[keys[-1]] = value
    for change in (record, {name: record[name] for name in record if name != "record_sha256"}):
        (folder / kind.record).write_text(json.dumps(change))
        with pytest.raises(kind.error, match=rf"{kind.record} is damaged"):
            load(folder, kind)


def test_an_adapters_scores_and_card_may_be_corrected(copy_of: Copy) -> None:
    copy = copy_of(ADAPTER)
    before = load_adapter(copy)
    record = json.loads((copy / "training.json").read_text())
    record["validation"]["accuracy"] = 0.123
    (copy / "training.json").write_text(json.dumps(record))
    (copy / "README.md").write_text("my own card")
    (copy / "curves.png").unlink()
    after = load_adapter(copy)
    assert after.scores.values["accuracy"] == 0.123
    assert replace(after, scores=before.scores) == before
