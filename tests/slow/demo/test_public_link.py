"""Gradio's public link: made, refused in Gradio's own words, and ended with the page; a Space."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gradio.tunneling import BINARY_FILENAME

from tests.conftest import ROOT, Folders
from tests.demo.page_client import values_on_load
from tests.demo.server import connect, exists, serve_cleanly, wait_until_gone

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
sys.stdin.read()
"""
"""A page of its own process, whose helper program has a given checksum and asks no server for its link."""

NO_NETWORK = {
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:1"),
    **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:1"),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
}
"""Environment variables that close the way out by a proxy that is not there, whatever this machine's network is."""


@contextmanager
def start_page(folder: Path, script: str | None, *, checksum: str = "") -> Iterator["subprocess.Popen[str]"]:
    """A page whose helper program is a shell script; None: there is none."""
    content = f"#!/bin/sh\n{script}\n".encode()
    helper = folder / "gradio" / "frpc" / BINARY_FILENAME
    if script is not None:
        helper.parent.mkdir(parents=True)
        helper.write_bytes(content)
        helper.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-c", PAGE, checksum or hashlib.sha256(content).hexdigest()],
        cwd=folder,
        env=os.environ | NO_NETWORK | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until_launched(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """What the page printed until it said "launched", and its own address."""
    assert process.stdout is not None
    printed = ""
    while not (found := re.search("^launched .*$", printed, flags=re.MULTILINE)):
        line = process.stdout.readline()
        assert line, printed
        printed += line
    assert found[0].endswith(" False")  # its JavaScript comes from the page, not from Amazon's servers
    return printed, found[0].split()[1]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_link_is_shown_and_ends_however_the_page_ends(how: signal.Signals, tmp_path: Path) -> None:
    with start_page(tmp_path, SHOWS_LINK) as process:
        printed, url = read_until_launched(process)
        assert f"* Running on public URL: {LINK}\n" in printed
        assert f"launched {url} {LINK} " in printed
        shown = values_on_load(url, {"Host": LINK.removeprefix("https://")})
        assert shown["share-link"] == LINK
        assert f'aria-label="QR code of {LINK}"' in shown["share-qr"]
        assert f'Client("{LINK}/")' in shown["use-python"]
        assert f'Client("{url}/")' in values_on_load(url)["use-python"]
        assert "127.0.0.1" in (tmp_path / "arguments").read_text().split()
        helper = int((tmp_path / "pid").read_text())
        assert exists(helper)
        process.send_signal(how)
        process.wait(timeout=60)
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
def test_without_a_link_gradio_says_why_and_the_page_goes_on(
    script: str | None, checksum: str, words: str, tmp_path: Path
) -> None:
    with start_page(tmp_path, script, checksum=checksum) as process:
        printed, url = read_until_launched(process)
        assert "Could not create share link. " + words in printed
        assert f"launched {url} None" in printed
        shown = values_on_load(url)
        assert shown["share-note"].startswith("There is no public link. Gradio printed the reason")
        assert not shown["share-link"]
        assert not (tmp_path / "ran").exists()
        assert process.poll() is None


def test_the_demo_without_a_link_is_served_and_warns_about_strangers(
    adapter: Folders, bundle: Folders, tmp_path: Path
) -> None:
    environment = NO_NETWORK | {"HF_HOME": str(tmp_path / "hub")}  # where Gradio keeps its helper program
    flags = ["--adapter", str(adapter("bert")), "--bundle", str(bundle("bert")), "--share"]
    with serve_cleanly(flags, tmp_path, environment) as server:
        with connect(server.wait_for_url()) as client:
            assert client.predict("word1", "word2", api_name="/compare")["runs"] > 0
        assert "warning: --share without --auth or --auth-file" in server.output
        assert "Could not create share link. " in server.output


SPACE = [sys.executable, str(ROOT / "demo" / "space.py")]


def test_a_space_listens_on_every_address_at_the_port_that_it_is_given(tmp_path: Path) -> None:
    """From another folder, as nothing may depend on the current one; a port in use says all of it at once."""
    with socket.create_server(("0.0.0.0", 0)) as taken:  # noqa: S104 -- as a Space does
        port = taken.getsockname()[1]
        environment = os.environ | {"GRADIO_SERVER_PORT": str(port)}
        result = subprocess.run(SPACE, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --port {port} is in use on 0.0.0.0.")


def test_a_space_serves_the_page_with_its_engines(adapter: Folders, bundle: Folders, tmp_path: Path) -> None:
    """The engines are processes that start by importing the file that was run."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen(
        [*SPACE, "--adapter", str(adapter("bert")), "--bundle", str(bundle("bert"))],
        cwd=tmp_path,
        env=os.environ | {"GRADIO_SERVER_PORT": str(port), "XDG_CACHE_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        printed = ""
        try:
            while "the page is at" not in printed and (line := process.stdout.readline()):
                printed += line
            with connect(f"http://127.0.0.1:{port}/") as client:
                answer = client.predict("word1 word2", "word2 word1", api_name="/compare")
        except Exception as error:
            raise AssertionError(printed) from error
        finally:
            process.terminate()
            printed += process.stdout.read()
    assert answer["onnx"]["label"] == answer["pytorch"]["label"]
    assert "Traceback" not in printed
