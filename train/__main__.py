"""``python -m train``: P-tune a model. See ``--help``."""

import shlex
import sys
from collections.abc import Sequence

from train.config import parse_config
from train.console import run_main, say


def _command(argv: Sequence[str] | None) -> None:
    from train.loop import train

    config = parse_config(argv)
    words = sys.argv[1:] if argv is None else argv
    result = train(config, command=shlex.join(["python", "-m", "train", *words]))
    scores, trivial = result.scores, result.always_positive
    say(
        f"{config.out}: epoch {result.best_epoch} of {len(result.epochs)}, validation accuracy "
        f"{100 * scores.accuracy:.1f} and F1 {100 * scores.f1:.1f} "
        f"(always positive: {100 * trivial.accuracy:.1f} and {100 * trivial.f1:.1f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
