"""A host that only labels, serves and shows the page: export/requirements.txt alone, in an environment made anew."""

import json
import re
import subprocess
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from export.serve.ports import find_port
from tests.conftest import ROOT

Folders = Callable[[str], Path]

WAIT_SECONDS = 300
"""How long a server may take to start on a busy machine."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment, with onnxruntime in the place of onnxruntime-gpu, as the file itself says."""
    folder = tmp_path_factory.mktemp("light")
    text = (ROOT / "export" / "requirements.txt").read_text(encoding="utf-8")
    text, n_replaced = re.subn(r"^onnxruntime-gpu\[.*$", "onnxruntime==1.31.1", text, flags=re.MULTILINE)
    assert n_replaced == 1
    (folder / "requirements.txt").write_text(re.sub(r"^onnxruntime==.*darwin.*\n", "", text, flags=re.MULTILINE))
    venv.create(folder / "venv", with_pip=True)
    interpreter = folder / "venv" / "bin" / "python"
    install = [
        interpreter,
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "-r",
        folder / "requirements.txt",
    ]
    subprocess.run(install, check=True)
    listed = subprocess.run([interpreter, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"^(torch|transformers|peft|datasets|optimum)\b", listed, flags=re.MULTILINE)
    return interpreter


@contextmanager
def running(command: list[str | Path], address: str) -> Iterator[None]:
    """A server of ours, once something answers at an address."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            end = time.monotonic() + WAIT_SECONDS
            while True:
                try:
                    urllib.request.urlopen(address, timeout=10).close()  # noqa: S310 -- our own server
                    break
                except OSError:
                    assert process.poll() is None, process.communicate()[0]
                    assert time.monotonic() < end
                    time.sleep(0.5)
            yield
        finally:
            process.terminate()
            process.communicate(timeout=WAIT_SECONDS)


def test_it_labels_a_file_answers_over_http_and_opens_the_page(
    python: Path, adapter: Folders, bundle: Folders, tmp_path: Path
) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("sentence1,sentence2\nword1 word2,word2 word1\n", encoding="utf-8")
    score: list[str | Path] = [python, "-m", "export.score", bundle("bert"), "--in", source, "--out", out]
    subprocess.run(score, cwd=ROOT, check=True, capture_output=True)
    label = out.read_text(encoding="utf-8").splitlines()[1].split(",")[2]

    port = find_port("127.0.0.1", None, first=8100)
    url = f"http://127.0.0.1:{port}/v1"
    serve: list[str | Path] = [python, "-m", "export.serve", bundle("bert"), "--port", str(port)]
    with running(serve, f"{url}/health"):
        question = json.dumps({"pair": ["word1 word2", "word2 word1"]}).encode()
        answer = json.load(urllib.request.urlopen(f"{url}/classify", question, timeout=60))  # noqa: S310 -- the same
    assert answer["answers"][0]["label"] == label

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
        bundle("bert"),
    ]
    with running([*page, "--port", str(port)], f"http://127.0.0.1:{port}/"):
        code = (
            "import sys; from gradio_client import Client; "
            "answer = Client(sys.argv[1], verbose=False).predict('word1 word2', 'word2 word1', api_name='/compare'); "
            "print(answer['onnx']['label'])"
        )
        command: list[str | Path] = [python, "-c", code, f"http://127.0.0.1:{port}/"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == label
