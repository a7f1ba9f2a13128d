"""The page before the page in a real browser: readable, live, and gone when the page itself answers."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import ClassVar

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, expect

from demo.__main__ import find_port
from demo.starting_page import StartingPage
from tests.demo.browser import DESKTOP, PHONE, needs_chromium

pytestmark = needs_chromium


class _Page(BaseHTTPRequestHandler):
    """Stands for the page itself; a proxy before it says for a while that there is none."""

    statuses: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        self.send_response(self.statuses.pop(0))
        self.end_headers()
        self.wfile.write(b"<h1>The page itself</h1>")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served_at(port: int) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", port), _Page) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def test_a_tab_outlasts_the_gap_says_that_it_hears_nothing_and_loads_the_page(browser: Browser) -> None:
    page = StartingPage("127.0.0.1", find_port("127.0.0.1", None, first=8060))
    with closing(page):
        tab = browser.new_page()
        errors: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(f"{page.url}?__theme=dark")
        expect(tab.get_by_role("status")).to_have_text("Read the adapter (step 1 of 2)")
        page.hear("starting the engines")
        expect(tab.get_by_role("status")).to_have_text("Start the engines and build the page (step 2 of 2)")
        expect(tab.locator("[aria-current=step]")).to_contain_text("running, ")
    expect(tab.get_by_role("status")).to_contain_text("the terminal in which it ran says why")
    _Page.statuses = [502, 200, 200]
    with served_at(page.port):
        expect(tab.get_by_role("heading")).to_have_text("The page itself")
    assert tab.url == f"{page.url}?__theme=dark"
    assert errors == []
    tab.close()


def test_without_javascript_it_loads_itself_again(browser: Browser) -> None:
    with closing(StartingPage("127.0.0.1", find_port("127.0.0.1", None, first=8060))) as page:
        tab = browser.new_page(java_script_enabled=False)
        tab.goto(page.url)
        page.hear("starting the engines")
        expect(tab.get_by_role("status")).to_contain_text("step 2 of 2")
        tab.close()


@pytest.mark.parametrize(("size", "dark"), [(DESKTOP, False), (PHONE, True)])
def test_it_is_neither_too_wide_nor_hard_to_use(size: tuple[int, int], dark: bool, browser: Browser) -> None:
    with closing(StartingPage("127.0.0.1", find_port("127.0.0.1", None, first=8060))) as page:
        page.hear("first start with this adapter")
        viewport = {"width": size[0], "height": size[1]}
        tab = browser.new_page(viewport=viewport, color_scheme="dark" if dark else "light")  # type: ignore[arg-type]
        tab.goto(page.url)
        light = tab.evaluate("getComputedStyle(document.body).color === 'rgb(0, 0, 0)'")
        assert light != dark
        assert tab.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert Axe().run(tab).response["violations"] == []
        tab.close()
