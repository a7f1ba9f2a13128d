"""The tab "Use it" and the box with the public link: view only. Code to copy comes from the page's own endpoints."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import gradio as gr
import httpx
from gradio.route_utils import get_root_url
from gradio.tunneling import BINARY_FOLDER

from demo.access.public_link import SAFE_URL, ShareState, qr_svg
from demo.engines.stage import Stage
from demo.page.controls import text

if TYPE_CHECKING:
    import fastapi
    from gradio.data_classes import APIEndpointInfo


ENDPOINT = "/compare"
"""What the code calls; the others stand in the table."""


EXAMPLE = {
    "sentence1": "Coast redwoods are tall trees.",
    "sentence2": "The tallest trees are redwoods.",
}
"""Texts for the code, by parameter: for an endpoint without components Gradio has none but "..."."""


@dataclass(frozen=True)
class Snippets:
    """Code that calls an endpoint, by language."""

    python: str
    javascript: str
    curl: str


def visitor_url(page: gr.Blocks, request: "fastapi.Request") -> str:
    """The address under which a visitor reached the page, without a slash at its end.

    Headers that a proxy sets and ``root_path`` count as they do for Gradio itself (``get_root_url`` in
    gradio/route_utils.py). An address with any unusual character is replaced by the page's own.
    """
    own: str = page.share_url or page.local_url or ""
    api = request.url.path.find("/gradio_api")
    try:
        url = get_root_url(request, request.url.path[max(api, 0) :], page.root_path or request.scope.get("root_path"))
        if page.share_url and urlsplit(url).netloc == urlsplit(page.share_url).netloc:
            url = own  # the tunnel's own requests come without TLS
    except (httpx.InvalidURL, ValueError):
        url = own
    return (url if SAFE_URL.fullmatch(url) else own).rstrip("/")


def example_values(endpoint: "APIEndpointInfo", known: Mapping[str, str]) -> dict[str, Any]:
    """An endpoint's parameters with a value each: one that is known, or its default, or Gradio's example."""
    return {
        parameter["parameter_name"]: known.get(
            parameter["parameter_name"],
            parameter["parameter_default"] if parameter["parameter_has_default"] else parameter["example_input"],
        )
        for parameter in endpoint["parameters"]
    }


def snippets(url: str, name: str, values: Mapping[str, Any], *, asks_password: bool) -> Snippets:
    """Code that calls an endpoint.

    Args:
        url: of the page, made of `SAFE_URL`'s characters.
        name: of the endpoint, with its slash.
        values: of its parameters.
        asks_password: whether the page wants a login.
    """
    arguments = "".join(f"    {key}={value!r},\n" for key, value in values.items())
    login = ', auth=("user", "password")' if asks_password else ""
    python = (
        "from gradio_client import Client  # pip install gradio_client\n\n"
        f'page = Client("{url}/"{login})\n'
        f'answer = page.predict(\n{arguments}    api_name="{name}",\n)\n'
        "print(answer)\n"
    )
    login = ', { auth: ["user", "password"] }' if asks_password else ""
    javascript = (
        'import { Client } from "@gradio/client"; // npm install @gradio/client\n\n'
        f'const page = await Client.connect("{url}/"{login});\n'
        f'const answer = await page.predict("{name}", {json.dumps(dict(values), indent=2, ensure_ascii=False)});\n'
        "console.log(answer.data[0]);\n"
    )
    cookies = ""
    sign_in = ""
    if asks_password:
        cookies = " --cookie cookies.txt"
        sign_in = f"curl --silent --output /dev/null --cookie-jar cookies.txt {url}/login --form username=user --form password=password\n"
    body = shlex.quote(json.dumps(dict(values), ensure_ascii=False))
    call = f"{url}/gradio_api/call"
    curl = (
        f"{sign_in}event=$(curl --silent{cookies} {call}/v2{name} \\\n"
        f"  --header 'Content-Type: application/json' --data {body} \\\n"
        '  | sed \'s/.*"event_id": *"\\([^"]*\\)".*/\\1/\')\n'
        f'curl --silent --no-buffer{cookies} "{call}{name}/$event"\n'
    )
    return Snippets(python, javascript, curl)


def mcp_config(url: str) -> str:
    """What an MCP client's configuration file wants, as JSON."""
    return json.dumps({"mcpServers": {"promptfold": {"url": f"{url}/gradio_api/mcp/"}}}, indent=2)


def pipeline_snippet(adapter: str, texts: Mapping[str, str]) -> str:
    """Code that runs an adapter's bundle without this page, as in the README."""
    given = {"text": texts["sentence1"]}
    if "sentence2" in texts:
        given["text_pair"] = texts["sentence2"]
    return (
        f"# first: python -m export FOLDER_OF_THE_ADAPTER --out {shlex.quote(f'bundles/{adapter}')}\n"
        "from transformers import AutoTokenizer, pipeline\n"
        "from optimum.onnxruntime import ORTModelForSequenceClassification\n\n"
        f"bundle = {f'bundles/{adapter}'!r}\n"
        'model = ORTModelForSequenceClassification.from_pretrained(bundle, file_name="model.onnx")\n'
        'classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(bundle))\n'
        f"print(classify({given!r}))\n"
    )


