"""Gradio's public link, its QR code, and the address behind a reverse proxy."""

import hashlib
import html
import platform
import queue
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from train.common.errors import UsageError, first_line

if TYPE_CHECKING:
    import gradio as gr


SHARE_WARNING = (
    "warning: --share without --auth or --auth-file: whoever has the public link can use this page and its endpoints, "
    "and with them this machine's processor."
)
"""Printed before the link is made."""


LINK_TIMEOUT_SECONDS = 75.0
"""Download of the helper program included; Gradio itself waits for the link's name for 30 s."""


END_TIMEOUT_SECONDS = 5.0
"""How long the helper program may take to end before it is killed."""


SAFE_PATH = re.compile(r"(/[A-Za-z0-9._~\-]+)*")


SAFE_URL = re.compile(r"https?://([A-Za-z0-9.\-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?" + SAFE_PATH.pattern)
"""Addresses that no shell and no language reads anything into. What a visitor's request says of the host is input."""


def parse_root_path(text: str | None) -> str | None:
    """The value of ``--root-path`` as `gr.Blocks.launch` takes it.

    Raises:
        UsageError: neither a path nor an address. Gradio would not start, and would say that localhost is not there.
    """
    if text is None:
        return None
    path = text.rstrip("/")
    if not SAFE_PATH.fullmatch(path) and not SAFE_URL.fullmatch(path):
        raise UsageError(
            f"--root-path {text!r}: write a path such as /promptfold, or the whole public address such as "
            "https://example.com/promptfold."
        )
    return path


# The public link


@dataclass(frozen=True)
class Tunnel:
    """A public link, or why there is none.

    Attributes:
        url: empty where there is none.
        why_not: whole sentences for a person; empty where there is a link.
    """

    url: str
    why_not: str


@dataclass
class ShareState:
    """What the page says about its public link, which is made after the page was built.

    Attributes:
        requested: whether a link was asked for.
        tunnel: None until `open_tunnel` came back.
    """

    requested: bool
    tunnel: Tunnel | None = None


class _NoLinkError(Exception):
    """Why there is no public link, in words."""


def open_tunnel(page: "gr.Blocks", *, timeout_seconds: float = LINK_TIMEOUT_SECONDS) -> Tunnel:
    """Make Gradio's public link to a page that was launched with ``share=False``.

    It does what `launch(share=True)` does (gradio/blocks.py, networking.py, tunneling.py), which keeps the reason of a
    failure to itself, waits without a limit for a helper program that says nothing, and runs one from its cache
    without looking at its checksum. ``page.share`` stays False: it would make every visitor load the page's JavaScript
    from Amazon's servers instead of from this page.

    Args:
        page: launched; its ``share_url`` is set.
        timeout_seconds: when to give up.

    Returns:
        The link or, in words, why there is none: a page works without.
    """
    if page.space_id is not None:
        return Tunnel("", "A Hugging Face Space has a public address already.")
    answers: queue.SimpleQueue[Tunnel] = queue.SimpleQueue()
    given_up = threading.Event()

    def work() -> None:
        try:
            answers.put(Tunnel(_make_link(page), ""))
        except _NoLinkError as error:
            answers.put(Tunnel("", str(error)))
        except Exception as error:  # launch() catches everything too: a page without a link beats no page
            answers.put(Tunnel("", f"Gradio could not make it ({type(error).__name__}: {first_line(error)})."))
        if given_up.is_set():
            close_tunnel(page)

    threading.Thread(target=work, name="public link", daemon=True).start()
    answer = _wait(answers, page, time.monotonic() + timeout_seconds)
    if answer is None:
        given_up.set()
        close_tunnel(page)
        return Tunnel(
            "",
            f"Gradio's servers gave none within {timeout_seconds:g} s; a firewall may keep the helper program from them.",
        )
    if answer.url:
        parts = urlsplit(answer.url)
        answer = Tunnel(urlunsplit((page.share_server_protocol, *parts[1:])), "")
        page.share_url = answer.url  # type: ignore[assignment]  # Gradio declares None and sets a text too
    else:
        close_tunnel(page)
    return answer


