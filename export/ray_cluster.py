"""A Ray cluster for as long as a command needs it: one that runs already, or one started on this machine.

Importing this module does not import Ray.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from train.common.child import ExitOnce
from train.common.errors import EngineError, UsageError, first_line
from train.common.limits import MIB
from train.common.machine import usable_cores

INSTALL = 'pip install "ray[serve,data]==2.60.0"'
OBJECT_STORE_MIB = 80
"""Shared memory of a cluster that is started here. Little is passed around, and a container's /dev/shm may be small."""
REACH_SECONDS = 5.0
START_SECONDS = 300.0
"""After this time no further attempt is made to start a part of Ray."""
START_ATTEMPTS = 3
START_PAUSE_SECONDS = 1.0

# Ray and its processes read these when they start. A user who sets one of them keeps that value.
for _name, _value in {
    # Ray's C++ code logs to standard error about its own parts; its exceptions still reach us.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # Ray's future default; without it every start prints a warning.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Seconds until the server of a cluster must listen; Ray's 30 are too few on a busy machine.
    "RAY_gcs_server_port_wait_time_s": "120",
}.items():
    os.environ.setdefault(_name, _value)


@dataclass(frozen=True)
class RayCluster:
    """A cluster to which this process is connected."""

    address: str
    """HOST:PORT of its head, by which others connect."""
    node_cpus: tuple[int, ...]
    """How many CPUs Ray may use on each machine that is alive."""

    @property
    def cpus(self) -> int:
        """CPUs of all machines together."""
        return sum(self.node_cpus)


