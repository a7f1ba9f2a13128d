"""Accounts, Gradio's public link in success and in every failure, its QR code, and the page as a Space."""

import asyncio
import hashlib
import inspect
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import gradio as gr
import pytest
from gradio import networking, tunneling
from gradio_client import Client

from demo.access.accounts import LONGEST_DELAY_SECONDS, SLOTS, Accounts, Throttle, parse_auth
from demo.access.public_link import Tunnel, close_tunnel, open_tunnel, parse_root_path, qr_svg
from tests.conftest import ROOT
from tests.demo.server import exists, wait_until_gone
from train.common.errors import UsageError

# Accounts


def test_without_a_flag_there_are_no_accounts() -> None:
    assert parse_auth(None, None) is None


def test_one_account_opens_with_its_password_alone() -> None:
    accounts = parse_auth("ann:a:b ü", None)
    assert accounts is not None
    assert accounts.matches("ann", "a:b ü")
    for username, password in (
        ("ann", "a"),
        ("ann", "A:b ü"),
        ("ann", ""),
        ("", ""),
        ("bob", "a:b ü"),
        ("ann:a", "b ü"),
    ):
        assert not accounts.matches(username, password), (username, password)
    assert not accounts.matches("ann\udcff", "\ud800")  # what a form can hold


def test_a_file_holds_several_accounts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "accounts"
    path.write_bytes("\ufeff# ours\r\nann:one\r\n\r\n  bob : two:2\n#eve:three\nzoë:ÿ".replace(" two", "two").encode())
    path.chmod(0o600)
    accounts = parse_auth(None, path)
    assert accounts is not None
    assert accounts.matches("ann", "one")
    assert accounts.matches("bob", "two:2")
    assert accounts.matches("zoë", "ÿ")
    assert not accounts.matches("#eve", "three")
    assert not accounts.matches("eve", "three")
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_file_that_everybody_can_read_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "accounts"
    path.write_text("ann:secret", encoding="utf-8")
    path.chmod(0o644)
    assert parse_auth(None, path) is not None
    printed = capsys.readouterr().out
    assert printed == f"warning: every user of this machine can read {path}. Close it with: chmod 600 {path}\n"


@pytest.mark.parametrize("text", ["secret", ":secret", "  :secret", "secret:", "", "secret: secret", "secret:secret "])
def test_a_flag_that_is_no_account_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--auth: ") as caught:
        parse_auth(text, None)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"ann:one\nsecret\n", "line 2: write user:password"),
        (b"\n#\n:secret\n", "line 3: write user:password"),
        (b"ann:secret \n", "line 1: the password begins or ends with a space"),
        (b"ann:secret\nbob:secret\n ann:secret2\n", "line 3: the user of line 1 again"),
        (b"", "holds no account"),
        (b"# secret\n", "holds no account"),
        (b"ann:secret\xff", "byte 11 is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_line(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "accounts"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"^--auth-file {re.escape(str(path))}.*{re.escape(expected)}") as caught:
        parse_auth(None, path)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match=r"^--auth-file .* cannot be read \(.+\)\.$"):
            parse_auth(None, path)
    with pytest.raises(UsageError, match="give one of them"):
        parse_auth("ann:secret", tmp_path)


def test_no_password_is_shown_or_kept() -> None:
    accounts = parse_auth("ann:secret", None)
    assert "secret" not in repr(accounts)
    assert accounts is not None
    assert accounts.digests == (hashlib.sha256(b"ann").digest() + hashlib.sha256(b"secret").digest(),)


def test_wrong_logins_wait_longer_each_time_and_the_right_one_never_longer_than_the_longest() -> None:
    throttle = Throttle()
    waits = [throttle.wait_seconds("ann", right=False) for _ in range(8)]
    assert waits == [0, 0.5, 1, 2, 4, 8, 8, 8]
    for _ in range(1000):  # no count grows beyond what a float can hold
        assert throttle.wait_seconds("ann", right=False) == LONGEST_DELAY_SECONDS
    assert throttle.wait_seconds("ann", right=True) == LONGEST_DELAY_SECONDS
    assert throttle.wait_seconds("ann", right=True) == 0


def test_another_name_does_not_wait_and_no_flood_of_names_forgets_one() -> None:
    throttle = Throttle()
    for _ in range(5):
        throttle.wait_seconds("ann", right=False)
    others = [throttle.wait_seconds(f"bob{number}", right=False) for number in range(50)]
    assert others.count(0) >= 45  # a few may share a counter
    for number in range(2 * SLOTS):
        throttle.wait_seconds(f"eve{number}", right=False)
    assert throttle.wait_seconds("ann", right=True) == LONGEST_DELAY_SECONDS


