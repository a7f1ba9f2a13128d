"""The page before the page: what a start is doing, shown at the page's own address from the first second on.

Every answer has status 503, that of a server which is not ready: programs that wait for the page go on waiting, and a
browser shows the content all the same. A script in it asks for the same address each second, and loads the page itself
as soon as that answers. The steps are told in words of ours: no path of this machine, nothing that a visitor sent.
"""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any, NamedTuple

from demo.page.html import render

MAX_CONNECTIONS = 64
"""Connections at once; one more is closed unanswered, and its tab asks again."""

READ_BYTES = 100_000
"""How much of a request's body is read; a client that still sends may miss the answer."""

DETAIL = json.dumps({"detail": "The page is starting. Try again in a few seconds."}).encode()


class _Step(NamedTuple):
    said: str
    """How the line begins with which this step begins (`train.common.console.say`)."""
    words: str
    """The same for people."""
    part: str = "start"
    """The steps of a part are shown as soon as the first of them begins."""


STEPS = (
    _Step("open ", "Read the adapter"),
    _Step("starting Ray Serve", "Start Ray Serve", "Ray"),
    _Step("first start", "Load PyTorch, to export the model: only a first start does this", "export"),
    _Step("[1/5]", "Read the frozen base model", "export"),
    _Step("[2/5]", "Fold the learned prompt into it and trace one ONNX graph", "export"),
    _Step("[3/5]", "Compare the graph's logits with PEFT's", "export"),
    _Step("[4/5]", "Make the graph in other precisions and measure what they cost", "export"),
    _Step("[5/5]", "Keep the graphs for later starts", "export"),
    _Step("starting the engines", "Start the engines and build the page"),
)


class ShownStep(NamedTuple):
    """A step as the visitor sees it."""

    words: str
    state: str
    """ "done", "running" or "waiting"."""
    seconds: float
    """How long it took, or has taken so far."""


class StartingPage:
    """A small server in a thread of this process, until `close` leaves its port to the page itself."""

    def __init__(self, host: str, port: int) -> None:
        """Listen; an `OSError` where nothing can."""
        self.port = port
        shown_host = "localhost" if host in {"0.0.0.0", "::"} else host  # noqa: S104 -- to show, not to listen on
        self.url = f"http://{f'[{shown_host}]' if ':' in shown_host else shown_host}:{port}/"
        self._began: dict[_Step, float] = {STEPS[0]: time.monotonic()}
        self._server = _Server(host, port, self._render)
        # Its port shall be free soon after `close`.
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def hear(self, line: str) -> None:
        """Take a line that the start says."""
        for step in STEPS:
            if line.startswith(step.said):
                self._began.setdefault(step, time.monotonic())

    def steps(self) -> list[ShownStep]:
        """What is done, runs, and waits."""
        began = self._began.copy()
        ended = dict(zip(began, [*began.values()][1:], strict=False))
        now, parts = time.monotonic(), {step.part for step in began}
        return [
            ShownStep(
                step.words,
                "done" if step in ended else "running" if step in began else "waiting",
                ended.get(step, now) - began.get(step, now),
            )
            for step in STEPS
            if step.part in parts
        ]

    def _render(self) -> str:
        return render("starting.html", steps=self.steps())

    def close(self) -> None:
        """Stop listening and end every connection; harmless when done before."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingTCPServer):
    # `http.server.HTTPServer` would ask a name server for this machine's name.
    allow_reuse_address = True  # as the page's own server does, which takes the port next
    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, host: str, port: int, render_page: Callable[[], str]) -> None:
        self.render_page = render_page
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._open: set[Any] = set()
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            self.shutdown_request(request)
            return
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        # A browser opens connections ahead, and would ask this server on them for what the page shall answer.
        for request in list(self._open):
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing where a visitor hung up; anything else is a bug of ours and keeps its traceback."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10  # seconds without a byte

    def _answer(self) -> None:
        is_page = self.path.partition("?")[0] == "/" and self.command != "POST"
        body = self.server.render_page().encode() if is_page else DETAIL
        length = self.headers.get("Content-Length", "")
        if length.isascii() and length.isdigit():
            self.rfile.read(min(int(length[:20]), READ_BYTES))
        self.send_response(503)
        self.send_header("Content-Type", "text/html; charset=utf-8" if is_page else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Retry-After", "5")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = _answer  # noqa: N815 -- `BaseHTTPRequestHandler`'s names

    def version_string(self) -> str:
        return "promptfold"

    def log_message(self, *_: Any) -> None:
        """Print nothing that a visitor sent."""
