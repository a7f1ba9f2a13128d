"""``python -m export.bench ADAPTER BUNDLE``: every way to run one P-tuned model, side by side on this machine.

Timed is one forward pass, token ids in, logits out, at several shapes, and with ``--file`` the scoring of a whole
labelled file; tokenizing is the same for all and left out. The engines: PEFT's tutorial as it stands and under
torch.compile, both also in 16 bits; base and prompt exported by optimum as anybody would, in fp32 and int8, and that
graph in OpenVINO's int8; the bundle in each precision that it holds.

Two thread pools that spin at the same time slow each other down several times. So each engine has a process of its own,
only one computes at a time, all have the same number of threads, and there is a pause before each timed burst. They take
turns at each shape, ``--rounds`` times: what slows a shared machine down for minutes slows all of them down. A ratio is of
two medians of one round. All engines are in memory at once. Run it on an idle machine:

    python -m export.bench demo/adapters/minilm-mrpc-v2 bundles/minilm-mrpc --file validation.jsonl
    python -m export.bench --shape-of roberta-large --shapes 1x16,1x60,1x200,8x60

Prints a table, writes a chart with ``--png``, and prints one JSON document as the last line.
"""

import json
import signal
import sys

from export.bench.config import BenchConfig
from train.common.child import ExitOnce
from train.common.command_line import Command
from train.common.console import say


def _run(config: BenchConfig) -> None:
    from export.bench.rounds import run_bench

    say(json.dumps(run_bench(config)))


main = Command(
    BenchConfig,
    _run,
    "python -m export.bench",
    example="example: python -m export.bench demo/adapters/minilm-mrpc-v2 bundles/minilm-mrpc --file validation.jsonl",
)

if __name__ == "__main__":
    # An exception, so that the engine's process ends too and gigabytes of graphs do not stay in the temporary folder.
    signal.signal(signal.SIGTERM, ExitOnce(143))
    sys.exit(main())
