"""Charts as inline SVG in the page's own colours, light or dark, with a description for screen readers."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PYTORCH_COLOR, ONNX_COLOR = "#d9541e", "#6366f1"
"""The engines' colours in every chart; both stand out on white and on near-black."""

_INK = "#010203"
"""Stands for the colour of the page's text, whatever that is."""


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


def to_svg(figure: "Figure", description: str) -> Markup:
    """Inline SVG that is as wide as its place allows, up to its own size.

    Args:
        description: what the chart shows, in words.
    """
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    markup = buffer.getvalue()
    markup = markup[markup.index("<svg") :].replace(_INK, "currentColor")
    # A size in points would not shrink on a phone; the viewBox keeps the proportions.
    markup = re.sub(r' (width|height)="[\d.]+pt"', "", markup, count=2)
    style = f"width:100%;max-width:{figure.get_figwidth():g}in;height:auto"
    markup = markup.replace("<svg", f'<svg role="img" aria-label="{escape(description)}" style="{style}"', 1)
    return Markup(markup)  # noqa: S704 -- drawn by matplotlib, which escapes text


def to_png(figure: "Figure") -> bytes:
    """A PNG file on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()
