"""``python -m export.score``: every kind of model, texts that are no pairs, memory."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from export.__main__ import main as export_main
from tests.conftest import KINDS, ON_CPU, ROOT, VIRTUAL_TOKENS, WORDS, Data, Folders, write_jsonl
from tests.export import test_score as default
from tests.export.test_score import Label, Rows, cpu_engine, golden_probabilities, label, read_rows, write_rows
from train.__main__ import main as train_main

__all__ = ["cpu_engine", "label"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")
MOODS = ("bad", "good", "so-so")


# Not BLOOM, which has no positions and so cuts no text; nor GPT-2 with P-Tuning v2, whose last token transformers takes
# for padding where it runs several texts at once.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in {"bert", "bloom", "gpt2-v2"}])
def test_predictions_of_every_kind_are_pefts(
    kind: str, bundle: Folders, adapter: Folders, base_model: Folders, tmp_path: Path, label: Label
) -> None:
    default.test_predictions_are_pefts_in_the_callers_order(kind, bundle, adapter, base_model, tmp_path, label)


def test_single_texts_with_three_labels_and_other_columns(base_model: Folders, tmp_path: Path, label: Label) -> None:
    generator = random.Random(3)  # noqa: S311 -- test data
    texts = [" ".join(generator.sample(WORDS[n % 3 :: 3], 3 + n % 11)) for n in range(48)]
    rows: Rows = [{"remark": text, "mood": MOODS[n % 3]} for n, text in enumerate(texts)]
    data = Data(write_jsonl(tmp_path / "train.jsonl", rows[:30]), write_jsonl(tmp_path / "validation.jsonl", rows[30:]))
    adapter_folder, bundle_folder = tmp_path / "adapter", tmp_path / "bundle"
    sizes = f"--epochs 2 --encoder-hidden-size 16 --virtual-tokens {VIRTUAL_TOKENS} --learning-rate 1e-2"
    flags = [*["--text-columns", "remark", "--label-column", "mood"], *sizes.split(), *data.flags]
    assert train_main(["--model", str(base_model("bert")), "--out", str(adapter_folder), *flags]) == 0
    assert export_main([str(adapter_folder), "--out", str(bundle_folder)]) == 0
    rows = [{"said": row["remark"], "gold": row["mood"], "mood": 3} for row in rows[:30]]
    source, out = write_rows(tmp_path / "in.parquet", rows), tmp_path / "out.csv"
    named = "--text-columns said --label-column gold --all-probabilities --chunk-rows 9"
    result = label(bundle_folder, source, out, *named.split())
    golden = golden_probabilities([(text,) for text in texts[:30]], adapter_folder, base_model("bert"), n_labels=3)
    written = read_rows(out)
    probabilities = np.array([[float(row[f"probability_{name}"]) for name in MOODS] for row in written])
    assert np.abs(probabilities - golden).max() < 1e-5
    gold, predicted = [row["gold"] for row in rows], [row["prediction"] for row in written]
    assert predicted == [MOODS[index] for index in golden.argmax(axis=1)]
    f1_macro = f1_score(gold, predicted, labels=MOODS, average="macro", zero_division=0)
    assert result["scores"] == pytest.approx({"accuracy": accuracy_score(gold, predicted), "f1_macro": f1_macro})


PEAK = """
import sys
from export.score.__main__ import main
from train.common.machine import peak_memory_mib
status = main(sys.argv[1:])
print(peak_memory_mib())
assert not {"torch", "transformers", "datasets", "sklearn"} & set(sys.modules)
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc, from which the peak of a process is read")
@pytest.mark.parametrize(
    ("source_suffix", "out_suffix"), [(".jsonl", ".parquet"), (".parquet", ".csv"), (".csv", ".jsonl")]
)
def test_memory_does_not_grow_with_a_file(source_suffix: str, out_suffix: str, bundle: Folders, tmp_path: Path) -> None:
    peaks_mib = []
    for n in (4_000, 40_000):
        pair: dict[str, object] = {"sentence1": "word1 word3", "sentence2": "word4"}
        rows: Rows = [pair | {"label": i % 2, "note": f"{i} " * 200} for i in range(n)]
        source = write_rows(tmp_path / f"in{n}{source_suffix}", rows)  # in Parquet one row group
        words = [str(bundle("bert")), "--in", str(source), "--out", str(tmp_path / f"out{n}{out_suffix}")]
        flags = ["--chunk-rows", "2000", "--batch-size", "256", "--threads", "1"]
        command, environment = [sys.executable, "-c", PEAK, *words, *flags], os.environ | ON_CPU
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        peaks_mib.append(float(result.stdout.splitlines()[-1]))
        assert json.loads(result.stdout.splitlines()[-2])["rows"] == n
    # The larger file holds 40 MB more as text, and rows that stay in memory take over 100.
    assert peaks_mib[1] - peaks_mib[0] < 32, peaks_mib
