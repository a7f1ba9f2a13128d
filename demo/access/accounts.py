"""Accounts of the page: passwords, and how often one may be tried."""

import asyncio
import hashlib
import hmac
import os
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path

from train.common.console import say
from train.common.errors import UsageError

FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.5, 8.0
"""Of the login after a wrong one; doubled with every further wrong one."""


SLOTS = 4096
"""Counters of wrong logins, shared by all user names that there could be."""


# Accounts


class Throttle:
    """How long a login has to wait, by the wrong ones before it under the same name.

    A right password waits as well, or giving up early would tell it from a wrong one, but never longer than
    `LONGEST_DELAY_SECONDS`: nobody can be locked out. Names share a fixed number of counters, by a hash with a secret
    of this process: memory is bounded, no flood of names pushes a counter out, and a name that exists behaves like
    one that does not.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._wrong = [0] * SLOTS
        self._lock = threading.Lock()

    def wait_seconds(self, username: str, *, right: bool) -> float:
        """Count a login and return how long its answer has to wait."""
        digest = hmac.digest(self._secret, _as_bytes(username), "sha256")
        slot = int.from_bytes(digest[:8], "big") % SLOTS
        with self._lock:
            # Counted on arrival: many at once wait as long as one after the other.
            wrong = self._wrong[slot]
            self._wrong[slot] = 0 if right else min(wrong + 1, 64)
        return min(FIRST_DELAY_SECONDS * 2 ** (wrong - 1), LONGEST_DELAY_SECONDS) if wrong else 0.0


@dataclass(frozen=True)
class Accounts:
    """Who may open the page. Pass `login` to `gr.Blocks.launch(auth=…)`.

    Attributes:
        digests: of each account SHA-256 of the user name and of the password.
        throttle: slows guessing down.
    """

    digests: tuple[bytes, ...] = field(repr=False)
    throttle: Throttle = field(default_factory=Throttle, repr=False, compare=False)

    def matches(self, username: str, password: str) -> bool:
        """Whether there is such an account; takes the same time whatever is wrong, and wherever it stands."""
        given = _digest(username, password)
        found = False
        for digest in self.digests:
            found |= hmac.compare_digest(digest, given)
        return found

    async def login(self, username: str, password: str) -> bool:
        """The same, slowed down by `Throttle`.

        A coroutine function, because Gradio calls its ``auth`` in the event loop (``login`` in gradio/routes.py), where
        a sleep would hold up every visitor; it awaits what `inspect.iscoroutinefunction` knows, as it does a bound
        method, but not an object whose ``__call__`` is one.
        """
        right = self.matches(username, password)
        await asyncio.sleep(self.throttle.wait_seconds(username, right=right))
        return right


def _as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(username: str, password: str) -> bytes:
    # One of each, or a colon in a login's user name would move the border between the two.
    return hashlib.sha256(_as_bytes(username)).digest() + hashlib.sha256(_as_bytes(password)).digest()


def parse_auth(user_colon_password: str | None, auth_file: Path | None) -> Accounts | None:
    """The accounts of ``--auth`` or ``--auth-file``; None where neither was given.

    Args:
        user_colon_password: "user:password"; the password may hold colons.
        auth_file: one account a line; empty lines and those that begin with # are passed over.

    Raises:
        UsageError: both were given, or one cannot be used. A password is never part of the message.
    """
    if user_colon_password is not None and auth_file is not None:
        raise UsageError("--auth and --auth-file: give one of them.")
    if user_colon_password is not None:
        return Accounts((_account(user_colon_password, "--auth").digest,))
    return None if auth_file is None else _read_accounts(auth_file)


@dataclass(frozen=True)
class _Account:
    username: str
    digest: bytes = field(repr=False)


def _account(text: str, where: str) -> _Account:
    username, colon, password = text.partition(":")
    # Gradio strips user names before it asks.
    username = username.strip()
    if not colon or not username or not password:
        raise UsageError(f"{where}: write user:password, and leave neither empty.")
    if password != password.strip():
        raise UsageError(f"{where}: the password begins or ends with a space.")
    return _Account(username, _digest(username, password))


def _read_accounts(path: Path) -> Accounts:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
        readable_by_all = os.name == "posix" and bool(path.stat().st_mode & 0o004)
    except UnicodeDecodeError as cause:
        raise UsageError(f"--auth-file {path}: byte {cause.start + 1} is not UTF-8. Save it as UTF-8.") from cause
    except OSError as cause:
        raise UsageError(f"--auth-file {path} cannot be read ({cause.strerror}).") from cause
    accounts: dict[str, int] = {}
    digests = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"--auth-file {path}, line {number}"
        account = _account(line.removesuffix("\r"), where)
        if account.username in accounts:
            raise UsageError(f"{where}: the user of line {accounts[account.username]} again. Keep one of them.")
        accounts[account.username] = number
        digests.append(account.digest)
    if not digests:
        raise UsageError(f"--auth-file {path} holds no account. Write user:password, one a line.")
    if readable_by_all:
        say(f"warning: every user of this machine can read {path}. Close it with: chmod 600 {path}")
    return Accounts(tuple(digests))