@contextmanager
def ray_cluster(
    address: str | None = None, num_cpus: int | None = None, *, is_private: bool = True, **options: Any
) -> Iterator[RayCluster]:
    """Connect to the cluster at HOST:PORT ("auto": this machine's), or start one here; leave or stop it at the end.

    A started one has ``num_cpus`` (by default all that this process may use), and admits this process alone where it
    ``is_private``, or all that have the user's token. Within the block SIGTERM raises `SystemExit` where the command has
    no handler of its own, so that nothing stays behind.

    Raises:
        UsageError: Ray is not installed, or the address is not one.
        EngineError: nothing answers there, Ray cannot be started, or this process uses a cluster already.
    """
    ray = import_ray()
    if address is not None:
        _reach(address)
    if ray.is_initialized():
        raise EngineError("This process uses a Ray cluster already, and can use one only.")
    _reread_token()
    with ExitStack() as stack:
        folder = None
        if address is None:
            folder = stack.enter_context(_short_folder())
            if is_private:
                stack.enter_context(_private_token())
            # "local": without it, RAY_ADDRESS could name another cluster.
            options |= {"address": "local", "num_cpus": num_cpus or usable_cores(), "include_dashboard": False}
            options |= {"object_store_memory": OBJECT_STORE_MIB * MIB, "_temp_dir": folder}
            # Ray's default is 15: beside other busy programs its processes would hardly run, and not start in time.
            os.environ.setdefault("RAY_worker_niceness", "0")
            message = "Ray cannot be started on this machine ({})."
        else:
            options["address"] = address
            message = (
                f"--address {address}: the Ray cluster there cannot be used ({{}}). Run this on one of its machines, with "
                "the same Python and Ray, and with its ~/.ray/auth_token."
            )
        before = signal.getsignal(signal.SIGTERM)
        handler = before if callable(before) else ExitOnce(128 + signal.SIGTERM)
        stack.callback(_handle_sigterm, before)
        _handle_sigterm(handler)
        stack.callback(ray.shutdown)

        def connect() -> None:
            try:
                with _no_stderr():
                    ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **options)
            except Exception:
                ray.shutdown()
                if folder:
                    _kill_children(folder)
                raise
            finally:
                _handle_sigterm(handler)  # Ray installs its own

        start_with_retries(connect, message)
        cpus = tuple(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        yield RayCluster(ray.get_runtime_context().gcs_address, cpus)


def import_ray(name: str = "ray") -> Any:
    """Ray, or one of its modules; raises a UsageError where that is not installed."""
    try:
        return import_module(name)
    except ImportError as cause:
        raise UsageError(f"Ray is not installed ({first_line(cause)}). Run: {INSTALL}") from cause


def start_with_retries(start: Callable[[], object], message: str, final: tuple[type[Exception], ...] = ()) -> None:
    """Start a part of Ray, and try again where that fails: on a busy machine Ray's own deadlines pass.

    After the last attempt, or an exception of ``final``, it raises an EngineError: the message with Ray's reason for {}.
    """
    deadline = time.monotonic() + START_SECONDS
    for attempts_left in reversed(range(START_ATTEMPTS)):
        try:
            start()
            return
        # Ray's errors share no base class: RayError, TimeoutError, ConnectionError, plain RuntimeError and Exception.
        except Exception as cause:
            if not attempts_left or time.monotonic() > deadline or isinstance(cause, final):
                raise EngineError(message.format(ray_reason(str(cause)) or type(cause).__name__)) from cause
        time.sleep(START_PAUSE_SECONDS)


def ray_reason(message: str) -> str:
    """The sentence that matters in a message of Ray's, which may contain a traceback; it has no full stop."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line in reversed(lines):
        name, _, said = line.partition(": ")
        if name.rpartition(".")[2].endswith("Error") and said:
            return said.rstrip(".")
    return lines[0].rstrip(".") if lines else ""


def check_address(address: str) -> None:
    """Raise a UsageError for what cannot be a cluster's address."""
    host, _, port = address.rpartition(":")
    if address != "auto" and (not host or "/" in host or not port.isdecimal() or not 1 <= int(port) <= 65535):
        raise UsageError(f'--address {address[:80]}: give HOST:PORT of a Ray cluster\'s head, or "auto".')


def _reach(address: str) -> None:
    """Refuse an address at which no Ray listens: Ray itself would try for minutes."""
    check_address(address)
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    trouble = "what listens there does not speak gRPC"
    try:
        with socket.create_connection((host, int(port)), timeout=REACH_SECONDS) as connection:
            # HTTP/2's preface and an empty SETTINGS frame (RFC 9113, 3.4), which a server answers with its own.
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            if connection.recv(9)[3:4] == b"\4":
                return
    except OSError as cause:
        trouble = cause.strerror or str(cause)
    raise EngineError(
        f"--address {address}: no Ray cluster answers there ({trouble}). Start one with `ray start --head`, or leave "
        "--address out to start one on this machine."
    )


@contextmanager
def _private_token() -> Iterator[None]:
    """Give a cluster that is started within the block a secret token: Ray's ports are open, and with it anyone can run code."""
    if "RAY_AUTH_MODE" in os.environ:  # the user has decided
        yield
        return
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.update(token)
    _reread_token()
    try:
        yield
    finally:
        for name in token:
            os.environ.pop(name, None)
        _reread_token()


def _reread_token() -> None:
    """Let Ray read its variables again, which it does only once, when it is imported."""
    raylet: Any = import_module("ray._raylet")  # its stub lacks these names
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _short_folder() -> Iterator[str]:
    """A new folder for Ray's sockets, whose paths may have about a hundred characters."""
    is_long = len(tempfile.gettempdir()) > 24 and Path("/tmp").is_dir()  # noqa: S108 -- mkdtemp makes what only we can read
    folder = tempfile.mkdtemp(prefix="pf-ray-", dir="/tmp" if is_long else None)  # noqa: S108
    try:
        yield folder
    finally:
        for _ in range(50):  # Ray's last processes may still write their logs
            shutil.rmtree(folder, ignore_errors=True)
            if not Path(folder).exists():
                break
            time.sleep(0.1)


def _kill_children(folder: str) -> None:
    """End what a failed start of a cluster in a folder left behind: Ray itself would do so only at exit."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            if folder in " ".join(process.cmdline()):
                process.kill()


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Hide what Ray's C++ code prints while it starts, such as that it obeys a variable."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _handle_sigterm(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
        signal.signal(signal.SIGTERM, handler)
