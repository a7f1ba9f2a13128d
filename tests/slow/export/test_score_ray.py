"""``python -m export.score --engine ray`` on a real cluster: many files, S3, workers and commands that are killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pytest
from pyarrow import fs, parquet

import export.score.on_ray
from export.__main__ import main as export_main
from export.score.__main__ import main
from tests.conftest import ON_CPU, ROOT, Folders, flip_bit, make_pairs
from tests.export.test_score import LABELS, Capsys, Label, Refusal, Rows, refusal, write_files

__all__ = ["refusal"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")
S3_KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
"""On every machine of the cluster; the endpoint goes from the command to the workers."""
LONG_ROWS = make_pairs(900, seed=23)
SLOW = ("--chunk-rows", "10", "--batch-size", "1")
CLUSTER = """
import sys
from export.ray_cluster import ray_cluster
with ray_cluster(num_cpus=2) as cluster:
    print(cluster.address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster in a process of its own, so that commands can come and go; the token keeps everybody else out."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ON_CPU | S3_KEYS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}).items():
            patch.setenv(name, value)
        command = [sys.executable, "-c", CLUSTER]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
            process.communicate("")
        assert process.returncode == 0


@pytest.fixture
def label(address: str, capsys: Capsys) -> Label:
    def run(bundle_folder: Path, source: object, out: object, *flags: str) -> dict[str, Any]:
        capsys.readouterr()
        status = main(ray_words(bundle_folder, source, out, "--address", address, *flags))
        captured = capsys.readouterr()
        assert status == 0, captured.err
        assert "Dataset" not in captured.err  # Ray Data's own talk
        return json.loads(captured.out.splitlines()[-1])

    return run


def ray_words(bundle_folder: Path, source: object, out: object, *flags: str) -> list[str]:
    return [str(bundle_folder), "--in", str(source), "--out", str(out), "--engine", "ray", *flags]


def read_parts(out: Path) -> Rows:
    """The rows of an output, by others than promptfold; nothing else may lie there."""
    names = sorted(path.name for path in out.iterdir())
    assert names.pop(0) == "_SUCCESS"
    assert all(name.endswith(".parquet") and name.startswith("part-") for name in names)
    return [row for name in names for row in parquet.read_table(out / name).to_pylist()]


def assert_same(rows: Rows, others: Rows) -> None:
    """Row by row. Batches differ from engine to engine, and with them the last bits of a probability."""
    for row, other in zip(rows, others, strict=True):
        floats = [name for name in row if name.startswith("probability")]
        assert list(other) == list(row)
        assert other == row | {name: pytest.approx(row[name], abs=1e-5) for name in floats}


def test_files_are_labelled_as_one_file_is(bundle: Folders, tmp_path: Path, label: Label, capsys: Capsys) -> None:
    rows: Rows = [row | {"note": f"Ünï {index}"} for index, row in enumerate(make_pairs(120, seed=21))]
    sizes = {"a b/größe 1.parquet": 40, "a b/größe 2.parquet": 0, "a b/größe [3].parquet": 61, "c/größe.parquet": 19}
    folder = write_files(tmp_path / "in put", rows, sizes)
    (folder / "a b" / "_größe.parquet").write_bytes(b"none of the data")
    (folder / "a b" / "readme.txt").write_text("none either")
    flags, out, whole = ["--all-probabilities", "--chunk-rows", "16"], tmp_path / "out", tmp_path / "whole.parquet"
    result = label(bundle("bert"), f"{folder}/*/gr*.parquet", out, *flags, "--workers", "2")
    written = read_parts(out)
    assert [{name: row[name] for name in rows[0]} for row in written] == rows
    parts = [parquet.ParquetFile(path).metadata.num_rows for path in sorted(out.glob("*.parquet"))]
    assert parts == [16, 16, 8, 16, 16, 16, 13, 16, 3]
    parquet.write_table(pyarrow.Table.from_pylist(rows), whole)
    capsys.readouterr()
    assert main([str(bundle("bert")), "--in", str(whole), "--out", str(tmp_path / "local.parquet"), *flags]) == 0
    local = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert_same(written, parquet.read_table(tmp_path / "local.parquet").to_pylist())
    assert all(result[name] == local[name] for name in ("rows", "texts_cut", "scores"))
    assert (result["workers"], result["threads"]) == (2, 1)
    assert min(result["peak_worker_mib"], result["peak_driver_mib"]) > 50
    assert json.loads((out / "_SUCCESS").read_text())["rows"] == 120


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[fs.S3FileSystem]:
    """An S3 service on this machine with one bucket, "data"."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (S3_KEYS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
        monkeypatch.setenv(name, value)
    filesystem = fs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True)
    filesystem.create_dir("data")
    yield filesystem
    server.stop()


def test_a_task_of_several_from_s3_to_s3(
    adapter: Folders, second: Folders, tmp_path: Path, s3: fs.S3FileSystem, label: Label, refusal: Refusal, address: str
) -> None:
    shared, rows = tmp_path / "shared", make_pairs(50, seed=22)
    other = shutil.copytree(second("bert"), tmp_path / "other")
    assert export_main([str(adapter("bert")), str(other), "--out", str(shared)]) == 0
    folder = write_files(tmp_path / "in", rows, {"x/1 ä.parquet": 30, "x/y/2.parquet": 20})
    for path in folder.rglob("*.parquet"):
        with s3.open_output_stream(f"data/pairs/{path.relative_to(folder)}") as stream:
            stream.write(path.read_bytes())
    result = label(shared, "s3://data/pairs", "s3://data/labelled", "--task", "other", "--chunk-rows", "20")
    names = sorted(info.path for info in s3.get_file_info(fs.FileSelector("data/labelled")) if info.is_file)
    parts = [f"data/labelled/part-0000000{number}.parquet" for number in range(3)]
    assert names == ["data/labelled/_SUCCESS", *parts]
    written = [row for name in parts for row in parquet.read_table(name, filesystem=s3).to_pylist()]
    whole, local = tmp_path / "whole.parquet", tmp_path / "local.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), whole)
    assert main([str(shared), "--in", str(whole), "--out", str(local), "--task", "other"]) == 0
    assert_same(written, parquet.read_table(local).to_pylist())
    assert result["scores"]["accuracy"] == np.mean([LABELS[r["label"]] == r["prediction"] for r in written])
    words = ray_words(shared, "s3://data/pairs", "s3://data/labelled", "--task", "other", "--address", address)
    assert "s3://data/labelled is there already" in refusal(*words)
    words[2] = "s3://data/nothing"
    assert "s3://data/nothing: there is no such file or folder" in refusal(*words, "--overwrite")


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small blocks, with --chunk-rows 10: there is always one under way."""
    return write_files(tmp_path_factory.mktemp("long"), LONG_ROWS, {"1.parquet": 500, "2.parquet": 400})


@pytest.fixture(scope="module")
def unbroken(bundle: Folders, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """What the other engine makes of it in the same blocks."""
    folder = write_files(tmp_path_factory.mktemp("unbroken"), LONG_ROWS, {"in.parquet": 900})
    words = [str(bundle("bert")), "--in", str(folder / "in.parquet"), "--out", str(folder / "out.parquet")]
    assert main([*words, "--threads", "1", *SLOW]) == 0
    return parquet.read_table(folder / "out.parquet").to_pylist()


def wait_for_parts(out: Path, n: int, process: "subprocess.Popen[str] | None" = None) -> None:
    while (process is None or process.poll() is None) and len(list(out.glob("part-*.parquet"))) < n:
        time.sleep(0.002)


def test_a_worker_is_killed(bundle: Folders, long_folder: Path, unbroken: Rows, tmp_path: Path, label: Label) -> None:
    def kill() -> None:  # what it raises fails the test, as a warning
        wait_for_parts(tmp_path / "out", 10)
        # Ray names its processes by what they do.
        worker = next(item for item in psutil.process_iter(["cmdline"]) if "_Labeller" in str(item.info["cmdline"]))
        worker.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    result = label(bundle("bert"), long_folder, tmp_path / "out", *SLOW, "--workers", "2")
    killer.join()
    assert read_parts(tmp_path / "out") == unbroken
    assert (result["rows"], sum(result["scores"].values()) > 0) == (900, True)


def test_a_killed_command_goes_on_to_the_very_same_rows(
    bundle: Folders, long_folder: Path, unbroken: Rows, tmp_path: Path, address: str, label: Label, refusal: Refusal
) -> None:
    out, generator = tmp_path / "out", random.Random()  # noqa: S311 -- any moment must do
    words = ray_words(bundle("bert"), long_folder, out, *SLOW, "--address", address)
    for moment in range(2):
        there = len(list(out.glob("part-*.parquet")))
        command = [sys.executable, "-m", "export.score", *words, *["--resume"] * moment]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, text=True) as process:
            wait_for_parts(out, there + generator.randint(1, 25), process)
            process.kill()
        assert (process.returncode, (out / "_SUCCESS").exists()) == (-signal.SIGKILL, False)
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert "holds an interrupted run. Add --resume" in refusal(*words)
    assert "had batch_size 1, now it is 4" in refusal(*words, "--batch-size", "4", "--resume")
    assert "had bundle_sha256" in refusal(bundle("bert-v2"), *words[1:], "--resume")
    flip_bit(damaged := min(before), 50)
    # A grown or shrunk cluster goes on all the same.
    result = label(bundle("bert"), long_folder, out, *SLOW, "--resume", "--workers", "1")
    assert (read_parts(out), result["rows"]) == (unbroken, 900)
    kept = {path for path, changed in before.items() if path.stat().st_mtime_ns == changed}
    assert 0 < len(kept - {damaged}) == len(kept)
    assert "is there already, and whole" in refusal(*words, "--resume")


def test_a_stopped_command_leaves_no_process_and_no_folder(bundle: Folders, long_folder: Path, tmp_path: Path) -> None:
    """On a cluster of its own, stopped as a service manager does."""
    with tempfile.TemporaryDirectory(prefix="t") as scratch:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= ON_CPU | {"TMPDIR": scratch}
        command = [sys.executable, "-m", "export.score"]
        command += ray_words(bundle("bert"), long_folder, tmp_path / "out", *SLOW)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
            wait_for_parts(tmp_path / "out", 3, process)
            started = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            _, errors = process.communicate()
        assert process.returncode == 128 + signal.SIGTERM, errors
        assert len(started) > 5
        assert psutil.wait_procs(started, timeout=30)[1] == []
        assert os.listdir(scratch) == []  # noqa: PTH208 -- names for the message
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_the_first_bad_row_of_all_is_named(bundle: Folders, tmp_path: Path, address: str, refusal: Refusal) -> None:
    rows, sizes, out = make_pairs(60, seed=24), {f"{number}.parquet": 20 for number in (1, 2, 3)}, tmp_path / "out"
    rows[33]["sentence2"], rows[50]["sentence1"] = " \n", ""
    folder = write_files(tmp_path / "in", rows, sizes)
    out.mkdir()
    for name in ("_SUCCESS", "part-00000000.parquet"):
        (out / name).write_text("older")
    words = ray_words(bundle("bert"), folder, out, "--chunk-rows", "5", "--address", address, "--overwrite")
    assert f"{folder}/2.parquet, row 14: column 'sentence2' holds no text" in refusal(*words)
    rows[33], rows[50] = rows[32], rows[51] | {"label": 7}
    write_files(folder, rows, sizes)
    assert f"{folder}/3.parquet, row 11: label 7 in column 'label' is none of task" in refusal(*words)
    assert (out / "part-00000000.parquet").read_text() == "older"


@pytest.mark.parametrize("other", ["bert-v2", ""])
def test_no_row_is_labelled_by_another_model(
    other: str, bundle: Folders, tmp_path: Path, address: str, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place changes once the command has seen its own bundle: as if the workers were other machines."""
    place = tmp_path / "bundle"
    place.symlink_to(bundle("bert"))

    def change_place(*_: object) -> None:
        place.unlink()
        if other:
            place.symlink_to(bundle(other))

    monkeypatch.setattr(export.score.on_ray, "_inspect", change_place)
    folder = write_files(tmp_path / "in", make_pairs(20, seed=25), {"1.parquet": 20})
    error = refusal(*ray_words(place, folder, tmp_path / "out", "--chunk-rows", "5", "--address", address))
    assert (f"{place} is another bundle" if other else f"there is no bundle folder {place}") in error
    assert "Copy the same bundle to the same path on every machine" in error
    assert list((tmp_path / "out").glob("*.parquet")) == []
    assert not (tmp_path / "out" / "_SUCCESS").exists()
