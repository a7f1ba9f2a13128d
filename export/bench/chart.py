"""The chart of a benchmark."""

import io
from collections.abc import Sequence
from pathlib import Path

from export.bench.config import FILE, TUTORIAL
from export.bench.engines import ENGINES, OURS, REFERENCE
from export.bench.prepare import Prepared
from export.bench.report import NOT_RUN, WRONG, EngineResult
from train.common.atomic_folder import write_whole
from train.common.errors import UsageError


def draw(path: Path, prepared: Prepared, results: Sequence[EngineResult]) -> None:
    """One panel for each cell, one bar for each engine: how many times as fast as PEFT it is (else texts per second).

    Raises:
        UsageError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system is touched

    ran = [result for result in results if result.status != NOT_RUN]
    cells = [cell for cell in prepared.cells if cell.name != TUTORIAL]
    columns = min(3, len(cells))
    n_rows = -(-len(cells) // columns)
    figure = Figure(figsize=(2.2 + 3.4 * columns, n_rows * (1.1 + 0.27 * len(ran)) + 0.6), layout="constrained")
    panels = figure.subplots(n_rows, columns, squeeze=False, sharey=True).flat
    has_reference = any(result.engine == REFERENCE for result in ran)
    for panel, cell in zip(panels, cells, strict=False):
        for place, result in enumerate(ran):
            row = result.cell(cell.name)
            if row is None:
                continue
            value = row.speedup if has_reference else row.pairs_per_second
            if value is None:
                continue
            colour = "#c0392b" if ENGINES[result.engine].family == OURS else "#8a99a8"
            panel.barh(place, value, color=colour, hatch="//" if result.status == WRONG else None)
            label = f" {value:.2f}×" if has_reference else f" {value:.0f}"
            panel.text(value, place, f"{label}  {_milliseconds(row.latency_ms)}", va="center", fontsize=7)
        panel.set_title(cell.name if cell.name == FILE else cell.what, fontsize=9)
        panel.set_yticks(range(len(ran)), [result.engine for result in ran], fontsize=8)
        panel.set_ylim(len(ran) - 0.4, -0.6)
        panel.margins(x=0.55)
        panel.set_xlim(left=0)
        panel.tick_params(axis="x", labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels):
        panel.set_visible(False)
    unit = "times as fast as PEFT eager" if has_reference else "texts per second"
    figure.suptitle(f"{prepared.model}: {unit}, and the median latency ({prepared.machine})", fontsize=9)
    image = io.BytesIO()
    # matplotlib's own rule: a name without an ending is a PNG.
    figure.savefig(image, format=path.suffix[1:] or "png", dpi=130)
    try:
        write_whole(path, image.getvalue())
    except OSError as cause:
        raise UsageError(f"--png {path} cannot be written ({cause.strerror or cause}). Choose another name.") from cause


def _milliseconds(latency_ms: float) -> str:
    return f"{latency_ms / 1000:.2f} s" if latency_ms >= 1000 else f"{latency_ms:.3g} ms"
