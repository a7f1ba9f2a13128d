"""What must not be reached over the network: the host's files, other machines, routes that the page does not use."""

import asyncio
import re
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from demo.access.gate import API, MAX_BODY_BYTES, Gate
from demo.access.limits import MAX_BYTES
from demo.engines.adapters import choose_adapters
from demo.engines.stage import Stage
from demo.page.controls import errors_shown
from tests.conftest import ROOT, Folders, make_pairs, write_jsonl
from tests.demo.page_client import call, request_raw, status_of
from tests.demo.server import Server

EVIL, UP = "https://evil.example", "../" * 14
FILE = {"_type": "gradio.FileData"}
CLOSED = (
    *(("POST", API + path) for path in ("/process_recording", "/component_server", "/vibe-edit", "/undo-vibe-edit")),
    *(("POST", API + path) for path in ("/stream/a", "/stream/a/close")),
    *(("GET", API + path) for path in ("/vibe-code", "/deep_link?session_hash=a", "/dev/reload", "/token")),
    *(("GET", API + path) for path in ("/custom_component/a/client/b/c", "/stream/a/1/2/playlist-file")),
    *(("GET", path) for path in ("/monitoring", "/monitoring/summary", "/docs", "/redoc", "/openapi.json", "/nothing")),
    ("GET", f"{API}/stream/a/1/2/playlist.m3u8"),
)


@pytest.fixture
def visitor(running_page: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running_page.url, timeout=60) as client:
        yield client


@contextmanager
def listen() -> Iterator[tuple[int, list[str]]]:
    """A server on this machine that must get no request: its port, and what it was asked for."""
    asked: list[str] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(str(self.request.recv(1000)))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1], asked
        server.shutdown()
        thread.join()


def escapes(path: str) -> list[str]:
    """A path of the host in the forms in which servers have given files away."""
    dots = ("../", "..%2f", "%2e%2e/", "%252e%252e%252f", "....//", "..%5c", "..%c0%af")
    climbing = [UP.replace("../", form) + path.lstrip("/") for form in dots]
    return [path, f"/{path}", f"//{path}", path.replace("/", "%2f"), f"file://{path}", f"./{path}%00.css", *climbing]


PLACES = (
    *(f"{API}/{place}" for place in ("file=", "file/", "file%3D", "proxy=", "proxy=file://", "stream/", "mcp/")),
    *(f"{API}/{place}" for place in ("custom_component/", "custom_component/gradio/client/", "call/compare/")),
    *("/file=", "/file/", "/proxy=", "/static/", "/static/..", "/assets/", "/assets/..", "/svelte/", "/theme.css/"),
    *("/theme/", "/favicon.ico/", "/pwa_icon/", "/?deep_link=", "/config?deep_link=", "/"),
)


def test_nothing_leads_to_a_file(running_page: Server, visitor: httpx.Client, tmp_path: Path) -> None:
    # A file that every process may read, and that must not be sent to a visitor.
    secret = tmp_path / "secret.csv"
    secret.write_text("sentence1,sentence2\nxyzzy-secret,xyzzy-secret\n", encoding="utf-8")
    files = {str(secret): b"xyzzy-secret", "/etc/passwd": b"root:", str(ROOT / "README.md"): b"# promptfold"}
    for path, content in files.items():
        for target in (place + form for place in PLACES for form in escapes(path)):
            answer = request_raw(running_page.url, target)
            assert content not in answer, target
            assert status_of(answer) < 500, target
            # The page itself is shown whatever stands behind its question mark.
            assert status_of(answer) != 200 or "?deep_link=" in target, target
    for path in (str(secret), "/etc/passwd", UP + str(secret), f"file://{secret}"):
        wrapped = {"path": path, "meta": FILE}
        for file in (wrapped, wrapped | {"url": path}, path, [path], {"path": path}):
            said = call(visitor, "score_file", [file, *[""] * 5])
            assert "event: error" in said, said
            assert not any(words in said for words in ("event: complete", "xyzzy", "root:", str(tmp_path))), said
        others: dict[str, list[Any]] = {
            "compare": [wrapped, wrapped, "", "", ""],
            "latency": [[wrapped], wrapped, "", "", ""],
            "prompt": [wrapped],
            "prompt_effect": [wrapped, wrapped, wrapped],
        }
        for name, data in others.items():
            said = call(visitor, name, data)
            assert not any(words in said for words in ("event: complete", "xyzzy", "root:")), said
    assert secret.exists(), "an endpoint deletes what was uploaded, and nothing else"


def test_nothing_is_fetched_from_an_address(visitor: httpx.Client, running_page: Server) -> None:
    with listen() as (port, asked):
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "evil.example"):
            for path in (f"http://{host}/rows.csv", f"HTTP://{host}/rows.csv", f"http://user@{host}/rows.csv"):
                for file in (
                    {"path": path, "meta": FILE},
                    {"path": path, "url": path, "orig_name": "rows.csv", "meta": FILE},
                    {"path": "rows.csv", "url": path, "meta": FILE},
                ):
                    assert "event: error" in call(visitor, "score_file", [file, *[""] * 5])
                    assert "event: complete" not in call(visitor, "compare", [file, file, "", "", ""])
                for place in (f"{API}/file=", f"{API}/proxy=", "/proxy=", "/file=", f"{API}/file=%20"):
                    assert status_of(request_raw(running_page.url, place + path)) in {403, 404}, place + path
        said = call(visitor, "score_file", [{"path": f"{EVIL}/rows.csv", "meta": FILE}, *[""] * 5])
        assert "Upload the file instead" in said
        # Nor for an MCP client.
        params = {"name": "score_file", "arguments": {"file": f"http://127.0.0.1:{port}/rows.csv"}}
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        accept = {"Accept": "application/json, text/event-stream"}
        answer = visitor.post(f"{API}/mcp/", json=body, headers=accept)
        assert answer.status_code == 200
        assert "Upload the file instead" in answer.text
    assert asked == []


