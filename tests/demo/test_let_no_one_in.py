"""What must not be reached: the host's files, other machines, the page behind a password; and nothing that reports."""

import asyncio
import http.server
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AuthenticationError
from playwright.sync_api import expect, sync_playwright
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from demo.access.gate import API, MAX_BODY_BYTES, Gate, launch_options
from demo.access.limits import MAX_BYTES
from tests.conftest import ON_CPU, ROOT, Data, make_pairs, write_jsonl
from tests.demo.server import Server, serve
from tests.demo.test_browser import CHROMIUM

Folders = Callable[[str], Path]

PAIR = ("word1 word2 word3 word4", "word4 word3 word2 word1 word9")

EVIL = "https://evil.example"

FILE = {"_type": "gradio.FileData"}


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the host that every process may read, and nobody over the network."""
    path = tmp_path_factory.mktemp("host") / "secret.csv"
    path.write_text("sentence1,sentence2\nxyzzy-secret,xyzzy-secret\n", encoding="utf-8")
    return path


@dataclass(frozen=True)
class Watched:
    """A running page, and where what its processes reach for on the network is written down."""

    server: Server
    url: str
    reached: Path


WATCH = '''
"""Writes down every address that this process, and each that it starts, connects to or asks a name of."""
import os, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a text or bytes: of this machine's own kind
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    else:
        return
    if host is not None:
        host = host.decode() if isinstance(host, bytes) else str(host)
        with open(os.environ["REACHED"], "a", encoding="utf-8") as file:
            file.write(f"{event} {host} {os.getpid()}\\n")

sys.addaudithook(watch)
'''
"""A ``sitecustomize``: Python imports it at the start of every process."""

LOOPBACK = {"127.0.0.1", "localhost", "::1", "0.0.0.0"}  # noqa: S104 -- to find, not to listen on


def watching(folder: Path) -> dict[str, str]:
    """Environment variables under which every Python process writes down what it reaches for."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    (folder / "reached").write_text("", encoding="utf-8")
    # Switched on by whoever starts the tests, it would switch telemetry off for us.
    return ON_CPU | {"PYTHONPATH": str(folder), "REACHED": str(folder / "reached"), "HF_HUB_OFFLINE": ""}


def strange_hosts(reached: Path) -> list[str]:
    """Whatever is written there that is not this machine itself."""
    lines = [line.split() for line in reached.read_text(encoding="utf-8").splitlines()]
    return [" ".join(line) for line in lines if line[1] not in LOOPBACK]


