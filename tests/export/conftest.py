"""A test that takes a ``kind`` runs for the kinds that its file names in ``USUAL_KINDS``; tests/slow/export has the others."""

import pytest

from tests.export.graphs import parametrize_kinds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if kinds := getattr(metafunc.module, "USUAL_KINDS", ()):
        parametrize_kinds(metafunc, kinds)
