"""One browser for each file of tests, and one page's flags."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.conftest import Folders
from tests.demo.browser import start_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with start_browser() as chromium:
        yield chromium


@pytest.fixture(scope="session")
def flags(adapter: Folders, bundle: Folders) -> list[str]:
    """Flags of a page with both engines."""
    return ["--adapter", str(adapter("bert")), "--bundle", str(bundle("bert"))]
