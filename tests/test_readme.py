"""The READMEs: their commands are understood or run, their figures are the adapters', the map is the tree on disk."""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from export.__main__ import main as export_main
from tests.conftest import ROOT, SHIPPED, Data
from tests.test_rooms import STAGES
from train.adapter.folder import load_adapter
from train.evaluate import main as evaluate_main

README = ROOT / "README.md"
READMES = (README, *(ROOT / folder / "README.md" for folder in (*STAGES, "tests")))
TEXT = "\n".join(path.read_text("utf-8") for path in READMES)

OTHERS = ("model_signing", "pytest")
"""Programs in the READMEs that are not ours: tests/test_signing.py runs the first, .ci/run the second."""


def commands(module: str | None = None) -> list[tuple[str, list[str]]]:
    """Each ``python -m MODULE …`` on a line of its own, once: the module, and the words after it."""
    found = dict.fromkeys(re.findall(r"^ +(?:.* && )?python -m ([\w.]+)( .*)?$", TEXT, flags=re.MULTILINE))
    return [(name, shlex.split(words)) for name, words in found if module in (name, None)]


def command(module: str, *having: str) -> list[str]:
    """The words of the one command of a module that has some."""
    (words,) = [words for _, words in commands(module) if set(having) <= set(words)]
    return words


def python_block(word: str) -> str:
    """The Python with a word in it."""
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL) if word in code]
    return block


def run_block(code: str, places: dict[str, str], names: dict[str, Any] | None = None) -> str:
    """Run Python of a README with other addresses; the last line that it prints. ``names`` gets what it defines."""
    for written, real in places.items():
        assert written in code
        code = code.replace(written, real)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {} if names is None else names)  # noqa: S102 -- the README's own lines are what is tested
    return printed.getvalue().strip().splitlines()[-1]


def parse(module: str, words: list[str]) -> object:
    """What a module's command line becomes."""
    spec = find_spec(module)
    assert spec, f"there is no {module}"
    name = f"{module}.__main__" if spec.submodule_search_locations else module
    settings: object = importlib.import_module(name).main.parse(words)
    return settings


def test_every_command_is_one_that_the_programs_understand() -> None:
    seen = set()
    for module, words in commands():
        if module not in OTHERS:
            # The programs that have to be there already, interpreters with other libraries, are this one here.
            parse(module, [sys.executable if word.endswith("/bin/python") else word for word in words])
        seen.add(module)
    ours = {
        "train",
        "train.evaluate",
        "train.import_peft",
        "export",
        "export.score",
        "export.serve",
        "export.bench",
        "demo",
    }
    assert seen >= {*ours, *OTHERS, "tests.measure.training", "tests.measure.growth", "tests.measure.ray_scoring"}
    for module in re.findall(r"python -m ([\w.]+)", TEXT):
        assert module in OTHERS or find_spec(module), module


def test_the_export_command_and_the_pipeline_on_its_bundle_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = command("export", "demo/adapters/minilm-mrpc-v2")
    out = words.index("--out") + 1
    written, words[out] = words[out], str(tmp_path / "bundle")
    assert export_main(words) == 0
    answer = ast.literal_eval(run_block(python_block("pipeline("), {written: words[out]}))
    assert answer["label"] in {"equivalent", "not_equivalent"}
    assert 0.5 <= answer["score"] <= 1


def test_the_evaluate_command_runs(
    data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On other rows: those that the README scores do not belong into the repository."""
    monkeypatch.chdir(ROOT)
    words = command("train.evaluate")
    words[words.index("--file") + 1] = str(data.validation_file)
    assert evaluate_main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 40


@pytest.mark.parametrize("name", SHIPPED)
def test_the_figures_are_those_of_the_adapters_that_ship(name: str) -> None:
    folder = ROOT / "demo" / "adapters" / name
    adapter = load_adapter(folder)
    training = json.loads((folder / "training.json").read_text())
    spread = training["seed_summary"]
    seeds = ", ".join(map(str, training["seeds"]))
    text = re.sub(r" \(\d\d\.\d to \d\d\.\d\)", "", TEXT)  # without the intervals
    cells = [f"{100 * spread[metric]['mean']:.1f} ± {100 * spread[metric]['std']:.1f}" for metric in ("accuracy", "f1")]
    assert len(training["seeds"]) >= 3
    assert f"| {' | '.join(cells)} | {seeds} |" in text
    kept = adapter.scores.values
    assert f"`{name}`, the seed that ships | {100 * kept['accuracy']:.1f} | {100 * kept['f1']:.1f} |" in text
    for scores in adapter.baselines.values():
        assert f"| {100 * scores.values['accuracy']:.1f} | {100 * scores.values['f1']:.1f} |" in text
    assert f"| on {adapter.n_validation} validation pairs |" in TEXT
    assert f"    {training['command']}\n" in TEXT


def test_the_map_is_the_tree_on_disk() -> None:
    """Each file of the stages is named in its folder's lines, and nothing else is."""
    (block,) = re.findall(r"## The map\n+```text\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    named: dict[str, set[str]] = {}
    folders: list[tuple[int, str]] = []
    for line in block.splitlines():
        indent, words = len(line) - len(line.lstrip()), line.split()
        if not words:
            continue
        if words[0].endswith("/"):
            folders = [*((depth, name) for depth, name in folders if depth < indent), (indent, words[0])]
            named["".join(name for _, name in folders)] = set()
        elif words[0].endswith((".py", ".jinja", ".css", ".js")):
            named["".join(name for depth, name in folders if depth < indent)].add(words[0])
    on_disk: dict[str, set[str]] = {}
    for stage in STAGES:
        for path in (ROOT / stage).rglob("*.*"):
            if path.suffix in {".py", ".jinja", ".css", ".js"} and path.name != "__init__.py":
                on_disk.setdefault(f"{path.parent.relative_to(ROOT)}/", set()).add(path.name)
    in_map = {folder: names for folder, names in named.items() if folder.partition("/")[0] in STAGES}
    assert in_map == on_disk | {"demo/adapters/": set()}
    for folder in named:
        assert (ROOT / folder).is_dir(), folder


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len(README.read_bytes()) <= 12_000
