"""``python -m export.score --engine ray`` on a real cluster: many files, S3, workers and commands that are killed."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pytest
from pyarrow import fs, parquet
from sklearn.metrics import accuracy_score, f1_score

import export.score.on_ray
from export.score.__main__ import main
from export.score.data_set import Block, BlockReader, find_data_set, parse_place
from tests.conftest import ON_CPU, ROOT, Data, flip_bit, make_pairs
from tests.export.test_score import golden_probabilities
from train.common.errors import DataError
from train.data.tasks import MRPC

pytestmark = pytest.mark.usefixtures("one_thread")

Folders = Callable[[str], Path]
Rows = list[dict[str, Any]]

LABELS = MRPC.labels

S3_KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
"""On every machine of the cluster; the endpoint goes from the command to the workers."""

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
def label(address: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """A function that runs the command line on the cluster to its end and returns the JSON of its last line."""

    def run(bundle_folder: Path, source: object, out: object, *flags: str) -> dict[str, Any]:
        capsys.readouterr()
        status = main(ray_words(bundle_folder, source, out, "--address", address, *flags))
        captured = capsys.readouterr()
        assert status == 0, captured.err
        assert "Dataset" not in captured.err  # Ray Data's own talk
        return json.loads(captured.out.splitlines()[-1])

    return run


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command line which must be refused, and returns what it says."""

    def run(words: list[str]) -> str:
        capsys.readouterr()
        assert main(words) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line and "row/s" not in line]
        assert error.startswith("error: ")
        return error

    return run


def ray_words(bundle_folder: Path, source: object, out: object, *flags: str) -> list[str]:
    return [str(bundle_folder), "--in", str(source), "--out", str(out), "--engine", "ray", *flags]


def write_files(folder: Path, rows: Rows, names: dict[str, int], *, group_rows: int = 7) -> Path:
    """Rows as Parquet files: so many in each, in the order of their names."""
    assert sum(names.values()) == len(rows)
    start = 0
    for name, n in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist(rows[start : start + n], schema=pyarrow.Table.from_pylist(rows).schema)
        parquet.write_table(table, path, row_group_size=group_rows)
        start += n
    return folder


def read_parts(out: Path) -> Rows:
    """The rows of an output, by others than promptfold; nothing else may lie there."""
    names = sorted(path.name for path in out.iterdir())
    assert names.pop(0) == "_SUCCESS"
    assert all(name.endswith(".parquet") and name.startswith("part-") for name in names)
    return [row for name in names for row in parquet.read_table(out / name).to_pylist()]


def assert_same(rows: Rows, others: Rows) -> None:
    """Row by row. Batches differ from engine to engine, and with them the last bits of a probability."""
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert list(row) == list(other)
        for name, value in row.items():
            assert other[name] == (pytest.approx(value, abs=1e-5) if name.startswith("probability") else value)


