"""The house keeps its shape: the direction of imports, cheap imports, the top level, and a README that runs."""

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from demo.__main__ import parse_config as parse_demo
from export.__main__ import main as export_main
from tests.conftest import ROOT, SHIPPED_ADAPTER
from tests.server import serve
from train.adapter import load_adapter
from train.config import parse_config as parse_train

ROOMS = ("train", "export", "demo")
"""From below to above: each may import itself and what stands before it."""

README = (ROOT / "README.md").read_text(encoding="utf-8")

HEAVY = ("torch", "transformers", "peft", "datasets", "optimum", "onnxruntime", "sklearn", "gradio", "pandas")


def imported_modules(path: Path) -> set[str]:
    """The first names of every import in a file, also of those inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    above = set(ROOMS[ROOMS.index(room) + 1 :]) | {"tests"}
    files = list((ROOT / room).glob("*.py"))
    assert files
    assert {str(path): found for path in files if (found := imported_modules(path) & above)} == {}


def test_the_command_lines_import_nothing_heavy_until_they_work() -> None:
    code = (
        "import sys, train.__main__, export.__main__, export.runtime, export.bundle, demo.__main__, demo.backends\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_telemetry_is_off_before_anything_could_send_it() -> None:
    code = (
        "import os\nfor name in ('ORT_DISABLE_TELEMETRY', 'GRADIO_ANALYTICS_ENABLED', 'HF_HUB_DISABLE_TELEMETRY'):\n"
        "    os.environ.pop(name, None)\n"
        "import {room}, gradio, huggingface_hub.constants as hub\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'], gradio.Blocks().analytics_enabled, hub.HF_HUB_DISABLE_TELEMETRY)"
    )
    for room in ROOMS:
        command = [sys.executable, "-c", code.format(room=room)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "1 False True"


def readme_commands(module: str) -> list[list[str]]:
    """The words after ``python -m MODULE`` of every command line in the README."""
    found = re.findall(rf"^    (?:.* && )?python -m {module}( .*)?$", README, flags=re.MULTILINE)
    return [shlex.split(words) for words in found]


def test_every_command_in_the_readme_is_one_that_the_programs_understand() -> None:
    train_commands = [parse_train(words) for words in readme_commands("train")]
    assert len(train_commands) == 3
    demo_commands = [parse_demo(words) for words in readme_commands("demo")]
    assert len(demo_commands) == 2
    assert len(readme_commands("export")) == 1
    assert len(readme_commands("pytest")) == 1


def test_the_readmes_export_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (words,) = readme_commands("export")
    words[words.index("--out") + 1] = str(tmp_path / "bundle")
    assert export_main(words) == 0


def test_the_readmes_python_runs_against_the_page(tmp_path_factory: pytest.TempPathFactory) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    with serve([], tmp_path_factory.mktemp("cache")) as server:
        code = block.replace("http://127.0.0.1:7860/", server.wait_for_url())
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})  # noqa: S102 -- the README's own lines are what is tested
    assert re.search(r"^equivalent \d+\.\d+ \d\S+$", printed.getvalue().strip().splitlines()[-1])


def test_the_readmes_figures_are_those_of_the_adapter_that_ships() -> None:
    adapter = load_adapter(SHIPPED_ADAPTER)
    for scores in (adapter.scores, adapter.always_positive):
        assert f"| {100 * scores['accuracy']:.1f} | {100 * scores['f1']:.1f} |" in README
    assert f"| {adapter.n_validation} validation pairs |" in README
    (command,) = [
        line
        for line in README.splitlines()
        if "demo/adapters/minilm-mrpc" in line and "train" in line and line.startswith("    ")
    ]
    assert command.strip() in (SHIPPED_ADAPTER / "training.json").read_text()
