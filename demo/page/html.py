"""The page's HTML and code to copy, from the folder templates.

In HTML every value is escaped, unless it is `Markup`, which is HTML already.
"""

import json
import re
import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)


def render_text(template: str, **values: object) -> str:
    """A template filled in."""
    return _TEMPLATES.get_template(template).render(values).strip()


def render(template: str, **values: object) -> Markup:
    """An HTML template filled in; as `Markup`, it can be a value of another one."""
    return Markup(render_text(template, **values))  # noqa: S704 -- the template escapes values


def _backticks(words: str) -> Markup:
    """Words in backticks as code."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(words))))  # noqa: S704 -- escaped


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False)


_TEMPLATES.filters |= {
    "backticks": _backticks,
    "commas": "{:,}".format,
    "json": _json,
    "repr": repr,
    "shell": shlex.quote,
}
