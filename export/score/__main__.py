"""``python -m export.score BUNDLE --in F --out G``: label a file of any size with ONNX Runtime.

Reads and writes .csv, .jsonl and .parquet, and turns any of them into any other. The same rows in the same
order with all their columns, then

    prediction             name of the most probable label
    probability            of that label
    probability_LABEL      of each one, with --all-probabilities

Where the file holds true labels, the task's metrics are printed too; the last line on standard output is
one JSON document. Memory does not grow with the file: a first pass reads every row and refuses the first one
that cannot be used, before anything is computed; the second labels chunk after chunk. Each finished chunk is
kept in G.partial until the last is done (``--resume``). Needs neither torch nor transformers.

With ``--engine ray`` a data set of many Parquet files is labelled on a cluster (`export.score.on_ray`).
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.score.label import Labelled
from export.score.local import ScoreConfig, partial_folder, score_file
from export.score.options import CHUNK_ROWS
from train.common.console import Parser, names, run_main, say
from train.common.errors import UsageError
from train.data.read_rows import FILE_TYPES


def _command(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m export.score",
        description="Label a CSV, JSON lines or Parquet file of any size with ONNX Runtime, or a folder of Parquet files "
        "on a Ray cluster; the last line is JSON.",
        epilog="example: python -m export.score bundles/minilm-mrpc --in pairs.csv --out labelled.parquet",
    )
    suffixes = ", ".join(FILE_TYPES)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that `python -m export` wrote")
    parser.add_argument(
        "--in",
        dest="source",
        required=True,
        metavar="F",
        help=f"file to label ({suffixes}); with --engine ray a .parquet file, a folder or a quoted pattern of them, or "
        "s3://BUCKET/KEY",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="G",
        help=f"file to write ({suffixes}); with --engine ray a folder, or s3://BUCKET/KEY",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local: one process on this machine; ray: Ray Data, on a cluster (default: local)",
    )
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="with --engine ray: of the cluster (default: start one on this machine)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="with --engine ray: processes that hold the model (default: one a CPU of the cluster)",
    )
    parser.add_argument("--task", metavar="NAME", help="which task, where the bundle holds several")
    parser.add_argument(
        "--text-columns",
        type=names,
        default=(),
        metavar="COLUMNS",
        help="the file's text columns (default: the bundle's)",
    )
    parser.add_argument(
        "--label-column", metavar="COLUMN", help="its label column (default: the bundle's, where the file has it)"
    )
    parser.add_argument("--no-labels", action="store_true", help="leave labels unread and score nothing")
    parser.add_argument("--all-probabilities", action="store_true", help="write the probability of every label")
    parser.add_argument("--batch-size", type=int, default=32, help="texts in one run of the graph (default: 32)")
    parser.add_argument(
        "--chunk-rows",
        type=int,
        default=CHUNK_ROWS,
        help=f"rows in memory at a time, and lost at most when the run is killed (default: {CHUNK_ROWS})",
    )
    parser.add_argument(
        "--threads", type=int, help="threads on the CPU, of each worker (default: all usable cores, shared out)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted run left beside --out")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an older --out, or start an interrupted run anew"
    )
    parser.add_argument(
        "--untrusted",
        action="store_true",
        help="open the bundle in a process of its own first, under limits of memory and time, and run it on the CPU",
    )
    options = vars(parser.parse_args(argv))
    out = str(options["out"])
    labelled = _run_ray(options) if options.pop("engine") == "ray" else _run_local(options)
    say(
        f"{out}: {labelled.rows} rows, {labelled.rows - labelled.rows_resumed} of them labelled in "
        f"{labelled.seconds:.1f} s ({labelled.rows_per_second:.0f} rows/s)"
    )
    if labelled.texts_cut:
        say(f"{labelled.texts_cut} texts are longer than {labelled.max_length} tokens and lost their end")
    if labelled.scores is not None:
        say(f"against the file's labels: {labelled.scores}")
    say(json.dumps(labelled.document(out)))


def _run_local(options: dict[str, Any]) -> Labelled:
    for name in ("address", "workers"):
        if options.pop(name) is not None:
            raise UsageError(f"--{name} is for --engine ray. Leave it out, or add that.")
    config = ScoreConfig(**options | {name: Path(options[name]) for name in ("source", "out")})
    try:
        return score_file(config)
    except KeyboardInterrupt:
        if partial_folder(config.out).is_dir():
            print(_KEPT, file=sys.stderr)
        raise


def _run_ray(options: dict[str, Any]) -> Labelled:
    # With it comes Ray, which nothing else here needs.
    from export.score.on_ray import RayScoreConfig, score_data_set

    try:
        return score_data_set(RayScoreConfig(**options))
    except KeyboardInterrupt:
        print(_KEPT, file=sys.stderr)
        raise


_KEPT = "What is done is kept: add --resume to go on."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
