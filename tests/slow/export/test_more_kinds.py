"""Tests of tests/export for a few more kinds of model, where all would show nothing new."""

from pathlib import Path

import pytest

from tests.conftest import Folders
from tests.export import test_precision
from tests.export.graphs import parametrize_kinds
from tests.export.test_runtime import (  # noqa: F401
    test_a_gpu_that_misreads_padding_is_found_out_before_it_answers,
    test_arrays_that_stay_in_place_give_each_batch_its_own_logits,
    test_on_a_cpu_int8_is_taken_and_fp32_where_it_is_asked_for,
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_kinds(metafunc, ("bert-v2", "roberta-v2", "gpt2"))


@pytest.mark.parametrize("one_kind", ["distilbert", "gpt2-v2"])
def test_int8_is_written_with_what_it_costs(
    one_kind: str, bundle: Folders, adapter: Folders, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test_precision.test_int8_is_written_with_what_it_costs(one_kind, bundle, adapter, no_leftovers, capsys)
