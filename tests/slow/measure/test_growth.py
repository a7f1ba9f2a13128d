"""The benchmark of growth, run as its users run it: with Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ON_CPU, ROOT, Folders
from tests.measure.test_growth import bundle_of_two_tasks


def test_it_measures_tasks_and_replicas(adapter: Folders, tmp_path: Path) -> None:
    folder = str(bundle_of_two_tasks(adapter, tmp_path).folder)
    flags = "--tasks 1,5 --replicas 1 --batch-waits 2 --clients 2 --pairs 3 --seconds 1 --threads 1"
    command, environment = [sys.executable, "-m", "tests.measure.growth", folder, *flags.split()], os.environ | ON_CPU
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert [cell["n_tasks"] for cell in result["tasks"]] == [1, 5]
    assert result["tasks"][1]["file_mb"] > result["tasks"][0]["file_mb"]
    (cell,) = result["serving"]
    assert (cell["replicas"], cell["clients"], cell["pairs"], cell["errors"]) == (1, 2, 3, 0)
    assert 3 <= cell["batch_size"] <= 6
    assert set(cell["cpu_ms"]) == {"replica", "api", "proxy"}
    assert min(cell["pairs_per_second"], cell["cpu_ms"]["replica"]) > 0
    assert [demand["pairs_per_second"] for demand in result["demands"]] == [1, 100, 10_000]
