"""A page behind a password, every route of Gradio's; and that no other command reaches for another machine."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AuthenticationError
from playwright.sync_api import Browser, expect

from demo.access.gate import API
from tests.conftest import ON_CPU, ROOT, Data, Folders
from tests.demo.browser import needs_chromium
from tests.demo.engines import PAIR
from tests.demo.page_client import check_answer, request_raw, run_python, run_shell, values_on_load
from tests.demo.server import serve_cleanly, strange_hosts, watching
from tests.demo.test_access import CLOSED, EVIL

ROUTES_OF_GRADIO = """
import gradio as gr

def paths(routes):
    for route in routes:
        if path := getattr(route, "path", None):
            yield path
        # A router's own routes stand below it in newer versions of FastAPI.
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
def url(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve_cleanly([*flags, "--auth", "ann:secret"], tmp_path_factory.mktemp("cache"), ON_CPU) as server:
        yield server.url


@needs_chromium
def test_a_visitor_logs_in(url: str, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(url)
    expect(page.locator("input[type=password]")).to_be_visible()
    assert "score_file" not in page.content()
    page.locator("input").first.fill("ann")
    page.locator("input[type=password]").fill("secret")
    page.get_by_role("button", name="Login").click()
    expect(page.locator("#sentence1 textarea")).to_be_visible()
    page.close()


SHOWN = {
    *("/", "/login", "/login/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/static/a"),
    *("/assets/a", "/svelte/a", f"{API}/startup-events"),  # Gradio's own start asks for the last
}
MORE = (
    *(path for _, path in CLOSED),
    *(API + path for path in ("/mcp/", "/mcp/sse", "/mcp/schema", "/call/compare", "/call/v2/compare")),
    *(API + path for path in ("/call/compare/a", "/run/compare", "/file=/etc/passwd", "/file=https://evil.example")),
    *("/file=/etc/passwd", "//config", "/./config", "/static/%2e%2e/config", "/CONFIG", "/config/", "/config;a=1"),
    "/login/../config",
)


def test_without_a_login_nothing_but_the_form_answers(url: str) -> None:
    routes = routes_of_gradio()
    known = ("/upload", "/queue/join", "/heartbeat/a", "/cancel", "/info")
    assert {"/config", *(API + path for path in known)} <= set(routes)
    with httpx.Client(base_url=url, timeout=30) as client:
        body = {"data": [*PAIR, "", "", ""], "session_hash": "a", "fn_index": 0, "event_id": "a"}
        for path in sorted({*routes, *MORE} - SHOWN):
            # The form's own folders are open; outside of its files they hold nothing.
            accepted = {403, 404, 405} if path.startswith("/static/%2e") else {401}
            for method, cookie in (("GET", ""), ("POST", ""), ("DELETE", "access-token-a=b; access-token-unsecure-a=")):
                # The whole address: a path with two slashes would be taken for a host.
                answer = client.request(method, url + path, json=body, headers={"Cookie": cookie})
                assert answer.status_code in accepted, (method, path, answer.text[:200])
        assert client.post(f"{API}/upload", files={"files": ("a.csv", b"a")}).status_code == 401
        for path in ("/static/../config", "/static/%2e%2e/config", "/static//config", "/assets/..%2f..%2fconfig"):
            assert b"components" not in request_raw(url, path)
        form = client.get("/")
        assert form.status_code == 200
        assert not any(words in form.text for words in ("score_file", "sentence1", "prompt_effect", "Latency lab"))
        assert "auth_required" in form.text
        assert client.post("/login", data={"username": "ann", "password": "wrong"}).status_code == 400
        assert client.get("/config").status_code == 401
    with pytest.raises(AuthenticationError):
        Client(url, verbose=False)


def test_behind_a_password_the_code_runs_with_the_real_one(url: str, tmp_path: Path) -> None:
    with httpx.Client(base_url=url) as client:
        client.post("/login", data={"username": "ann", "password": "secret"}).raise_for_status()
        shown = values_on_load(url, cookies=client.cookies)
    assert 'auth=("user", "password")' in shown["use-python"]
    code = shown["use-python"].replace('("user", "password")', '("ann", "secret")')
    check_answer(ast.literal_eval(run_python(code).splitlines()[-1]))
    assert 'auth: ["user", "password"]' in shown["use-javascript"]
    code = shown["use-curl"].replace("username=user", "username=ann").replace("password=password", "password=secret")
    check_answer(run_shell(code, tmp_path)[0])
    assert "does not serve MCP" in shown["use-mcp-note"]
    assert httpx.get(f"{url}{API}/mcp/schema").status_code == 401


def test_with_a_login_the_page_answers_until_the_logout(url: str) -> None:
    with closing(Client(url, auth=("ann", "secret"), verbose=False)) as known:
        assert known.predict(*PAIR, api_name="/compare")["onnx"]["label"]
    with httpx.Client(base_url=url, timeout=30) as client:
        assert client.post("/login", data={"username": "ann", "password": "secret"}).status_code == 200
        # Over plain HTTP the other cookie, which wants TLS, does not count.
        cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items() if "unsecure" in name)
        mine = {"Cookie": cookie}
        assert client.get(f"{API}/info", headers=mine).status_code == 200
        assert "score_file" in client.get("/", headers=mine).text
        elsewhere = mine | {"Host": "page.example", "Origin": EVIL, "Sec-Fetch-Site": "cross-site"}
        for path in ("/config", f"{API}/info", f"{API}/queue/data?session_hash=a"):
            answer = client.get(path, headers=elsewhere | {"Sec-Fetch-Mode": "cors"})
            assert answer.status_code == 403
            assert answer.json() == {"detail": "This page does not answer to scripts of other sites."}
        client.get("/logout", headers=mine)
        assert client.get("/config", headers=mine).status_code == 401


def test_training_export_and_scoring_reach_no_machine(base_model: Folders, data: Data, tmp_path: Path) -> None:
    # In one process: most of the time goes into imports. The last line shows that the record would name a machine.
    code = (
        "import json, socket, sys, train.__main__, export.__main__, export.score.__main__\n"
        "for name, words in json.loads(sys.argv[1]):\n"
        "    assert sys.modules[name].main(words) == 0, name\n"
        "try: socket.create_connection(('evil.invalid', 80), timeout=1)\nexcept OSError: pass"
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
    (line,) = strange_hosts(tmp_path / "watch")
    assert line.startswith("socket.getaddrinfo evil.invalid ")
