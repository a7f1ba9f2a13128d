"""A host that only labels, serves and shows the page: export/requirements.txt alone, in an environment made anew.

`pytest -rP` shows the environment's size and how long each program took to its first answer.
"""

import json
import re
import subprocess
import time
import urllib.request
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Folders
from tests.demo.server import serve
from train.common.machine import describe_machine


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment, with onnxruntime in the place of onnxruntime-gpu, as the file itself says."""
    folder = tmp_path_factory.mktemp("light")
    text = (ROOT / "export" / "requirements.txt").read_text(encoding="utf-8")
    text, n_replaced = re.subn(r"^onnxruntime-gpu\[.*\n", "", text, flags=re.MULTILINE)
    text, n_kept = re.subn(r"^(onnxruntime==\S+) ; .*darwin.*$", r"\1", text, flags=re.MULTILINE)
    assert (n_replaced, n_kept) == (1, 1)
    (folder / "requirements.txt").write_text(text, encoding="utf-8")
    venv.create(folder / "venv", with_pip=True)
    interpreter = folder / "venv" / "bin" / "python"
    pip = [str(interpreter), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "-r", folder / "requirements.txt"], check=True)
    listed = subprocess.run([*pip, "list"], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"^(torch|transformers|peft|datasets|optimum)\b", listed, flags=re.MULTILINE)
    n_bytes = sum(path.lstat().st_size for path in (folder / "venv").rglob("*") if path.is_file())
    print(f"light host: {n_bytes / 1e6:,.0f} MB of files on {describe_machine()}")
    return interpreter


def tell(program: str, start: float) -> None:
    print(f"{program}: {time.monotonic() - start:.1f} s to its first answer")


def compare_on_page(python: Path, flags: list[str], cache: Path) -> dict[str, Any]:
    """What ``/compare`` answers on a page of another environment, asked by the client that is there."""
    code = (
        "import json, sys; from gradio_client import Client; "
        "answer = Client(sys.argv[1], verbose=False).predict('word1 word2', 'word2 word1', api_name='/compare'); "
        "print(json.dumps(answer))"
    )
    start = time.monotonic()
    with serve(flags, cache, python=python) as server:
        command: list[str | Path] = [python, "-c", code, server.wait_for_url()]
        tell("demo", start)
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    answer: dict[str, Any] = json.loads(printed)
    return answer


def test_it_labels_a_file_answers_over_http_and_opens_the_page(
    python: Path, adapter: Folders, bundle: Folders, tmp_path: Path
) -> None:
    folder = bundle("bert")
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("sentence1,sentence2\nword1 word2,word2 word1\n", encoding="utf-8")
    start = time.monotonic()
    score: list[str | Path] = [python, "-m", "export.score", folder, "--in", source, "--out", out]
    subprocess.run(score, cwd=ROOT, check=True, capture_output=True)
    tell("export.score", start)
    label = out.read_text(encoding="utf-8").splitlines()[1].split(",")[2]

    request = json.dumps({"pair": ["word1 word2", "word2 word1"]}).encode()
    start = time.monotonic()
    with serve([str(folder)], tmp_path, program=("-m", "export.serve"), python=python) as server:
        url = server.wait_for(r"POST (http://\S+)")[1]
        with urllib.request.urlopen(url, request, timeout=60) as answer:  # noqa: S310 -- our own server
            assert json.load(answer)["answers"][0]["label"] == label
        tell("export.serve", start)

    flags = ["--engine", "onnx", "--adapter", str(adapter("bert")), "--bundle", str(folder)]
    assert compare_on_page(python, flags, tmp_path)["onnx"]["label"] == label
