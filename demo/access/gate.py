"""What stands between the network and Gradio's own routes: who may come in, how much they may bring, what they are told.

`launch_options` are for `gr.Blocks.launch`; each test in tests/test_let_no_one_in.py names what Gradio 6.17 does without.
"""

import json
import re
import secrets
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

from gradio import processing_utils, route_utils
from gradio.exceptions import Error
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
"""Of a request: the largest file and what a form puts around it."""


API = "/gradio_api"


STARTUP = f"{API}/startup-events"
"""What `gr.Blocks.launch` itself asks for, once, without a login; it tells nothing."""


FOR_STRANGERS = ("/", "/login", "/login/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", STARTUP)


FOLDERS_FOR_STRANGERS = ("/static/", "/assets/", "/svelte/")
"""What the form for a password is made of. Behind a password nothing else is shown to whoever has not given it."""


ROUTES = (*FOR_STRANGERS, "/config", "/config/", "/logout")


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
"""What the page and its clients use. Gradio has more: it records screens with ffmpeg, mirrors other hosts, writes links
to states into a folder, and prints what a visitor asks of its custom components."""


BUSY = f"The page is busy: {QUEUE_SIZE} visitors are waiting already. Try again in a minute."


_NO_ENDPOINTS = rb'\1{"named_endpoints":{},"unnamed_endpoints":{}}\2'


_API_INFO = re.compile(rb"(window\.gradio_api_info = ).*?(;</script>)", re.DOTALL)


@dataclass(frozen=True)
class _Refusal:
    status: int
    words: str

    @property
    def response(self) -> JSONResponse:
        """In the shape in which Gradio's own come."""
        return JSONResponse({"detail": self.words}, self.status)


NOTHING_HERE = _Refusal(404, "There is nothing here.")


LOG_IN = _Refusal(401, "Log in first.")


ELSEWHERE = _Refusal(403, "This page does not answer to scripts of other sites.")


TOO_LARGE = _Refusal(413, f"A request may have {MAX_BODY_BYTES:,} bytes. Send less.")


NOT_UNDERSTOOD = _Refusal(400, "This request cannot be understood. /gradio_api/info lists what can be asked.")


class _TooLargeError(Exception):
    """More came than was announced."""


class Gate:
    """ASGI middleware, inside of Gradio's own for CORS and compression, outside of its routes."""

    def __init__(self, app: "ASGIApp") -> None:
        """Put it before an application."""
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer a request, or hand it on and watch what comes back."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # Gradio has no websockets
        path = _route_path(scope)
        is_stranger = _is_stranger(scope)
        refusal = _refusal(scope, path, is_stranger=is_stranger)
        if refusal is not None:
            await refusal.response(scope, receive, send)
            return
        answer = _Answer(send, path, hides_endpoints=is_stranger and path == "/")
        try:
            await self._app(scope, _limited(receive), answer.send)
        except _TooLargeError:
            await answer.end(scope, receive, TOO_LARGE)
        except Exception as error:  # whatever Gradio's routes raise when they are asked what they did not expect
            # In one line, and quoted: what is in it may be a visitor's.
            say(f"a request to {path[:80]!r} failed ({type(error).__name__}: {first_line(error)[:200]!r})")
            await answer.end(scope, receive, NOT_UNDERSTOOD)


class _Answer:
    """What Gradio answers, on its way out."""

    def __init__(self, send: "Send", path: str, *, hides_endpoints: bool) -> None:
        self._send = send
        self._path = path
        self._hides_endpoints = hides_endpoints
        self._start: Message | None = None
        self._body = b""
        self._is_over = False
        self._has_started = False

    async def send(self, message: "Message") -> None:
        """Hand a part of it on, or keep it until the whole is there."""
        if message["type"] == "http.response.start":
            if message["status"] == 500 and self._path.startswith((f"{API}/run/", f"{API}/api/")):
                # So Gradio answers what it does not understand.
                message["status"] = 400
            if self._hides_endpoints or message["status"] == 503:
                self._start = message
                return
            self._has_started = True
        elif self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                start, self._start = self._start, None
                await self._send_changed(start, self._body)
            return
        self._is_over = message["type"] == "http.response.body" and not message.get("more_body")
        await self._send(message)

    async def _send_changed(self, start: "MutableMapping[str, Any]", body: bytes) -> None:
        kept = [pair for pair in start["headers"] if pair[0] not in {b"content-length", b"retry-after"}]
        if self._hides_endpoints:
            # Gradio puts them into the page that asks for the password too. Left out, its script would ask for them, be
            # refused, and show nothing at all.
            body = _API_INFO.sub(_NO_ENDPOINTS, body)
        else:
            body = json.dumps({"detail": BUSY}).encode()
            kept.append((b"retry-after", b"60"))
        kept.append((b"content-length", str(len(body)).encode()))
        self._has_started = self._is_over = True
        await self._send({**start, "headers": kept})
        await self._send({"type": "http.response.body", "body": body})

    async def end(self, scope: "Scope", receive: "Receive", refusal: _Refusal) -> None:
        """After an exception: refuse, or where something was sent already, send no more."""
        if not self._has_started:
            await refusal.response(scope, receive, self._send)
        elif not self._is_over:
            await self._send({"type": "http.response.body", "body": b""})


