"""Several processes train together and learn what one process learns at the same batch size."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.conftest import ON_CPU, ROOT, TOKEN_TYPES, Data, Folders, peft_logits, random_batch
from train.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread", "on_cpu")


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "train"]
ACCELERATE = [
    # With --cpu it would start one process, whatever their number; where there is no GPU, these two run on the CPU.
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--num_cpu_threads_per_process", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no", "-m", "train"),
]
EPOCHS = 3


def train_one(base: Path, data: Data, folder: Path, *more: str) -> list[str]:
    """Train "single" in one process; the words for "double": of 64 rows in batches of 16 each process takes eight."""
    sizes = ["--virtual-tokens", "4", "--encoder-hidden-size", "16", "--batch-size", "16", "--learning-rate", "1e-2"]
    words = ["--model", str(base), *data.flags, *sizes, "--epochs", str(EPOCHS), *more, "--out"]
    assert main([*words, str(folder / "single")]) == 0
    return [*words, str(folder / "double")]


def check_same(log: str, folder: Path, base: Path, family: str) -> None:
    """Two processes said everything once, and their adapter's logits, by PEFT alone, are those of one process."""
    last = f"epoch {EPOCHS}/{EPOCHS}  training loss"
    for words in ("2 processes share each batch", "64 training and 40 validation rows", "learning ", last):
        assert log.count(words) == 1, log
    assert log.count(f"{folder / 'double'}: seed 0, epoch ") == 1, log
    batch = random_batch(np.random.default_rng(0), 16, 20, token_types=family in TOKEN_TYPES)
    first, second = (peft_logits(folder / name, base, batch) for name in ("single", "double"))
    assert np.abs(first - second).max() < 1e-5


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | ON_CPU, stdout=stream, stderr=subprocess.STDOUT)


def test_two_processes_killed_and_resumed_learn_the_same(base_model: Folders, data: Data, tmp_path: Path) -> None:
    command = [*TORCHRUN, *train_one(base_model("bert"), data, tmp_path), "--checkpoint-steps", "3"]
    checkpoint = tmp_path / "double.checkpoints" / "seed-0" / "checkpoint-3" / "complete.json"
    process = start(command, tmp_path / "1.log")
    while not checkpoint.is_file() and process.poll() is None:
        time.sleep(0.002)
    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
        child.kill()
    process.wait()
    assert checkpoint.is_file(), (tmp_path / "1.log").read_text()
    assert not (tmp_path / "double").exists()

    assert start([*command, "--resume"], tmp_path / "2.log").wait() == 0, (tmp_path / "2.log").read_text()
    log = (tmp_path / "2.log").read_text()
    assert log.count("going on from ") == 1
    check_same(log, tmp_path, base_model("bert"), "bert")
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("single", "double")]
    for one, two in zip(*(record["epochs"] for record in records), strict=True):
        assert two["scores"] == one["scores"]
        for loss in ("train_loss", "validation_loss"):
            assert two[loss] == pytest.approx(one[loss], abs=1e-5)
    assert records[0]["best_epoch"] == records[1]["best_epoch"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.log", "2.log", "double", "single"]


def test_accelerate_launch_gives_the_logits_of_one_process(base_model: Folders, data: Data, tmp_path: Path) -> None:
    """P-Tuning v2 this time, with an average, on a model whose head is another.

    The precision is that of --precision, whatever accelerate is configured for.
    """
    more = ["--method", "p-tuning-v2", "--average", "0.9"]
    command = [*ACCELERATE, *train_one(base_model("roberta"), data, tmp_path, *more)]
    assert start(command, tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()
    check_same((tmp_path / "log").read_text(), tmp_path, base_model("roberta"), "roberta")


def machine(rank: int, host: str, port: int) -> list[str]:
    """What the README says to run on each of two machines, but for what is trained."""
    readme = (ROOT / "train" / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^ +(accelerate launch .*--num_machines 2.*) -m train", readme, flags=re.MULTILINE)
    values = {"RANK": str(rank), "HOST": host, "PORT": str(port)}
    _, _, *words = (values.get(word, word) for word in command.split())
    return [sys.executable, "-m", "accelerate.commands.launch", *words, "-m", "train"]


def test_two_machines_that_meet_by_an_address_learn_the_same(base_model: Folders, data: Data, tmp_path: Path) -> None:
    """Each has a launcher of its own, and they know nothing of each other but the address."""
    words = train_one(base_model("bert"), data, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = [start([*machine(rank, "127.0.0.1", port), *words], log) for rank, log in enumerate(logs)]
    statuses = [process.wait() for process in processes]
    log = "\n".join(log.read_text() for log in logs)
    assert statuses == [0, 0], log
    check_same(log, tmp_path, base_model("bert"), "bert")