def test_an_upload_is_bounded_and_refused_in_words(visitor: httpx.Client, running_page: Server) -> None:
    for n_bytes in (MAX_BYTES + 1, MAX_BODY_BYTES + 1, 3 * MAX_BYTES):
        answer = visitor.post(f"{API}/upload", files={"files": ("rows.csv", b"a" * n_bytes)})
        assert answer.status_code == 413
        assert re.search("exceeded maximum allowed size of 5000000 bytes|Send less", answer.text)
    many = [("files", (f"{number}.csv", b"a" * 1_000_000)) for number in range(20)]
    assert visitor.post(f"{API}/upload", files=many).status_code == 413

    def in_parts() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.csv"\r\n\r\n'
        for _ in range(12):
            yield b"a" * 500_000
        yield b"\r\n--x--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert visitor.post(f"{API}/upload", content=in_parts(), headers=headers).status_code == 413
    assert visitor.post(f"{API}/upload", files={"files": ("rows.csv", b"a")}).status_code == 200
    for length in ("-1", "1e9", "٣"):
        raw = request_raw(running_page.url, f"{API}/upload", method="POST", headers={"Content-Length": length})
        assert status_of(raw) in {400, 413}, length


def test_a_labelled_file_is_deleted_and_an_equal_one_stays(visitor: httpx.Client, tmp_path: Path) -> None:
    content = write_jsonl(tmp_path / "rows.jsonl", make_pairs(6, seed=5)).read_bytes()
    both = [visitor.post(f"{API}/upload", files={"files": ("rows.jsonl", content)}).json()[0] for _ in range(2)]
    assert both[0] != both[1]
    for path in both:
        assert visitor.get(f"{API}/file={path}").content == content
        assert "event: complete" in call(visitor, "score_file", [{"path": path, "meta": FILE}, *[""] * 5])
        assert visitor.get(f"{API}/file={path}").status_code == 403
        assert not Path(path).exists()
    # In a folder of this page alone, closed to other users of this machine.
    assert Path(both[0]).parent.parent.name.startswith("promptfold-page-")
    assert Path(both[0]).parent.parent.stat().st_mode & 0o077 == 0


def test_other_sites_read_and_ask_nothing_and_unused_routes_are_closed(
    visitor: httpx.Client, running_page: Server
) -> None:
    port = running_page.url.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}"):
        for origin in (EVIL, "null", "http://localhost.evil.example", f"http://evil.example:{port}"):
            for path in ("/", "/config", f"{API}/info", f"{API}/queue/status"):
                answer = visitor.get(path, headers={"Host": host, "Origin": origin})
                assert "access-control-allow-origin" not in answer.headers, (host, origin, path)
            asked = {"Host": host, "Origin": origin, "Access-Control-Request-Method": "POST"}
            answer = visitor.options(f"{API}/call/compare", headers=asked)
            assert "access-control-allow-origin" not in answer.headers
        own = visitor.get(f"{API}/info", headers={"Host": host, "Origin": f"http://{host}"})
        assert own.headers["access-control-allow-origin"] == f"http://{host}"
        # A form may be sent anywhere without being asked first; its answer is not read, and need not be.
        sent = {"Host": host, "Origin": EVIL, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
        answer = visitor.post(f"{API}/upload", files={"files": ("a.csv", b"a")}, headers=sent)
        assert answer.status_code == 403
        # A link is followed.
        followed = {"Host": host, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert visitor.get("/", headers=followed).status_code == 200
    for method, path in CLOSED:
        answer = visitor.request(method, path, json={})
        assert answer.status_code == 404, path
        assert answer.json() == {"detail": "There is nothing here."}
    # These would not wait in the queue for their turn.
    for route in ("run", "api"):
        answer = visitor.post(f"{API}/{route}/compare", json={"data": ["a", "b", "", "", ""]})
        assert answer.status_code == 404


def test_a_visitor_learns_no_folder_from_an_error(
    adapter: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a file is in the place of the bundles' folder, the terminal alone says so."""
    cache = tmp_path / "cache"
    cache.write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    stage = Stage(choose_adapters([adapter("bert")]))
    with pytest.raises(gr.Error) as told, errors_shown():
        stage.bundle(next(iter(stage.choices)))
    assert str(tmp_path) not in told.value.message
    assert "terminal" in told.value.message
    assert str(cache) in capsys.readouterr().out


def test_the_gate_reads_paths_as_the_router_does() -> None:
    async def show(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.url.path)

    app = Starlette(routes=[Route("/config", show), Route("/gradio_api/info", show), Route("/", show)])
    app.add_middleware(Gate)

    async def statuses(root: str) -> list[int]:
        transport = httpx.ASGITransport(app, root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://page.example") as client:
            # A proxy may leave its prefix, or take it away.
            paths = [prefix + path for prefix in ("", root) for path in ("/config", f"{API}/info", "/")]
            return [(await client.get(path)).status_code for path in paths]

    for auth, status in ((None, 200), (object(), 401)):
        app.auth, app.tokens, app.cookie_id = auth, {}, "a"  # type: ignore[attr-defined]
        for root in ("", "/promptfold"):
            assert asyncio.run(statuses(root)) == [status, status, 200] * 2
