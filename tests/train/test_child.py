"""`run_in_child`: what comes back from a child process, and that none outlives its parent."""

import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from subprocess import PIPE, Popen

import pytest

from tests.conftest import ROOT
from train.common.child import run_in_child
from train.common.console import print_line, said_to, say
from train.common.errors import EngineError, PromptfoldError, RequestError


def refuse(error: PromptfoldError) -> None:
    raise error


def wait_in_a_grandchild() -> None:
    run_in_child(partial(run_in_child, wait, name="The grandchild"), name="The child")


def wait() -> None:
    try:
        print("waiting", flush=True)  # within the block: the signal may come at once
        time.sleep(3600)
    finally:
        print("cleaned up", flush=True)


def test_results_and_errors_come_back_from_a_process_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_in_child(os.getpid, name="Asking") != os.getpid()
    assert run_in_child(divmod, 7, 2, name="Dividing") == (3, 1)
    with pytest.raises(RequestError) as raised:
        run_in_child(refuse, error := RequestError(422, "No text."), name="Asking")
    assert (str(raised.value), vars(raised.value)) == (str(error), vars(error))
    with pytest.raises(EngineError, match=r"^Counting ended unexpectedly \(exit code 3\)\. Count less\.$"):
        run_in_child(os._exit, 3, name="Counting", remedy="Count less.")
    with pytest.raises(EngineError, match=r"^Dividing ended unexpectedly \(exit code 1\)\.$"):
        run_in_child(divmod, 1, 0, name="Dividing")
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_its_parent(how: signal.Signals) -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "from tests.train.test_child import wait_in_a_grandchild; wait_in_a_grandchild()"
    )
    with Popen([sys.executable, "-c", code], cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(how)
        # Its end comes when no process has the pipe open any more.
        assert process.communicate(timeout=600)[0] == "cleaned up\n"
    assert process.returncode == -how


def say_both(first: str, second: str) -> None:
    say(first)
    say(second)


def say_and_die(line: str) -> None:
    say(line)
    os._exit(3)


def say_and_wait(line: str) -> None:
    say(line)
    time.sleep(3600)


def test_what_a_child_says_is_printed_once_and_can_be_listened_to(capfd: pytest.CaptureFixture[str]) -> None:
    run_in_child(partial(run_in_child, say_both, "ä", "[2/5]", name="The grandchild"), name="The child")
    assert capfd.readouterr().out == "ä\n[2/5]\n"
    heard: list[str] = []
    with said_to(print_line, heard.append):
        run_in_child(say_both, "a", "b", name="Saying")
        with pytest.raises(EngineError, match="exit code 3"):
            run_in_child(say_and_die, "c", name="Saying")
    say("d")
    assert heard == ["a", "b", "c"]
    assert capfd.readouterr().out == "a\nb\nc\nd\n"


def test_a_child_whose_words_nobody_takes_is_ended() -> None:
    def refuse_line(line: str) -> None:
        raise BrokenPipeError(line)

    with said_to(refuse_line), pytest.raises(BrokenPipeError, match=r"^a$"):
        run_in_child(say_and_wait, "a", name="Saying")
    assert multiprocessing.active_children() == []
