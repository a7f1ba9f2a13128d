"""``python -m export.score BUNDLE --in F --out G``: label a file of any size with ONNX Runtime.

Reads CSV, JSON, Parquet and Arrow files and writes .csv, .tsv, .jsonl and .parquet, each from any other; a CSV file
keeps its delimiter and byte-order mark. The output has the same rows in the same order with all their columns, then

    prediction             name of the most probable label
    probability            its probability
    probability_LABEL      the probability of each label, with --all-probabilities

A regression has only ``prediction``, a number. Where a text may have several labels, ``prediction`` holds them
with commas between, or nothing, and each has its ``probability_LABEL``.

Where the file holds true labels, the task's metrics are printed too; the last line on standard output is one JSON
document. Memory does not grow with the file: a first pass reads every row and refuses those that cannot be used, or
skips them (``--skip-bad-rows``); the second labels chunk after chunk, and keeps each in G.partial until the last is
done (``--resume``). Needs neither torch nor transformers. With ``--engine ray`` a data set of many Parquet files, and of
no others, is labelled on a cluster.
"""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from export.score.label import PROBLEM, Labelled
from export.score.local import ScoreConfig, partial_folder, score_file
from export.score.options import ScoreOptions
from train.common.command_line import Command
from train.common.console import say
from train.common.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ScoreCommand(ScoreOptions):
    """Label a CSV, JSON lines or Parquet file of any size with ONNX Runtime, or a folder of Parquet files on a Ray
    cluster; the last line is JSON.
    """

    source: Annotated[str, Parameter(name="--in", allow_leading_hyphen=True)]
    """file to label (.csv, .tsv, .jsonl, .json, .parquet, .arrow; the text files also as .gz or .zst), a folder or a quoted
    pattern of them; with --engine ray a .parquet file, a folder or a pattern, or s3://BUCKET/KEY"""
    out: Annotated[str, Parameter(allow_leading_hyphen=True)]
    """file to write (.csv, .tsv, .jsonl, .parquet); with --engine ray a folder, or s3://BUCKET/KEY"""
    engine: Annotated[str, Parameter(choices=("local", "ray"))] = "local"
    """local: one process on this machine; ray: Ray Data, on a cluster"""
    address: Annotated[str | None, Parameter(metavar="HOST:PORT")] = None
    """with --engine ray: address of the cluster (default: start one on this machine)"""
    workers: int | None = None
    """with --engine ray: processes that hold the model (default: one a CPU of the cluster)"""

    def __post_init__(self) -> None:
        for flag, value in (("--address", self.address), ("--workers", self.workers)):
            if self.engine != "ray" and value is not None:
                raise UsageError(f"{flag} is for --engine ray. Leave it out, or add that.")


def _run(command: ScoreCommand) -> None:
    labelled = _label(command)
    say(
        f"{command.out}: {labelled.rows} rows, {labelled.rows - labelled.rows_resumed - labelled.rows_skipped} of them labelled in "
        f"{labelled.seconds:.1f} s ({labelled.rows_per_second:.0f} rows/s)"
    )
    if labelled.rows_skipped:
        say(
            f"{labelled.rows_skipped} rows could not be used: they have no prediction, and the reason in column {PROBLEM}"
        )
    if labelled.texts_cut:
        say(f"{labelled.texts_cut} texts are longer than {labelled.max_length} tokens and lost their end")
    if labelled.scores is not None:
        say(f"against the file's labels: {labelled.scores.with_recalls()}")
    if labelled.why_unscored:
        say(f"against the file's labels there is no score. {labelled.why_unscored}")
    say(json.dumps(labelled.document(command.out)))


def _label(command: ScoreCommand) -> Labelled:
    options = {item.name: getattr(command, item.name) for item in fields(ScoreOptions)}
    out = Path(command.out)
    try:
        if command.engine == "local":
            return score_file(ScoreConfig(**options, source=Path(command.source), out=out))
        # It imports Ray, which nothing else here needs.
        from export.score.on_ray import RayScoreConfig, score_data_set

        return score_data_set(
            RayScoreConfig(
                **options, source=command.source, out=command.out, address=command.address, workers=command.workers
            )
        )
    except KeyboardInterrupt:
        if command.engine == "ray" or partial_folder(out).is_dir():
            print("What is done is kept: add --resume to go on.", file=sys.stderr)
        raise


main = Command(
    ScoreCommand,
    _run,
    "python -m export.score",
    example="example: python -m export.score bundles/minilm-mrpc --in pairs.csv --out labelled.parquet",
)

if __name__ == "__main__":
    sys.exit(main())
