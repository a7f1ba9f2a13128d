"""Every command over hostile folders, with the real package `kernels` installed and a hub that notes what it is asked."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from export.bundle.folder import BUNDLE
from tests.conftest import ON_CPU, ROOT, Data, Folders
from tests.test_untrusted import Trap, change_json, rehash
from train.adapter.record import ADAPTER

KERNELS = "kernels==0.9.0"
"""The newest that transformers 4.57 loads."""
INTERNAL = {"_attn_implementation_internal": "stranger/kernel"}
ELSEWHERE = {"base_model_name_or_path": "stranger/model", "peft_type": "P_TUNING", "task_type": "SEQ_CLS"}
REFUSED = "error: "
COMMANDS = {
    "train": "from train.__main__ import main",
    "evaluate": "from train.evaluate import main",
    "import": "from train.import_peft import main",
    "export": "from export.__main__ import main",
    "bench": "from export.bench.__main__ import main",
    "score": "from export.score.__main__ import main",
    "demo": "from demo.__main__ import main",
}
DRIVER = """
import contextlib, io, json, sys

def run(imported, words):
    said = io.StringIO()
    names = {}
    exec(imported, names)
    with contextlib.redirect_stderr(said):
        status = names["main"](words)
    return status, said.getvalue()

if __name__ == "__main__":
    print(json.dumps([run(*job) for job in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("kernels")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", KERNELS]
    subprocess.run([*command, "--target", str(folder)], check=True)
    return folder


@pytest.fixture
def hub(kernels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The paths that a hub on this machine is asked for; it has nothing. Processes started here see it, and `kernels`."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET  # noqa: N815 -- the names that http.server looks for

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "driver.py").write_text(DRIVER)
    paths = (tmp_path / "driver", kernels, ROOT)
    for name, value in {
        **ON_CPU,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hub-cache"),
        "PROMPTFOLD_CACHE": str(tmp_path / "cache"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }.items():
        monkeypatch.setenv(name, value)
    yield asked
    server.shutdown()
    server.server_close()


def run(jobs: list[tuple[str, list[str]]]) -> list[tuple[int, str]]:
    """Commands in one new process: status and standard error of each."""
    program = [sys.executable, "-m", "driver"]
    asked = json.dumps([(COMMANDS[name], words) for name, words in jobs])
    result = subprocess.run(program, input=asked, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [(status, said) for status, said in json.loads(result.stdout.splitlines()[-1])]


def spoil(folder: Path, how: str, canary: Path) -> None:
    """Make a base model or an adapter hostile."""
    code = f"import os\nos.mkdir({str(canary)!r})\nclass Hostile: pass\n"
    (folder / "hostile.py").write_text(code)
    names = {"AutoConfig": "hostile.Hostile", "AutoModelForSequenceClassification": "hostile.Hostile"}
    tokenizer = {"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "kernel": ("config.json", INTERNAL),
        "nested kernel": ("config.json", {"text_config": INTERNAL}),
        "code": ("config.json", {"auto_map": names}),
        "tokenizer": ("tokenizer_config.json", {"auto_map": tokenizer}),
        "generation": ("generation_config.json", {"custom_generate": "stranger/generate"}),
        "adapter": ("adapter_config.json", ELSEWHERE),
        "mapping": (
            "adapter_config.json",
            {"auto_mapping": {"base_model_class": "Hostile", "parent_library": "hostile"}},
        ),
    }
    file, change = changes[how]
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    change_json(folder / file, **change)


def put_pickles(folder: Path, canary: Path) -> None:
    """What the Trainer leaves in a checkpoint, as pickles that make a folder when they are loaded."""
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "pytorch_model.bin",
        "adapter_model.bin",
    ):
        (folder / name).write_bytes(pickle.dumps(Trap(canary)))


def test_the_trap_works(hub: list[str], base_model: Folders, tmp_path: Path) -> None:
    """Without promptfold, transformers asks the hub for the kernel that config.json names."""
    folder = Path(shutil.copytree(base_model("bert"), tmp_path / "base"))
    spoil(folder, "kernel", tmp_path / "canary")
    code = f"import transformers; transformers.AutoModelForSequenceClassification.from_pretrained({str(folder)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode
    assert any("stranger/kernel" in path for path in hub), result.stderr


def test_hostile_folders_are_refused_in_one_sentence_and_nothing_is_asked_or_run(
    hub: list[str], base_model: Folders, adapter: Folders, bundle: Folders, data: Data, tmp_path: Path
) -> None:
    canary, good, never = tmp_path / "canary", base_model("bert"), tmp_path / "never"
    rows = str(data.validation_file)
    jobs: list[tuple[str, list[str]]] = []

    def hostile(folder: Path, name: str, how: str) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / name))
        put_pickles(copy, canary)
        spoil(copy, how, canary)
        return copy

    for how in ("kernel", "nested kernel", "code", "tokenizer", "generation", "adapter"):
        base = hostile(good, f"base-{how}", how)
        own = Path(shutil.copytree(adapter("bert"), tmp_path / f"of-{how}"))
        training = json.loads((own / "training.json").read_text())
        rehash(own, ADAPTER, model=training["model"] | {"name": str(base)})
        jobs += [
            ("train", ["--model", str(base), "--out", str(never), *data.flags]),
            ("evaluate", [str(own), "--file", rows]),
            ("export", [str(own), "--out", str(never)]),
        ]
        if find_spec("train.import_peft"):
            foreign = Path(shutil.copytree(adapter("bert"), tmp_path / f"foreign-{how}"))
            (foreign / "training.json").unlink()
            put_pickles(foreign, canary)
            jobs.append(("import", [str(foreign), "--base-model", str(base), "--labels", "a,b", "--out", str(never)]))
        if how in {"kernel", "code"}:
            jobs.append(("bench", ["--shape-of", str(base), "--shapes", "1x16"]))
    jobs.append(("demo", ["--adapter", str(tmp_path / "of-kernel")]))
    for how in ("kernel", "code", "tokenizer", "mapping"):
        own = hostile(adapter("bert"), f"adapter-{how}", how)
        rehash(own, ADAPTER)
        jobs += [
            ("evaluate", [str(own), "--file", rows]),
            ("export", [str(own), "--out", str(never)]),
            ("bench", [str(own), str(bundle("bert")), "--shapes", "1x16"]),
            ("demo", ["--adapter", str(own)]),
        ]
    for how in ("kernel", "tokenizer"):
        own = hostile(bundle("bert"), f"bundle-{how}", how)
        rehash(own, BUNDLE)
        jobs += [
            ("score", [str(own), "--in", rows, "--out", f"{never}.jsonl", "--no-labels"]),
            ("bench", [str(adapter("bert")), str(own), "--shapes", "1x16"]),
            ("demo", ["--adapter", str(adapter("bert")), "--bundle", str(own)]),
        ]
    outcomes = run(jobs)
    for (name, words), (status, said) in zip(jobs, outcomes, strict=True):
        assert status == 2, (name, words, said)
        last = said.strip().splitlines()[-1]
        assert last.startswith(REFUSED), (name, words, said)
        assert any(word in last for word in ("_config.json", "config.json")), (name, words, said)
    assert not hub
    assert not canary.exists()
    assert not list(tmp_path.glob("never*"))


def test_good_folders_beside_pickles_ask_no_hub(
    hub: list[str], base_model: Folders, data: Data, tmp_path: Path
) -> None:
    """Nor does an adapter whose configuration says that its base is another one, on the hub."""
    canary, base = tmp_path / "canary", Path(shutil.copytree(base_model("bert"), tmp_path / "base"))
    put_pickles(base, canary)
    out, bundle = tmp_path / "adapter", tmp_path / "bundle"
    flags = ["--epochs", "1", "--virtual-tokens", "5", "--encoder-hidden-size", "16", *data.flags]
    assert run([("train", ["--model", str(base), "--out", str(out), *flags])])[0][0] == 0
    change_json(out / "adapter_config.json", base_model_name_or_path="stranger/model", revision="evil")
    put_pickles(out, canary)
    rehash(out, ADAPTER)
    labelled = str(tmp_path / "out.jsonl")
    outcomes = run(
        [
            ("evaluate", [str(out), "--file", str(data.validation_file)]),
            ("export", [str(out), "--out", str(bundle)]),
            ("score", [str(bundle), "--in", str(data.validation_file), "--out", labelled, "--no-labels"]),
        ]
    )
    assert [status for status, _ in outcomes] == [0, 0, 0], outcomes
    assert not hub
    assert not canary.exists()
