"""``python -m tests.measure.ray_scoring BUNDLE --rows N --workers 1,2``: what a million rows cost on a cluster that grows.

Rows of a few common words are written as Parquet files, and ``python -m export.score --engine ray`` labels them, once
for every number of workers, each time with a cluster of its own on this machine. Of each output every row is then held
against its input: there must be exactly one, in order. Run it on an idle machine.

Prints a table, and one JSON document as the last line. A worker has ``--threads`` threads, 1 by default, so that a
second one is a second core; its time holds the start of the workers and the loading of their models.
"""

import json
import random
import subprocess
import sys
import tempfile
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from export.bundle.folder import load_bundle
from export.score.label import PREDICTION
from train.common.command_line import Command, WholeNumbers, check_counts
from train.common.console import say
from train.common.errors import EngineError
from train.data.tasks import Task

TEXT = (
    "the company said it will buy shares of stock in new york on monday after market close and sell them for more money "
    "next year while police found no one at home who knew what happened to that old man"
)
ROW, FILES, GROUP_ROWS = "row", 8, 50_000
"""A row group is as large as others would write it, so that blocks are parts of one."""


@dataclass(frozen=True)
class RayScoringConfig:
    """Measure export.score --engine ray on made-up rows; the last line is JSON."""

    bundle: Path
    """folder that `python -m export` wrote"""
    _: KW_ONLY
    task: str | None = None
    """name of the task, where the bundle holds several"""
    rows: int = 20_000
    """rows to label"""
    words: int = 5
    """words of a sentence, on average"""
    workers: WholeNumbers = (1, 2)
    """numbers of workers, one run each"""
    threads: int = 1
    """threads of each worker"""

    def __post_init__(self) -> None:
        check_counts(self, "rows", "words")


def write_rows(folder: Path, task: Task, rows: int, words: int) -> None:
    """Write files of numbered rows, whose sentences have so many words on average, a row group at a time."""
    import pyarrow
    from pyarrow import parquet

    generator = random.Random(1)  # noqa: S311 -- no secret

    def text() -> str:
        return " ".join(generator.choices(TEXT.split(), k=generator.randint(1, 2 * words - 1)))

    schema = pyarrow.schema([*((name, pyarrow.string()) for name in task.text_columns), (ROW, pyarrow.int64())])
    for file in range(FILES):
        first, end = rows * file // FILES, rows * (file + 1) // FILES
        with parquet.ParquetWriter(folder / f"rows-{file}.parquet", schema) as writer:
            for start in range(first, end, GROUP_ROWS):
                numbers = range(start, min(end, start + GROUP_ROWS))
                columns = {name: [text() for _ in numbers] for name in task.text_columns}
                writer.write_table(pyarrow.table(columns | {ROW: list(numbers)}, schema=schema))


def check_rows(out: Path, rows: int) -> None:
    """Raise an `EngineError` where the output has not every row exactly once, in order and labelled."""
    from pyarrow import parquet

    position = 0
    for path in sorted(out.glob("*.parquet")):
        table = parquet.read_table(path, columns=[ROW, PREDICTION])
        numbers = table.column(ROW).to_pylist()
        if numbers != list(range(position, position + len(numbers))) or table.column(PREDICTION).null_count:
            raise EngineError(f"{path}: rows are missing, doubled, in another order or without a label.")
        position += len(numbers)
    if position != rows:
        raise EngineError(f"{out} holds {position} rows instead of {rows}.")


def measure(options: RayScoringConfig, folder: Path, workers: int) -> dict[str, Any]:
    """Label the rows in a folder; an EngineError where the command fails, or its output is not what it should be."""
    out = folder / f"out-{workers}"
    command = [sys.executable, "-m", "export.score", str(options.bundle.absolute()), "--engine", "ray", "--no-labels"]
    command += ["--in", str(folder / "in"), "--out", str(out), "--workers", str(workers)]
    command += ["--threads", str(options.threads), *(["--task", options.task] if options.task is not None else [])]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        raise EngineError(f"{' '.join(command)} ended with status {run.returncode}.")
    document: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    check_rows(out, options.rows)
    names = ("workers", "threads", "seconds", "rows_per_second", "peak_worker_mib", "peak_driver_mib")
    cost = {name: document[name] for name in names} | {"rows": options.rows}
    core_seconds = document["seconds"] * document["workers"] * document["threads"]
    return cost | {"core_seconds_per_million_rows": core_seconds * 1e6 / options.rows}


def _run(options: RayScoringConfig) -> None:
    task, costs = load_bundle(options.bundle).find_task(options.task).task, []
    with tempfile.TemporaryDirectory(prefix="score-bench-") as work:
        (folder := Path(work, "in")).mkdir()
        write_rows(folder, task, options.rows, options.words)
        say("workers  threads   rows/s  core-seconds/million  worker MiB  driver MiB")
        for workers in options.workers:
            costs.append(measure(options, folder.parent, workers))
            say(
                "{workers:>7}{threads:>9}{rows_per_second:>9.0f}{core_seconds_per_million_rows:>22,.0f}"
                "{peak_worker_mib:>12.0f}{peak_driver_mib:>12.0f}".format_map(costs[-1])
            )
    say(json.dumps({"runs": costs}))


main = Command(RayScoringConfig, _run, "python -m tests.measure.ray_scoring")

if __name__ == "__main__":
    sys.exit(main())