def test_every_wrong_login_of_many_threads_counts() -> None:
    throttle = Throttle()
    threads = [threading.Thread(target=throttle.wait_seconds, args=("ann",), kwargs={"right": False}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert throttle.wait_seconds("ann", right=True) == 4


def test_a_login_that_waits_does_not_hold_up_the_event_loop() -> None:
    accounts = parse_auth("ann:secret", None)
    assert accounts is not None
    # What Gradio asks, to know whether to await; where it does not, a coroutine would count as a yes.
    assert inspect.iscoroutinefunction(accounts.login)

    async def use(accounts: Accounts) -> None:
        assert await accounts.login("ann", "secret")
        assert not await accounts.login("ann", "wrong")
        slow = asyncio.create_task(accounts.login("ann", "wrong"))
        assert await accounts.login("bob", "secret") is False  # runs through while the other waits
        assert not slow.done()
        assert await slow is False

    asyncio.run(use(accounts))


# Behind a proxy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("/promptfold", "/promptfold"),
        ("/a/b_c-1/", "/a/b_c-1"),
        ("/", ""),
        ("https://demo.example:8443/x/", "https://demo.example:8443/x"),
    ],
)
def test_a_root_path_is_a_path_or_an_address(text: str | None, expected: str | None) -> None:
    assert parse_root_path(text) == expected


@pytest.mark.parametrize(
    "text", ["promptfold", "//evil", "/a b", "/$(id)", "/a?b", "ftp://a/b", "https://", "https:///x"]
)
def test_a_root_path_that_gradio_could_not_use_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--root-path .* write a path such as /promptfold"):
        parse_root_path(text)


# The public link

LINK = "https://0123456789abcdef.gradio.live"