def endpoint_table(endpoints: "Mapping[str, APIEndpointInfo]") -> str:
    """The named endpoints and their parameters, as HTML that scrolls in itself."""
    rows = []
    for name, endpoint in endpoints.items():
        parameters = ", ".join(
            f"{parameter['parameter_name']}: {parameter['python_type']['type']}"
            + (f" = {parameter['parameter_default']!r}" if parameter["parameter_has_default"] else "")
            for parameter in endpoint["parameters"]
        )
        rows.append(
            f'<tr><th scope="row"><code>{text(name)}</code></th><td><code>{text(parameters)}</code></td>'
            f"<td>{text(endpoint.get('description', ''))}</td></tr>"
        )
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Endpoint", "Parameters", "What it does"))
    return (
        '<div style="overflow-x: auto" role="region" aria-label="Endpoints" tabindex="0">'
        f'<table style="text-align: left"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _code(
    language: Literal["python", "javascript", "shell", "json"], label: str, name: str, value: str = ""
) -> gr.Code:
    """Code to copy. Its lines are wrapped: what scrolls sideways would have to be reached by keyboard as well."""
    return gr.Code(
        value,
        language=language,
        label=label,
        interactive=False,
        wrap_lines=True,
        show_line_numbers=False,
        buttons=["copy"],
        elem_id=name,
        elem_classes="use-code",
    )


def build_use_tab(stage: Stage, page: gr.Blocks) -> None:
    """Fill the tab "Use it"; on every load the code gets the address under which the visitor came.

    Args:
        stage: the code shows what its page starts with.
        page: with an endpoint `ENDPOINT` by the time it is launched.
    """
    setup = stage.default()
    is_pair = stage.choices[setup.adapter].adapter.task.is_pair
    texts = dict(list(EXAMPLE.items())[: 2 if is_pair else 1])
    known = texts | {"adapter": setup.adapter, "precision": setup.onnx, "pytorch": setup.pytorch}
    gr.Markdown("Whatever this page answers, a program can ask for too. The code calls the page that you see.")
    with gr.Accordion("Python"):
        python = _code("python", "Python code", "use-python")
    with gr.Accordion("JavaScript", open=False):
        javascript = _code("javascript", "JavaScript code", "use-javascript")
    with gr.Accordion("curl", open=False):
        curl = _code("shell", "Shell commands", "use-curl")
    with gr.Accordion("MCP, for assistants that call tools", open=False):
        mcp_note = gr.Markdown(elem_id="use-mcp-note")
        mcp = _code("json", "Configuration of an MCP client", "use-mcp")
    with gr.Accordion("Without this page: optimum and transformers", open=False):
        gr.Markdown("The graph alone, in a transformers pipeline on ONNX Runtime.")
        _code("python", "Python code for the bundle", "use-pipeline", pipeline_snippet(setup.adapter, texts))
    table = gr.HTML(elem_id="endpoints")

    def fill(request: gr.Request) -> dict[Any, Any]:
        assert request.request is not None, "the page is not launched through a Jupyter proxy"
        url = visitor_url(page, request.request)
        endpoints = page.get_api_info()["named_endpoints"]
        code = snippets(url, ENDPOINT, example_values(endpoints[ENDPOINT], known), asks_password=page.auth is not None)
        note = (
            "The endpoints are tools of an MCP server (streamable HTTP). Most clients take this configuration:"
            if page.mcp_server
            else "This page does not serve MCP: behind a password its tools could be listed but not called."
        )
        return {
            python: code.python,
            javascript: code.javascript,
            curl: code.curl,
            mcp_note: note,
            mcp: gr.Code(mcp_config(url), visible=page.mcp_server),
            table: endpoint_table(endpoints),
        }

    # Past the queue: nobody waits for an engine here.
    outputs = [python, javascript, curl, mcp_note, mcp, table]
    page.load(fill, None, outputs, queue=False, show_progress="hidden", api_visibility="private")


def build_share_box(state: ShareState, page: gr.Blocks) -> None:
    """Show the public link with its QR code, or why there is none.

    Args:
        state: read on every load, and until there is an answer, as the link is made after the page.
        page: to be loaded.
    """
    note = gr.HTML(elem_id="share-note", padding=False)
    with gr.Row():
        link = gr.Textbox(
            label="Public link", interactive=False, buttons=["copy"], visible=False, elem_id="share-link", scale=3
        )
        code = gr.HTML(visible=False, elem_id="share-qr", min_width=160)
    timer = gr.Timer(2, active=False)

    def show() -> dict[Any, Any]:
        tunnel = state.tunnel
        if tunnel is not None and tunnel.url:
            words = "Anyone with this link can open the page, for a week at most."
        elif tunnel is not None:
            # Where folders lie on this machine is nobody's business.
            words = text(
                f"There is no public link. {tunnel.why_not}".replace(str(BINARY_FOLDER), "HF_HOME/gradio/frpc")
            )
        elif state.requested:
            words = "The public link is being made …"
        else:
            words = "Local page. Start with <code>--share</code> for a public link."
        url = "" if tunnel is None else tunnel.url
        return {
            note: words,
            link: gr.Textbox(url, visible=bool(url)),
            code: gr.HTML(qr_svg(url) if url else "", visible=bool(url)),
            timer: gr.Timer(active=state.requested and tunnel is None),
        }

    gr.on(
        [page.load, timer.tick],
        show,
        None,
        [note, link, code, timer],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