@pytest.fixture(scope="module")
def page(adapter: Folders, bundle: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """The page without a password."""
    folder = tmp_path_factory.mktemp("watched") / "watch"
    flags = ["--adapter", str(adapter("bert")), "--bundle", str(bundle("bert"))]
    temporary = folder.parent / "temporary"
    temporary.mkdir()
    with serve(flags, folder.parent, watching(folder) | {"TMPDIR": str(temporary)}) as server:
        yield Watched(server, server.wait_for_url().rstrip("/"), folder / "reached")
        assert list(temporary.glob("promptfold-page-*")) != []
    assert list(temporary.glob("promptfold-page-*")) == [], "what visitors brought is gone with the page"


@dataclass(frozen=True)
class Listener:
    """A server on this machine that nobody should ask for anything."""

    port: int
    asked: list[str]


@pytest.fixture
def listener() -> Iterator[Listener]:
    asked: list[str] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"sentence1,sentence2\na,b\n")

        def log_message(self, *_: Any) -> None:
            """Not in the tests' output."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Listener(server.server_port, asked)
    server.shutdown()
    server.server_close()
    thread.join()


def ask(url: str, target: str, *, method: str = "GET", headers: dict[str, str] | None = None) -> bytes:
    """The whole answer to a request whose target is sent as it is; a client of HTTP would mend its dots."""
    host, port = url.removeprefix("http://").split(":")
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    if "Host" not in (headers or {}):
        lines.append(f"Host: {host}:{port}")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(("\r\n".join([*lines, "Connection: close", "", ""])).encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def status_of(answer: bytes) -> int:
    """The status of a whole answer."""
    return int(answer.split(b" ", 2)[1])


def call(url: str, name: str, data: list[Any], *, client: httpx.Client | None = None) -> str:
    """Everything that an endpoint says to raw parameters, in the order of its events."""
    asker = client or httpx.Client(timeout=30)
    try:
        answer = asker.post(f"{url}{API}/call/{name}", json={"data": data})
        if answer.status_code != 200:
            return answer.text
        event = answer.json()["event_id"]
        return asker.get(f"{url}{API}/call/{name}/{event}").text
    finally:
        if client is None:
            asker.close()


def escapes(path: str) -> list[str]:
    """A path of the host in the forms in which servers have given files away."""
    up = "../" * 14
    climbing = [
        up + path.lstrip("/"),
        up.replace("../", "..%2f") + path.lstrip("/"),
        up.replace("../", "%2e%2e/") + path.lstrip("/"),
        up.replace("../", "%252e%252e%252f") + path.lstrip("/"),
        up.replace("../", "....//") + path.lstrip("/"),
        up.replace("../", "..%5c") + path.lstrip("/"),
        up.replace("../", "..%c0%af") + path.lstrip("/"),
    ]
    return [path, f"/{path}", f"//{path}", path.replace("/", "%2f"), f"file://{path}", f"./{path}%00.css", *climbing]


PLACES = (
    f"{API}/file=",
    f"{API}/file/",
    f"{API}/file%3D",
    f"{API}/proxy=",
    f"{API}/proxy=file://",
    f"{API}/stream/",
    f"{API}/custom_component/",
    f"{API}/custom_component/gradio/client/",
    f"{API}/call/compare/",
    f"{API}/mcp/",
    "/file=",
    "/file/",
    "/proxy=",
    "/static/",
    "/static/..",
    "/assets/",
    "/assets/..",
    "/svelte/",
    "/theme.css/",
    "/theme/",
    "/favicon.ico/",
    "/pwa_icon/",
    "/?deep_link=",
    "/config?deep_link=",
    "/",
)


def test_no_path_leads_to_a_file_of_the_host(page: Watched, secret: Path) -> None:
    for path, content in (
        (str(secret), b"xyzzy-secret"),
        ("/etc/passwd", b"root:"),
        (str(ROOT / "README.md"), b"# promptfold"),
    ):
        for place in PLACES:
            for form in escapes(path):
                answer = ask(page.url, place + form)
                assert content not in answer, place + form
                assert status_of(answer) < 500, place + form
                # The page itself is shown whatever stands behind its question mark.
                assert status_of(answer) != 200 or place.endswith("deep_link="), place + form


def test_no_parameter_of_an_endpoint_is_taken_for_a_file_of_the_host(page: Watched, secret: Path) -> None:
    for path in (str(secret), "/etc/passwd", "../" * 14 + str(secret), f"file://{secret}"):
        for file in (
            {"path": path, "meta": FILE},
            {"path": path, "url": path, "meta": FILE},
            path,
            [path],
            {"path": path},
        ):
            said = call(page.url, "score_file", [file, "", "", "", "", ""])
            assert "event: error" in said, said
            assert "xyzzy" not in said
            assert "root:" not in said
            assert str(secret.parent) not in said
        wrapped = {"path": path, "meta": FILE}
        for name, data in (
            ("compare", [wrapped, wrapped, "", "", ""]),
            ("latency", [[wrapped], wrapped, "", "", ""]),
            ("prompt", [wrapped]),
            ("prompt_effect", [wrapped, wrapped, wrapped]),
        ):
            said = call(page.url, name, data)
            assert "event: complete" not in said, said
            assert "xyzzy" not in said
            assert "root:" not in said
    assert secret.exists(), "an endpoint deletes what was uploaded, and nothing else"


def test_nothing_is_fetched_from_an_address(page: Watched, listener: Listener) -> None:
    for host in (f"127.0.0.1:{listener.port}", f"localhost:{listener.port}", f"[::1]:{listener.port}", "evil.example"):
        for path in (f"http://{host}/rows.csv", f"HTTP://{host}/rows.csv", f"http://user@{host}/rows.csv"):
            for file in (
                {"path": path, "meta": FILE},
                {"path": path, "url": path, "orig_name": "rows.csv", "meta": FILE},
                {"path": "rows.csv", "url": path, "meta": FILE},
            ):
                said = call(page.url, "score_file", [file, "", "", "", "", ""])
                assert "event: error" in said, said
                assert "event: complete" not in call(page.url, "compare", [file, file, "", "", ""])
            for place in (f"{API}/file=", f"{API}/proxy=", "/proxy=", "/file=", f"{API}/file=%20"):
                assert status_of(ask(page.url, place + path)) in {403, 404}, place + path
    said = call(page.url, "score_file", [{"path": "http://evil.example/rows.csv", "meta": FILE}, "", "", "", "", ""])
    assert "Upload the file instead" in said
    assert listener.asked == []


def test_an_agents_file_is_fetched_from_no_address_either(page: Watched, listener: Listener) -> None:
    body = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {
            "name": "score_file",
            "arguments": {"file": f"http://127.0.0.1:{listener.port}/rows.csv"},
        },
    }
    headers = {"Accept": "application/json, text/event-stream"}
    with httpx.Client(timeout=30) as client:
        tools = client.post(
            f"{page.url}{API}/mcp/", json=body | {"method": "tools/list", "params": {}}, headers=headers
        )
        (name,) = set(re.findall(r'"name":\s*"(\w*score_file)"', tools.text))
        body["params"] = {"name": name, "arguments": {"file": f"http://127.0.0.1:{listener.port}/rows.csv"}}
        answer = client.post(f"{page.url}{API}/mcp/", json=body, headers=headers)
    assert answer.status_code == 200
    assert "Upload the file instead" in answer.text
    assert "Traceback" not in answer.text
    assert listener.asked == []


def test_an_upload_is_bounded_and_refused_in_words(page: Watched) -> None:
    with httpx.Client(timeout=30) as client:
        for n_bytes in (MAX_BYTES + 1, MAX_BODY_BYTES + 1, 3 * MAX_BYTES):
            answer = client.post(f"{page.url}{API}/upload", files={"files": ("rows.csv", b"a" * n_bytes)})
            assert answer.status_code == 413
            assert re.search("exceeded maximum allowed size of 5000000 bytes|Send less", answer.text)
        many = [("files", (f"{number}.csv", b"a" * 1_000_000)) for number in range(20)]
        assert client.post(f"{page.url}{API}/upload", files=many).status_code == 413

        def in_parts() -> Iterator[bytes]:
            yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.csv"\r\n\r\n'
            for _ in range(12):
                yield b"a" * 500_000
            yield b"\r\n--x--\r\n"

        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        assert client.post(f"{page.url}{API}/upload", content=in_parts(), headers=headers).status_code == 413
        assert client.post(f"{page.url}{API}/upload", files={"files": ("rows.csv", b"a")}).status_code == 200
        for length in ("-1", "1e9", "٣"):
            raw = ask(page.url, f"{API}/upload", method="POST", headers={"Content-Length": length})
            assert status_of(raw) in {400, 413}, length


def test_a_file_that_was_labelled_is_gone_and_the_same_file_of_another_visitor_is_not(
    page: Watched, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", make_pairs(6, seed=5))
    columns = ["", "", "", "", ""]
    with httpx.Client(timeout=60) as client:
        both = []
        for _ in range(2):
            answer = client.post(f"{page.url}{API}/upload", files={"files": ("rows.jsonl", rows.read_bytes())})
            both += answer.json()
        assert len(set(both)) == 2
        for path in both:
            assert client.get(f"{page.url}{API}/file={path}").content == rows.read_bytes()
            said = call(page.url, "score_file", [{"path": path, "meta": FILE}, *columns], client=client)
            assert "event: complete" in said
            assert client.get(f"{page.url}{API}/file={path}").status_code == 403
            assert not Path(path).exists()
    # Of this page alone, and closed to other users of this machine.
    assert Path(both[0]).parent.parent.name.startswith("promptfold-page-")
    assert Path(both[0]).parent.parent.stat().st_mode & 0o077 == 0


def test_no_page_of_another_site_reads_or_asks_this_one(page: Watched) -> None:
    port = page.url.rpartition(":")[2]
    with httpx.Client(timeout=30) as client:
        for host in (f"localhost:{port}", f"127.0.0.1:{port}"):
            for origin in (EVIL, "null", "http://localhost.evil.example", f"http://evil.example:{port}"):
                for path in ("/", "/config", f"{API}/info", f"{API}/queue/status"):
                    answer = client.get(page.url + path, headers={"Host": host, "Origin": origin})
                    assert "access-control-allow-origin" not in answer.headers, (host, origin, path)
                asked = {"Host": host, "Origin": origin, "Access-Control-Request-Method": "POST"}
                answer = client.options(f"{page.url}{API}/call/compare", headers=asked)
                assert "access-control-allow-origin" not in answer.headers
            own = client.get(f"{page.url}{API}/info", headers={"Host": host, "Origin": f"http://{host}"})
            assert own.headers["access-control-allow-origin"] == f"http://{host}"
            # A form may be sent anywhere without being asked first; its answer is not read, and need not be.
            sent = {"Host": host, "Origin": EVIL, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
            answer = client.post(f"{page.url}{API}/upload", files={"files": ("a.csv", b"a")}, headers=sent)
            assert answer.status_code == 403
            # A link is followed.
            followed = {"Host": host, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
            assert client.get(page.url, headers=followed).status_code == 200


CLOSED = (
    ("POST", f"{API}/process_recording"),
    ("POST", f"{API}/component_server"),
    ("POST", f"{API}/vibe-edit"),
    ("POST", f"{API}/undo-vibe-edit"),
    ("GET", f"{API}/vibe-code"),
    ("GET", f"{API}/deep_link?session_hash=a"),
    ("GET", f"{API}/dev/reload"),
    ("GET", f"{API}/custom_component/a/client/b/c"),
    ("GET", f"{API}/token"),
    ("POST", f"{API}/stream/a"),
    ("POST", f"{API}/stream/a/close"),
    ("GET", f"{API}/stream/a/1/2/playlist.m3u8"),
    ("GET", f"{API}/stream/a/1/2/playlist-file"),
    ("GET", "/monitoring"),
    ("GET", "/monitoring/summary"),
    ("GET", "/docs"),
    ("GET", "/redoc"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing"),
)
"""Routes of Gradio's, or of FastAPI's, that the page has no use for."""


def test_what_the_page_does_not_use_is_closed(page: Watched) -> None:
    with httpx.Client(timeout=30) as client:
        for method, path in CLOSED:
            answer = client.request(method, page.url + path, json={})
            assert answer.status_code == 404, path
            assert answer.json() == {"detail": "There is nothing here."}
        # Past the queue nobody would wait for a turn.
        for route in ("run", "api"):
            answer = client.post(f"{page.url}{API}/{route}/compare", json={"data": [*PAIR, "", "", ""]})
            assert answer.status_code == 404


def test_the_page_opens_no_folder_of_the_host(tmp_path: Path) -> None:
    options = launch_options()
    assert options["allowed_paths"] == []
    assert options["strict_cors"]
    assert options["max_file_size"] == MAX_BYTES


ROUTES_OF_GRADIO = """
import gradio as gr

