"""``python -m export``: killed, starved and misled."""

import random
from pathlib import Path

from tests.faults import Fault, Launcher
from tests.slow.faults.claims import Reads, check_nothing_broken_is_loadable, finish
from tests.slow.faults.conftest import Work

KILLS = 8


class TestExport(Reads):
    program = "export"
    source = "adapter"
    inputs_of_its_own = ("adapter/training.json", "adapter/adapter_model.safetensors", "validation.jsonl")

    def test_killed_at_any_time_and_run_again_it_ends_as_if_nothing_had_been(
        self, work: Work, tool: Launcher, tmp_path: Path, soak: int
    ) -> None:
        generator, kills, n = random.Random("kill export"), 0, KILLS * soak  # noqa: S311 -- test data
        for trial in range(n):
            # One in each of as many equal spans, so that they lie everywhere.
            seconds = work.unbroken.seconds * (trial + generator.random()) / n
            older = bool(generator.getrandbits(1))
            place = work.new_place(tmp_path / str(trial), older=older)
            words = [*work.at(place), *(["--overwrite"] if older else [])]
            ended = tool.run("export", words, Fault(kill_after=seconds))
            assert ended.was_killed or ended.status == 0, ended.errors
            kills += ended.was_killed
            assert (place / work.out).exists() or not older
            check_nothing_broken_is_loadable(work, place)
            finish(tool, work, words, place)
        assert kills
