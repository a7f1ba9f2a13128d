"""Paths with characters that mean something to a shell, a pattern or a flag."""

import json
import shutil
from pathlib import Path

import pytest

from tests.faults import Launcher
from tests.slow.faults.conftest import Inputs, Work


@pytest.mark.parametrize("name", ['Grüße  aus Łódź – 文書 🙂 it\'s "100%" $HOME;*?[a]', "-x"])
def test_a_path_may_have_any_name(
    name: str, works: dict[str, Work], inputs: Inputs, tool: Launcher, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    own = Inputs.write(folder, Path(shutil.copytree(inputs.base, folder / "base")))
    for program, source in (("train", "base"), ("export", "adapter"), ("score", "bundle")):
        work = works[program]
        out = folder / work.out
        ended = tool.run(program, [*own.words(program, folder / source), "--out", str(out)])
        assert ended.status == 0, ended.errors
        expected, found = work.expected, work.result(out)
        if program == "train":
            # PEFT's configuration names the base model, which lies elsewhere here.
            for result in (expected := json.loads(json.dumps(expected)), found):
                del result["sha256"]["adapter_config.json"]
        elif program == "export":
            expected, found = (
                {key: value for key, value in result.items() if "onnx" in key} for result in (expected, found)
            )
        assert found == expected
    assert {path.name for path in folder.iterdir()} == {
        *("base", "train.jsonl", "validation.jsonl", "long.jsonl", "adapter", "bundle", "out.csv")
    }
