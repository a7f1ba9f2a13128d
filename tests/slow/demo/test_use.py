"""The tab "Use it": its code behind reverse proxies, and without the page."""

import ast
import asyncio
import json
import re
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from demo.page.tab_use import EXAMPLE, pipeline_snippet
from tests.conftest import ON_CPU
from tests.demo.engines import PAIR
from tests.demo.page_client import call_mcp, check_answer, run_python, run_shell, values_on_load
from tests.demo.server import serve_cleanly


def test_the_pipeline_code_runs_on_a_bundle(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "it's").symlink_to(bundle("bert"))
    printed = run_python(pipeline_snippet("it's", EXAMPLE), folder=tmp_path).splitlines()[-1]
    assert set(ast.literal_eval(printed)) == {"label", "score"}


@contextmanager
def prefix_proxy(target: str, prefix: str, *, strips: bool) -> Iterator[str]:
    """A reverse proxy that serves a page under a prefix, with the headers that nginx is told to set."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(base_url=target, timeout=60) as app.state.client:
            yield

    async def forward(request: Request) -> StreamingResponse:
        path = request.url.path.removeprefix(prefix) if strips else request.url.path
        kept = {name: request.headers[name] for name in ("content-type", "accept") if name in request.headers}
        headers = kept | {"X-Forwarded-Host": request.headers["host"], "X-Forwarded-Proto": "http"}
        client, content = request.app.state.client, await request.body()
        asked = client.build_request(
            request.method, path or "/", params=request.url.query, content=content, headers=headers
        )
        answer = await client.send(asked, stream=True)
        kind = {"content-type": answer.headers.get("content-type", "text/plain")}
        return StreamingResponse(
            answer.aiter_bytes(), answer.status_code, kind, background=BackgroundTask(answer.aclose)
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


def test_behind_a_reverse_proxy_with_a_prefix_the_page_loads_and_its_code_runs(
    flags: list[str], tmp_path: Path
) -> None:
    """Whether the proxy strips the prefix, as nginx does with a slash behind `proxy_pass`'s host, or keeps it."""
    with serve_cleanly([*flags, "--root-path", "/promptfold"], tmp_path / "cache", ON_CPU) as page:
        for strips in (True, False):
            with prefix_proxy(page.url, "/promptfold", strips=strips) as url:
                html = httpx.get(f"{url}/").raise_for_status().text
                assert json.loads(re.findall(r"window\.gradio_config = (\{.*?\});", html)[0])["root"] == url
                assets = re.findall(r'(?:src|href)="\./(assets/[^"]+)"', html)
                assert assets
                for asset in assets:
                    assert httpx.get(f"{url}/{asset}").status_code == 200
                shown = values_on_load(url)
                assert f'Client("{url}/")' in shown["use-python"]
                check_answer(ast.literal_eval(run_python(shown["use-python"]).splitlines()[-1]))
                if shutil.which("curl"):
                    check_answer(run_shell(shown["use-curl"], tmp_path)[0])
                (server,) = json.loads(shown["use-mcp"])["mcpServers"].values()
                assert server["url"] == f"{url}/gradio_api/mcp/"
                assert "compare" in asyncio.run(call_mcp(server["url"], *PAIR))[0]
