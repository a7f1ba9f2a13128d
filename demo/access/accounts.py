"""Accounts of the page: their passwords, and the delay after a wrong login."""

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
"""Delay of the login that follows a wrong one; each further wrong login doubles it, up to the longest."""

SLOTS = 4096
"""Number of counters of wrong logins; user names share them by hash."""


class Throttle:
    """Delays logins by the number of wrong ones under the same user name.

    A right password is delayed as well, or a quick answer would give it away, but never longer than
    `LONGEST_DELAY_SECONDS`: an account cannot be locked out. The hash that assigns names to counters has a secret of
    this process, and the number of counters is fixed: memory is bounded, a flood of names resets no counter, and
    existing names behave like unknown ones.
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
            # Counted on arrival: logins at the same time wait as long as one after the other.
            wrong = self._wrong[slot]
            self._wrong[slot] = 0 if right else min(wrong + 1, 64)
        return min(FIRST_DELAY_SECONDS * 2 ** (wrong - 1), LONGEST_DELAY_SECONDS) if wrong else 0.0


@dataclass(frozen=True)
class Accounts:
    """The accounts that may open the page. Pass `login` to `gr.Blocks.launch(auth=…)`."""

    digests: tuple[bytes, ...] = field(repr=False)
    """For each account: SHA-256 of the user name, then SHA-256 of the password."""
    throttle: Throttle = field(default_factory=Throttle, repr=False, compare=False)

    def matches(self, username: str, password: str) -> bool:
        """Whether there is such an account, in the same time whatever is wrong and wherever the account stands."""
        given = _digest(username, password)
        found = False
        for digest in self.digests:
            found |= hmac.compare_digest(digest, given)
        return found

    async def login(self, username: str, password: str) -> bool:
        """`matches`, delayed by the throttle.

        Gradio calls this in its event loop (``login`` in gradio/routes.py), where a plain sleep would hold up every
        visitor. It awaits what `inspect.iscoroutinefunction` accepts: a bound method, not an object with ``__call__``.
        """
        right = self.matches(username, password)
        await asyncio.sleep(self.throttle.wait_seconds(username, right=right))
        return right


def _as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(username: str, password: str) -> bytes:
    # Two hashes: with one over both, a colon in the user name could shift the border between them.
    return hashlib.sha256(_as_bytes(username)).digest() + hashlib.sha256(_as_bytes(password)).digest()


def parse_auth(user_colon_password: str | None, auth_file: Path | None) -> Accounts | None:
    """The accounts of ``--auth`` or ``--auth-file``; None if neither was given.

    The file has one account per line; empty lines and lines that begin with # are skipped. A password may contain
    colons. A `UsageError` never contains a password.
    """
    if user_colon_password is not None and auth_file is not None:
        raise UsageError("--auth and --auth-file: give one of them.")
    if user_colon_password is not None:
        return Accounts((_digest(*_parse_account(user_colon_password, "--auth")),))
    return None if auth_file is None else _read_accounts(auth_file)


def _parse_account(text: str, where: str) -> tuple[str, str]:
    """User name and password of "user:password"; ``where`` begins the error messages."""
    username, _, password = text.partition(":")
    username = username.strip()  # as Gradio does before it asks
    if not username or not password:
        raise UsageError(f"{where}: write user:password, and leave neither empty.")
    if password != password.strip():
        raise UsageError(f"{where}: the password begins or ends with a space.")
    return username, password


def _read_accounts(path: Path) -> Accounts:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
        readable_by_all = os.name == "posix" and bool(path.stat().st_mode & 0o004)
    except UnicodeDecodeError as cause:
        raise UsageError(f"--auth-file {path}: byte {cause.start + 1} is not UTF-8. Save it as UTF-8.") from cause
    except OSError as cause:
        raise UsageError(f"--auth-file {path} cannot be read ({cause.strerror}).") from cause
    line_of: dict[str, int] = {}
    digests = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"--auth-file {path}, line {number}"
        username, password = _parse_account(line.removesuffix("\r"), where)
        if username in line_of:
            raise UsageError(f"{where}: line {line_of[username]} has the same user. Keep one of them.")
        line_of[username] = number
        digests.append(_digest(username, password))
    if not digests:
        raise UsageError(f"--auth-file {path} holds no account. Write user:password, one per line.")
    if readable_by_all:
        say(f"warning: every user of this machine can read {path}. Close it with: chmod 600 {path}")
    return Accounts(tuple(digests))