def _route_path(scope: "Scope") -> str:
    """The path as Starlette's router reads it: below the root path, where it has that."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    below = path[len(root) :] if root and path.startswith(root) else path
    return path if below and not below.startswith("/") else below or "/"


def _is_stranger(scope: "Scope") -> bool:
    """Whether the page asks for a password and this request comes without a login; as Gradio's ``get_current_user``."""
    app = cast("App", scope["app"])
    if app.auth is None:
        return False
    cookies = cookie_parser(Headers(scope=scope).get("cookie", ""))
    tokens = (cookies.get(f"access-token{kind}-{app.cookie_id}") for kind in ("", "-unsecure"))
    return next(filter(None, tokens), None) not in app.tokens


def _refusal(scope: "Scope", path: str, *, is_stranger: bool) -> _Refusal | None:
    """Why a request is not handed on; None where it is."""
    if is_stranger and path not in FOR_STRANGERS and not path.startswith(FOLDERS_FOR_STRANGERS):
        return LOG_IN
    below = path.removeprefix(API) if path.startswith(f"{API}/") else None
    if below is None:
        is_known = path in ROUTES or path.startswith(FOLDERS_FOR_STRANGERS)
    else:
        is_known = path == STARTUP or below in API_ROUTES or below.startswith(API_FOLDERS)
        # Gradio would send a visitor on to any address that is put there.
        is_known = is_known and not re.match(r"/file=\s*[a-z][a-z0-9+.-]+:", below, re.IGNORECASE)
    if not is_known:
        return NOTHING_HERE
    headers = Headers(scope=scope)
    if _is_of_another_site(scope, headers):
        return ELSEWHERE
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length[:20]) > MAX_BODY_BYTES:
        return TOO_LARGE
    return None


def _is_of_another_site(scope: "Scope", headers: Headers) -> bool:
    """Whether a script of another site asks, where that could use a visitor's login, or a page that only they can reach.

    Every browser says so, where it is asked by https or on the same machine, and no script can say otherwise. A page for
    everybody answers scripts from anywhere, as its JavaScript client wants.
    """
    if headers.get("sec-fetch-site") != "cross-site" or headers.get("sec-fetch-mode") == "navigate":
        return False
    host = route_utils.get_hostname(headers.get("host", ""))
    return cast("App", scope["app"]).auth is not None or host in {"localhost", "127.0.0.1", "0.0.0.0"}  # noqa: S104


def _limited(receive: "Receive") -> "Receive":
    """A request's body, as far as it is not too large."""
    n_bytes = 0

    async def receive_some() -> "Message":
        nonlocal n_bytes
        message = await receive()
        n_bytes += len(message.get("body", b""))
        if n_bytes > MAX_BODY_BYTES:
            raise _TooLargeError
        return message

    return receive_some


async def _fetch_nothing(url: str) -> NoReturn:
    raise Error("Files are not fetched from addresses here. Upload the file instead.", print_exception=False)


class _UploadFile(route_utils.GradioUploadFile):
    """An uploaded file whose folder has a name of its own.

    Gradio names it after the content, so that the same file of two visitors is one file, and is gone for the second
    when it has been labelled for the first.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sha.update(secrets.token_bytes(16))


def launch_options() -> dict[str, Any]:
    """Close what Gradio leaves open. Two of its functions are replaced, for which it has no setting.

    Returns:
        For `gr.Blocks.launch`.
    """
    # It would fetch any public address that stands in a request where an uploaded file should.
    processing_utils.async_ssrf_protected_get = _fetch_nothing
    route_utils.GradioUploadFile = _UploadFile  # type: ignore[misc]
    return {
        "app_kwargs": {"middleware": [Middleware(Gate)]},
        "max_file_size": MAX_BYTES,
        "allowed_paths": [],
        "strict_cors": True,
    }