def test_files_are_labelled_as_one_file_is(
    bundle: Folders,
    adapter: Folders,
    base_model: Folders,
    tmp_path: Path,
    label: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows: Rows = [row | {"note": f"Ünï {index}"} for index, row in enumerate(make_pairs(120, seed=21))]
    sizes = {"a b/größe 1.parquet": 40, "a b/größe 2.parquet": 0, "a b/größe [3].parquet": 61, "c/größe.parquet": 19}
    folder = write_files(tmp_path / "in put", rows, sizes)
    (folder / "a b" / "_größe.parquet").write_bytes(b"none of the data")
    (folder / "a b" / "readme.txt").write_text("none either")
    flags = ["--all-probabilities", "--chunk-rows", "16"]
    result = label(bundle("bert"), f"{folder}/*/gr*.parquet", tmp_path / "out", *flags, "--workers", "2")
    written = read_parts(tmp_path / "out")
    assert [{name: row[name] for name in rows[0]} for row in written] == rows
    parts = [parquet.ParquetFile(path).metadata.num_rows for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert parts == [16, 16, 8, 16, 16, 16, 13, 16, 3]

    whole = tmp_path / "whole.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), whole)
    capsys.readouterr()
    assert main([str(bundle("bert")), "--in", str(whole), "--out", str(tmp_path / "local.parquet"), *flags]) == 0
    local = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert_same(written, parquet.read_table(tmp_path / "local.parquet").to_pylist())
    assert {name: result[name] for name in ("rows", "texts_cut", "scores")} == {
        name: local[name] for name in ("rows", "texts_cut", "scores")
    }

    texts = [(row["sentence1"], row["sentence2"]) for row in rows]
    golden = golden_probabilities(texts, adapter("bert"), base_model("bert"))
    probabilities = np.array([[row[f"probability_{name}"] for name in LABELS] for row in written])
    assert np.abs(probabilities - golden).max() < 1e-5
    predicted = [int(index) for index in golden.argmax(axis=1)]
    expected = [row["label"] for row in rows]
    assert [row["prediction"] for row in written] == [LABELS[index] for index in predicted]
    assert result["scores"] == pytest.approx(
        {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}
    )
    assert (result["workers"], result["threads"]) == (2, 1)
    assert result["peak_worker_mib"] > 50
    assert result["peak_driver_mib"] > 50
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text())["rows"] == 120


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[fs.S3FileSystem]:
    """An S3 service on this machine with one bucket, "data"."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name, value in S3_KEYS.items():
        monkeypatch.setenv(name, value)
    filesystem = fs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True)
    filesystem.create_dir("data")
    yield filesystem
    server.stop()


def test_a_task_of_several_from_s3_to_s3(
    bundle: Folders,
    adapter: Folders,
    base_model: Folders,
    data: Data,
    tmp_path: Path,
    s3: fs.S3FileSystem,
    label: Callable[..., dict[str, Any]],
    refusal: Callable[..., str],
    address: str,
) -> None:
    from export.__main__ import main as export_main
    from train.__main__ import main as train_main

    flags = shlex.split(f"--model {base_model('bert')} --epochs 1 --encoder-hidden-size 16 --virtual-tokens 5 --seed 8")
    assert train_main([*flags, *data.flags, "--out", str(tmp_path / "other")]) == 0
    shared = tmp_path / "shared"
    assert export_main([str(adapter("bert")), str(tmp_path / "other"), "--out", str(shared)]) == 0
    rows = make_pairs(50, seed=22)
    folder = write_files(tmp_path / "in", rows, {"x/1 ä.parquet": 30, "x/y/2.parquet": 20})
    for path in folder.rglob("*.parquet"):
        with s3.open_output_stream(f"data/pairs/{path.relative_to(folder)}") as stream:
            stream.write(path.read_bytes())
    result = label(shared, "s3://data/pairs", "s3://data/labelled", "--task", "other", "--chunk-rows", "20")
    names = sorted(info.path for info in s3.get_file_info(fs.FileSelector("data/labelled")) if info.is_file)
    assert [name.rpartition("/")[2] for name in names] == [
        "_SUCCESS",
        "part-00000000.parquet",
        "part-00000001.parquet",
        "part-00000002.parquet",
    ]
    written = [row for name in names[1:] for row in parquet.read_table(name, filesystem=s3).to_pylist()]
    local = tmp_path / "local.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "whole.parquet")
    assert main([*shlex.split(f"{shared} --in {tmp_path / 'whole.parquet'} --out {local} --task other")]) == 0
    assert_same(written, parquet.read_table(local).to_pylist())
    assert result["scores"]["accuracy"] == np.mean([LABELS[r["label"]] == r["prediction"] for r in written])
    words = ray_words(shared, "s3://data/pairs", "s3://data/labelled", "--task", "other", "--address", address)
    assert "s3://data/labelled is there already" in refusal(words)
    words[2] = "s3://data/nothing"
    assert "s3://data/nothing: there is no such file or folder" in refusal([*words, "--overwrite"])


# Killed.


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small blocks, with --chunk-rows 10: there is always one under way."""
    return write_files(tmp_path_factory.mktemp("long"), make_pairs(900, seed=23), {"1.parquet": 500, "2.parquet": 400})


SLOW = ("--chunk-rows", "10", "--batch-size", "1")


@pytest.fixture(scope="module")
def unbroken(bundle: Folders, long_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """What the other engine makes of it in the same blocks."""
    folder = tmp_path_factory.mktemp("unbroken")
    whole = pyarrow.concat_tables(parquet.read_table(path) for path in sorted(long_folder.iterdir()))
    parquet.write_table(whole, folder / "in.parquet")
    words = [str(bundle("bert")), "--in", str(folder / "in.parquet"), "--out", str(folder / "out.parquet")]
    assert main([*words, "--threads", "1", *SLOW]) == 0
    return parquet.read_table(folder / "out.parquet").to_pylist()


def wait_for_parts(out: Path, n: int, process: "subprocess.Popen[str] | None" = None) -> None:
    while (process is None or process.poll() is None) and len(list(out.glob("part-*.parquet"))) < n:
        time.sleep(0.002)


def test_a_killed_worker_costs_nothing(
    bundle: Folders, long_folder: Path, unbroken: Rows, tmp_path: Path, label: Callable[..., dict[str, Any]]
) -> None:
    killed: list[int] = []

    def kill() -> None:
        wait_for_parts(tmp_path / "out", 10)
        # Ray names its processes by what they do.
        workers = [process for process in psutil.process_iter() if "_Labeller" in "".join(cmdline(process))]
        workers[0].kill()
        killed.append(workers[0].pid)

    killer = threading.Thread(target=kill)
    killer.start()
    result = label(bundle("bert"), long_folder, tmp_path / "out", *SLOW, "--workers", "2")
    killer.join()
    assert killed
    assert read_parts(tmp_path / "out") == unbroken
    assert (result["rows"], sum(result["scores"].values()) > 0) == (900, True)


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_killed_command_goes_on_to_the_very_same_rows(
    bundle: Folders,
    long_folder: Path,
    unbroken: Rows,
    tmp_path: Path,
    address: str,
    label: Callable[..., dict[str, Any]],
    refusal: Callable[..., str],
) -> None:
    out = tmp_path / "out"
    generator = random.Random()  # noqa: S311 -- any moment must do
    words = ray_words(bundle("bert"), long_folder, out, *SLOW, "--address", address)
    for moment in range(2):
        there = len(list(out.glob("part-*.parquet")))
        with subprocess.Popen(
            [sys.executable, "-m", "export.score", *words, *["--resume"] * moment],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            wait_for_parts(out, there + generator.randint(1, 25), process)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "_SUCCESS").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert "holds an interrupted run. Add --resume" in refusal(words)
    for flags, complaint in (
        (["--batch-size", "4"], "had batch_size 1, now it is 4"),
        (["--chunk-rows", "5"], "had chunk_rows 10, now it is 5"),
        (["--all-probabilities"], "had all_probabilities False, now it is True"),
        (["--no-labels"], "had label_column label, now it is None"),
    ):
        assert complaint in refusal([*words, *flags, "--resume"])
    assert "had bundle_sha256" in refusal([str(bundle("bert-v2")), *words[1:], "--resume"])
    damaged = min(before)
    flip_bit(damaged, 50)
    # A grown or shrunk cluster goes on all the same.
    result = label(bundle("bert"), long_folder, out, *SLOW, "--resume", "--workers", "1")
    assert read_parts(out) == unbroken
    assert result["rows"] == 900
    kept = {path for path, changed in before.items() if path.stat().st_mtime_ns == changed}
    assert damaged not in kept
    assert len(kept) > 0
    assert "is there already, and whole" in refusal([*words, "--resume"])


def test_a_stopped_command_leaves_no_process_and_no_folder(bundle: Folders, long_folder: Path, tmp_path: Path) -> None:
    """On a cluster of its own, stopped as a service manager does."""
    with tempfile.TemporaryDirectory(prefix="t") as scratch:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with subprocess.Popen(
            [sys.executable, "-m", "export.score", *ray_words(bundle("bert"), long_folder, tmp_path / "out", *SLOW)],
            cwd=ROOT,
            env=environment | ON_CPU | {"TMPDIR": scratch},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            wait_for_parts(tmp_path / "out", 3, process)
            started = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            _, errors = process.communicate()
        assert process.returncode == 128 + signal.SIGTERM, errors
        assert len(started) > 5
        _, alive = psutil.wait_procs(started, timeout=30)
        assert alive == []
        assert os.listdir(scratch) == []  # noqa: PTH208 -- names for the message
    assert not (tmp_path / "out" / "_SUCCESS").exists()


# Refused.


def test_the_first_bad_row_of_all_files_is_named_and_nothing_is_touched(
    bundle: Folders, tmp_path: Path, address: str, refusal: Callable[..., str]
) -> None:
    rows = make_pairs(60, seed=24)
    rows[33]["sentence2"] = " \n"
    rows[50]["sentence1"] = ""
    folder = write_files(tmp_path / "in", rows, {"1.parquet": 20, "2.parquet": 20, "3.parquet": 20})
    out = tmp_path / "out"
    out.mkdir()
    (out / "_SUCCESS").write_text("{}")
    (out / "part-00000000.parquet").write_text("older")
    words = ray_words(bundle("bert"), folder, out, "--chunk-rows", "5", "--address", address, "--overwrite")
    assert f"{folder}/2.parquet, row 14: column 'sentence2' holds no text" in refusal(words)
    rows[33] = rows[32]
    rows[50] = rows[51] | {"label": 7}
    write_files(folder, rows, {"1.parquet": 20, "2.parquet": 20, "3.parquet": 20})
    assert f"{folder}/3.parquet, row 11: label 7 in column 'label' is none of task" in refusal(words)
    assert (out / "part-00000000.parquet").read_text() == "older"


@pytest.mark.parametrize("change", ["another", "missing"])
def test_no_row_is_labelled_by_another_model(
    change: str,
    bundle: Folders,
    tmp_path: Path,
    address: str,
    refusal: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The place changes once the command has seen its own bundle: as if the workers were other machines."""
    place = tmp_path / "bundle"
    place.symlink_to(bundle("bert"))

    def change_place(*_: object) -> None:
        place.unlink()
        if change == "another":
            place.symlink_to(bundle("bert-v2"))

    monkeypatch.setattr(export.score.on_ray, "_inspect", change_place)
    folder = write_files(tmp_path / "in", make_pairs(20, seed=25), {"1.parquet": 20})
    error = refusal(ray_words(place, folder, tmp_path / "out", "--chunk-rows", "5", "--address", address))
    assert (
        f"{place} is another bundle" in error if change == "another" else f"there is no bundle folder {place}" in error
    )
    assert "Copy the same bundle to the same path on every machine" in error
    assert list((tmp_path / "out").glob("*.parquet")) == []
    assert not (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--in {in} --out {tmp}/new --address 127.0.0.1:1", "--address 127.0.0.1:1: no Ray cluster answers there"),
        ("--in {in} --out {tmp}/new --address nonsense", "give HOST:PORT"),
        ("--in {in} --out {tmp}/new --workers 0", "--workers 0: give a whole number of at least 1"),
        ("--in {in} --out {tmp}/new --threads 0", "--threads 0: give a whole number of at least 1"),
        ("--in {in} --out {tmp}/new --text-columns a,b", "has no column 'a'"),
        ("--in {in} --out {tmp}/file", "is a file. --engine ray writes a folder"),
        ("--in {in} --out {tmp}/foreign", "holds something that is no output of --engine ray"),
        ("--in {in} --out {in}", "holds something that is no output of --engine ray"),
        ("--in {tmp} --out {in} --overwrite", "holds something that is no output of --engine ray"),
        ("--in {tmp}/nowhere --out {tmp}/new", "there is no such file or folder"),
        ("--in {in}/*.pq --out {tmp}/new", "there is no such file"),
        ("--in {tmp}/rows.csv --out {tmp}/new", "no file there ends in .parquet, which --engine ray reads alone"),
        ("--in {tmp}/broken.parquet --out {tmp}/new", "broken.parquet cannot be read as parquet"),
        ("--in {tmp}/others --out {tmp}/new", "2.parquet has other columns than "),
        ("--in {tmp}/empty.parquet --out {tmp}/new", "has no rows"),
        ("--in http://here/x --out {tmp}/new", "--in http://here/x: give a path, or s3://BUCKET/KEY"),
        ("--in s3:// --out {tmp}/new", "give s3://BUCKET/KEY"),
        ("--in s3://*/x --out {tmp}/new", "give s3://BUCKET/KEY"),
        ("--in {in} --out {tmp}/done", "is there already, and whole. Add --overwrite"),
        ("--in {tmp}/done/*.parquet --out {tmp}/done --overwrite", "is read. Choose another folder"),
        ("--in {in} --out {in}/new", "is read. Choose another folder"),
        ("--in {tmp}/i*/*/*.parquet --out {in}/new", "there is no such file"),
    ],
)
def test_a_wrong_flag_ends_with_one_sentence_and_costs_nothing(
    flags: str, words: str, bundle: Folders, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    rows = make_pairs(4, seed=26)
    write_files(tmp_path / "in", rows, {"1.parquet": 4})
    write_files(tmp_path / "others", rows, {"1.parquet": 4})
    write_files(tmp_path / "others", [row | {"idx": "text"} for row in rows], {"2.parquet": 4})
    write_files(tmp_path / "done", rows, {"part-00000000.parquet": 4})
    (tmp_path / "done" / "_SUCCESS").write_text("{}")
    (tmp_path / "foreign").mkdir()
    for name in ("file", "foreign/mine", "rows.csv", "broken.parquet"):
        (tmp_path / name).write_text("mine")
    parquet.write_table(pyarrow.Table.from_pylist(rows).slice(0, 0), tmp_path / "empty.parquet")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command = shlex.split(flags.format(**{"in": tmp_path / "in", "tmp": tmp_path}))
    assert words in refusal([str(bundle("bert")), "--engine", "ray", *command])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_is_for_ray_is_refused_without_it(bundle: Folders, tmp_path: Path, refusal: Callable[..., str]) -> None:
    words = [str(bundle("bert")), "--in", str(tmp_path / "in.csv"), "--out", str(tmp_path / "out.csv")]
    for flags in (["--address", "auto"], ["--workers", "2"]):
        assert f"{flags[0]} is for --engine ray" in refusal([*words, *flags])


def test_a_missing_ray_is_named_and_the_other_engine_does_without(bundle: Folders, tmp_path: Path) -> None:
    code = "import sys\nsys.modules['ray'] = None\nfrom export.score.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    rows = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(make_pairs(4, seed=27)), rows)
    for flags, status in ((["--engine", "ray"], 2), ([], 0)):
        command = [
            sys.executable,
            "-c",
            code,
            str(bundle("bert")),
            "--in",
            str(rows),
            "--out",
            str(tmp_path / "o.parquet"),
        ]
        result = subprocess.run(
            [*command, *flags], cwd=ROOT, env=os.environ | ON_CPU, capture_output=True, text=True, check=False
        )
        assert result.returncode == status, result.stderr
        assert ('pip install "ray[serve,data]==2.60.0"' in result.stderr) == (status == 2)


def test_blocks_are_the_rows_of_the_file_in_whatever_order_they_are_read(tmp_path: Path) -> None:
    rows: Rows = [{"n": index} for index in range(100)]
    write_files(tmp_path / "in", rows, {"1.parquet": 63, "2.parquet": 37}, group_rows=13)
    place, out = parse_place(str(tmp_path / "in"), "--in"), parse_place(str(tmp_path / "out"), "--out")
    data_set = find_data_set(place, out)
    for block_rows in (1, 7, 13, 50, 1000):
        blocks = data_set.blocks(block_rows)
        assert [block.number for block in blocks] == list(range(len(blocks)))
        order = list(blocks)
        random.Random(block_rows).shuffle(order)  # noqa: S311 -- test data
        for sequence in (blocks, order, blocks[::2]):
            reader = BlockReader(data_set)
            for block in sequence:
                start = block.start + (63 if block.file else 0)
                chunk = reader.read(block)
                assert chunk.column("n") == list(range(start, start + block.rows))
                assert chunk.place(0) == f"row {block.start + 1}"
            reader.close()
    os.utime(tmp_path / "in" / "2.parquet", ns=(1, 1))
    with pytest.raises(DataError, match="changed while it was read"):
        BlockReader(data_set).read(Block(0, 1, 0, 5))
