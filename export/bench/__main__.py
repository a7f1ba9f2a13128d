"""``python -m export.bench ADAPTER BUNDLE``: every way to run one P-tuned model, side by side on this machine.

What is measured: one forward pass, token ids in, logits out, at several shapes, and with ``--file`` the scoring of a
whole labelled file, with the quality that comes with the speed. Tokenising is the same for all and left out. The engines:

- PEFT's tutorial as it stands, the same under torch.compile, both also in 16 bits;
- base and prompt exported by optimum as anybody would, in fp32 and int8, and that graph in OpenVINO's int8;
- promptfold's bundle in each precision that it holds.

Two thread pools that spin at the same time slow each other down several times. So each engine has a process of its own,
only one is alive at a time, all have the same number of threads, and there is a pause before each timed burst
(`export.bench.worker`). They take turns, ``--rounds`` times; a ratio is of two medians of one round. Each engine's
logits are compared with PEFT's, and what cannot run says why. Run it on an idle machine:

    python -m export.bench demo/adapters/minilm-mrpc-v2 bundles/minilm-mrpc --file validation.jsonl
    python -m export.bench --shape-of roberta-large --shapes 1x16,1x60,1x200,8x60

Prints a table, writes a chart with ``--png``, and prints one JSON document as the last line.
"""

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from export.bench.config import BenchConfig
from export.bench.engines import CPU, CUDA, ENGINES, Plan
from export.bench.rounds import run_bench
from train.common.console import Parser, names, run_main, say

DEFAULT_SHAPES = "1x16,1x60,1x200,8x60,32x60"


def _command(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m export.bench",
        description="Time every way to run one P-tuned model, side by side; the last line is JSON.",
        epilog="example: python -m export.bench demo/adapters/minilm-mrpc-v2 bundles/minilm-mrpc --file validation.jsonl",
    )
    parser.add_argument("adapter", type=Path, nargs="?", metavar="ADAPTER", help="folder that `python -m train` wrote")
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="folder that was exported from it")
    parser.add_argument(
        "--shape-of",
        metavar="MODEL",
        help="random weights instead of an adapter: roberta-large, or a folder with a config.json. Latency does not "
        "depend on the values",
    )
    parser.add_argument("--file", type=Path, help="labelled rows (.csv, .jsonl or .parquet) to score as a whole, too")
    parser.add_argument("--text-columns", type=names, default=(), metavar="COLUMNS", help="that file's text columns")
    parser.add_argument("--label-column", metavar="COLUMN", help="its label column")
    parser.add_argument(
        "--shapes",
        type=names,
        default=names(DEFAULT_SHAPES),
        help=f"texts×tokens, the prompt not counted (default: {DEFAULT_SHAPES})",
    )
    parser.add_argument(
        "--engines", type=names, default=(), help=f"some of {', '.join(ENGINES)} (default: all that the device runs)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="turns of each engine (default: %(default)s)")
    parser.add_argument("--device", default=CPU, help=f"{CPU} or {CUDA} (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of every engine (default: all usable cores)")
    parser.add_argument(
        "--openvino-python",
        type=Path,
        metavar="PYTHON",
        help="interpreter of an environment with openvino and nncf, whose requirements contradict ours",
    )
    parser.add_argument("--png", type=Path, help="file for the chart")
    parser.add_argument(
        "--pause", type=float, default=0.5, help="seconds before each timed burst (default: %(default)s)"
    )
    parser.add_argument("--min-runs", type=int, default=10, help="timed runs at least (default: %(default)s)")
    parser.add_argument("--max-runs", type=int, default=100, help="timed runs at most (default: %(default)s)")
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=4.0,
        help="go on beyond --min-runs for so long (default: %(default)s)",
    )
    options = vars(parser.parse_args(argv))
    plan = Plan(
        pause_seconds=options.pop("pause"),
        min_runs=options.pop("min_runs"),
        max_runs=options.pop("max_runs"),
        budget_seconds=options.pop("budget_seconds"),
    )
    say(json.dumps(run_bench(BenchConfig(plan=plan, **options))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    # An exception, so that the engine's process ends too and gigabytes of graphs do not stay in the temporary folder.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
