"""Gradio's public link to the page, its QR code, and the address of a page behind a reverse proxy."""

import hashlib
import html
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.errors import UsageError

if TYPE_CHECKING:
    import gradio as gr

SHARE_WARNING = (
    "warning: --share without --auth or --auth-file: anyone who has the public link can use this page and its "
    "endpoints, and with them this machine's processor."
)
"""Printed before the link is made."""

SAFE_PATH = re.compile(r"(/[A-Za-z0-9._~\-]+)*")
SAFE_URL = re.compile(r"https?://([A-Za-z0-9.\-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?" + SAFE_PATH.pattern)
"""Paths and addresses without characters that mean something to a shell or a programming language. The host that a
request names is the visitor's input, and stands in the code to copy."""


def parse_root_path(text: str | None) -> str | None:
    """The value of ``--root-path`` as `gr.Blocks.launch` takes it. With anything else Gradio would not start, and would
    say that localhost cannot be reached."""
    if text is None:
        return None
    path = text.rstrip("/")
    if not SAFE_PATH.fullmatch(path) and not SAFE_URL.fullmatch(path):
        raise UsageError(
            f"--root-path {text!r}: write a path such as /promptfold, or the whole public address such as "
            "https://example.com/promptfold."
        )
    return path


def launch_page(page: "gr.Blocks", *, share: bool, **options: Any) -> None:
    """Serve a page, if wanted with a public link; Gradio prints the link, or why there is none, and goes on.

    An `OSError` says that the page cannot listen on its port.
    """
    if share:
        _remove_wrong_helper()
    # Said in both cases, or GRADIO_SHARE would decide.
    page.launch(share=share, prevent_thread_lock=True, quiet=True, ssr_mode=False, footer_links=["api"], **options)
    # With True every visitor would load the page's JavaScript from Amazon's servers instead of from this page.
    page.share = False
    if page.share_url:
        _end_helpers_with_us()


def _remove_wrong_helper() -> None:
    """Delete Gradio's helper program if it is not the published one: Gradio checks a fresh download alone, and keeps it."""
    from gradio import tunneling

    path, expected = Path(tunneling.BINARY_PATH), tunneling.CHECKSUMS.get(tunneling.BINARY_URL)
    if expected and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        path.unlink()


def _end_helpers_with_us() -> None:
    """Let the helper programs end when this process does, even by `kill -9`: else they publish what takes the port next.

    A watcher waits for the end of a pipe that only this process holds open.
    """
    from gradio import tunneling

    code = "import os, signal, sys; sys.stdin.read(); os.kill(int(sys.argv[1]), signal.SIGTERM)"
    for tunnel in tunneling.CURRENT_TUNNELS:
        helper: subprocess.Popen[bytes] | None = tunnel.proc
        if helper is not None:
            command = [sys.executable, "-I", "-S", "-c", code, str(helper.pid)]
            # In its own session, so that Ctrl-C does not reach it.
            watcher = subprocess.Popen(
                command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
            )
            threading.Thread(target=_dismiss, args=(watcher, helper), daemon=True).start()


def _dismiss(watcher: "subprocess.Popen[bytes]", helper: "subprocess.Popen[bytes]") -> None:
    """End a watcher after its helper program, or it would end another process that gets the same number."""
    helper.wait()
    with watcher:
        watcher.kill()


def qr_svg(url: str) -> str:
    """A QR code as inline SVG: black on white with a quiet zone, also on a dark page."""
    import segno

    code = segno.make_qr(url, error="m").svg_inline(scale=4, border=4, dark="#000", light="#fff")
    label = html.escape(f"QR code of {url}", quote=True)
    return code.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
