"""The tab "Use it" and the box with the public link. View only; the code to copy calls the page's own endpoints."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import gradio as gr
import httpx
from gradio.route_utils import get_root_url
from markupsafe import Markup

from demo.access.public_link import SAFE_URL, qr_svg
from demo.engines.stage import Stage
from demo.page.controls import AT_ONCE
from demo.page.html import render, render_text
from train.config import MULTI_LABEL

if TYPE_CHECKING:
    import fastapi
    from gradio.data_classes import APIEndpointInfo

Language = Literal["python", "javascript", "shell", "json"]

ENDPOINT = "/compare"
"""The endpoint that the code calls; the others are in the table."""

EXAMPLE = {
    "sentence1": "Coast redwoods are tall trees.",
    "sentence2": "The tallest trees are redwoods.",
}
"""Sentences for the code, by parameter: for an endpoint without components Gradio has only "..."."""


LANGUAGES: tuple[tuple[str, Language, str], ...] = (
    ("Python", "python", "Python code"),
    ("JavaScript", "javascript", "JavaScript code"),
    ("curl", "shell", "Shell commands"),
)
"""Title, Gradio's name and label of each language with code."""


def visitor_url(page: gr.Blocks, request: "fastapi.Request") -> str:
    """The address under which a visitor reached the page, without a slash at its end.

    Headers of a proxy and ``root_path`` count as they do for Gradio itself (``get_root_url`` in gradio/route_utils.py).
    An address with any unusual character is replaced by the page's own.
    """
    own: str = page.share_url or page.local_url or ""
    api = request.url.path.find("/gradio_api")
    try:
        url = get_root_url(request, request.url.path[max(api, 0) :], page.root_path or request.scope.get("root_path"))
        if page.share_url and urlsplit(url).netloc == urlsplit(page.share_url).netloc:
            url = own  # the tunnel's requests arrive without TLS
    except (httpx.InvalidURL, ValueError):
        url = own
    return (url if SAFE_URL.fullmatch(url) else own).rstrip("/")


def example_values(endpoint: "APIEndpointInfo", known: Mapping[str, str]) -> dict[str, Any]:
    """A value for each parameter of an endpoint: one that is known, or its default, or Gradio's example."""
    return {
        parameter["parameter_name"]: known.get(
            parameter["parameter_name"],
            parameter["parameter_default"] if parameter["parameter_has_default"] else parameter["example_input"],
        )
        for parameter in endpoint["parameters"]
    }


def snippets(url: str, endpoint: str, values: Mapping[str, Any], *, asks_password: bool) -> list[str]:
    """Code that calls an endpoint, in the order of `LANGUAGES`; ``url`` has `SAFE_URL`'s characters alone."""
    given = {"url": url, "endpoint": endpoint, "values": values, "asks_password": asks_password}
    return [render_text(f"use_{title.lower()}.txt", **given) for title, _, _ in LANGUAGES]


def mcp_config(url: str) -> str:
    """JSON for an MCP client's configuration file."""
    return json.dumps({"mcpServers": {"promptfold": {"url": f"{url}/gradio_api/mcp/"}}}, indent=2)


def pipeline_snippet(adapter: str, sentences: Mapping[str, str], *, all_labels: bool = False) -> str:
    """Code that runs an adapter's bundle without this page, as in the README, for one label or all of them."""
    names = {"sentence1": "text", "sentence2": "text_pair"}
    given = {names[name]: sentence for name, sentence in sentences.items()}
    return render_text("use_pipeline.txt", bundle=f"bundles/{adapter}", sentences=given, all_labels=all_labels)


def endpoint_table(endpoints: "Mapping[str, APIEndpointInfo]") -> Markup:
    """The named endpoints and their parameters."""
    return render("endpoints.html", endpoints=endpoints)


def build_use_tab(stage: Stage, page: gr.Blocks) -> None:
    """Fill the tab "Use it"; on every load the code gets the address under which the visitor came.

    The page has the endpoint `ENDPOINT` by the time it is launched.
    """
    setup = stage.default()
    task = stage.choices[setup.adapter].adapter.task
    sentences = dict(list(EXAMPLE.items())[: 2 if task.is_pair else 1])
    known = sentences | {"adapter": setup.adapter, "precision": setup.onnx, "pytorch": setup.pytorch}
    gr.Markdown("Whatever this page answers, a program can ask for too. The code calls the page that you see.")
    code = []
    for title, language, label in LANGUAGES:
        with gr.Accordion(title, open=language == "python"):
            code.append(_code(language, label, f"use-{title.lower()}"))
    with gr.Accordion("MCP, for assistants that call tools", open=False):
        mcp_note = gr.Markdown(elem_id="use-mcp-note")
        mcp = _code("json", "Configuration of an MCP client", "use-mcp")
    with gr.Accordion("Without this page: optimum and transformers", open=False):
        gr.Markdown("The graph alone, in a transformers pipeline on ONNX Runtime.")
        snippet = pipeline_snippet(setup.adapter, sentences, all_labels=task.kind == MULTI_LABEL)
        _code("python", "Python code for the bundle", "use-pipeline", snippet)
    table = gr.HTML(elem_id="endpoints")

    def fill(request: gr.Request) -> list[Any]:
        assert request.request is not None, "the page is not launched through a Jupyter proxy"
        url = visitor_url(page, request.request)
        endpoints = page.get_api_info()["named_endpoints"]
        values = example_values(endpoints[ENDPOINT], known)
        calls = snippets(url, ENDPOINT, values, asks_password=page.auth is not None)
        note = (
            "The endpoints are tools of an MCP server (streamable HTTP). Most clients take this configuration:"
            if page.mcp_server
            else "This page does not serve MCP: behind a password its tools could be listed but not called."
        )
        config = gr.Code(mcp_config(url), visible=page.mcp_server)
        return [*calls, note, config, endpoint_table(endpoints)]

    page.load(fill, None, [*code, mcp_note, mcp, table], **AT_ONCE)


def _code(language: Language, label: str, elem_id: str, value: str = "") -> gr.Code:
    """Code to copy. Its lines wrap: what scrolls sideways would have to be reached by keyboard as well."""
    return gr.Code(
        value,
        language=language,
        label=label,
        interactive=False,
        wrap_lines=True,
        show_line_numbers=False,
        buttons=["copy"],
        elem_id=elem_id,
        elem_classes="use-code",
    )


def build_share_box(page: gr.Blocks, *, requested: bool) -> None:
    """Show the public link with its QR code, or that there is none; looked at again until Gradio has made it."""
    note = gr.HTML(elem_id="share-note", padding=False)
    with gr.Row():
        link = gr.Textbox(
            label="Public link", interactive=False, buttons=["copy"], visible=False, elem_id="share-link", scale=3
        )
        code = gr.HTML(visible=False, elem_id="share-qr", min_width=160)
    timer = gr.Timer(2, active=False)

    def show() -> list[Any]:
        url = page.share_url or ""
        being_made = page.share and not url
        return [
            render("share_note.html", url=url, being_made=being_made, requested=requested),
            gr.Textbox(url, visible=bool(url)),
            gr.HTML(qr_svg(url) if url else "", visible=bool(url)),
            gr.Timer(active=being_made),
        ]

    gr.on([page.load, timer.tick], show, None, [note, link, code, timer], **AT_ONCE)