def paths(routes):
    for route in routes:
        if path := getattr(route, "path", None):
            yield path
        # What was included from a router stands below it in newer versions of FastAPI.
        yield from paths(getattr(getattr(route, "original_router", None), "routes", []))

with gr.Blocks(analytics_enabled=False) as blocks:
    gr.Textbox()
print("\\n".join(paths(gr.routes.App.create_app(blocks).routes)))
"""


def routes_of_gradio() -> list[str]:
    """Every route that Gradio has, with something in place of its parameters."""
    result = subprocess.run([sys.executable, "-c", ROUTES_OF_GRADIO], capture_output=True, text=True, check=True)
    found = {re.sub(r"\{[^}]*\}", "a", path) for path in result.stdout.split()}
    # Below a router the prefix may be left out.
    return sorted(found | {API + path for path in found if not path.startswith(API)})


@pytest.fixture(scope="module")
def closed_page(adapter: Folders, bundle: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page behind a password."""
    flags = ["--adapter", str(adapter("bert")), "--bundle", str(bundle("bert")), "--auth", "ann:secret"]
    with serve(flags, tmp_path_factory.mktemp("cache"), ON_CPU) as server:
        server.wait_for_url()
        yield server


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium, as tests/test_browser.py says")
def test_a_visitor_logs_in(closed_page: Server) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(closed_page.wait_for_url())
        expect(page.locator("input[type=password]")).to_be_visible()
        assert "score_file" not in page.content()
        page.locator("input").first.fill("ann")
        page.locator("input[type=password]").fill("secret")
        page.get_by_role("button", name="Login").click()
        expect(page.locator("#sentence1 textarea")).to_be_visible()
        browser.close()


