"""A running page for tests: ``python -m demo`` in a process of its own, found by what it prints."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradio_client import Client

from tests.conftest import ON_CPU, ROOT

START_TIMEOUT_SECONDS = 900


class Server:
    """One ``python -m demo`` and everything it printed so far."""

    def __init__(self, flags: list[str], cache: Path, environment: dict[str, str] | None = None) -> None:
        self.lines: list[str] = []
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # A shell starts background jobs so, and children inherit it: Ctrl-C would be lost.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "demo", *flags],
            cwd=ROOT,
            env=os.environ | {"XDG_CACHE_HOME": str(cache)} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())

    @property
    def output(self) -> str:
        """Everything printed so far."""
        return "\n".join(self.lines)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until a line matches, and return the match."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if match := re.search(pattern, line):
                    return match
            if self._process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.05)
        raise AssertionError(f"the page never said {pattern!r}; it said:\n{self.output}")

    def wait_for_url(self) -> str:
        """Wait until the page is served, and return its address."""
        return self.wait_for(r"the page is at (http://\S+)")[1]

    def children(self) -> list[int]:
        """Processes that the page started, resource trackers of multiprocessing left out."""
        pids = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
                command = (status.parent / "cmdline").read_text()
            except OSError:
                continue  # it ended meanwhile
            if int(fields[1]) == self.pid and "spawn_main" in command:
                pids.append(int(status.parent.name))
        return pids

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End the page and return its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(how)
        try:
            status = self._process.wait(timeout=60)
        finally:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=10)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return status


@contextmanager
def serve(flags: list[str], cache: Path, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """Start a page, and end it whatever happens."""
    server = Server(flags, cache, environment)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def serve_cleanly(flags: list[str], cache: Path, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """The same for visitors who follow the rules; Gradio prints a traceback for each malformed request."""
    with serve(flags, cache, environment) as server:
        yield server
    assert "Traceback" not in server.output, server.output


@contextmanager
def connect(url: str) -> Iterator[Client]:
    """A visitor's program."""
    client = Client(url, verbose=False)
    try:
        yield client
    finally:
        client.close()


def exists(pid: int) -> bool:
    """Whether a process still runs (a zombie does not, once the last of its threads has ended)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    except OSError:
        return False
    return state != "Z" or threads > 1


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
    """Lines of the record that name another machine."""
    lines = [line.split() for line in (folder / "reached").read_text(encoding="utf-8").splitlines()]
    return [" ".join(line) for line in lines if line[1] not in LOOPBACK]
