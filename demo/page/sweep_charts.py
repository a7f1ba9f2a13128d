"""The charts of the latency lab."""

from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from demo.measure.sweep import Sweep
from demo.page.charts import ONNX_COLOR, PYTORCH_COLOR, drawing, to_png, to_svg
from export.runtime.classifier import Execution

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LATENCY = "latency in ms, the band up to the 95th percentile"

LOG_SCALE_FROM = 20
"""Ratio of the largest to the smallest value from which the axis is logarithmic: a linear one would show zeros."""


def charts_svg(measured: Sweep) -> tuple[Markup, Markup]:
    """Latency and throughput over the length, as inline SVG; needs at least one row."""
    return _chart_svg(measured, LATENCY), _chart_svg(measured, f"{measured.unit} per second")


def _chart_svg(measured: Sweep, title: str) -> Markup:
    with drawing(5.2, 3.6) as figure:
        _draw(figure.subplots(), measured, title)
        words = f"{title} against length in tokens, one line for each engine and batch size; the table has the figures"
        return to_svg(figure, words.capitalize())


def charts_png(measured: Sweep) -> bytes:
    """Both charts side by side, and what they were measured on; needs at least one row."""
    with drawing(10.4, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        _draw(left, measured, LATENCY)
        _draw(right, measured, f"{measured.unit} per second")
        figure.suptitle(f"{measured.setup.adapter}: {'; '.join(engine_lines(measured))}", fontsize=9)
        return to_png(figure)


def engine_lines(measured: Sweep) -> list[str]:
    """For each engine one line that says what it ran on."""
    return [_describe(execution) for execution in (measured.pytorch, measured.onnx) if execution]


def _describe(execution: Execution) -> str:
    threads = "thread" if execution.threads == 1 else "threads"
    return f"{execution.engine}, {execution.provider}, {execution.threads} {threads}, {execution.precision}"


def _draw(axes: "Axes", measured: Sweep, title: str) -> None:
    """A line for each engine and batch size; latencies with a band from the median up to the 95th percentile."""
    from matplotlib.lines import Line2D

    sizes = sorted({row.cell.batch_size for row in measured.rows})
    marks: Any = zip(["-", "--", ":", "-."] * 3, "os^DvPX*<>ph", strict=True)  # as many as there may be cells
    styles = dict(zip(sizes, marks, strict=False))
    keys = [Line2D([], [], color="gray", linestyle=dash, marker=mark) for dash, mark in styles.values()]
    names = [f"batch {size}" for size in sizes]
    drawn: list[float] = []
    for name, color in (("PyTorch", PYTORCH_COLOR), ("ONNX Runtime", ONNX_COLOR)):
        sides = [(row, row.pytorch if name == "PyTorch" else row.onnx) for row in measured.rows]
        known = [(row, times) for row, times in sides if times is not None]
        for size, (dash, mark) in styles.items():
            line = [(row, times) for row, times in known if row.cell.batch_size == size]
            x = [row.cell.tokens for row, _ in line]
            y = [times.median_ms if title == LATENCY else row.pairs_per_s(times) for row, times in line]
            axes.plot(x, y, color=color, linestyle=dash, marker=mark, markersize=5)
            if title == LATENCY:
                top = [times.p95_ms for _, times in line]
                axes.fill_between(x, y, top, color=color, alpha=0.25, linewidth=0)
                axes.vlines(x, y, top, color=color, alpha=0.5)  # a single length has no band
            drawn += y
        if known:
            keys.append(Line2D([], [], color=color, linewidth=4))
            names.append(name)
    _scale(axes, drawn)
    axes.set_xlabel("tokens")
    axes.set_title(title)
    axes.legend(keys, names, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=9)


def _scale(axes: "Axes", values: list[float]) -> None:
    from matplotlib.ticker import LogLocator

    if max(values) > LOG_SCALE_FROM * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    else:
        axes.set_ylim(bottom=0)
