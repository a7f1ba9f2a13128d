"""The tab "Use it": its code is run as a visitor would, against a small page with a real endpoint."""

import ast
import asyncio
import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import httpx
import pytest
import uvicorn
from gradio.tunneling import BINARY_FOLDER
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from demo.access.public_link import SAFE_URL
from demo.page.tab_use import EXAMPLE, endpoint_table, mcp_config, pipeline_snippet, snippets, visitor_url
from tests.conftest import ROOT

LOGIN = ("ann", "a:b ü")

PAIR = (EXAMPLE["sentence1"], EXAMPLE["sentence2"])


def compare(sentence1: str, sentence2: str = "", adapter: str = "first", precision: str = "fp32") -> dict:
    """Say which words two sentences share.

    Args:
        sentence1: the first sentence, or the only one
        sentence2: the second sentence
        adapter: which one
        precision: of the graph
    """
    shared = sorted(set(sentence1.lower().split()) & set(sentence2.lower().split()))
    return {"shared": shared, "adapter": adapter, "precision": precision}


def serve_page(**options: Any) -> None:
    """A page with the tab and the sharing box, as a process of its own; its address is the first thing it prints."""
    from demo.access.accounts import Accounts, parse_auth
    from demo.access.public_link import ShareState, Tunnel
    from demo.engines.adapters import choose_adapters
    from demo.engines.stage import Stage
    from demo.page.tab_use import build_share_box, build_use_tab

    state = ShareState(requested="tunnel" in options or "why_not" in options)
    accounts: Accounts | None = parse_auth(options.get("auth"), None)
    with gr.Blocks(title="promptfold", analytics_enabled=False) as page:
        gr.Markdown("# promptfold")
        build_share_box(state, page)
        with gr.Tabs(), gr.Tab("Use it"):
            build_use_tab(Stage(choose_adapters()), page)
        box = gr.Textbox(label="A box")
        box.submit(str.upper, box, box, api_visibility="private")
        gr.api(compare, api_name="compare")
    page.launch(
        share=False,
        auth=None if accounts is None else accounts.login,
        root_path=options.get("root_path"),
        mcp_server=options.get("mcp_server", True),
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
    )
    if "tunnel" in options or "why_not" in options:
        state.tunnel = Tunnel(options.get("tunnel", ""), options.get("why_not", ""))
        page.share_url = options.get("tunnel")
    print(f"ready {page.local_url}", flush=True)
    threading.Event().wait()


@contextmanager
def small_page(**options: Any) -> Iterator[str]:
    """`serve_page` in a process of its own; its address. It may print no traceback."""
    command = [sys.executable, "-m", "tests.demo.test_use", json.dumps(options)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = ""
    try:
        for line in process.stdout:
            printed += line
            if line.startswith("ready "):
                yield line.split()[1].rstrip("/")
                break
        else:
            raise AssertionError(f"it did not start:\n{printed}")
    finally:
        # Not asked: streams that are open would hold up the end.
        process.kill()
        printed += process.communicate(timeout=30)[0]
    assert "Traceback" not in printed, printed


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with small_page() as url:
        yield url


def load(url: str, headers: dict[str, str] | None = None, cookies: httpx.Cookies | None = None) -> dict[str, Any]:
    """What the page's events on load put into its components, by `elem_id`, as a browser gets it."""
    with httpx.Client(base_url=url, headers=headers, cookies=cookies, timeout=60) as browser:
        config = browser.get("/config").raise_for_status().json()
        names = {component["id"]: component["props"].get("elem_id") for component in config["components"]}
        shown: dict[str, Any] = {}
        for event in config["dependencies"]:
            if any(trigger == "load" for _, trigger in event["targets"]):
                body = {"data": [], "fn_index": event["id"], "session_hash": "test"}
                answer = browser.post("/gradio_api/run/predict", json=body).raise_for_status().json()["data"]
                for component, value in zip(event["outputs"], answer, strict=True):
                    given = value.get("value") if isinstance(value, dict) else value
                    shown[names[component] or str(component)] = given
    return shown


def run_python(code: str, folder: Path = ROOT) -> str:
    """What a program prints."""
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=120).stdout


def run_shell(code: str, folder: Path) -> list[Any]:
    """The data of the event that a shell snippet receives at last."""
    command = ["bash", "-euc", code]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r"^event: complete\ndata: (.*)$", result.stdout, flags=re.MULTILINE)
    assert found, result.stdout
    data = json.loads(found[1])
    assert isinstance(data, list)
    return data


