"""``python -m export.score --engine ray`` before a cluster is needed: what is refused, and the blocks of a data set."""

import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from export.score.data_set import Block, BlockReader, find_data_set
from export.score.place import parse_place
from tests.conftest import ON_CPU, ROOT, Folders, make_pairs
from tests.export.test_score import Refusal, Rows, contents, refusal
from train.common.errors import DataError

__all__ = ["refusal"]  # a fixture


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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--in {in} --out {tmp}/new --address 127.0.0.1:1", "--address 127.0.0.1:1: no Ray cluster answers there"),
        ("--in {in} --out {tmp}/new --address nonsense", "give HOST:PORT"),
        ("--in {in} --out {tmp}/new --workers 0", "--workers 0: give a whole number of at least 1"),
        ("--in {in} --out {tmp}/new --threads 0", "--threads 0: give a whole number of at least 1"),
        ("--in {in} --out {tmp}/new --text-columns a,b", "has no column 'a'"),
        ("--in {in} --out {tmp}/file", "is a file, not a folder"),
        ("--in {in} --out {tmp}/foreign", "holds something that is no run of export.score"),
        ("--in {in} --out {in}", "holds something that is no run of export.score"),
        ("--in {tmp} --out {in} --overwrite", "holds something that is no run of export.score"),
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
    flags: str, words: str, bundle: Folders, tmp_path: Path, refusal: Refusal
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
    before = contents(tmp_path)
    command = shlex.split(flags.format(**{"in": tmp_path / "in", "tmp": tmp_path}))
    assert words in refusal(bundle("bert"), "--engine", "ray", *command)
    assert contents(tmp_path) == before


def test_a_missing_ray_is_named_and_the_other_engine_does_without(bundle: Folders, tmp_path: Path) -> None:
    code = "import sys\nsys.modules['ray'] = None\nfrom export.score.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    rows = write_files(tmp_path, make_pairs(4, seed=27), {"in.parquet": 4}) / "in.parquet"
    words = [str(bundle("bert")), "--in", str(rows), "--out", str(tmp_path / "out.parquet")]
    for flags, status in ((["--engine", "ray"], 2), ([], 0)):
        command, environment = [sys.executable, "-c", code, *words, *flags], os.environ | ON_CPU
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
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
                assert chunk.place(0) == f"{data_set.name(block.file)}, row {block.start + 1}"
    os.utime(tmp_path / "in" / "2.parquet", ns=(1, 1))
    with pytest.raises(DataError, match="changed while it was read"):
        BlockReader(data_set).read(Block(0, 1, 0, 5))
