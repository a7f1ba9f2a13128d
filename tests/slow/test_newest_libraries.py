"""The newest libraries, among them a transformers that optimum-onnx does not take: training, export, labels and the page.

The environment is made anew. What does not change (torch, ONNX Runtime and others) is linked into it, so that only some
hundred megabytes are installed.
"""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.conftest import ROOT, VIRTUAL_TOKENS, Data, Folders, family_of
from tests.slow.test_light_host import compare_on_page

NEWEST = ("transformers>=5,<5.24", "peft", "huggingface_hub>=1", "datasets", "gradio[mcp]", "accelerate")
"""transformers 5.24 calls a cache by another name, and PEFT 0.21.2, the newest, then refuses prefix tuning."""
REPLACED = {
    *("accelerate", "datasets", "gradio", "gradio_client", "hf_gradio", "hf_xet", "huggingface_hub"),
    *("optimum", "optimum_onnx", "peft", "tokenizers", "transformers"),
}
"""Packages that are installed anew, or not at all."""
KINDS = ("bert", "bert-v2", "gpt2", "gpt2-v2")
GOLDEN = """
import sys
from pathlib import Path
import numpy as np
from export.bundle.folder import load_bundle
from export.runtime.classifier import OnnxClassifier
from tests.conftest import TOKEN_TYPES, peft_logits, random_batch
adapter, base, bundle = map(Path, sys.argv[1:4])
classifier = OnnxClassifier(load_bundle(bundle), threads=1, use_cuda=False)
generator = np.random.default_rng(3)
worst = 0.0
for length in (1, 7, 21):
    batch = random_batch(generator, 1, length, token_types=sys.argv[4] in TOKEN_TYPES)
    given = {name: batch[name] for name in classifier.bundle.inputs}
    worst = max(worst, float(np.abs(classifier.logits(given) - peft_logits(adapter, base, batch)).max()))
print(worst)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the environment."""
    folder = tmp_path_factory.mktemp("newest")
    own = Path(sys.modules["pytest"].__file__ or "").parents[1]
    outside = folder / "linked"
    outside.mkdir()
    for path in own.iterdir():
        name = re.split(r"-\d", path.name)[0].lower()
        if name not in REPLACED | {"pip", "setuptools"} and path.suffix != ".pth":
            (outside / path.name).symlink_to(path)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    interpreter = environment / "bin" / "python"
    (packages,) = (environment / "lib").glob("python*/site-packages")
    # While pip works the links lie outside: it leaves alone what it would otherwise replace through them.
    (packages / "linked.pth").write_text(f"{outside}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "--disable-pip-version-check", "install", "-q"]
    subprocess.run([*pip, *NEWEST], check=True)
    # Afterwards inside, as dill pickles modules from elsewhere with all that they hold.
    (packages / "linked.pth").write_text(f"{outside.rename(environment / 'linked')}\n")
    return interpreter


def run(python: Path, *words: object) -> str:
    """A program's standard output."""
    result = subprocess.run([str(python), *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_libraries_are_the_newest(python: Path) -> None:
    code = "import importlib.metadata as m, sys; print([m.version(name) for name in sys.argv[1:]])"
    found = run(python, "-c", code, "transformers", "huggingface_hub", "torch")
    assert re.fullmatch(rf"\['5\.\d+\.\d+', '[1-9]\d*\.\d+\.\d+', '{re.escape(version('torch'))}'\]\n", found)
    assert run(python, "-c", "from importlib.util import find_spec; print(find_spec('optimum'))") == "None\n"


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_its_graph_gives_pefts_logits(
    kind: str, python: Path, base_model: Folders, data: Data, tmp_path: Path
) -> None:
    """The base model's folder was written by the pinned transformers, as those on the hub are by many versions."""
    base, own, bundle = base_model(family_of(kind)), tmp_path / "adapter", tmp_path / "bundle"
    method = "p-tuning-v2" if kind.endswith("-v2") else "p-tuning"
    sizes = ["--virtual-tokens", VIRTUAL_TOKENS, "--encoder-hidden-size", 16, "--epochs", 1]
    run(python, "-m", "train", "--model", base, "--method", method, *sizes, *data.flags, "--out", own)
    run(python, "-m", "export", own, "--precision", "fp32", "--out", bundle)
    assert float(run(python, "-c", GOLDEN, own, base, bundle, family_of(kind))) < 1e-4
    # The same adapter as PEFT alone would have left it.
    source, imported = tmp_path / "source", tmp_path / "imported"
    source.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (source / name).write_bytes((own / name).read_bytes())
    words = ["--base-model", base, "--labels", "equivalent,not_equivalent", "--pair", "--out", imported]
    said = run(python, "-m", "train.import_peft", source, *words)
    assert (imported / "training.json").is_file(), said


def test_an_adapter_of_the_pinned_libraries_is_exported_labels_rows_and_is_shown(
    python: Path, adapter: Folders, data: Data, tmp_path: Path
) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "out.jsonl"
    run(python, "-m", "export", adapter("bert"), "--precision", "fp32", "--out", bundle)
    run(python, "-m", "export.score", bundle, "--in", data.validation_file, "--out", out, "--no-labels")
    assert len(out.read_text().splitlines()) == 40
    run(python, "-m", "train.evaluate", adapter("bert"), "--file", data.validation_file)
    answer = compare_on_page(python, ["--adapter", str(adapter("bert")), "--bundle", str(bundle)], tmp_path)
    assert answer["onnx"]["label"] == answer["pytorch"]["label"]
