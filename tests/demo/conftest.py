"""One page for all tests of the page."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.demo.server import LOOPBACK, Server, serve, strange_hosts, watching


@dataclass(frozen=True)
class RunningPage:
    """The page with both engines, without a password, and its address without the last slash."""

    server: Server
    url: str


@pytest.fixture(scope="session")
def running_page(
    adapter: Callable[[str], Path], bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningPage]:
    """The page; whatever the tests made it do, it reached no other machine and left no visitor's file."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "temporary").mkdir()
    flags = ["--adapter", str(adapter("bert")), "--bundle", str(bundle("bert"))]
    environment = watching(folder / "watch") | {"TMPDIR": str(folder / "temporary")}
    with serve(flags, folder, environment) as server:
        yield RunningPage(server, server.wait_for_url().rstrip("/"))
        assert list((folder / "temporary").glob("promptfold-page-*")) != []
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        assert len(processes) >= 3
        links = [link.raddr.ip for process in processes for link in process.net_connections() if link.raddr]
        assert set(links) <= LOOPBACK
    assert list((folder / "temporary").glob("promptfold-page-*")) == []
    written = (folder / "watch" / "reached").read_text(encoding="utf-8")
    assert f"socket.connect 127.0.0.1 {server.pid}" in written, "or nothing is written down"
    assert strange_hosts(folder / "watch") == []
