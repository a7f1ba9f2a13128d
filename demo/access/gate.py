"""The gate between the network and Gradio's own routes: which requests are answered, how large they may be, and how
errors are reported.

`launch_options` are for `gr.Blocks.launch`; the tests of the gate name what Gradio 6.17 does without it.
"""

import json
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

from gradio import processing_utils, route_utils
from gradio.exceptions import Error
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse

from demo.access.limits import MAX_BYTES, QUEUE_SIZE
from train.common.console import say
from train.common.errors import first_line

if TYPE_CHECKING:
    from gradio.routes import App
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = MAX_BYTES + 100_000
"""Largest request body: the largest file and what a form puts around it."""

API = "/gradio_api"

STARTUP = f"{API}/startup-events"
"""`gr.Blocks.launch` itself requests this once, without a login; the answer tells nothing."""

PUBLIC_ROUTES = ("/", "/login", "/login/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", STARTUP)
PUBLIC_FOLDERS = ("/static/", "/assets/", "/svelte/")
"""The login form and its files: all that is answered without a login, where the page asks for one."""

ROUTES = (*PUBLIC_ROUTES, "/config", "/config/", "/logout")
API_ROUTES = (
    "/info",
    "/info/",
    "/openapi.json",
    "/app_id",
    "/user",
    "/login_check",
    "/theme.css",
    "/queue/join",
    "/queue/data",
    "/queue/status",
    "/cancel",
    "/reset",
    "/upload",
    "/upload_progress",
    "/mcp",
)
API_FOLDERS = ("/heartbeat/", "/call/", "/run/", "/api/", "/file=", "/mcp/")
"""The routes that the page and its clients use. Gradio has more: they record screens with ffmpeg, mirror other hosts,
write links to states into a folder, and print what a visitor asks of custom components."""

BUSY = f"The page is busy: {QUEUE_SIZE} visitors are waiting already. Try again in a minute."

_API_INFO = re.compile(rb"(window\.gradio_api_info = ).*?(;</script>)", re.DOTALL)
_NO_ENDPOINTS = rb'\1{"named_endpoints":{},"unnamed_endpoints":{}}\2'


@dataclass(frozen=True)
class _Refusal:
    status: int
    detail: str

    @property
    def response(self) -> JSONResponse:
        """The answer, in the shape of Gradio's own refusals."""
        return JSONResponse({"detail": self.detail}, self.status)


NOT_FOUND = _Refusal(404, "There is nothing here.")
LOG_IN = _Refusal(401, "Log in first.")
OTHER_SITE = _Refusal(403, "This page does not answer to scripts of other sites.")
TOO_LARGE = _Refusal(413, f"A request may have {MAX_BODY_BYTES:,} bytes. Send less.")
NOT_UNDERSTOOD = _Refusal(400, "This request cannot be understood. /gradio_api/info lists what can be asked.")


class _TooLargeError(Exception):
    """A request body is larger than its headers announced."""


class Gate:
    """ASGI middleware between Gradio's own middleware (CORS, compression) and its routes."""

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Refuse a request, or pass it on and watch the answer."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # Gradio has no websockets
        path = get_route_path(scope) or "/"
        lacks_login = _lacks_login(scope)
        refusal = _refusal(scope, path, lacks_login=lacks_login)
        if refusal is not None:
            await refusal.response(scope, receive, send)
            return
        answer = _Answer(send, path, hides_endpoints=lacks_login and path == "/")
        try:
            await self._app(scope, _limited(receive), answer.send)
        except _TooLargeError:
            await answer.end(scope, receive, TOO_LARGE)
        except Exception as error:  # Gradio's routes raise anything for a request that they did not expect
            # One quoted line: the message may contain a visitor's input.
            say(f"a request to {path[:80]!r} failed ({type(error).__name__}: {first_line(error)[:200]!r})")
            await answer.end(scope, receive, NOT_UNDERSTOOD)


