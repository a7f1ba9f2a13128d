"""``python -m export ADAPTER --out BUNDLE``: fold an adapter into an ONNX bundle. See ``--help``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from train.common.console import Parser, names, run_main, say


def _command(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m export",
        description="Fold an adapter's learned prompt and head into one static ONNX graph, and prove it equal. "
        "Several adapters of one base model become one graph that is told of each row its task.",
        epilog="example: python -m export demo/adapters/minilm-mrpc --out bundles/minilm-mrpc",
    )
    parser.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER", help="folder that `python -m train` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the bundle")
    parser.add_argument(
        "--add", action="store_true", help="add the adapters to the bundle at --out, which holds several already"
    )
    parser.add_argument(
        "--precision",
        default="auto",
        help="fp32, fp16 (for CUDA), int8, or auto: whatever is fastest and passes the gate (default: %(default)s)",
    )
    parser.add_argument(
        "--validation-file",
        dest="validation_files",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="labelled rows, a file for each adapter, that decide whether a precision is kept: no metric may fall by "
        "more than half a point (default: the file the adapter was validated with, where it still lies unchanged)",
    )
    parser.add_argument(
        "--ungated",
        action="store_true",
        help="make other precisions also where no labelled rows can say what they cost; they run only where named",
    )
    parser.add_argument("--text-columns", type=names, default=(), metavar="COLUMNS", help="that file's text columns")
    parser.add_argument("--label-column", metavar="COLUMN", help="its label column")
    parser.add_argument("--overwrite", action="store_true", help="replace an older bundle at --out")
    options = vars(parser.parse_args(argv))

    from export.fold.config import ExportConfig
    from export.fold.pipeline import export_adapters

    for name in ("adapters", "validation_files"):
        options[name] = tuple(options[name])
    config = ExportConfig(**options)
    bundle = export_adapters(config)
    for graph in bundle.graphs:
        path = bundle.graph_path(graph.precision)
        difference = max(task.max_logit_difference for task in bundle.tasks)
        exact = f"largest logit difference {difference:.1e}" if graph.precision == "fp32" else "ungated"
        costs = [str(gate) for gate in graph.gates] or [exact]
        say(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {'; '.join(costs)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
