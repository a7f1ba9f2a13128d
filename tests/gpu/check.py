"""On a GPU machine: does the project do there what it says, and how fast? After unpack.sh, in the repository's root:

    /tmp/gpu/venv/bin/python -m tests.gpu.check STEP [STEP …] [--behind STEP [STEP …]] [--seconds 500]

Each step is a process of its own (`tests.gpu.steps`), one after the other; those after ``--behind`` run beside them, in
sessions of their own, and go on when the command has ended. What was found is printed as it comes, and stands in
check.json, which is written to the folder $OUT after every line of it and keeps what earlier calls found. NAME is ``v1`` or
``v2`` (the demo's adapters) or ``large`` (random weights in the shape of roberta-large).

- machine: versions, the GPU, ONNX Runtime's providers
- tiny, tiny:KIND,…: a model of each family made in code, fp32 and fp16, with and without CUDA graphs, held against PEFT on the CPU
- engines:NAME, only behind: export with --precision fp16, and start all engines of `export.bench`
- wait:NAME: wait for that export; graphs:NAME: the same comparison as tiny, at the benchmark's shapes, with GPU memory
- bench:NAME: wait for all engines, and time them; nothing else should run then
- attention:NAME: the fp16 graph with cuDNN's attention and with ONNX Runtime's own
- profile:NAME: kernels, launches and copies of a request, and which kernels take the time
- hidden: what the runtime says where the GPU, or the driver, is hidden
- demo: the page's PyTorch side, held against the graph
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from tests.gpu.places import MARK, WORK


class Findings:
    """What was found so far, by step and key, in a file that is whole after every line."""

    def __init__(self) -> None:
        self._kept = WORK / "check.json"
        self._start = time.monotonic()
        self._found: dict[str, Any] = json.loads(self._kept.read_text()) if self._kept.is_file() else {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def note(self, step: str, key: str, value: Any) -> None:
        """Keep a finding and print it, once."""
        if self._found.get(step, {}).get(key) == value:
            return
        self._found.setdefault(step, {})[key] = value
        text = json.dumps(value)
        print(f"[{self.seconds:5.1f} s] {step}: {key}: {text if len(text) < 700 else text[:700] + ' …'}", flush=True)
        scratch = self._kept.with_suffix(".tmp")
        scratch.write_text(json.dumps(self._found, indent=1), encoding="utf-8")
        scratch.replace(self._kept)
        shutil.copy(self._kept, os.environ.get("OUT", "/tmp"))  # noqa: S108


def start(step: str, **pipes: Any) -> "subprocess.Popen[str]":
    """Start a step. Nothing asks a hub; the step that hides the GPU has it hidden.

    Steps behind share the cores: where each took all of them, an export of 40 s took 400.
    """
    variables = {"HF_HUB_OFFLINE": "1"}
    if step == "hidden":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if step.startswith("engines:"):
        variables |= {"OMP_NUM_THREADS": "4", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    settings: Any = {"env": {**os.environ, **variables}, "stdin": subprocess.DEVNULL, **pipes}
    words = [sys.executable, "-u", "-m", "tests.gpu.steps", *step.split(":")]
    return subprocess.Popen(words, start_new_session=True, text=True, errors="replace", **settings)


def wait(name: str, marker: str, findings: Findings, at_most: float) -> None:
    """Wait until ``engines:NAME`` has come as far as a marker, and keep what it found until then."""
    log, folder = WORK / f"engines-{name}.log", WORK / name
    end = time.monotonic() + at_most
    while not any((folder / one).exists() for one in (marker, "failed")) and time.monotonic() < end:
        time.sleep(0.1)
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else ["nothing was begun"]
    for line in lines:
        if line.startswith(MARK):
            findings.note(f"engines:{name}", *json.loads(line.removeprefix(MARK)))
    if not (folder / marker).exists():
        findings.note(f"engines:{name}", f"not {marker}", lines[-15:])


def run(step: str, findings: Findings, at_most: float) -> None:
    """Run a step to its end or its deadline, printing its lines as they come."""
    began = time.monotonic()
    tail: list[str] = []
    process = start(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
    signal.alarm(max(1, int(at_most)))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(MARK):
            findings.note(step, *json.loads(line.removeprefix(MARK)))
        elif line.strip():
            tail = [*tail, line.strip()[:300]][-15:]
            print(f"    {line.rstrip()[:230]}", flush=True)
    code = process.wait()
    signal.alarm(0)
    ended = {"exit": code, "seconds": round(time.monotonic() - began, 1)}
    findings.note(step, "ended", ended | ({"tail": tail} if code else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*")
    parser.add_argument("--behind", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=500)
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    findings = Findings()
    for step in options.behind:  # these outlive this command; `wait` reads their logs
        with (WORK / f"{step.replace(':', '-')}.log").open("w") as log:
            start(step, stdout=log, stderr=log)
    for step in options.steps:
        left = options.seconds - findings.seconds
        if left < 5:
            findings.note(step, "ended", "no time was left")
        elif step.startswith("wait:"):
            wait(step.partition(":")[2], "exported", findings, left)
        elif step.startswith("bench:"):
            name = step.partition(":")[2]
            wait(name, "ready", findings, left)
            if (WORK / name / "ready").exists():
                (WORK / name / "go").touch()
                wait(name, "done", findings, options.seconds - findings.seconds)
        else:
            run(step, findings, left)
    print(f"{findings.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
