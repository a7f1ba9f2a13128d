"""``python -m export.triton``, whose folder is replaced by two renames where two folders cannot change places."""

from dataclasses import replace
from pathlib import Path

from tests.faults import Fault, Launcher
from tests.slow.faults.claims import Writes, check_refusal, finish
from tests.slow.faults.conftest import Work


class TestTriton(Writes):
    program = "triton"

    def test_where_folders_cannot_change_places_an_older_one_is_put_back(
        self, work: Work, tool: Launcher, tmp_path: Path
    ) -> None:
        """Killed between the two renames that it takes there, a run leaves the older folder under another name."""
        place = work.new_place(tmp_path / "count", older=True)
        without = Fault(no_exchange=True)
        moments = tool.run("triton", [*work.at(place), "--overwrite"], without).moments
        assert moments[-3:] == ("rename", "rename", "fsync")
        for number in (len(moments) - 1, len(moments)):
            place = work.new_place(tmp_path / str(number), older=True)
            words = [*work.at(place), "--overwrite"]
            assert tool.run("triton", words, replace(without, strike_at=number)).was_killed
            ((aside,),) = [list(path.iterdir()) for path in place.glob(".*.old")]
            assert work.result(aside) == work.result(work.older)
            # Another run puts it back, also where that one fails.
            failed = tool.run("triton", words, replace(without, strike_at=2, strike="ENOSPC"))
            kept = work.older if number < len(moments) else place / work.out
            check_refusal(failed)
            assert [path.name for path in place.iterdir()] == [work.out]
            assert work.result(place / work.out) == work.result(kept)
            finish(tool, work, words, place)
