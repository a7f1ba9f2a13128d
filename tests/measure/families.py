"""Which model types work, from training to the graph: ``python -m tests.measure.families [TYPE …]``.

Each type is a tiny random model made in code. It is trained for an epoch with each method and exported; the export compares
the graph's logits with PEFT's, one text at a time, on shapes and paddings that were not traced. The table goes into
export/README.md; what fails stands there with its reason.
"""

import json
import sys
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from export.fold.fold import CONSTANT_KEYS_VALUES, CONSTANT_ROWS, ENCODER_FOR_CPU
from tests.conftest import ENCODERS, FAMILIES, VIRTUAL_TOKENS, Data, make_base_model, make_pairs, write_jsonl
from tests.families import GENERIC, REFUSED

METHODS = ("p-tuning", "p-tuning-v2")
SHORT = {CONSTANT_ROWS: "rows", CONSTANT_KEYS_VALUES: "keys and values", ENCODER_FOR_CPU: "encoder"}
"""Rewrites in a cell of the table."""

FLAGS = f"--epochs 1 --virtual-tokens {VIRTUAL_TOKENS} --encoder-hidden-size 16"


def refusal_of(error: str) -> str:
    """The reason in an error of ours, without names of folders and remedies."""
    if "take no learned keys and values" in error:
        return "no: takes no learned keys and values"
    if "depends on its padding" in error:
        return "no: what it says of a text depends on the texts beside it"
    if "no exporter writes" in error:
        return "no: no exporter writes its graph"
    return f"no: {error.strip().splitlines()[-1]}"


def measure(family: str, method: str, work: Path, data: Data) -> str:
    """A cell of the table: what exported, how, and the largest difference of a logit; or why not."""
    from export.__main__ import main as export
    from train.__main__ import main as train

    base, adapter, bundle = (work / name for name in ("base", "adapter", "bundle"))
    output = StringIO()
    with redirect_stdout(output), redirect_stderr(output), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_base_model(base, family)
        words = ["--model", str(base), "--method", method, *FLAGS.split(), *data.flags, "--out", str(adapter)]
        status = train(words) or export([str(adapter), "--out", str(bundle)])
    if status:
        return refusal_of(output.getvalue())
    manifest = json.loads((bundle / "manifest.json").read_text())
    folded = ", ".join(SHORT[name] for name in manifest["rewrites"]) or "generic"
    if manifest["exporter"] != "optimum":
        folded += f", {manifest['exporter']}"
    return f"{folded}; {manifest['tasks'][0]['parity']['max_logit_difference']:.0e}"


def main(wanted: list[str]) -> None:
    """Print a Markdown table of model types and methods, row by row."""
    families = [*FAMILIES, *GENERIC, *REFUSED]
    print("| model type | | P-Tuning | P-Tuning v2 |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        files = [write_jsonl(place / f"{seed}.jsonl", make_pairs(40, seed)) for seed in (1, 2)]
        for family in sorted(wanted or families, key=families.index):
            kind = GENERIC.get(family)
            is_encoder = family in ENCODERS or family in REFUSED or (kind is not None and not kind.is_decoder)
            cells = [measure(family, method, place / family / method, Data(*files)) for method in METHODS]
            print(f"| {family} | {'encoder' if is_encoder else 'decoder'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
