"""Charts as inline SVG, which take the page's colours in light and dark, and words for those who do not see them."""

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PYTORCH_COLOR, ONNX_COLOR = "#d9541e", "#6366f1"
"""Of the two engines in every chart; both stand out on white and on near-black."""


_INK = "#010203"
"""Drawn in this, shown in whatever colour the page's text has."""


@contextmanager
def drawing(width_inches: float, height_inches: float) -> "Iterator[Figure]":
    """A figure to draw on; without pyplot, whose state is shared between threads."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor"), _INK
        ),
    }
    with matplotlib.rc_context(style):
        yield Figure(figsize=(width_inches, height_inches), layout="constrained")


def to_svg(figure: "Figure", description: str) -> str:
    """Inline SVG as wide as its place allows, up to its own size.

    Args:
        description: what is to be seen, in words.
    """
    buffer = io.StringIO()
    width = figure.get_figwidth()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    markup = buffer.getvalue()
    markup = markup[markup.index("<svg") :].replace(_INK, "currentColor")
    # The size in points would not shrink on a phone; the viewBox keeps the proportions.
    label = html.escape(description, quote=True)
    return re.sub(
        r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"|<svg ([^>]*?)width="[^"]*"([^>]*?)height="[^"]*"',
        lambda match: (
            f'<svg role="img" aria-label="{label}" style="width:100%;max-width:{width:g}in;height:auto" '
            + "".join(filter(None, match.groups()))
        ),
        markup,
        count=1,
    )


def to_png(figure: "Figure") -> bytes:
    """The same on white, for a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def histogram(axes: "Axes", latencies_ms: tuple[float, ...], *, color: str, bins: list[float]) -> None:
    """How often each latency was seen."""
    axes.hist(latencies_ms, bins=bins, color=color, alpha=0.85)
    axes.set_xlabel("ms")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
