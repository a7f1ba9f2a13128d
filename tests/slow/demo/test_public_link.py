"""Gradio's public link: made, refused in Gradio's own words, and ended with the page; a Space."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gradio.tunneling import BINARY_FILENAME

from tests.conftest import ROOT
from tests.demo.page_client import values_on_load
from tests.demo.server import Server, connect, exists, serve, serve_cleanly, wait_until_gone

LINK = "https://0123456789abcdef.gradio.live"
SHOWS_LINK = f"echo $$ > pid; echo \"$@\" > arguments; echo 'start proxy success: {LINK}'; exec sleep 1000"

PAGE = """
import signal, sys
import gradio as gr
from gradio import networking, tunneling
from demo.access.public_link import launch_page
from demo.engines.adapters import choose_adapters
from demo.engines.stage import Stage
from demo.page.tab_use import build_share_box, build_use_tab
tunneling.CHECKSUMS[tunneling.BINARY_URL] = sys.argv[1]
networking.GRADIO_SHARE_SERVER_ADDRESS = "127.0.0.1:1"
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
def compare(sentence1: str = "") -> str:
    return sentence1
with gr.Blocks(analytics_enabled=False) as page:
    build_share_box(page, requested=True)
    build_use_tab(Stage(choose_adapters()), page)
    gr.api(compare, api_name="compare")
launch_page(page, share=True)
print("launched", page.local_url.rstrip("/"), page.share_url, page.share, flush=True)
signal.pause()
"""
"""A page of its own process, whose helper program has a given checksum and asks no server for its link."""

CLOSED = {f"{kind}_proxy": "http://127.0.0.1:1" for kind in ("http", "https", "all")} | {
    "no_proxy": "127.0.0.1,localhost"
}
NO_NETWORK = CLOSED | {name.upper(): value for name, value in CLOSED.items()}
"""Environment variables that close the way out by a proxy that is not there, whatever this machine's network is."""


@contextmanager
def start_page(folder: Path, script: str | None, *, checksum: str = "") -> Iterator[tuple[Server, str, str]]:
    """A page whose helper program is a shell script (None: there is none), its own address and its link."""
    content = f"#!/bin/sh\n{script}\n".encode()
    helper = folder / "gradio" / "frpc" / BINARY_FILENAME
    if script is not None:
        helper.parent.mkdir(parents=True)
        helper.write_bytes(content)
        helper.chmod(0o755)
    environment = NO_NETWORK | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder)}
    flags = [checksum or hashlib.sha256(content).hexdigest()]
    with serve(flags, folder, environment, program=("-c", PAGE)) as page:
        # False: its JavaScript comes from the page, not from Amazon's servers.
        url, link = page.wait_for(r"^launched (\S+) (\S+) False$").groups()
        yield page, url, link


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_link_is_shown_and_ends_however_the_page_ends(how: signal.Signals, tmp_path: Path) -> None:
    with start_page(tmp_path, SHOWS_LINK) as (page, url, link):
        assert f"* Running on public URL: {LINK}\n" in page.output
        assert link == LINK
        shown = values_on_load(url, {"Host": LINK.removeprefix("https://")})
        assert shown["share-link"] == LINK
        assert f'aria-label="QR code of {LINK}"' in shown["share-qr"]
        assert f'Client("{LINK}/")' in shown["use-python"]
        assert f'Client("{url}/")' in values_on_load(url)["use-python"]
        assert "127.0.0.1" in (tmp_path / "arguments").read_text().split()
        helper = int((tmp_path / "pid").read_text())
        assert exists(helper)
        page.stop(how)
        wait_until_gone(helper)


@pytest.mark.parametrize(
    ("script", "checksum", "words"),
    [
        (
            "echo 'login to server failed: i/o timeout'; exec sleep 9",
            "",
            "Please check your internet connection or our",
        ),
        (None, "", "Missing file: "),
        # Not the program that Gradio published: it is deleted, and cannot be downloaded again.
        ("touch ran; " + SHOWS_LINK, "0" * 64, "Missing file: "),
    ],
)
def test_without_a_link_gradio_says_why(script: str | None, checksum: str, words: str, tmp_path: Path) -> None:
    with start_page(tmp_path, script, checksum=checksum) as (page, url, link):
        assert "Could not create share link. " + words in page.output
        assert link == "None"
        shown = values_on_load(url)
        assert shown["share-note"].startswith("There is no public link. Gradio printed the reason")
        assert not shown["share-link"]
        assert not (tmp_path / "ran").exists()
        assert exists(page.pid)


def test_the_demo_without_a_link_warns_about_strangers(flags: list[str], tmp_path: Path) -> None:
    environment = NO_NETWORK | {"HF_HOME": str(tmp_path / "hub")}  # where Gradio keeps its helper program
    with serve_cleanly([*flags, "--share"], tmp_path, environment) as server:
        with connect(server.wait_for_url()) as client:
            assert client.predict("word1", "word2", api_name="/compare")["runs"] > 0
        assert "warning: --share without --auth or --auth-file" in server.output
        assert "Could not create share link. " in server.output


def test_a_space_serves_the_page_at_the_port_that_it_is_given(flags: list[str], tmp_path: Path) -> None:
    """From another folder; a port in use is told at once. The engines start by importing the file that was run."""
    space = str(ROOT / "demo" / "space.py")
    with socket.create_server(("0.0.0.0", 0)) as taken:  # noqa: S104 -- as a Space does
        port = {"GRADIO_SERVER_PORT": str(taken.getsockname()[1])}
        environment = os.environ | port
        result = subprocess.run(
            [sys.executable, space], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert result.returncode == 2
        assert result.stderr.startswith(b"error: --port %s is in use on 0.0.0.0." % port["GRADIO_SERVER_PORT"].encode())
    with serve_cleanly(flags, tmp_path, port, program=[space]) as page:
        page.wait_for("the page is at")
        with connect(f"http://127.0.0.1:{port['GRADIO_SERVER_PORT']}/") as client:
            answer = client.predict("word1 word2", "word2 word1", api_name="/compare")
    assert answer["onnx"]["label"] == answer["pytorch"]["label"]
