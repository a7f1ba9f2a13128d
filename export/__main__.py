"""``python -m export ADAPTER --out BUNDLE``: fold an adapter into an ONNX bundle. See ``--help``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from train.console import Parser, run_main, say


def _command(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m export",
        description="Fold an adapter's learned prompt and head into one static ONNX graph, and prove it equal.",
        epilog="example: python -m export demo/adapters/minilm-mrpc --out bundles/minilm-mrpc",
    )
    parser.add_argument("adapter", type=Path, help="folder that `python -m train` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the bundle")
    parser.add_argument("--overwrite", action="store_true", help="replace an older bundle at --out")
    arguments = parser.parse_args(argv)

    from export.fold import export_adapter

    bundle = export_adapter(arguments.adapter, arguments.out, overwrite=arguments.overwrite)
    n_mb = bundle.model_path.stat().st_size / 1e6
    say(f"{bundle.model_path}: {n_mb:.1f} MB, largest logit difference {bundle.max_logit_difference:.1e}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
