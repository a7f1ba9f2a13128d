"""`run_in_child`: what comes back from a child process, and that none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from tests.conftest import ROOT
from train.common.child import run_in_child
from train.common.errors import EngineError, PromptfoldError, RequestError, UsageError


def refuse(error: PromptfoldError) -> None:
    raise error


def wait_in_a_grandchild() -> None:
    run_in_child(partial(run_in_child, wait, name="The grandchild"), name="The child")


def wait() -> None:
    print("waiting", flush=True)
    try:
        time.sleep(3600)
    finally:
        print("cleaned up", flush=True)


def test_a_function_runs_in_a_process_of_its_own() -> None:
    assert run_in_child(os.getpid, name="Asking") != os.getpid()
    assert run_in_child(divmod, 7, 2, name="Dividing") == (3, 1)


@pytest.mark.parametrize("error", [UsageError("--out x: no."), RequestError(422, "No text.")])
def test_an_error_of_ours_comes_back_as_itself(error: PromptfoldError) -> None:
    with pytest.raises(type(error)) as raised:
        run_in_child(refuse, error, name="Asking")
    assert (str(raised.value), vars(raised.value)) == (str(error), vars(error))


def test_a_child_that_dies_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match=r"^Counting ended unexpectedly \(exit code 3\)\. Count less\.$"):
        run_in_child(os._exit, 3, name="Counting", remedy="Count less.")


def test_a_bug_keeps_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineError, match=r"^Dividing ended unexpectedly \(exit code 1\)\.$"):
        run_in_child(divmod, 1, 0, name="Dividing")
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_its_parent(how: signal.Signals) -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "from tests.train.test_child import wait_in_a_grandchild; wait_in_a_grandchild()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(how)
        # Its end comes when no process has the pipe open any more.
        assert process.communicate(timeout=600)[0] == "cleaned up\n"
    assert process.returncode == -how
