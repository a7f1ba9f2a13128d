"""Accounts of the page: flags and files, no password shown or kept, and the delay after a wrong login."""

import asyncio
import hashlib
import inspect
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from demo.access.accounts import LONGEST_DELAY_SECONDS, SLOTS, Throttle, parse_auth
from train.common.errors import UsageError


def test_one_account_opens_with_its_password_alone() -> None:
    assert parse_auth(None, None) is None
    accounts = parse_auth("ann:a:b ü", None)
    assert accounts is not None
    assert accounts.matches("ann", "a:b ü")
    wrong = [("ann", "a"), ("ann", "A:b ü"), ("ann", ""), ("", ""), ("bob", "a:b ü"), ("ann:a", "b ü")]
    wrong.append(("ann\udcff", "\ud800"))  # what a form can hold
    assert not any(accounts.matches(*account) for account in wrong)
    # No password is shown or kept.
    assert "a:b" not in repr(accounts)
    assert accounts.digests == (hashlib.sha256(b"ann").digest() + hashlib.sha256("a:b ü".encode()).digest(),)


def test_a_file_holds_several_accounts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "accounts"
    path.write_bytes("\ufeff# ours\r\nann:one\r\n\r\n  bob :two:2\n#eve:three\nzoë:ÿ".encode())
    path.chmod(0o600)
    accounts = parse_auth(None, path)
    assert accounts is not None
    known = (("ann", "one"), ("bob", "two:2"), ("zoë", "ÿ"), ("#eve", "three"), ("eve", "three"))
    assert [accounts.matches(*account) for account in known] == [True, True, True, False, False]
    assert capsys.readouterr().out == ""
    if os.name == "posix":
        path.chmod(0o644)
        parse_auth(None, path)
        expected = f"warning: every user of this machine can read {path}. Close it with: chmod 600 {path}\n"
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize("text", ["secret", ":secret", "  :secret", "secret:", "", "secret: secret", "secret:secret "])
def test_a_flag_that_is_no_account_is_refused_and_not_repeated(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--auth: ") as caught:
        parse_auth(text, None)
    assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match="give one of them"):
        parse_auth("ann:secret", tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"ann:one\nsecret\n", "line 2: write user:password"),
        (b"\n#\n:secret\n", "line 3: write user:password"),
        (b"ann:secret \n", "line 1: the password begins or ends with a space"),
        (b"ann:secret\nbob:secret\n ann:secret2\n", "line 3: line 1 has the same user"),
        (b"# secret\n", "holds no account"),
        (b"ann:secret\xff", "byte 11 is not UTF-8"),
        (None, "cannot be read ("),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_line(content: bytes | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "accounts" if content else tmp_path
    if content:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=f"^--auth-file {re.escape(str(path))}.*{re.escape(expected)}") as caught:
        parse_auth(None, path)
    assert "secret" not in str(caught.value)


def test_wrong_logins_wait_longer_each_time_and_the_right_one_never_longer_than_the_longest() -> None:
    throttle = Throttle()
    with ThreadPoolExecutor(4) as pool:
        waits = list(pool.map(lambda _: throttle.wait_seconds("ann", right=False), range(8)))
    assert sorted(waits) == [0, 0.5, 1, 2, 4, 8, 8, 8]
    for _ in range(1000):  # no count grows beyond what a float can hold
        assert throttle.wait_seconds("ann", right=False) == LONGEST_DELAY_SECONDS
    # Another name does not wait, and no flood of names resets a count.
    others = [throttle.wait_seconds(f"bob{number}", right=False) for number in range(50)]
    assert others.count(0) >= 45  # a few may share a counter
    for number in range(2 * SLOTS):
        throttle.wait_seconds(f"eve{number}", right=False)
    assert throttle.wait_seconds("ann", right=True) == LONGEST_DELAY_SECONDS
    assert throttle.wait_seconds("ann", right=True) == 0


def test_a_login_that_waits_does_not_hold_up_the_event_loop() -> None:
    accounts = parse_auth("ann:secret", None)
    assert accounts is not None
    # Gradio awaits only what this recognizes; an unawaited coroutine would count as a yes.
    assert inspect.iscoroutinefunction(accounts.login)

    async def use() -> None:
        assert await accounts.login("ann", "secret")
        assert not await accounts.login("ann", "wrong")
        slow = asyncio.create_task(accounts.login("ann", "wrong"))
        assert await accounts.login("bob", "secret") is False  # runs through while the other waits
        assert not slow.done()
        assert await slow is False

    asyncio.run(use())