ADAPTER = "minilm-mrpc-v2"
"""The best that ships, with which a page starts."""

EXPECTED = compare(*PAIR, adapter=ADAPTER)


def test_the_python_on_the_page_runs(url: str) -> None:
    code = load(url)["use-python"]
    assert f'Client("{url}/")' in code
    assert run_python(code).splitlines()[-1] == str(EXPECTED)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_the_curl_on_the_page_runs(url: str, tmp_path: Path) -> None:
    assert run_shell(load(url)["use-curl"], tmp_path) == [EXPECTED]


def test_the_javascript_on_the_page_names_the_live_parameters(url: str) -> None:
    """It is run by the next test, where Node has the client."""
    code = load(url)["use-javascript"]
    found = re.search(r'page\.predict\("/compare", (\{.*?\})\);', code, flags=re.DOTALL)
    assert found
    parameters = httpx.get(f"{url}/gradio_api/info").json()["named_endpoints"]["/compare"]["parameters"]
    assert list(json.loads(found[1])) == [parameter["parameter_name"] for parameter in parameters]
    assert f'Client.connect("{url}/")' in code


def node_modules() -> Path | None:
    """A folder of NODE_PATH with Gradio's client in it."""
    folders = [Path(folder) for folder in os.environ.get("NODE_PATH", "").split(os.pathsep) if folder]
    return next((folder for folder in folders if (folder / "@gradio" / "client").is_dir()), None)


@pytest.mark.skipif(
    shutil.which("node") is None or node_modules() is None,
    reason="no Node with @gradio/client: npm install @gradio/client, and name its node_modules in NODE_PATH",
)
def test_the_javascript_on_the_page_runs(url: str, tmp_path: Path) -> None:
    modules = node_modules()
    assert modules is not None
    (tmp_path / "node_modules").symlink_to(modules.resolve())
    program = tmp_path / "use.mjs"
    # The client keeps a connection open, which keeps Node from ending.
    program.write_text(
        load(url)["use-javascript"].replace("console.log(answer.data[0]);", "console.log(JSON.stringify(answer.data));")
        + "process.exit();\n",
        encoding="utf-8",
    )
    result = subprocess.run(["node", str(program)], capture_output=True, text=True, check=True, timeout=120)  # noqa: S607
    assert json.loads(result.stdout) == [EXPECTED]


async def call_mcp(url: str) -> tuple[list[str], Any]:
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client
    from mcp.types import TextContent

    async with streamable_http_client(url) as (read, write, _), ClientSession(read, write) as session:
        await session.initialize()
        tools = (await session.list_tools()).tools
        result = await session.call_tool("compare", {"sentence1": PAIR[0], "sentence2": PAIR[1]})
        assert not result.isError
        (content,) = result.content
        assert isinstance(content, TextContent)
        return [tool.name for tool in tools], content.text


def test_an_mcp_client_with_the_pages_configuration_finds_the_public_endpoints_alone_and_calls_one(url: str) -> None:
    (server,) = json.loads(load(url)["use-mcp"])["mcpServers"].values()
    tools, answer = asyncio.run(call_mcp(server["url"]))
    assert tools == ["compare"]
    assert answer == str(compare(*PAIR))


def test_the_table_lists_the_public_endpoints_with_their_parameters(url: str) -> None:
    table = load(url)["endpoints"]
    assert table.count("<tr>") == 2  # its head, and /compare
    assert "/compare" in table
    assert "sentence1: str, sentence2: str = &#x27;&#x27;, adapter: str = &#x27;first&#x27;" in table
    assert "Say which words two sentences share." in table