def test_behind_a_password_nothing_but_the_login_answers_a_stranger(closed_page: Server) -> None:
    routes = routes_of_gradio()
    for known in (
        "/config",
        f"{API}/upload",
        f"{API}/queue/join",
        f"{API}/heartbeat/a",
        f"{API}/cancel",
        f"{API}/info",
    ):
        assert known in routes
    url = closed_page.wait_for_url().rstrip("/")
    shown = {"/", "/login", "/login/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}
    # Gradio's own start asks for it.
    shown |= {f"{API}/startup-events"}
    forms = {"/static/a", "/assets/a", "/svelte/a"}
    more = [path for _, path in CLOSED] + [
        f"{API}/mcp/",
        f"{API}/mcp/sse",
        f"{API}/mcp/schema",
        f"{API}/call/compare",
        f"{API}/call/v2/compare",
        f"{API}/call/compare/a",
        f"{API}/run/compare",
        f"{API}/file=/etc/passwd",
        f"{API}/file=https://evil.example",
        "/file=/etc/passwd",
        "//config",
        "/./config",
        "/static/%2e%2e/config",
        "/CONFIG",
        "/config/",
        "/config;a=1",
        "/login/../config",
    ]
    with httpx.Client(timeout=30) as client:
        for path in [*routes, *more]:
            if path in shown | forms:
                continue
            # A stranger may ask for what the form is made of; beyond these folders there is nothing.
            accepted = {403, 404, 405} if path.startswith("/static/%2e") else {401}
            body = {"data": [*PAIR, "", "", ""], "session_hash": "a", "fn_index": 0, "event_id": "a"}
            for method, cookie in (
                ("GET", ""),
                ("POST", ""),
                ("DELETE", "access-token-a=b; access-token-unsecure-a="),
            ):
                answer = client.request(method, url + path, json=body, headers={"Cookie": cookie})
                assert answer.status_code in accepted, (method, path, answer.text[:200])
        upload = client.post(f"{url}{API}/upload", files={"files": ("a.csv", b"a")})
        assert upload.status_code == 401

        for path in ("/static/../config", "/static/%2e%2e/config", "/static//config", "/assets/..%2f..%2fconfig"):
            assert b"components" not in ask(url, path)
        form = client.get(url)
        assert form.status_code == 200
        for words in ("score_file", "sentence1", "prompt_effect", "Latency lab"):
            assert words not in form.text
        assert "auth_required" in form.text
        wrong = client.post(f"{url}/login", data={"username": "ann", "password": "wrong"})
        assert wrong.status_code == 400
        assert client.get(f"{url}/config").status_code == 401

    with pytest.raises(AuthenticationError):
        Client(url, verbose=False)
    known = Client(url, auth=("ann", "secret"), verbose=False)
    try:
        assert known.predict(*PAIR, api_name="/compare")["onnx"]["label"]
    finally:
        known.close()

    with httpx.Client(timeout=30) as client:
        assert client.post(f"{url}/login", data={"username": "ann", "password": "secret"}).status_code == 200
        # Over plain HTTP the other cookie, which wants TLS, does not count.
        cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items() if "unsecure" in name)
        mine = {"Cookie": cookie}
        assert client.get(f"{url}{API}/info", headers=mine).status_code == 200
        assert "score_file" in client.get(url, headers=mine).text
        elsewhere = mine | {"Host": "page.example", "Origin": EVIL, "Sec-Fetch-Site": "cross-site"}
        for path in ("/config", f"{API}/info", f"{API}/queue/data?session_hash=a"):
            answer = client.get(url + path, headers=elsewhere | {"Sec-Fetch-Mode": "cors"})
            assert answer.status_code == 403
            assert answer.json() == {"detail": "This page does not answer to scripts of other sites."}
        client.get(f"{url}/logout", headers=mine)
        assert client.get(f"{url}/config", headers=mine).status_code == 401
    assert "Traceback" not in closed_page.output


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


