"""Which port of this machine a server can listen on."""

import errno
import socket
from typing import NamedTuple

from train.common.errors import UsageError

PORTS_TRIED = 100


class PortFlags(NamedTuple):
    """Names of the flags for host and port, for error messages."""

    host: str = "--host"
    port: str = "--port"


PORT_FLAGS = PortFlags()


def check_port(port: int | None, flag: str) -> None:
    """Raise a UsageError for a number that no port has; None means the first free port."""
    if port is not None and not 1 <= port <= 65535:
        raise UsageError(f"{flag} {port}: give a number from 1 to 65535.")


def find_port(host: str, port: int | None, *, first: int, flags: PortFlags = PORT_FLAGS) -> int:
    """``port``, or without it the first free one from ``first`` on; a UsageError where nothing can listen there."""
    remedy = "Try 127.0.0.1 or 0.0.0.0."
    for candidate in [port] if port is not None else range(first, first + PORTS_TRIED):
        try:
            family = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # As servers do, so that a port whose last connections still linger counts as free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, candidate))
            return candidate
        except socket.gaierror as cause:
            raise UsageError(f"{flags.host} {host}: there is no such address. {remedy}") from cause
        except PermissionError as cause:
            raise UsageError(f"{flags.port} {candidate}: this user may not use it. Take one above 1023.") from cause
        except OSError as cause:
            if cause.errno != errno.EADDRINUSE:
                raise UsageError(f"{flags.host} {host}: this machine has no such address. {remedy}") from cause
            if port is not None:
                raise UsageError(
                    f"{flags.port} {port} is in use on {host}. Stop what listens there, or choose another {flags.port}."
                ) from cause
    raise UsageError(f"The ports {first} to {first + PORTS_TRIED - 1} are all in use. Choose one with {flags.port}.")
