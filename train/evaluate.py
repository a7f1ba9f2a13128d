"""``python -m train.evaluate ADAPTER --file F``: score an adapter on any labelled file.

Prints the task's metrics beside those of the two baselines that were settled on the adapter's own training data, then
the same as one JSON document on the last line.
"""

import json
import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base, load_prompted_classifier
from train.common.command_line import Command, Words, check_counts
from train.common.console import say
from train.common.errors import AdapterError
from train.data.files.options import ReadOptions
from train.data.intervals import metric_intervals, rise_intervals
from train.data.load import load_split
from train.data.read_rows import sha256_of_path
from train.data.tasks import interval_words, score
from train.data.token_ids import encode
from train.model.tokenizer import fit_vocabulary, load_tokenizer


@dataclass(frozen=True)
class EvaluateConfig:
    """Score an adapter on a labelled file, beside two baselines; the last line is JSON."""

    adapter: Path
    """folder that `python -m train` wrote"""
    _: KW_ONLY
    file: Path
    """labelled rows (.csv, .jsonl or .parquet)"""
    base_model: str | None = None
    """folder of the base model, if it lies elsewhere than at the training"""
    text_columns: Words = ()
    """the file's text columns (default: the adapter's)"""
    label_column: str | None = None
    """the file's label column (default: the adapter's)"""
    delimiter: str | None = None
    """between the cells of a CSV file: one character, or comma, semicolon, tab, pipe (default: recognised)"""
    encoding: str | None = None
    """encoding of a text file, such as cp1252 (default: recognised)"""
    quote: str | None = None
    """around quoted cells of a CSV file: one character, or none (default: recognised)"""
    batch_size: int = 32
    """rows in one forward pass"""

    def __post_init__(self) -> None:
        check_counts(self, "batch_size")


def _run(config: EvaluateConfig) -> None:
    from train.fit.loop import predict

    adapter = load_adapter(config.adapter, config.base_model)
    task = adapter.task.with_columns(config.text_columns, config.label_column, owner=adapter.folder)
    rows = load_split(task, "", config.file, ReadOptions.parse(config.delimiter, config.encoding, config.quote))
    base = find_adapter_base(adapter)
    tokenizer = load_tokenizer(adapter.folder, adapter.max_length)
    fit_vocabulary(tokenizer, base, adapter.folder, AdapterError, "Train the adapter again.")
    encoded = encode(rows, task, tokenizer)
    classifier = load_prompted_classifier(adapter, base)
    predicted = predict(classifier, task, tokenizer, encoded.rows, batch_size=config.batch_size)
    expected = np.array(rows[task.label_column])
    scores, intervals = score(task, predicted, expected), metric_intervals(task, predicted, expected)
    # An adapter made elsewhere has none, as its training data is not known.
    answers = adapter.baseline_rules.predict(task, base, rows) if adapter.baseline_rules else {}
    baselines = {name: score(task, values, expected) for name, values in answers.items()}
    rises = {name: rise_intervals(task, values, predicted, expected) for name, values in answers.items()}
    say(f"{config.adapter} on the {len(encoded.rows)} rows of {config.file}")
    if adapter.train_sha256 and sha256_of_path(config.file) == adapter.train_sha256:
        say("that is what the adapter was trained on, so the scores flatter it")
    if encoded.texts_cut:
        say(f"{encoded.texts_cut} texts are longer than {adapter.max_length} tokens and lost their end")
    say(f"  this adapter: {scores.with_recalls()}; 95 % intervals: {interval_words(intervals)}")
    for name, values in baselines.items():
        say(f"  {name}: {values.with_recalls()}; from it the adapter rises by {interval_words(rises[name], '+.1f')}")
    document = {"adapter": str(config.adapter), "file": str(config.file), "rows": len(encoded.rows)}
    results: dict[str, Any] = {
        "scores": scores.values,
        "baselines": {name: values.values for name, values in baselines.items()},
    }
    results |= {"recalls": scores.recalls, "intervals": intervals, "rises": rises}
    say(json.dumps(document | {"texts_cut": encoded.texts_cut} | results))


main = Command(EvaluateConfig, _run, "python -m train.evaluate")

if __name__ == "__main__":
    sys.exit(main())
