"""The README's way to sign and check folders: model-signing's own command line, on a bundle and on an adapter."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from export.bundle.folder import load_bundle
from tests.conftest import ROOT, Folders, flip_bit
from train.adapter.folder import load_adapter

README = (ROOT / "export" / "README.md").read_text(encoding="utf-8")


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """One of the README's commands, with a folder of this test in the place of the bundle."""
    (place,) = re.findall(r"sign key (\S+)", README)
    words = shlex.split(command.replace(place, folder.name).replace("python -m", f"{sys.executable} -m"))
    return subprocess.run(words, cwd=folder.parent, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["bundle", "adapter"])
def test_a_signed_folder_is_told_from_one_that_was_changed(
    kind: str, bundle: Folders, adapter: Folders, tmp_path: Path
) -> None:
    folder = tmp_path / kind
    shutil.copytree((bundle if kind == "bundle" else adapter)("bert"), folder)
    (make_keys,) = re.findall(r"^    (openssl .*)$", README, flags=re.MULTILINE)
    subprocess.run(make_keys, shell=True, cwd=tmp_path, capture_output=True, check=True)  # noqa: S602 -- the README's own
    sign, verify = re.findall(r"^    (python -m model_signing .*)$", README, flags=re.MULTILINE)
    assert run(sign, folder).returncode == 0
    assert run(verify, folder).returncode == 0
    # The signature lies beside the folder, which is what it was.
    (load_bundle if kind == "bundle" else load_adapter)(folder)
    flip_bit(folder / "tokenizer.json", 100)
    damaged = run(verify, folder)
    assert damaged.returncode != 0
    assert "tokenizer.json" in damaged.stdout + damaged.stderr
