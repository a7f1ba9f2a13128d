"""``python -m train.evaluate ADAPTER --file F``: score an adapter on any labelled file.

Prints the task's metrics beside those of the two baselines that were settled on the adapter's own training
data, then the same as one JSON document on the last line.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base, load_prompted_classifier
from train.adapter.record import Adapter
from train.common.console import Parser, names, run_main, say
from train.common.errors import UsageError
from train.data.load import load_split
from train.data.tasks import Scores
from train.data.token_ids import encode
from train.model.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Evaluation:
    """Scores of an adapter on a file.

    Attributes:
        rows: how many rows the file has.
        texts_cut: how many of them were longer than the model reads and lost their end.
        scores: the adapter's.
        baselines: by a name for people.
    """

    rows: int
    texts_cut: int
    scores: Scores
    baselines: dict[str, Scores]


def evaluate_file(
    adapter: Adapter,
    file: Path,
    *,
    text_columns: tuple[str, ...] = (),
    label_column: str | None = None,
    batch_size: int = 32,
) -> Evaluation:
    """Score an adapter on a labelled file.

    Args:
        text_columns, label_column: the file's, where they are not named as in training.

    Raises:
        UsageError: the adapter reads another number of texts.
        DataError: the file cannot be read, lacks a column, or a row of it cannot be used.
        AdapterError, ModelError, HubError: the adapter or its base model cannot be used.
    """
    from train.fit.loop import evaluate

    task = adapter.task.with_columns(text_columns, label_column, owner=adapter.folder)
    rows = load_split(task, "", file)
    base = find_adapter_base(adapter)
    tokenizer = load_tokenizer(adapter.folder, adapter.max_length)
    encoded = encode(rows, task, tokenizer)
    classifier = load_prompted_classifier(adapter, base)
    return Evaluation(
        rows=len(encoded.rows),
        texts_cut=encoded.texts_cut,
        scores=evaluate(classifier, task, tokenizer, encoded.rows, batch_size=batch_size),
        baselines=adapter.baseline_rules.score(task, base, rows),
    )


def _command(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m train.evaluate",
        description="Score an adapter on a labelled file, beside two baselines; the last line is JSON.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder that `python -m train` wrote")
    parser.add_argument("--file", type=Path, required=True, help="labelled rows (.csv, .jsonl or .parquet)")
    parser.add_argument(
        "--text-columns",
        type=names,
        default=argparse.SUPPRESS,
        metavar="COLUMNS",
        help="the file's text columns (default: the adapter's)",
    )
    parser.add_argument(
        "--label-column", default=argparse.SUPPRESS, metavar="COLUMN", help="its label column (default: the adapter's)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="rows in one forward pass")
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        raise UsageError(f"--batch-size {options.batch_size}: give a whole number of at least 1.")
    adapter = load_adapter(options.adapter)
    result = evaluate_file(
        adapter,
        options.file,
        text_columns=getattr(options, "text_columns", ()),
        label_column=getattr(options, "label_column", None),
        batch_size=options.batch_size,
    )
    say(f"{options.adapter} on the {result.rows} rows of {options.file}")
    if result.texts_cut:
        say(f"{result.texts_cut} texts are longer than {adapter.max_length} tokens and lost their end")
    for name, scores in {"this adapter": result.scores, **result.baselines}.items():
        say(f"  {name}: {scores}")
    say(
        json.dumps(
            {
                "adapter": str(options.adapter),
                "file": str(options.file),
                "rows": result.rows,
                "texts_cut": result.texts_cut,
                "scores": result.scores.values,
                "baselines": {name: scores.values for name, scores in result.baselines.items()},
            }
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
