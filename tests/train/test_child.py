"""Child processes and signals: what comes back from a child, that none outlives its parent, and that no signal is lost."""

import multiprocessing
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from subprocess import PIPE, Popen

import pytest

from tests.conftest import ROOT
from train.common.child import ExitOnce, run_in_child
from train.common.command_line import Command
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


def in_a_callback(work: Callable[[], object]) -> None:
    """Python drops what is raised here."""

    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing, lambda _: work())
    del thing
    assert reference() is None


def in_a_class(work: Callable[[], object]) -> None:
    """Python 3.11 makes a RuntimeError of what is raised here, as it does within an enumeration."""

    class Name:
        def __set_name__(self, *_: object) -> None:
            work()

    type("Thing", (), {"name": Name()})


def as_an_error_of_the_users(work: Callable[[], object]) -> None:
    try:
        in_a_class(work)
    except RuntimeError as cause:
        raise EngineError("Nothing can be opened.") from cause


class InterruptsTheGroup:
    """Ctrl-C, which reaches a new child while it reads its arguments, and its parent."""

    def __reduce__(self) -> tuple[Callable[[int, int], None], tuple[int, int]]:
        return os.killpg, (0, signal.SIGINT)


def in_the_start_of_a_child(_: Callable[[], object]) -> None:
    run_in_child(print, InterruptsTheGroup(), name="Printing")


PLACES = {
    work.__name__: work for work in (in_a_callback, in_a_class, as_an_error_of_the_users, in_the_start_of_a_child)
}


@dataclass(frozen=True)
class Interrupted:
    """A command that gets a signal."""

    place: str
    signal: str


def be_interrupted(config: Interrupted) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    signal.signal(signal.SIGTERM, ExitOnce(7))
    try:
        PLACES[config.place](partial(signal.raise_signal, signal.Signals[config.signal]))
        time.sleep(3600)
    finally:
        if config.signal == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)  # a second one does not interrupt this
        print("cleaned up", flush=True)


main = Command(Interrupted, be_interrupted, "interrupted")


@pytest.mark.parametrize(
    ("place", "how"),
    [
        ("in_the_start_of_a_child", "SIGINT"),
        *((place, how) for place in list(PLACES)[:-1] for how in ("SIGINT", "SIGTERM")),
    ],
)
def test_a_signal_ends_a_command_wherever_it_strikes(place: str, how: str) -> None:
    code = "import sys; from tests.train.test_child import main; sys.exit(main())"
    command = [sys.executable, "-c", code, place, how]
    with Popen(command, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True) as process:
        printed = process.communicate(timeout=600)
    assert printed == ("cleaned up\n", {"SIGINT": "interrupted\n", "SIGTERM": ""}[how])
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 7}[how]


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


def test_a_child_is_ended_where_its_words_are_refused() -> None:
    def refuse_line(line: str) -> None:
        raise BrokenPipeError(line)

    with said_to(refuse_line), pytest.raises(BrokenPipeError, match=r"^a$"):
        run_in_child(say_and_wait, "a", name="Saying")
    assert multiprocessing.active_children() == []
