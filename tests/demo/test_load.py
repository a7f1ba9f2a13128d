"""The page under load: many visitors at once, each answered rightly or told that the page is busy."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from gradio_client.utils import QueueError

from demo.access.gate import API, BUSY
from demo.access.limits import QUEUE_SIZE
from tests.conftest import ON_CPU
from tests.demo.load import Load, known_pairs, work
from tests.demo.server import Server, exists, serve

Folders = Callable[[str], Path]

SHORT = Load(visitors=12, seconds=12, burst=4)
SOAK = Load(visitors=50, seconds=120, burst=10)

MOST_GROWTH = 0.05
"""Of the memory, in a soak, from its first third to its end."""


@pytest.fixture(scope="module")
def page(adapter: Folders, bundle: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With both engines."""
    flags = ["--adapter", str(adapter("bert")), "--bundle", str(bundle("bert"))]
    with serve(flags, tmp_path_factory.mktemp("cache"), ON_CPU) as server:
        server.wait_for_url()
        yield server


def test_every_visitor_is_answered_rightly_or_told_that_the_page_is_busy(
    page: Server, adapter: Folders, base_model: Folders, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    is_soak = request.config.getoption("--soak")
    load = SOAK if is_soak else SHORT
    known = known_pairs(adapter("bert"), base_model("bert"), 16)
    assert len({int(pair.logits.argmax()) for pair in known}) == 2, "or a page that always says the same passes"
    engines = page.children()
    seen = work(page.wait_for_url(), page.pid, known, load, tmp_path)
    print(seen.as_json(load))
    assert seen.wrong == []
    assert {"/compare", "/score_file", "/prompt", "/prompt_effect"} <= set(seen.waits)
    assert page.children() == engines, "no engine was started anew"
    assert "Traceback" not in page.output
    if is_soak:
        assert seen.growth < MOST_GROWTH


def test_beyond_the_queue_a_visitor_is_told_that_the_page_is_busy(page: Server) -> None:
    """Last of those that use the page: who waits there would wait for minutes."""
    url = page.wait_for_url()
    with httpx.Client(base_url=url, timeout=30) as visitor:
        for _ in range(QUEUE_SIZE + 2):
            answer = visitor.post(f"{API}/call/compare", json={"data": ["word1", "word2", "", "", ""]})
            if answer.status_code != 200:
                break
        assert answer.status_code == 503
        assert answer.json() == {"detail": BUSY}
        assert f"{QUEUE_SIZE} visitors are waiting" in BUSY
        assert int(answer.headers["retry-after"]) > 0
        # A page that is busy is still there.
        assert visitor.get("/").status_code == 200
    client = Client(url, verbose=False)
    try:
        with pytest.raises(QueueError, match="Queue is full! Please try again"):
            client.predict("word1", "word2", api_name="/compare")
    finally:
        client.close()
    assert exists(page.pid)
    assert "Traceback" not in page.output
