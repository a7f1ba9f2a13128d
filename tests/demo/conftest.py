"""One page for all tests of the page, and one pair of engines a file."""

from collections.abc import Iterator

import pytest

from demo.engines.stage import Stage
from tests.conftest import Folders
from tests.demo.engines import stage_of
from tests.demo.server import Server, serve, strange_hosts, watching


@pytest.fixture(scope="module")
def short_pauses() -> Iterator[None]:
    """For tests that judge no latency."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("compare", "sweep"):
            patch.setattr(f"demo.measure.{module}.PAUSE_SECONDS", 0.01)
            patch.setattr(f"demo.measure.{module}.BURST_BUDGET_SECONDS", 0.05)
        yield


@pytest.fixture(scope="module")
def stage(adapter: Folders, bundle: Folders) -> Iterator[Stage]:
    kinds = ("bert", "llama-v2")
    with stage_of(*map(adapter, kinds), bundles=tuple(map(bundle, kinds))) as stage:
        yield stage


@pytest.fixture(scope="session")
def running_page(adapter: Folders, bundle: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page; whatever the tests made it do, it reached no other machine and left no visitor's file."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "temporary").mkdir()
    flags = ["--adapter", str(adapter("bert")), "--bundle", str(bundle("bert"))]
    environment = watching(folder / "watch") | {"TMPDIR": str(folder / "temporary")}
    with serve(flags, folder, environment) as server:
        server.wait_for_url()
        yield server
        assert list((folder / "temporary").glob("promptfold-page-*")) != []
    assert list((folder / "temporary").glob("promptfold-page-*")) == []
    written = (folder / "watch" / "reached").read_text(encoding="utf-8")
    assert f"socket.connect 127.0.0.1 {server.pid}" in written, "or nothing is written down"
    assert strange_hosts(folder / "watch") == []
