"""What importing costs and needs: command lines are cheap, a light host needs no torch, telemetry is off."""

import importlib
import subprocess
import sys

from tests.conftest import ROOT
from tests.test_rooms import STAGES, modules

HEAVY = ("torch", "transformers", "peft", "datasets", "optimum", "onnxruntime", "sklearn", "gradio", "pandas", "ray")

NOT_ON_A_LIGHT_HOST = ("torch", "transformers", "peft", "datasets", "optimum", "accelerate", "sklearn", "onnx")
"""What requirements.txt has beside export/requirements.txt. Gradio brings pandas and jinja2."""

FULL = ("train.fit.trainer", "train.model.plain", "train.model.prompted", "export.fold.")
"""Modules that need requirements.txt as soon as they are imported; all others import with export/requirements.txt."""


def run(code: str) -> str:
    """What Python code prints, run in a process of its own at the root."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_command_lines_import_nothing_heavy_until_they_work() -> None:
    code = (
        "import sys, train.__main__, train.evaluate, export.__main__, export.runtime.session, export.bundle.folder\n"
        "import export.score.__main__, export.serve.__main__, demo.__main__, demo.engines.engine_process, demo.engines.stage\n"
        "import export.bench.__main__, export.triton\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert run(code).strip() == "[]"


def test_every_module_imports_with_the_requirements_of_its_room() -> None:
    """A light host's in a process of their own, in which the packages that it lacks cannot be imported."""
    names = [name for name in modules() if name != "demo.space"]
    light = [name for name in names if not name.startswith(FULL)]
    code = "import importlib, sys\nsys.modules.update(dict.fromkeys({absent!r}))\n[importlib.import_module(name) for name in {names!r}]"
    run(code.format(absent=NOT_ON_A_LIGHT_HOST, names=light))
    for name in set(names) - set(light):
        importlib.import_module(name)


def test_telemetry_is_off_before_anything_could_send_it() -> None:
    names = ("ORT_DISABLE_TELEMETRY", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY")
    unset = f"import os\nfor name in {names!r}:\n    os.environ.pop(name, None)\n"
    for stage in STAGES:
        off = run(f"{unset}import {stage}\nprint(*[os.environ[name] for name in {names!r}])")
        assert off.strip() == "1 False 1"
    # Two of the libraries say what they made of it.
    code = "import demo, gradio, huggingface_hub.constants as hub\nprint(gradio.Blocks().analytics_enabled, hub.HF_HUB_DISABLE_TELEMETRY)"
    assert run(unset + code).strip() == "False True"
