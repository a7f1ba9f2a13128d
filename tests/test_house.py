"""The house keeps its shape: the direction of imports, cheap imports, the top level, and a README that runs."""

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.__main__ import main as demo_main
from export.__main__ import main as export_main
from export.serve.__main__ import main as serve_main
from tests.conftest import ROOT, SHIPPED, Data
from tests.demo.server import serve
from tests.measure.training import main as bench_main
from train.__main__ import main as train_main
from train.adapter.folder import load_adapter
from train.evaluate import main as evaluate_main

README = (ROOT / "README.md").read_text(encoding="utf-8")

HEAVY = ("torch", "transformers", "peft", "datasets", "optimum", "onnxruntime", "sklearn", "gradio", "pandas", "ray")


def test_the_command_lines_import_nothing_heavy_until_they_work() -> None:
    code = (
        "import sys, train.__main__, train.evaluate, export.__main__, export.runtime.session, export.bundle.folder\n"
        "import export.score.__main__, export.serve.__main__, demo.__main__, demo.engines.engine_process, demo.engines.stage\n"
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
    for room in ("train", "export", "demo"):
        command = [sys.executable, "-c", code.format(room=room)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "1 False True"


def readme_commands(module: str) -> list[list[str]]:
    """The words after ``python -m MODULE`` of every command line in the README."""
    found = re.findall(rf"^ +(?:.* && )?python -m {re.escape(module)}( .*)?$", README, flags=re.MULTILINE)
    return [shlex.split(words) for words in found]


def python_block(word: str) -> str:
    """The README's Python with a word in it."""
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if word in code]
    return block


def run_block(code: str, places: dict[str, str]) -> str:
    """Run the README's Python with other addresses; the last line that it prints."""
    for written, real in places.items():
        assert written in code
        code = code.replace(written, real)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})  # noqa: S102 -- the README's own lines are what is tested
    return printed.getvalue().strip().splitlines()[-1]


def test_every_command_in_the_readme_is_one_that_the_programs_understand() -> None:
    """Those of the other modules, and pytest's, are run by tests below or by whoever reads this."""
    train_commands = [train_main.parse(words) for words in readme_commands("train")]
    models = ["roberta-large", *["minilm"] * 3, "smollm2", "minilm"]
    assert [config.model for config in train_commands] == models
    demo_commands = [demo_main.parse(words) for words in readme_commands("demo")]
    assert [config.engine for config in demo_commands] == ["both", "both", "ray"]
    (serve_command,) = [serve_main.parse(words) for words in readme_commands("export.serve")]
    assert serve_command.serving.replicas == 2
    counts = {
        "export": 1,
        "model_signing": 2,
        "export.bench": 2,
        "export.score": 2,
        "train.evaluate": 1,
        "tests.measure.growth": 1,
        "tests.measure.ray_scoring": 1,
        "tests.measure.training": 1,
        "pytest": 1,
    }
    for module, count in counts.items():
        assert len(readme_commands(module)) == count, module
    known = (
        "demo",
        "export",
        "export.bench",
        "export.score",
        "export.serve",
        "export.triton",
        "model_signing",
        "pytest",
        "tests.measure.growth",
        "tests.measure.ray_scoring",
        "tests.measure.training",
        "train",
        "train.evaluate",
    )
    assert set(re.findall(r"python -m ([\w.]+)", README)) <= set(known)


def test_the_readmes_export_commands_and_the_pipeline_on_the_bundle_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (words,) = readme_commands("export")
    out = words.index("--out") + 1
    written, words[out] = words[out], str(tmp_path / "bundle")
    assert export_main(words) == 0
    printed = run_block(python_block("pipeline("), {written: words[out]})
    answer = ast.literal_eval(printed)
    assert answer["label"] in {"equivalent", "not_equivalent"}
    assert 0.5 <= answer["score"] <= 1


def test_the_readmes_evaluate_command_runs(
    data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On other rows: those that the README scores do not belong into the repository."""
    monkeypatch.chdir(ROOT)
    (words,) = readme_commands("train.evaluate")
    words[words.index("--file") + 1] = str(data.validation_file)
    assert evaluate_main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 40


def test_the_readmes_bench_command_runs(
    data: Data, base_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (words,) = readme_commands("tests.measure.training")
    places = {"--model": str(base_model("bert")), "--rounds": "1", "--epochs": "1"}
    places |= dict(zip(data.flags[::2], data.flags[1::2], strict=True))
    for flag, value in places.items():
        words[words.index(flag) + 1] = value
    assert bench_main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples_per_second_ratio"] > 0


def test_the_readmes_python_runs_against_the_page(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serve([], tmp_path_factory.mktemp("cache")) as server:
        printed = run_block(python_block("gradio_client"), {"http://127.0.0.1:7860/": server.wait_for_url()})
    assert re.search(r"^equivalent \d+\.\d+ \d\S+$", printed)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_readmes_figures_are_those_of_the_adapters_that_ship(name: str) -> None:
    folder = ROOT / "demo" / "adapters" / name
    adapter = load_adapter(folder)
    training = json.loads((folder / "training.json").read_text())
    spread = training["seed_summary"]
    seeds = ", ".join(map(str, training["seeds"]))
    cells = [f"{100 * spread[metric]['mean']:.1f} ± {100 * spread[metric]['std']:.1f}" for metric in ("accuracy", "f1")]
    assert len(training["seeds"]) >= 3
    assert f"| {' | '.join(cells)} | {seeds} |" in README
    kept = adapter.scores.values
    assert f"`{name}`, the seed that ships | {100 * kept['accuracy']:.1f} | {100 * kept['f1']:.1f} |" in README
    for scores in adapter.baselines.values():
        assert f"| {100 * scores.values['accuracy']:.1f} | {100 * scores.values['f1']:.1f} |" in README
    assert f"| on {adapter.n_validation} validation pairs |" in README
    assert f"    {training['command']}\n" in README
