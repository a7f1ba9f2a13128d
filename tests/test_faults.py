"""Starved and damaged: nothing is lost that was there, and nothing broken is taken for whole. Kills are in tests/slow."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow
import pytest
from pyarrow import parquet

import train.common.atomic_folder
from export.bundle.folder import load_bundle
from tests.conftest import Folders, Precisions, make_pairs, write_jsonl
from train.adapter.folder import load_adapter
from train.common.atomic_folder import new_folder, write_whole
from train.common.errors import AdapterError, BundleError, PromptfoldError, UsageError


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


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

    def patch(self, patch: pytest.MonkeyPatch, *, can_exchange: bool) -> None:
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


@dataclass(frozen=True)
class Kind:
    """An adapter or a bundle."""

    record: str
    """The file that describes the others."""
    unhashed: tuple[str, ...]
    """Files that decide no answer, which a person may edit."""
    load: Callable[[Path], Any]
    """Reads and checks a folder."""
    error: type[PromptfoldError]
    decisive: Callable[[Any], object]
    """All that decides an answer, of what `load` returns."""


ADAPTERS = Kind(
    "training.json",
    ("README.md", "curves.png"),
    load_adapter,
    AdapterError,
    attrgetter("model_sha256", "task", "method", "virtual_tokens", "max_length", "baseline_rules"),
)
BUNDLES = Kind("manifest.json", (), load_bundle, BundleError, lambda bundle: bundle)


@pytest.fixture(params=[ADAPTERS, BUNDLES], ids=["adapter", "bundle"])
def kind_and_copy(
    request: pytest.FixtureRequest, adapter: Folders, bundle_in: Precisions, tmp_path: Path
) -> tuple[Kind, Path]:
    source = adapter("bert") if request.param is ADAPTERS else bundle_in("bert", "int8")
    return request.param, Path(shutil.copytree(source, tmp_path / "copy"))


def test_no_damage_changes_an_answer_without_a_word(kind_and_copy: tuple[Kind, Path]) -> None:
    """Flip bits and cut files short, one at a time: what is not refused decides as before.

    As often again in the one file that no other one vouches for.
    """
    kind, folder = kind_and_copy
    generator = random.Random(f"damage {kind.record}")  # noqa: S311 -- test data

    def flip(content: bytes) -> bytes:
        flipped = bytearray(content)
        flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        return bytes(flipped)

    def cut(content: bytes) -> bytes:
        return content[: generator.randrange(len(content))]

    before, refused = kind.decisive(kind.load(folder)), 0
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) >= 7
    for number in range(500):
        name = kind.record if number % 2 else generator.choice(files)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes((flip if number % 5 else cut)(whole))
        try:
            assert kind.decisive(kind.load(folder)) == before
            assert name in (*kind.unhashed, kind.record)
        except kind.error as error:
            # A record may be damaged where it speaks of another file.
            assert str(folder / ("" if name == kind.record else name)) in str(error)
            refused += 1
        (folder / name).write_bytes(whole)
    assert refused > 200
    kind.load(folder)  # all damages are undone


def test_a_download_that_was_killed_is_refused_until_it_is_done_again(
    kind_and_copy: tuple[Kind, Path], tmp_path: Path
) -> None:
    """Files come one after the other under their final names, as the simplest of tools write them."""
    kind, source = kind_and_copy
    # What decides no answer comes first: the folder would be whole without it.
    names = sorted((path.name for path in source.iterdir()), key=lambda name: name not in kind.unhashed)
    to = tmp_path / "download"
    for n_whole in (len(names) // 2, len(names) - 1):
        to.mkdir()
        for name in names[:n_whole]:
            shutil.copyfile(source / name, to / name)
        (to / names[n_whole]).write_bytes((source / names[n_whole]).read_bytes()[:100])
        with pytest.raises(kind.error, match=str(to)):
            kind.load(to)
        shutil.copytree(source, to, dirs_exist_ok=True)
        kind.load(to)
        shutil.rmtree(to)


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
