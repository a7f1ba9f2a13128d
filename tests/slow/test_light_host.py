"""A host that only labels, serves and shows the page: export/requirements.txt alone, in an environment made anew.

`pytest -rP` shows the environment's size and how long each program took to its first answer.
"""

import json
import re
import subprocess
import time
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from export.serve.ports import find_port
from tests.conftest import ROOT, Folders
from train.common.machine import describe_machine

WAIT_SECONDS = 300
"""How long a server may take to start on a busy machine."""


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


@contextmanager
def answering(command: list[str | Path], address: str, data: bytes | None = None) -> Iterator[str]:
    """What a server of ours answers first at an address."""
    start = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            while True:
                try:
                    with urllib.request.urlopen(address, data, timeout=60) as answer:  # noqa: S310 -- our own server
                        body = answer.read().decode()
                    break
                except OSError:
                    assert process.poll() is None, process.communicate()[0]
                    assert time.monotonic() < start + WAIT_SECONDS
                    time.sleep(0.1)
            print(f"{command[2]}: {time.monotonic() - start:.1f} s to its first answer")
            yield body
        finally:
            process.terminate()
            process.communicate(timeout=WAIT_SECONDS)


def test_it_labels_a_file_answers_over_http_and_opens_the_page(
    python: Path, adapter: Folders, bundle: Folders, tmp_path: Path
) -> None:
    folder = bundle("bert")
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("sentence1,sentence2\nword1 word2,word2 word1\n", encoding="utf-8")
    start = time.monotonic()
    score: list[str | Path] = [python, "-m", "export.score", folder, "--in", source, "--out", out]
    subprocess.run(score, cwd=ROOT, check=True, capture_output=True)
    print(f"export.score: {time.monotonic() - start:.1f} s to its first answer")
    label = out.read_text(encoding="utf-8").splitlines()[1].split(",")[2]

    port = find_port("127.0.0.1", None, first=8100)
    request = json.dumps({"pair": ["word1 word2", "word2 word1"]}).encode()
    serve: list[str | Path] = [python, "-m", "export.serve", folder, "--port", str(port)]
    with answering(serve, f"http://127.0.0.1:{port}/v1/classify", request) as body:
        assert json.loads(body)["answers"][0]["label"] == label

    port = find_port("127.0.0.1", None, first=7960)
    page: list[str | Path] = [
        python,
        "-m",
        "demo",
        "--engine",
        "onnx",
        "--adapter",
        adapter("bert"),
        "--bundle",
        folder,
    ]
    with answering([*page, "--port", str(port)], f"http://127.0.0.1:{port}/"):
        code = (
            "import sys; from gradio_client import Client; "
            "answer = Client(sys.argv[1], verbose=False).predict('word1 word2', 'word2 word1', api_name='/compare'); "
            "print(answer['onnx']['label'])"
        )
        command: list[str | Path] = [python, "-c", code, f"http://127.0.0.1:{port}/"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == label