# Nothing reports


def test_the_page_reaches_for_no_machine_but_this_one(page: Watched, tmp_path: Path) -> None:
    """Last of those that use the page: whatever the others made it do is in the record."""
    client = Client(page.url, verbose=False)
    try:
        assert client.predict(*PAIR, api_name="/compare")["onnx"]["label"]
        rows = write_jsonl(tmp_path / "rows.jsonl", make_pairs(4, seed=7))
        summary, labelled = client.predict(handle_file(rows), "", "", "", "", "", api_name="/score_file")
        assert summary["rows"] == 4
        assert Path(labelled).read_text(encoding="utf-8").count("prediction_onnx") == 4
        assert client.predict([1], [8], api_name="/latency")
    finally:
        client.close()
    processes = [psutil.Process(page.server.pid), *psutil.Process(page.server.pid).children(recursive=True)]
    assert len(processes) >= 3
    remote = [link.raddr.ip for process in processes for link in process.net_connections() if link.raddr]
    assert set(remote) <= LOOPBACK
    written = page.reached.read_text(encoding="utf-8")
    assert f"socket.connect 127.0.0.1 {page.server.pid}" in written, "or nothing is written down"
    assert strange_hosts(page.reached) == []


def test_training_export_and_scoring_reach_for_no_machine(base_model: Folders, data: Data, tmp_path: Path) -> None:
    # In one process: most of the time goes into imports.
    code = (
        "import json, sys, train.__main__, export.__main__, export.score.__main__\n"
        "for name, words in json.loads(sys.argv[1]):\n"
        "    assert sys.modules[name].main(words) == 0, name"
    )
    commands = {
        "train.__main__": f"--model {base_model('bert')} --out {tmp_path / 'adapter'} --virtual-tokens 5 "
        f"--encoder-hidden-size 16 --epochs 1 {shlex.join(data.flags)}",
        "export.__main__": f"{tmp_path / 'adapter'} --out {tmp_path / 'bundle'}",
        "export.score.__main__": f"{tmp_path / 'bundle'} --in {data.validation_file} --out {tmp_path / 'labelled.jsonl'}",
    }
    words = json.dumps([(name, shlex.split(command)) for name, command in commands.items()])
    environment = os.environ | watching(tmp_path / "watch")
    result = subprocess.run(
        [sys.executable, "-c", code, words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "labelled.jsonl").exists()
    assert strange_hosts(tmp_path / "watch" / "reached") == []


def test_the_record_would_show_another_machine(tmp_path: Path) -> None:
    environment = os.environ | watching(tmp_path / "watch")
    code = "import socket\ntry: socket.create_connection(('evil.invalid', 80), timeout=1)\nexcept OSError: pass"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    (line,) = strange_hosts(tmp_path / "watch" / "reached")
    assert line.startswith("socket.getaddrinfo evil.invalid ")
