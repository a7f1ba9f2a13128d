"""The page before the page: its steps, what it answers to everything else, and that it leaves its port at once."""

import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import httpx
import pytest

from demo.__main__ import find_port
from demo.page.html import render
from demo.starting_page import MAX_CONNECTIONS, ShownStep, StartingPage


@pytest.fixture
def starting() -> Iterator[StartingPage]:
    with closing(StartingPage("127.0.0.1", find_port("127.0.0.1", None, first=8060))) as page:
        yield page


def states(page: StartingPage) -> list[str]:
    return [step.state for step in page.steps()]


def test_the_steps_of_a_part_are_shown_once_it_begins_and_each_is_done_when_the_next_begins(
    starting: StartingPage,
) -> None:
    assert states(starting) == ["running", "waiting"]
    starting.hear("      int8: a detail that is no step, of /home/ann")
    starting.hear("first start with this adapter: exporting it to /home/ann/cache")
    assert states(starting) == ["done", "running", *["waiting"] * 6]
    for number in range(1, 6):
        starting.hear(f"[{number}/5] reading /home/ann")
    assert states(starting) == [*["done"] * 6, "running", "waiting"]
    starting.hear("starting the engines, each in a process of its own")
    assert states(starting) == [*["done"] * 7, "running"]
    answer = httpx.get(starting.url)
    assert answer.status_code == 503  # who waits for the page itself goes on waiting
    assert (answer.headers["cache-control"], answer.headers["retry-after"]) == ("no-store", "5")
    assert "Start the engines and build the page (step 8 of 8)" in answer.text
    assert answer.text.count('<li class="done">') == 7
    assert "/home" not in answer.text


def test_words_are_escaped() -> None:
    page = render("starting.html", steps=[ShownStep("<b>&amp;", "running", 1.6)])
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;amp;\n    <span>running, 2 s</span>" in page


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize("path", ["/", "/?__theme=dark", "/config", "/gradio_api/call/compare", "/<script>"])
def test_every_request_is_told_to_come_again(
    method: str, path: str, starting: StartingPage, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = httpx.request(method, starting.url[:-1] + path, content=b"a" * 20_000 if method == "POST" else None)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    if method == "HEAD":
        assert answer.content == b""
    elif method == "GET" and path.partition("?")[0] == "/":
        assert "promptfold is starting" in answer.text
    else:
        assert answer.json() == {"detail": "The page is starting. Try again in a few seconds."}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "request_bytes",
    [b"\r\n\r\n", b"\x16\x03\x01\x00", b"GET / HTTP/9\r\n\r\n", b"GET /" + b"a" * 70_000, b"BREW / HTTP/1.1\r\n\r\n"],
)
def test_what_is_no_request_prints_nothing(
    request_bytes: bytes, starting: StartingPage, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", starting.port)) as connection, suppress(ConnectionError):
        connection.sendall(request_bytes)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert httpx.get(starting.url).status_code == 503
    assert capfd.readouterr() == ("", "")


def test_too_many_connections_are_closed_and_the_page_answers_on(starting: StartingPage) -> None:
    address = ("127.0.0.1", starting.port)
    idle = [socket.create_connection(address) for _ in range(MAX_CONNECTIONS)]
    with socket.create_connection(address) as one_more:
        assert one_more.recv(1) == b""
    for connection in idle:
        connection.close()
    for _ in range(100):
        try:
            assert httpx.get(starting.url).status_code == 503
            break
        except httpx.TransportError:
            time.sleep(0.05)
    else:
        raise AssertionError("it does not answer any more")


def test_its_port_is_free_at_once_also_under_open_connections(starting: StartingPage) -> None:
    address = ("127.0.0.1", starting.port)
    with socket.create_connection(address) as idle, socket.create_connection(address) as half, httpx.Client() as client:
        half.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\n")
        assert client.get(starting.url).status_code == 503
        starting.close()
        assert find_port("127.0.0.1", starting.port) == starting.port
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn
            listener.bind(address)
            listener.listen()
            assert (idle.recv(1), half.recv(1)) == (b"", b"")  # they do not stay with the old server
    starting.close()
