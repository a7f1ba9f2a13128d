"""The endpoint ``/score_file`` over HTTP and the tab "Score a file" in a browser, on a page of ``python -m demo``."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import handle_file
from playwright.sync_api import Browser, expect

from demo.measure.upload import MAX_ROWS
from tests.conftest import ON_CPU, ROOT, Folders
from tests.demo.browser import PHONE, choose, download, label_file, needs_chromium, open_tab, visit_page
from tests.demo.server import connect, serve
from tests.demo.test_scorefile import check_answers, files_in
from tests.export.test_score import read_rows, shuffled_pairs, write_rows

KINDS = ("bert", "gpt2")


@pytest.fixture(scope="module")
def served(adapter: Folders, bundle: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A page's address, and the folder in which Gradio keeps what visitors bring and take."""
    flags = ["--adapter", *(str(adapter(kind)) for kind in KINDS), "--bundle", *(str(bundle(kind)) for kind in KINDS)]
    folder = tmp_path_factory.mktemp("served")
    with serve(flags, tmp_path_factory.mktemp("cache"), ON_CPU | {"GRADIO_TEMP_DIR": str(folder)}) as server:
        yield server.wait_for_url(), folder
        # Gradio prints what it refuses; nothing of ours may be on the way there.
        assert str(ROOT / "demo") not in server.output, server.output


@pytest.mark.parametrize("kind", KINDS)
def test_the_endpoint_answers_as_peft_does(
    kind: str, served: tuple[str, Path], adapter: Folders, base_model: Folders, tmp_path: Path
) -> None:
    before = files_in(served[1])

    def score(path: Path, **named: str) -> tuple[dict[str, Any], Path]:
        with connect(served[0]) as client:
            summary, labelled = client.predict(handle_file(str(path)), **named, api_name="/score_file")
            return summary, Path(labelled)

    check_answers(kind, score, adapter(kind), base_model(kind), tmp_path)
    assert files_in(served[1]) == sorted([*before, "a file-labelled.jsonl"])  # the upload is gone


@needs_chromium
def test_a_visitor_labels_a_file_and_cancels_another(
    browser: Browser, served: tuple[str, Path], tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "pairs.csv", shuffled_pairs(30, seed=17))
    long = write_rows(tmp_path / "long.jsonl", shuffled_pairs(MAX_ROWS, seed=18))
    before = files_in(served[1])
    with visit_page(browser, served[0], size=PHONE) as page:
        open_tab(page, "Score a file")
        start, cancel = (page.get_by_role("button", name=name, exact=True) for name in ("Label the file", "Cancel"))
        status = page.locator("[role=status]:visible")
        expect(page.get_by_role("button", name="Download the labelled file")).to_be_disabled()
        label_file(page, source)
        expect(status).to_have_text("Done: 30 rows of pairs.csv labelled.")
        expect(page.locator("#score-file")).not_to_contain_text("pairs")
        labelled = download(page, "Download the labelled file", tmp_path)
        assert (labelled.name, len(read_rows(labelled))) == ("pairs-labelled.csv", 30)
        expect(start).to_be_enabled()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        assert files_in(served[1]) == sorted([*before, "pairs-labelled.csv"])

        choose(page, "Adapter", "gpt2")
        label_file(page, long)
        expect(status).to_contain_text(re.compile("PyTorch: [0-9,]+ of 2,000 rows labelled"))
        cancel.click()
        expect(status).to_have_text("Cancelled. Nothing was kept.")
        expect(start).to_be_enabled()
        expect(cancel).to_be_disabled()
        expect(page.locator("#score-results")).not_to_contain_text("rows")
        assert files_in(served[1]) == sorted([*before, "pairs-labelled.csv"])

        # The queue is free again, and what was cancelled says nothing more.
        label_file(page, source)
        expect(status).to_have_text("Done: 30 rows of pairs.csv labelled.")
