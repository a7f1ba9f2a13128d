"""Which port of this machine a server can listen on."""

import errno
import socket
from dataclasses import dataclass

from train.common.errors import UsageError

PORTS_TRIED = 100


@dataclass(frozen=True)
class PortFlags:
    """What the flags for the address are called."""

    host: str = "--host"
    port: str = "--port"


PORT_FLAGS = PortFlags()


def check_port(port: int | None, flag: str) -> None:
    """Refuse what is no number of a port; None is the first free one.

    Raises:
        UsageError: it is none.
    """
    if port is not None and not 1 <= port <= 65535:
        raise UsageError(f"{flag} {port}: give a number from 1 to 65535.")


def find_port(host: str, port: int | None, *, first: int, flags: PortFlags = PORT_FLAGS) -> int:
    """A port to listen on.

    Args:
        port: the one that is wanted; None for the first free one.
        first: where to look for that.
        flags: the names of the flags, for complaints.

    Raises:
        UsageError: the port is in use, none is free, or the host is not this machine's.
    """
    candidates = [port] if port is not None else range(first, first + PORTS_TRIED)
    for candidate in candidates:
        try:
            family = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # As a server does, so that a port whose last connections still linger counts as free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, candidate))
            return candidate
        except socket.gaierror as cause:
            raise UsageError(f"{flags.host} {host}: there is no such address. Try 127.0.0.1 or 0.0.0.0.") from cause
        except PermissionError as cause:
            raise UsageError(f"{flags.port} {candidate}: this user may not use it. Take one above 1023.") from cause
        except OSError as cause:
            if cause.errno != errno.EADDRINUSE:
                raise UsageError(
                    f"{flags.host} {host}: this machine has no such address. Try 127.0.0.1 or 0.0.0.0."
                ) from cause
            if port is not None:
                raise UsageError(
                    f"{flags.port} {port} is in use on {host}. Stop what listens there, or choose another {flags.port}."
                ) from cause
    raise UsageError(f"The ports {first} to {first + PORTS_TRIED - 1} are all in use. Choose one with {flags.port}.")
