"""A Ray cluster for as long as a command needs it: one that is there already, or one started on this machine.

Needs ``pip install "ray[serve,data]==2.60.0"``, which promptfold does without elsewhere. Importing this module does
not import Ray.
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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from train.common.errors import EngineError, UsageError, first_line
from train.common.limits import MIB

INSTALL = 'pip install "ray[serve,data]==2.60.0"'


OBJECT_STORE_MIB = 80
"""Of shared memory for a cluster of our own: what is passed around is small, and a container's /dev/shm may be."""


AUTO = "auto"
"""For an address: the cluster of which this machine is part."""


REACH_SECONDS = 5.0
"""How long a cluster's address may take to accept a connection."""


# Ray and its processes read these when they start. setdefault: a user who wants more sets the variable and keeps it.
# What Ray's C++ half prints to standard error is about Ray's own parts; its exceptions come all the same.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


# The behaviour that will be Ray's default. Without it a warning is given at every start.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@dataclass(frozen=True)
class RayCluster:
    """A cluster to which this process is connected.

    Attributes:
        address: HOST:PORT of its head, by which others connect.
        node_cpus: of each machine that is alive, how many CPUs Ray may use there.
        is_own: whether it was started here and ends with the block.
    """

    address: str
    node_cpus: tuple[int, ...]
    is_own: bool

    @property
    def cpus(self) -> int:
        """Of all machines together."""
        return sum(self.node_cpus)


@contextmanager
def ray_cluster(address: str | None = None, num_cpus: int | None = None) -> Iterator[RayCluster]:
    """Connect to a cluster, or start a quiet one on this machine for nobody else; at the end leave or stop it.

    SIGTERM ends the block by `SystemExit`, so that nothing stays behind; Ctrl-C by `KeyboardInterrupt`, as ever.

    Args:
        address: HOST:PORT of its head or "auto"; None to start a cluster.
        num_cpus: how many CPUs one that is started may use; by default all that this process may.

    Raises:
        UsageError: Ray is not installed, or the address is none.
        EngineError: nothing answers there, or Ray cannot be started.
    """
    ray = import_ray()
    _reread_lock()
    if address is not None:
        reach(address)
    folder = short_folder() if address is None else None
    try:
        with _sigterm_exits(), nullcontext() if folder is None else _locked():
            try:
                # Ray puts a handler of its own in our handler's place.
                with sigterm_kept(), no_stderr():
                    _connect(ray, address, num_cpus, folder)
                yield _describe(ray, is_own=address is None)
            finally:
                ray.shutdown()
    finally:
        if folder is not None:
            remove_folder(folder)


def import_ray(*parts: str) -> Any:
    """The module ``ray``.

    Args:
        parts: of it, which are imported too: "serve"

    Raises:
        UsageError: it is not installed.
    """
    try:
        import ray

        for part in parts:
            import_module(f"ray.{part}")
    except ImportError as cause:
        raise UsageError(f"Ray is not installed ({first_line(cause)}). Run: {INSTALL}") from cause
    return ray


def check_address(address: str) -> None:
    """Refuse what is no address of a cluster.

    Raises:
        UsageError: it is none.
    """
    host, _, port = address.rpartition(":")
    if address != AUTO and (not host or "/" in host or not port.isdecimal() or not 1 <= int(port) <= 65535):
        raise UsageError(f'--address {address[:80]}: give HOST:PORT of a Ray cluster\'s head, or "{AUTO}".')


def reach(address: str) -> None:
    """Refuse an address at which nothing listens: Ray itself would try for minutes.

    Raises:
        UsageError: it is none.
        EngineError: no Ray answers there.
    """
    check_address(address)
    if address == AUTO:
        return
    host, _, port = address.rpartition(":")
    try:
        trouble = _greet(host, int(port))
    except OSError as cause:
        trouble = cause.strerror or str(cause)
    if trouble:
        raise EngineError(
            f"--address {address}: no Ray cluster answers there ({trouble}). Start one with `ray start --head`, or leave "
            "--address out to start one on this machine."
        )


def _greet(host: str, port: int) -> str:
    """Why what listens there cannot be Ray, which speaks gRPC; empty where it may be."""
    with socket.create_connection((host, port), timeout=REACH_SECONDS) as connection:
        # HTTP/2's greeting and an empty frame of settings (RFC 9113, 3.4), which the other side answers with its own.
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        answer = connection.recv(9)
    return "" if answer[3:4] == b"\4" else "what listens there does not speak gRPC"


@contextmanager
def _locked() -> Iterator[None]:
    """Give a cluster that is started within the block a token, without which nobody can use it.

    Ray's ports are open to the network, and who reaches them could run any code here.
    """
    if "RAY_AUTH_MODE" in os.environ:  # the user has decided
        yield
        return
    lock = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.update(lock)
    _reread_lock()
    try:
        yield
    finally:
        for name in lock:
            os.environ.pop(name, None)
        _reread_lock()


def _reread_lock() -> None:
    """Let this process's Ray look at its variables again, which it does once, when it is imported."""
    raylet: Any = import_module("ray._raylet")  # its stub lacks these names
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _connect(ray: Any, address: str | None, num_cpus: int | None, folder: Path | None) -> None:
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address is None:
        settings |= {
            "address": "local",  # whatever RAY_ADDRESS says
            "num_cpus": num_cpus or _usable_cores(),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_MIB * MIB,
            "_temp_dir": str(folder),
        }
    else:
        settings["address"] = address
    try:
        ray.init(**settings)
    # Of Ray's errors here some are ConnectionErrors, most plain RuntimeErrors or ValueErrors, a few of its own classes.
    except Exception as cause:
        if address is None:
            raise EngineError(f"Ray cannot be started on this machine ({first_line(cause)}).") from cause
        raise EngineError(
            f"--address {address}: the Ray cluster there cannot be used ({first_line(cause)}). Run this on one of its "
            "machines, with the same Python and Ray."
        ) from cause


def _usable_cores() -> int:
    # Within the function: NumPy comes with it.
    from train.common.machine import usable_cores

    return usable_cores()


def _describe(ray: Any, *, is_own: bool) -> RayCluster:
    cpus = tuple(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    return RayCluster(address=ray.get_runtime_context().gcs_address, node_cpus=cpus, is_own=is_own)


def short_folder() -> Path:
    """A new folder for Ray's sockets, whose names may have some hundred characters in all."""
    parent = tempfile.gettempdir()
    if len(parent) > 24 and Path("/tmp").is_dir():  # noqa: S108 -- mkdtemp makes what only we can read
        parent = "/tmp"  # noqa: S108
    return Path(tempfile.mkdtemp(prefix="pf-ray-", dir=parent))


def remove_folder(folder: Path) -> None:
    """Remove a folder in which Ray's last processes may still write their logs."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


@contextmanager
def no_stderr() -> Iterator[None]:
    """Keep off the terminal what Ray's C++ half says while it starts: that it obeys a variable, that it tries again."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Let SIGTERM raise `SystemExit` within the block; in another thread than the first one Python forbids it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Undo what the block does to the handler of SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
