"""A running page for tests: ``python -m demo`` in a process of its own, found by what it prints."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
from gradio_client import Client

from tests.conftest import ON_CPU, ROOT

START_TIMEOUT_SECONDS = 900


class Server:
    """One ``python -m demo``, or another program in the folder of the cache, and everything it printed so far."""

    def __init__(
        self,
        command: list[str],
        cache: Path,
        environment: dict[str, str] | None = None,
        *,
        python: str | Path = sys.executable,
    ) -> None:
        self.lines: list[str] = []
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # A shell starts background jobs so, and children inherit it: Ctrl-C would be lost.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._process = subprocess.Popen(
            [python, *command],
            cwd=ROOT if command[0] == "-m" else cache,
            env=os.environ | {"XDG_CACHE_HOME": str(cache)} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that Ctrl-C can be sent to it and its engines, as a terminal does
        )
        assert self._process.stdout is not None
        self._printed = self._process.stdout
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._printed:
            self.lines.append(line.rstrip())

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if match := next(filter(None, (re.search(pattern, line) for line in list(self.lines))), None):
                return match
            if self._process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.05)
        raise AssertionError(f"the page never said {pattern!r}; it said:\n{self.output}")

    def wait_for_url(self) -> str:
        return self.wait_for(r"the page is at (http://\S+)")[1]

    @property
    def url(self) -> str:
        """Without the last slash."""
        return self.wait_for_url().rstrip("/")

    def children(self) -> list[int]:
        """Processes that the page started, resource trackers of multiprocessing left out."""
        children = [(child.pid, child.as_dict(["cmdline"])["cmdline"]) for child in psutil.Process(self.pid).children()]
        return [pid for pid, command in children if "spawn_main" in " ".join(command or [])]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        if how == signal.SIGINT and self._process.poll() is None:
            os.killpg(self.pid, how)
        else:
            self._process.send_signal(how)  # nothing is done where it has ended
        try:
            status = self._process.wait(timeout=60)
        finally:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=10)
        self._printed.close()
        return status


@contextmanager
def serve(
    flags: list[str],
    cache: Path,
    environment: dict[str, str] | None = None,
    *,
    program: Iterable[str] = ("-m", "demo"),
    python: str | Path = sys.executable,
) -> Iterator[Server]:
    server = Server([*program, *flags], cache, environment, python=python)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def serve_cleanly(*arguments: Any, **program: Any) -> Iterator[Server]:
    """The same for visitors who follow the rules; Gradio prints a traceback for each malformed request."""
    with serve(*arguments, **program) as server:
        yield server
    assert "Traceback" not in server.output, server.output


def connect(url: str) -> AbstractContextManager[Client]:
    return closing(Client(url, verbose=False))


def exists(pid: int) -> bool:
    """Whether a process still runs (a zombie does not, once the last of its threads has ended)."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pid: int) -> None:
    """Wait until a process is no more; a zombie counts as gone."""
    deadline = time.monotonic() + 30
    while exists(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.02)


WATCH = '''
"""Writes down every address that this process, and each that it starts, connects to or asks a name of."""
import os, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a text or bytes: of this machine's own kind
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    else:
        return
    if host is not None:
        host = host.decode() if isinstance(host, bytes) else str(host)
        with open(os.environ["REACHED"], "a", encoding="utf-8") as file:
            file.write(f"{event} {host} {os.getpid()}\\n")

sys.addaudithook(watch)
'''
"""A ``sitecustomize``: Python imports it at the start of every process."""

LOOPBACK = {"127.0.0.1", "localhost", "::1", "0.0.0.0"}  # noqa: S104 -- to find, not to listen on


def watching(folder: Path) -> dict[str, str]:
    """Environment variables under which every Python process writes down the hosts that it reaches for."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    (folder / "reached").write_text("", encoding="utf-8")
    # Hugging Face's offline switch would switch telemetry off for us.
    return ON_CPU | {"PYTHONPATH": str(folder), "REACHED": str(folder / "reached"), "HF_HUB_OFFLINE": ""}


def strange_hosts(folder: Path) -> list[str]:
    lines = [line.split() for line in (folder / "reached").read_text(encoding="utf-8").splitlines()]
    return [" ".join(line) for line in lines if line[1] not in LOOPBACK]
