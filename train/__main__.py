"""``python -m train``: P-tune a model. See ``--help``."""

import shlex
import sys
from collections.abc import Sequence

from train.common.console import run_main, say
from train.config import parse_config
from train.data.tasks import METRICS


def _command(argv: Sequence[str] | None) -> None:
    from train.fit.seeds import train

    config = parse_config(argv)
    # The card shall show what makes the adapter anew, not what an interruption or an older one asked for.
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("--resume", "--overwrite")]
    result = train(config, command=shlex.join(["python", "-m", "train", *words]))
    if result is None:
        return
    adapter = result.adapter
    say(f"{config.out}: seed {result.seed}, epoch {result.best_epoch} of {result.n_epochs}, on validation:")
    rows = {"this adapter": str(adapter.scores)}
    if len(result.seed_scores) > 1:
        for seed, scores in result.seed_scores.items():
            say(f"  seed {seed}: {scores}")
        spread = ", ".join(
            f"{METRICS[name]} {100 * item.mean:.1f} ± {100 * item.std:.1f}" for name, item in result.spread.items()
        )
        rows[f"mean of {len(result.seed_scores)} seeds"] = spread
    rows |= {name: str(scores) for name, scores in adapter.baselines.items()}
    for name, scores_text in rows.items():
        say(f"  {name}: {scores_text}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