def test_a_page_behind_a_password_without_a_link_shows_both_and_its_code_runs_with_the_real_password(
    tmp_path: Path,
) -> None:
    with small_page(auth=":".join(LOGIN), mcp_server=False, why_not=f"No <folder> {BINARY_FOLDER}.") as url:
        with httpx.Client(base_url=url) as browser:
            form = {"username": LOGIN[0], "password": LOGIN[1]}
            assert browser.get("/config").status_code == 401
            assert browser.post("/login", data=form | {"password": "a"}).status_code == 400
            assert browser.post("/login", data=form).status_code == 200
            shown = load(url, cookies=browser.cookies)
        assert 'auth=("user", "password")' in shown["use-python"]
        code = shown["use-python"].replace('("user", "password")', repr(LOGIN))
        assert run_python(code).splitlines()[-1] == str(EXPECTED)
        assert 'auth: ["user", "password"]' in shown["use-javascript"]
        code = shown["use-curl"].replace("username=user", "username=ann").replace("=password", "='a:b ü'")
        assert run_shell(code, tmp_path) == [EXPECTED]
        assert "does not serve MCP" in shown["use-mcp-note"]
        assert shown["share-note"] == "There is no public link. No &lt;folder&gt; HF_HOME/gradio/frpc."
        assert not shown["share-link"]
        assert httpx.get(f"{url}/gradio_api/mcp/schema").status_code == 404


HOSTILE = (
    'x";import os;os.system("id")#',
    "x$(id)",
    "x`id`",
    "x';id;'",
    "x\\",
    "x y",
    "user@evil.example",
    "x/../..;id",
    "x:99999999",
    "[::1",
    "",
)


@pytest.mark.parametrize("header", ["host", "x-forwarded-host"])
def test_a_hostile_host_is_replaced_by_the_pages_own_address(header: str) -> None:
    page = cast(gr.Blocks, SimpleNamespace(share_url=None, local_url="http://127.0.0.1:7860/", root_path=""))

    def address(value: str) -> str:
        headers = [(b"host", b"honest:7860")] if header != "host" else []
        scope = {
            "type": "http",
            "method": "POST",
            "scheme": "http",
            "path": "/gradio_api/run/predict",
            "query_string": b"",
            "headers": [*headers, (header.encode(), value.encode())],
            "server": ("127.0.0.1", 7860),
        }
        return visitor_url(page, Request(scope))

    assert address("honest.example:81") == "http://honest.example:81"
    for value in HOSTILE:
        assert address(value) in ("http://127.0.0.1:7860", "http://honest:7860"), value


def test_a_hostile_host_reaches_no_snippet(url: str) -> None:
    assert load(url, headers={"X-Forwarded-Host": "x$(id)"})["use-curl"] == load(url)["use-curl"]


def test_every_address_in_a_snippet_is_of_harmless_characters() -> None:
    for address in ("http://127.0.0.1:7860", "https://a-b.gradio.live", "http://[::1]:7860/prompt_fold/x"):
        assert SAFE_URL.fullmatch(address)
    for host in HOSTILE:
        assert not SAFE_URL.fullmatch(f"http://{host}")
    assert not SAFE_URL.fullmatch("javascript:alert(1)")
    assert not SAFE_URL.fullmatch("http://a/b\n")


