"""``python -m train.import_peft SOURCE --out ADAPTER``: make an adapter folder of an adapter that PEFT wrote elsewhere."""

import sys

from train.common.command_line import Command
from train.common.console import say
from train.foreign.config import ImportConfig


def _run(config: ImportConfig) -> None:
    # Imports torch, which takes seconds.
    from train.foreign.convert import import_adapter

    adapter = import_adapter(config).adapter
    say(f"{config.out}: {adapter.method}, {len(adapter.labels)} labels, quality {adapter.quality}")


main = Command(
    ImportConfig,
    _run,
    "python -m train.import_peft",
    example="example: python -m train.import_peft output/checkpoint-100 --pair --labels different,same --out adapters/mine",
)

if __name__ == "__main__":
    sys.exit(main())