class _Answer:
    """Gradio's answer to one request, passed on part by part or, where it has to be changed, as a whole."""

    def __init__(self, send: "Send", path: str, *, hides_endpoints: bool) -> None:
        self._send = send
        self._path = path
        self._hides_endpoints = hides_endpoints
        self._held_start: Message | None = None
        """The start of an answer that is changed, held until its body is complete."""
        self._body = b""
        self._has_started = self._is_over = False

    async def send(self, message: "Message") -> None:
        """Take a part of the answer from Gradio."""
        if message["type"] == "http.response.start":
            if message["status"] == 500 and self._path.startswith((f"{API}/run/", f"{API}/api/")):
                message["status"] = 400  # Gradio's status for requests that it does not understand
            if self._hides_endpoints or message["status"] == 503:
                self._held_start = message
                return
            self._has_started = True
        elif self._held_start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_changed(self._held_start)
            return
        self._is_over = message["type"] == "http.response.body" and not message.get("more_body")
        await self._send(message)

    async def _send_changed(self, start: "Message") -> None:
        headers = [pair for pair in start["headers"] if pair[0] not in {b"content-length", b"retry-after"}]
        if self._hides_endpoints:
            # Gradio puts the endpoints even into the login form's page. Without the whole entry its script would ask
            # for them, be refused, and show nothing at all.
            body = _API_INFO.sub(_NO_ENDPOINTS, self._body)
        else:
            body = json.dumps({"detail": BUSY}).encode()
            headers.append((b"retry-after", b"60"))
        headers.append((b"content-length", str(len(body)).encode()))
        self._held_start = None
        self._has_started = self._is_over = True
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def end(self, scope: "Scope", receive: "Receive", refusal: _Refusal) -> None:
        """End the answer after an exception: refuse, or send no more if something was sent already."""
        if not self._has_started:
            await refusal.response(scope, receive, self._send)
        elif not self._is_over:
            await self._send({"type": "http.response.body", "body": b""})


def _lacks_login(scope: "Scope") -> bool:
    """Whether the page asks for a login and this request has none, decided as in Gradio's ``get_current_user``."""
    app = cast("App", scope["app"])
    if app.auth is None:
        return False
    cookies = cookie_parser(Headers(scope=scope).get("cookie", ""))
    tokens = (cookies.get(f"access-token{kind}-{app.cookie_id}") for kind in ("", "-unsecure"))
    return next(filter(None, tokens), None) not in app.tokens


def _refusal(scope: "Scope", path: str, *, lacks_login: bool) -> _Refusal | None:
    """Why a request is not passed on; None if it is."""
    if lacks_login and path not in PUBLIC_ROUTES and not path.startswith(PUBLIC_FOLDERS):
        return LOG_IN
    if not _is_used(path):
        return NOT_FOUND
    headers = Headers(scope=scope)
    if _is_from_other_site(scope, headers):
        return OTHER_SITE
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length[:20]) > MAX_BODY_BYTES:
        return TOO_LARGE
    return None


def _is_used(path: str) -> bool:
    """Whether the page or one of its clients uses this route."""
    if not path.startswith(f"{API}/"):
        return path in ROUTES or path.startswith(PUBLIC_FOLDERS)
    below = path.removeprefix(API)
    # Gradio would redirect to any address after "file=".
    is_redirect = re.match(r"/file=\s*[a-z][a-z0-9+.-]+:", below, re.IGNORECASE)
    return path == STARTUP or below in API_ROUTES or (below.startswith(API_FOLDERS) and not is_redirect)


def _is_from_other_site(scope: "Scope", headers: Headers) -> bool:
    """Whether a script of another site asks a page that has a login or is local, so that it could use a visitor's access.

    Browsers tell so by a header that no script can set, over HTTPS and on this machine. A page that is open to
    everybody answers scripts from anywhere, as Gradio's JavaScript client needs.
    """
    if headers.get("sec-fetch-site") != "cross-site" or headers.get("sec-fetch-mode") == "navigate":
        return False
    host = route_utils.get_hostname(headers.get("host", ""))
    return cast("App", scope["app"]).auth is not None or host in {"localhost", "127.0.0.1", "0.0.0.0"}  # noqa: S104


def _limited(receive: "Receive") -> "Receive":
    """A request's body, whose reading raises `_TooLargeError` beyond the limit."""
    n_bytes = 0

    async def receive_some() -> "Message":
        nonlocal n_bytes
        message = await receive()
        n_bytes += len(message.get("body", b""))
        if n_bytes > MAX_BODY_BYTES:
            raise _TooLargeError
        return message

    return receive_some


async def _refuse_to_fetch(url: str) -> NoReturn:
    raise Error("Files are not fetched from addresses here. Upload the file instead.", print_exception=False)


class _UploadFile(route_utils.GradioUploadFile):
    """An uploaded file in a folder with a random name.

    Gradio derives the name from the content: two visitors' equal files would be one, and deleting one visitor's after
    it was labelled would delete the other's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sha.update(secrets.token_bytes(16))


def launch_options() -> dict[str, Any]:
    """Keyword arguments for `gr.Blocks.launch`; also replaces two functions of Gradio's, which has no setting for them."""
    # Gradio would fetch any public address that a request gives in place of an uploaded file.
    processing_utils.async_ssrf_protected_get = _refuse_to_fetch
    route_utils.GradioUploadFile = _UploadFile  # type: ignore[misc]
    return {
        "app_kwargs": {"middleware": [Middleware(Gate)]},
        "max_file_size": MAX_BYTES,
        "allowed_paths": [],
        "strict_cors": True,
    }
