"""``python -m demo`` from its start to its end: exports, ports, signals, and no process or file left."""

import shutil
import signal
from pathlib import Path

import httpx
import pytest

from demo.__main__ import find_port
from export.bundle.folder import load_bundle
from tests.conftest import Folders, flip_bit
from tests.demo.engines import PAIR
from tests.demo.server import connect, exists, serve_cleanly, wait_until_gone


def test_the_port_is_the_pages_from_the_first_second_and_every_way_to_end_a_start_frees_it(
    flags: list[str], tmp_path: Path
) -> None:
    for how, status in ((None, None), (signal.SIGTERM, 0), (signal.SIGINT, 130)):
        with serve_cleanly(flags, tmp_path) as server:
            told = server.wait_for(r"open (http://127\.0\.0\.1:(\d+)/) to watch the start")
            server.wait_for("starting the engines")
            answer = httpx.get(told[1])
            assert answer.status_code == 503
            assert "running, " in answer.text
            assert not [word for word in flags if word in answer.text]  # folders of this machine
            if how is not None:
                assert server.stop(how) == status
                assert find_port("127.0.0.1", int(told[2])) == int(told[2])
                continue
            assert find_port("127.0.0.1", None, first=int(told[2])) != int(told[2])
            # The page itself, at the same address.
            assert server.wait_for_url() == told[1]
            with connect(told[1]) as client:
                assert client.predict(*PAIR, api_name="/compare")["runs"] > 0


def test_the_page_exports_once_and_leaves_no_process(adapter: Folders, tmp_path: Path) -> None:
    cache = tmp_path / "a cache"  # a space in the path
    flags = ["--adapter", str(adapter("bert"))]
    with serve_cleanly(flags, cache) as server:
        server.wait_for_url()
        for step in ("[1/5]", "[2/5]", "[3/5]", "[4/5]", "[5/5]"):
            assert step in server.output
        (folder,) = (cache / "promptfold" / "bundles").iterdir()
        exported = (folder / "model.onnx").stat().st_mtime_ns
        children = server.children()
        assert len(children) == 2
        assert server.stop(signal.SIGTERM) == 0
        assert not [pid for pid in children if exists(pid)]
    with serve_cleanly(flags, cache) as server:
        server.wait_for_url()
        assert "[1/5]" not in server.output
        assert (folder / "model.onnx").stat().st_mtime_ns == exported
        assert server.stop(signal.SIGINT) == 130
    # A cached bundle that was damaged is noticed and made again.
    flip_bit(folder / "model.onnx", 4000)
    with serve_cleanly(flags, cache) as server:
        server.wait_for_url()
        assert "is damaged" in server.output
        assert "[5/5]" in server.output
    assert load_bundle(folder).find_task().max_logit_difference < 1e-4


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_first_start_that_is_interrupted_leaves_nothing(how: signal.Signals, tmp_path: Path) -> None:
    with serve_cleanly([], tmp_path) as server:
        server.wait_for(r"\[2/5\]")
        children = server.children()
        assert len(children) == 1
        assert server.stop(how) == {signal.SIGTERM: 0, signal.SIGINT: 130}[how]
        assert not [pid for pid in children if exists(pid)]
    assert list((tmp_path / "promptfold" / "bundles").iterdir()) == []


def test_a_page_with_odd_paths_is_killed_with_its_engines(adapter: Folders, bundle: Folders, tmp_path: Path) -> None:
    """Spaces and letters beyond ASCII in both paths."""
    copied = shutil.copytree(adapter("bert"), tmp_path / "ein Adapter ä")
    moved = shutil.copytree(bundle("bert"), tmp_path / "ein Bündel")
    with serve_cleanly(["--adapter", str(copied), "--bundle", str(moved)], tmp_path / "cache") as server:
        with connect(server.wait_for_url()) as client:
            assert client.predict(*PAIR, api_name="/compare")["max_logit_difference"] < 1e-4
        children = server.children()
        assert len(children) == 2
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    for pid in children:
        wait_until_gone(pid)
    assert not (tmp_path / "cache" / "promptfold").exists()  # a bundle was given, so none was exported
