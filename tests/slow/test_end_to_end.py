"""The whole path on minilm with P-Tuning v2."""

from pathlib import Path

from tests.conftest import Data
from tests.test_end_to_end import check_the_whole_path


def test_minilm_is_trained_with_p_tuning_v2_exported_and_served(data: Data, tmp_path: Path) -> None:
    check_the_whole_path("p-tuning-v2", data, tmp_path)