def close_tunnel(page: "gr.Blocks") -> None:
    """End the page's public link and its helper program, if there is one; to be called when the page ends."""
    page.share_url = None
    for process in _helpers(page, forget=True):
        process.terminate()
        try:
            process.wait(timeout=END_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _helpers(page: "gr.Blocks", *, forget: bool = False) -> "list[subprocess.Popen[bytes]]":
    """The helper programs that Gradio has started for a page."""
    from gradio import tunneling

    found = []
    for tunnel in tunneling.CURRENT_TUNNELS:
        process: subprocess.Popen[bytes] | None = tunnel.proc
        if process is not None and tunnel.local_port == page.server_port:
            found.append(process)
            if forget:
                # Gradio's loop that reads from it ends, and nothing is announced at exit.
                tunnel.proc = None
    return found


def _wait(answers: "queue.SimpleQueue[Tunnel]", page: "gr.Blocks", deadline: float) -> Tunnel | None:
    """The answer, or None where it did not come in time. Gradio does not notice a helper program that has ended."""
    while (left_seconds := deadline - time.monotonic()) > 0:
        try:
            return answers.get(timeout=min(left_seconds, 0.2))
        except queue.Empty:
            ended = [process.returncode for process in _helpers(page) if process.poll() is not None]
        if ended:
            try:
                return answers.get(timeout=2)  # what it said last may still be on its way
            except queue.Empty:
                return Tunnel("", f"Gradio's helper program ended with status {ended[0]} before it had a link.")
    return None


def _make_link(page: "gr.Blocks") -> str:
    from gradio import networking, tunneling
    from gradio.exceptions import ShareCertificateWriteError

    _fetch_helper()
    try:
        url = networking.setup_tunnel(
            local_host=page.server_name,
            local_port=page.server_port,
            share_token=page.share_token,
            share_server_address=page.share_server_address,
            share_server_tls_certificate=page.share_server_tls_certificate,
        )
    except ShareCertificateWriteError as error:
        raise _NoLinkError(
            f"The folder from which the page was started takes no {tunneling.CERTIFICATE_PATH} ({error.__cause__}). "
            "Start the page from one that can be written."
        ) from error
    except RuntimeError as error:
        why = first_line(error.__cause__ or error)
        raise _NoLinkError(
            f"{networking.GRADIO_API_SERVER}, which assigns the links, gave none ({why}). Check that "
            "there is a network and that this address is open."
        ) from error
    except ValueError as error:
        raise _NoLinkError(
            f"Gradio's helper program reached no server: {str(error).strip().splitlines()[-1]}. A firewall may block it."
        ) from error
    except OSError as error:
        raise _NoLinkError(f"{tunneling.BINARY_PATH} cannot be run ({error.strerror}).") from error
    for process in _helpers(page):
        _end_with_us(process)
    return url


def _fetch_helper() -> None:
    """Download the program that makes the link, if it is not there, and make sure that it is Gradio's.

    Gradio compares the checksum of a fresh download alone, and leaves a wrong one where the next start runs it.
    """
    import httpx
    from gradio import tunneling
    from gradio.exceptions import ChecksumMismatchError

    path = Path(tunneling.BINARY_PATH)
    checksum = tunneling.CHECKSUMS.get(tunneling.BINARY_URL)
    unsupported = f"Gradio has no helper program for {platform.system()} on {platform.machine()}."
    wrong = f"{path} is not the program that Gradio published: its checksum is another. Delete it and start again."
    try:
        if checksum is None and not path.exists():
            raise _NoLinkError(unsupported)
        tunneling.Tunnel.download_binary()
        if checksum is not None and hashlib.sha256(path.read_bytes()).hexdigest() != checksum:
            raise _NoLinkError(wrong)
    except ChecksumMismatchError as error:
        raise _NoLinkError(wrong) from error
    except httpx.HTTPError as error:
        raise _NoLinkError(
            f"The helper program cannot be downloaded from {tunneling.BINARY_URL} ({first_line(error)}). Is there a "
            f"network? Elsewhere downloaded, it belongs at {path}."
        ) from error
    except OSError as error:
        if error.errno is None:  # Gradio's own, at HTTP status 403
            raise _NoLinkError(f"{unsupported} {tunneling.BINARY_URL} was refused.") from error
        raise _NoLinkError(
            f"The helper program cannot be kept in {path.parent} ({error.strerror}). Set HF_HOME to a folder that can "
            "be written."
        ) from error


def _end_with_us(process: "subprocess.Popen[bytes]") -> None:
    """Let a process end when this one does, `kill -9` included: left behind, it would publish whatever takes the port.

    A watcher waits for the end of a pipe that this process alone holds open.
    """
    code = "import os, signal, sys; sys.stdin.read(); os.kill(int(sys.argv[1]), signal.SIGTERM)"
    command = [sys.executable, "-I", "-S", "-c", code, str(process.pid)]
    # In a session of its own: Ctrl-C is not for it.
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)

    def dismiss() -> None:
        process.wait()
        # Its number may be another process's from here on.
        with watcher:
            watcher.kill()

    threading.Thread(target=dismiss, name="watcher of the public link", daemon=True).start()


def qr_svg(url: str) -> str:
    """A QR code as inline SVG: black on white with a quiet zone, whatever the page's colours."""
    import segno

    code = segno.make_qr(url, error="m").svg_inline(scale=4, border=4, dark="#000", light="#fff")
    label = html.escape(f"QR code of {url}", quote=True)
    return code.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