def make_page(*, server_port: int = 7999, space_id: str | None = None) -> gr.Blocks:
    """As much of a launched page as a link needs: `open_tunnel` serves nothing."""
    page = SimpleNamespace(
        server_name="127.0.0.1",
        server_port=server_port,
        share=False,
        share_token="token",
        share_server_address=None,
        share_server_protocol="https",
        share_server_tls_certificate=None,
        share_url=None,
        space_id=space_id,
    )
    return cast(gr.Blocks, page)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Gradio keeps its helper program; certificates go below the same folder. No network whatever the machine's."""
    folder = tmp_path / "hub" / "gradio" / "frpc"
    monkeypatch.setattr(tunneling, "BINARY_FOLDER", folder)
    monkeypatch.setattr(tunneling, "BINARY_PATH", str(folder / tunneling.BINARY_FILENAME))
    monkeypatch.chdir(tmp_path)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
        monkeypatch.setenv(name.lower(), "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    return folder


Helper = Callable[[str], Path]


@pytest.fixture
def helper(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Helper:
    """Puts a shell script where Gradio keeps its helper program, and names a server that nobody asks."""

    def put(script: str) -> Path:
        cache.mkdir(parents=True, exist_ok=True)
        path = Path(tunneling.BINARY_PATH)
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
        monkeypatch.setitem(tunneling.CHECKSUMS, tunneling.BINARY_URL, hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setattr(networking, "GRADIO_SHARE_SERVER_ADDRESS", "127.0.0.1:1")
        return path

    return put


@pytest.fixture(autouse=True)
def no_helper_left() -> Iterator[None]:
    before = len(tunneling.CURRENT_TUNNELS)
    yield
    started = tunneling.CURRENT_TUNNELS[before:]
    del tunneling.CURRENT_TUNNELS[before:]
    for tunnel in started:
        assert tunnel.proc is None


SAYS_LINK = f"echo $$ > pid; echo \"$@\" > arguments; echo 'start proxy success: {LINK}'; exec sleep 1000"


def read_pid(folder: Path) -> int:
    """Of the helper program; written before it says anything."""
    return int((folder / "pid").read_text())


def test_a_link_is_told_and_ends_with_the_page(helper: Helper, tmp_path: Path) -> None:
    helper(SAYS_LINK)
    page = make_page()
    assert open_tunnel(page) == Tunnel(LINK, "")
    assert page.share_url == LINK
    assert page.share is False
    arguments = (tmp_path / "arguments").read_text().split()
    assert {"token", "7999", "127.0.0.1"} <= set(arguments)
    pid = read_pid(tmp_path)
    assert exists(pid)
    close_tunnel(page)
    assert not exists(pid)
    assert page.share_url is None
    close_tunnel(page)  # twice does no harm


def test_a_helper_that_does_not_listen_to_a_signal_is_ended_too(
    helper: Helper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demo.access.public_link.END_TIMEOUT_SECONDS", 0.2)
    helper("trap '' TERM; " + SAYS_LINK)
    page = make_page()
    assert open_tunnel(page).url == LINK
    close_tunnel(page)
    assert not exists(read_pid(tmp_path))


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_the_link_ends_however_the_page_ends(how: str, helper: Helper, tmp_path: Path) -> None:
    """A process of its own, which is killed outright or asked to end."""
    path = helper(SAYS_LINK)
    code = (
        "import hashlib, signal, sys, time\n"
        "from pathlib import Path\n"
        "from gradio import networking, tunneling\n"
        "from demo.access.public_link import open_tunnel\n"
        "from tests.demo.test_sharing import make_page\n"
        "tunneling.BINARY_PATH = sys.argv[1]\n"
        "tunneling.CHECKSUMS[tunneling.BINARY_URL] = hashlib.sha256(Path(sys.argv[1]).read_bytes()).hexdigest()\n"
        "networking.GRADIO_SHARE_SERVER_ADDRESS = '127.0.0.1:1'\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "print(open_tunnel(make_page()).url, flush=True)\n"
        "time.sleep(1000)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == LINK
        pid = read_pid(tmp_path)
        getattr(process, how)()
        wait_until_gone(pid)


def why_not(**settings: Any) -> str:
    """The reason why there is no link."""
    page = make_page()
    tunnel = open_tunnel(page, **settings)
    assert tunnel.url == ""
    assert page.share_url is None
    assert tunnel.why_not.endswith(".")
    return tunnel.why_not


def test_without_network_the_download_of_the_helper_is_what_failed(cache: Path) -> None:
    reason = why_not()
    assert f"The helper program cannot be downloaded from {tunneling.BINARY_URL} (" in reason
    assert str(cache) in reason


def test_a_folder_that_cannot_be_written_is_named(cache: Path) -> None:
    """Permissions do not bind root, as whom tests may run: a file stands in the folder's place."""
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file")
    reason = why_not()
    assert f"cannot be kept in {cache} (" in reason
    assert "HF_HOME" in reason


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_folder_is_named(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o500)
    assert f"cannot be kept in {cache} (" in why_not()
    cache.chmod(0o700)


def test_a_helper_that_is_not_gradios_is_not_run(cache: Path, tmp_path: Path) -> None:
    cache.mkdir(parents=True)
    path = Path(tunneling.BINARY_PATH)
    path.write_text("#!/bin/sh\ntouch ran\n")
    path.chmod(0o755)
    reason = why_not()
    assert reason.startswith(f"{path} is not the program that Gradio published")
    assert not (tmp_path / "ran").exists()


def test_a_system_that_gradio_has_no_helper_for_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(tunneling.CHECKSUMS, tunneling.BINARY_URL)
    assert why_not().startswith("Gradio has no helper program for ")


def test_without_the_server_that_assigns_links_it_is_named(helper: Helper, monkeypatch: pytest.MonkeyPatch) -> None:
    helper("exit 0")
    monkeypatch.setattr(networking, "GRADIO_SHARE_SERVER_ADDRESS", None)
    assert why_not().startswith(f"{networking.GRADIO_API_SERVER}, which assigns the links, gave none (")


def test_what_the_helper_says_last_is_told(helper: Helper, capfd: pytest.CaptureFixture[str]) -> None:
    helper("echo 'login to server failed: dial tcp: i/o timeout'; exec sleep 1000")
    assert "reached no server: login to server failed: dial tcp: i/o timeout." in why_not()


def test_a_helper_that_ends_is_noticed(helper: Helper) -> None:
    helper("exit 3")
    assert why_not() == "Gradio's helper program ended with status 3 before it had a link."


def test_a_helper_that_says_nothing_is_ended_in_time(helper: Helper, tmp_path: Path) -> None:
    helper("echo $$ > pid; exec sleep 1000")
    assert "gave none within 2 s" in why_not(timeout_seconds=2)
    if (tmp_path / "pid").exists():
        assert not exists(read_pid(tmp_path))


def test_a_helper_that_cannot_be_run_is_told(helper: Helper) -> None:
    helper("exit 0").chmod(0o644)
    reason = why_not()
    assert reason == f"{tunneling.BINARY_PATH} cannot be run (Permission denied)."


class LinkServer(ThreadingHTTPServer):
    """In the place of Gradio's server that assigns links: answers once it may."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), LinkHandler)
        self.may_answer = threading.Event()


class LinkHandler(BaseHTTPRequestHandler):
    server: LinkServer

    def do_GET(self) -> None:
        self.server.may_answer.wait()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'[{"host": "127.0.0.1", "port": 1, "root_ca": "a certificate"}]')

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def link_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LinkServer]:
    with LinkServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(networking, "GRADIO_API_SERVER", f"http://127.0.0.1:{server.server_port}/")
        yield server
        server.may_answer.set()
        server.shutdown()
        thread.join()


def test_a_link_is_made_by_way_of_the_server_that_assigns_them(
    helper: Helper, link_server: LinkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(SAYS_LINK)
    monkeypatch.setattr(networking, "GRADIO_SHARE_SERVER_ADDRESS", None)
    link_server.may_answer.set()
    page = make_page()
    assert open_tunnel(page) == Tunnel(LINK, "")
    assert (tmp_path / tunneling.CERTIFICATE_PATH).read_text() == "a certificate"
    close_tunnel(page)


def test_a_folder_that_takes_no_certificate_is_told(
    helper: Helper, link_server: LinkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(SAYS_LINK)
    monkeypatch.setattr(networking, "GRADIO_SHARE_SERVER_ADDRESS", None)
    (tmp_path / ".gradio").write_text("a file where a folder should be")
    link_server.may_answer.set()
    assert "The folder from which the page was started takes no .gradio/certificate.pem (" in why_not()


def test_a_link_that_comes_too_late_is_closed_again(
    helper: Helper, link_server: LinkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a page has said that there is none, there shall be none."""
    helper(SAYS_LINK)
    monkeypatch.setattr(networking, "GRADIO_SHARE_SERVER_ADDRESS", None)
    page = make_page()
    assert "gave none within 0.5 s" in open_tunnel(page, timeout_seconds=0.5).why_not
    assert not (tmp_path / "pid").exists()
    (late,) = [thread for thread in threading.enumerate() if thread.name == "public link"]
    link_server.may_answer.set()
    late.join(timeout=60)
    assert not exists(read_pid(tmp_path))
    assert page.share_url is None


def test_a_space_needs_no_link() -> None:
    tunnel = open_tunnel(make_page(space_id="someone/promptfold"))
    assert tunnel == Tunnel("", "A Hugging Face Space has a public address already.")


# The QR code


def test_the_qr_code_is_one_picture_with_a_name_and_a_quiet_zone() -> None:
    svg = ElementTree.fromstring(qr_svg('https://a.example/?a=1&b="<x>'))  # noqa: S314 -- our own
    assert svg.attrib["role"] == "img"
    assert svg.attrib["aria-label"] == 'QR code of https://a.example/?a=1&b="<x>'
    background, modules = list(svg.iter("path"))
    assert background.attrib["fill"] == "#fff"
    assert modules.attrib["stroke"] == "#000"
    assert modules.attrib["d"].startswith("M4 4.5")  # four modules from the edge


# As a Hugging Face Space

SPACE = [sys.executable, str(ROOT / "demo" / "space.py")]


def test_a_space_listens_on_every_address_at_the_port_that_it_is_given(tmp_path: Path) -> None:
    """A port that is in use says all of it at once; from another folder, as nothing may hang on the current one."""
    with socket.create_server(("0.0.0.0", 0)) as taken:  # noqa: S104 -- as a Space does
        port = taken.getsockname()[1]
        environment = os.environ | {"GRADIO_SERVER_PORT": str(port)}
        result = subprocess.run(SPACE, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --port {port} is in use on 0.0.0.0.")


def test_a_space_serves_the_page_with_its_engines(
    adapter: Callable[[str], Path], bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    """The engines are processes that start by importing the file that was run."""
    flags = ["--adapter", str(adapter("bert")), "--bundle", str(bundle("bert"))]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen(
        [*SPACE, *flags], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        printed = ""
        try:
            for line in process.stdout:
                printed += line
                if "the page is at" in line:
                    break
            client = Client(f"http://127.0.0.1:{port}/", verbose=False)
            answer = client.predict("word1 word2", "word2 word1", api_name="/compare")
            client.close()
        except Exception as error:
            raise AssertionError(printed) from error
        finally:
            process.terminate()
            printed += process.stdout.read()
    assert answer["onnx"]["label"] == answer["pytorch"]["label"]
    assert "Traceback" not in printed
