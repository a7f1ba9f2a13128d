"""``python -m train``: P-tune a model. See ``--help``."""

import shlex
import sys
from dataclasses import fields

from train.common.command_line import Command, flag
from train.common.console import say
from train.config import TrainConfig
from train.data.tasks import METRICS


def command_of(config: TrainConfig) -> str:
    """The command that makes an adapter anew, for its model card: what differs from the defaults, --out at the end."""
    words = ["python", "-m", "train"]
    for item in sorted(fields(config), key=lambda item: item.name == "out"):
        value = getattr(config, item.name)
        # The card does not tell that a run was interrupted or an older adapter replaced.
        if value == item.default or item.name in {"resume", "overwrite"}:
            continue
        words.append(flag(item.name))
        if value is not True:
            parts = (
                [f'"{part}"' if "," in str(part) else str(part) for part in value]
                if isinstance(value, tuple)
                else [value]
            )
            words.append(",".join(map(str, parts)))
    return shlex.join(words)


def _run(config: TrainConfig) -> None:
    from train.fit.seeds import train

    result = train(config, command=command_of(config))
    if result is None:
        return
    adapter = result.adapter
    say(f"{config.out}: seed {result.seed}, epoch {result.best_epoch} of {result.n_epochs}, on validation:")
    rows = {"this adapter": adapter.scores.with_recalls()}
    rows |= {f"this adapter on {name}": str(scores) for name, scores in adapter.more_scores.items()}
    if len(result.seed_scores) > 1:
        for seed, scores in result.seed_scores.items():
            say(f"  seed {seed}: {scores}")
        rows[f"mean of {len(result.seed_scores)} seeds"] = ", ".join(
            f"{METRICS[name]} {100 * item.mean:.1f} ± {100 * item.std:.1f}" for name, item in result.spread.items()
        )
    rows |= {name: scores.with_recalls() for name, scores in adapter.baselines.items()}
    for name, scores_text in rows.items():
        say(f"  {name}: {scores_text}")


main = Command(
    TrainConfig,
    _run,
    "python -m train",
    example="offline example: python -m train --model minilm --task mrpc --train-file train.jsonl "
    "--validation-file validation.jsonl --out adapters/minilm-mrpc",
    takes_settings=True,
)

if __name__ == "__main__":
    sys.exit(main())