def test_values_are_quoted_in_every_language(tmp_path: Path) -> None:
    """Whatever an endpoint's defaults hold."""
    nasty = 'it\'s "$(touch x)" `id` \\ \n é'
    code = snippets("http://127.0.0.1:1", "/compare", {"sentence1": nasty, "flag": True}, asks_password=False)
    found = re.search(r"predict\(\n    sentence1=(.*),\n    flag=True,", code.python)
    assert found
    assert run_python(f"import base64; print(base64.b64encode({found[1]}.encode()).decode())").strip() == (
        base64.b64encode(nasty.encode()).decode()
    )
    command = code.curl.replace("curl --silent", "printf %s").partition("--data ")[2].partition(" \\\n  | sed")[0]
    shell = subprocess.run(  # noqa: S602 -- the quoting is what is tested
        f"printf %s {command}", shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(shell.stdout) == {"sentence1": nasty, "flag": True}
    assert list(tmp_path.iterdir()) == []


def test_the_table_shows_markup_in_a_description_as_it_is() -> None:
    endpoint: Any = {"parameters": [], "returns": [], "api_visibility": "public", "description": "<script>x</script>"}
    assert "<script>" not in endpoint_table({"/compare": endpoint})


def test_the_pipeline_code_is_python_and_names_the_bundle() -> None:
    compile(code := pipeline_snippet("minilm-mrpc-v2 (2)", EXAMPLE), "snippet", "exec")
    assert "bundle = 'bundles/minilm-mrpc-v2 (2)'" in code
    assert "--out 'bundles/minilm-mrpc-v2 (2)'" in code
    assert "text_pair" not in pipeline_snippet("one", {"sentence1": "A sentence."})


def test_the_pipeline_code_runs_on_a_bundle(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "it's").symlink_to(bundle("bert"))
    printed = run_python(pipeline_snippet("it's", EXAMPLE), folder=tmp_path).splitlines()[-1]
    assert set(ast.literal_eval(printed)) == {"label", "score"}


def test_the_address_is_the_one_that_the_visitor_used(url: str) -> None:
    port = url.rpartition(":")[2]
    assert f'Client("http://localhost:{port}/")' in load(f"http://localhost:{port}")["use-python"]
    forwarded = {"X-Forwarded-Host": "demo.example", "X-Forwarded-Proto": "https"}
    shown = load(url, headers=forwarded)
    assert 'Client("https://demo.example/")' in shown["use-python"]
    assert json.loads(shown["use-mcp"]) == json.loads(mcp_config("https://demo.example"))


def test_the_sharing_box_shows_the_link_and_the_code_uses_it() -> None:
    link = "https://0123456789abcdef.gradio.live"
    with small_page(tunnel=link) as url:
        shown = load(url, headers={"Host": "0123456789abcdef.gradio.live"})
        assert shown["share-link"] == link
        assert f'aria-label="QR code of {link}"' in shown["share-qr"]
        assert f'Client("{link}/")' in shown["use-python"]
        assert f'Client("{url}/")' in load(url)["use-python"]


def test_a_local_page_says_how_to_share_it(url: str) -> None:
    shown = load(url)
    assert shown["share-note"] == "Local page. Start with <code>--share</code> for a public link."
    assert not shown["share-link"]
    assert not shown["share-qr"]


@contextmanager
def prefix_proxy(target: str, prefix: str, *, strips: bool) -> Iterator[str]:
    """A reverse proxy that serves a page under a prefix, with the headers that nginx is told to set."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(timeout=60) as app.state.client:
            yield

    async def forward(request: Request) -> StreamingResponse:
        path = request.url.path.removeprefix(prefix) if strips else request.url.path
        headers = {
            "X-Forwarded-Host": request.headers["host"],
            "X-Forwarded-Proto": "http",
            "Content-Type": request.headers.get("content-type", "text/plain"),
            "Accept": request.headers.get("accept", "*/*"),
        }
        asked = request.app.state.client.build_request(
            request.method,
            f"{target}{path or '/'}",
            params=request.url.query,
            content=await request.body(),
            headers=headers,
        )
        answer = await request.app.state.client.send(asked, stream=True)
        kept = {"content-type": answer.headers.get("content-type", "text/plain")}
        return StreamingResponse(
            answer.aiter_bytes(), answer.status_code, kept, background=BackgroundTask(answer.aclose)
        )

    route = Route(f"{prefix}{{path:path}}", forward, methods=["GET", "POST", "HEAD"])
    app = Starlette(routes=[route], lifespan=lifespan)
    config = uvicorn.Config(app, loop="asyncio", log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}{prefix}"
        finally:
            server.should_exit = True
            thread.join()


def test_behind_a_reverse_proxy_with_a_prefix_the_page_loads_and_its_code_runs(tmp_path: Path) -> None:
    """Whether the proxy strips the prefix, as nginx does with a slash behind `proxy_pass`'s host, or keeps it."""
    with (
        small_page(root_path="/promptfold") as target,
        prefix_proxy(target, "/promptfold", strips=True) as stripping,
        prefix_proxy(target, "/promptfold", strips=False) as keeping,
    ):
        for url in (stripping, keeping):
            page = httpx.get(f"{url}/").raise_for_status().text
            assert json.loads(re.findall(r"window\.gradio_config = (\{.*?\});", page)[0])["root"] == url
            assets = re.findall(r'(?:src|href)="\./(assets/[^"]+)"', page)
            assert assets
            for asset in assets:
                assert httpx.get(f"{url}/{asset}").status_code == 200
            shown = load(url)
            assert f'Client("{url}/")' in shown["use-python"]
            assert run_python(shown["use-python"]).splitlines()[-1] == str(EXPECTED)
            if shutil.which("curl"):
                assert run_shell(shown["use-curl"], tmp_path) == [EXPECTED]
            (server,) = json.loads(shown["use-mcp"])["mcpServers"].values()
            assert server["url"] == f"{url}/gradio_api/mcp/"
            assert asyncio.run(call_mcp(server["url"]))[0] == ["compare"]


if __name__ == "__main__":
    serve_page(**json.loads(sys.argv[1]))
