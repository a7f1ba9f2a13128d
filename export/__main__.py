"""``python -m export ADAPTER --out BUNDLE``: fold an adapter into an ONNX bundle. See ``--help``."""

import sys

from export.fold.config import ExportConfig
from train.common.command_line import Command
from train.common.console import say


def _run(config: ExportConfig) -> None:
    from export.fold.pipeline import export_adapters

    bundle = export_adapters(config)
    for graph in bundle.graphs:
        path = bundle.graph_path(graph.precision)
        difference = max(task.max_logit_difference for task in bundle.tasks)
        exact = f"largest logit difference {difference:.1e}" if graph.precision == "fp32" else "ungated"
        costs = [str(cost) for cost in (*graph.gates, *graph.fidelity)] or [exact]
        say(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {'; '.join(costs)}")


main = Command(
    ExportConfig,
    _run,
    "python -m export",
    example="example: python -m export demo/adapters/minilm-mrpc --out bundles/minilm-mrpc",
    takes_settings=True,
)

if __name__ == "__main__":
    sys.exit(main())
