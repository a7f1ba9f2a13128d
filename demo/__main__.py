"""``python -m demo``: open the page that compares PyTorch and ONNX Runtime. See ``--help``."""

import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.serve.__main__ import add_serving_flags, serving_config
from export.serve.config import ServingConfig
from export.serve.ports import PortFlags, check_port
from export.serve.ports import find_port as find_free_port
from export.serve.service import Service
from train.common.console import Parser, run_main, say
from train.common.errors import UsageError

if TYPE_CHECKING:
    import gradio as gr

    from demo.access.accounts import Accounts
    from demo.access.public_link import ShareState
    from demo.engines.stage import Stage

RAY = "ray"
ENGINES = ("both", "onnx", RAY)
"""What ``--engine`` takes."""

DEFAULT_PORT = 7860


@dataclass(frozen=True)
class DemoConfig:
    """The flags of ``python -m demo``."""

    adapters: tuple[Path, ...]
    bundles: tuple[Path, ...]
    engine: str
    host: str
    port: int | None
    root_path: str | None
    share: bool
    auth: str | None
    auth_file: Path | None
    serving: ServingConfig


SERVING_FLAGS = PortFlags("--http-host", "--http-port")
"""Of the cluster's own HTTP: ``--host`` and ``--port`` are the page's."""


def parse_config(argv: Sequence[str] | None) -> DemoConfig:
    """Parse the command line.

    Raises:
        UsageError: an unknown flag or a value that cannot be used.
    """
    parser = Parser(prog="python -m demo", description="Compare PyTorch and ONNX Runtime on one page.")
    parser.add_argument(
        "--adapter",
        dest="adapters",
        type=Path,
        nargs="+",
        default=[],
        metavar="ADAPTER",
        help="folders that `python -m train` wrote; the page starts with the first and offers those that ship as well "
        "(default: the best of those that ship)",
    )
    parser.add_argument(
        "--bundle",
        dest="bundles",
        type=Path,
        nargs="+",
        default=[],
        metavar="BUNDLE",
        help="folders that `python -m export` wrote from these adapters (default: exported on first use, and kept)",
    )
    parser.add_argument(
        "--engine",
        default="both",
        metavar="ENGINE",
        help="both; onnx: ONNX Runtime alone, without PyTorch; or ray: both, ONNX Runtime in Ray Serve, which answers "
        "plain HTTP as well (default: %(default)s)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, help=f"port to listen on (default: the first free one from {DEFAULT_PORT} on)"
    )
    parser.add_argument("--root-path", metavar="PATH", help="where a reverse proxy shows the page: /promptfold, say")
    parser.add_argument("--share", action="store_true", help="ask Gradio for a public link as well")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="let in only who gives these")
    parser.add_argument("--auth-file", type=Path, metavar="FILE", help="the same for many: USER:PASSWORD in each line")
    add_serving_flags(parser.add_argument_group("with --engine ray"), SERVING_FLAGS)
    flags = parser.parse_args(argv)
    flags.adapters, flags.bundles = tuple(flags.adapters), tuple(flags.bundles)
    names = {field.name for field in fields(DemoConfig)} - {"serving"}
    config = DemoConfig(**{name: getattr(flags, name) for name in names}, serving=serving_config(flags))
    check_port(config.port, "--port")
    if config.engine not in ENGINES:
        raise UsageError(f"--engine {config.engine}: choose one of {', '.join(ENGINES)}.")
    if config.engine == RAY:
        config.serving.check(SERVING_FLAGS)
    elif config.serving != ServingConfig():
        raise UsageError("--replicas, --batch-size and what else is about replicas needs --engine ray.")
    return config


def find_port(host: str, port: int | None) -> int:
    """The port to listen on, found before anything slow is done.

    Raises:
        UsageError: as `export.serve.ports.find_port`.
    """
    return find_free_port(host, port, first=DEFAULT_PORT)


def run(config: DemoConfig) -> None:
    """Serve the page until an exception, such as Ctrl-C's, ends it.

    Raises:
        PromptfoldError: what the user can mend: flags, folders, the base model.
    """
    if "GRADIO_TEMP_DIR" in os.environ:
        _serve(config)
        return
    # Gradio's own folder is that of every Gradio page on this machine, and is left behind when they end.
    with tempfile.TemporaryDirectory(prefix="promptfold-page-", ignore_cleanup_errors=True) as files:
        os.environ["GRADIO_TEMP_DIR"] = files
        try:
            _serve(config)
        finally:
            del os.environ["GRADIO_TEMP_DIR"]


def _serve(config: DemoConfig) -> None:
    from demo.access.accounts import parse_auth
    from demo.access.public_link import parse_root_path
    from demo.engines.adapters import choose_adapters
    from demo.engines.stage import Stage

    find_port(config.host, config.port)  # before anything slow is done
    accounts = parse_auth(config.auth, config.auth_file)
    root_path = parse_root_path(config.root_path)
    choices = choose_adapters(config.adapters)
    service = None
    if config.engine == RAY:
        say(f"starting Ray Serve in {config.serving.address or 'a cluster on this machine'}")
        service = Service(config.serving, flags=SERVING_FLAGS)
    try:
        stage = Stage(
            choices,
            bundles=config.bundles,
            has_pytorch=config.engine != "onnx",
            threads=config.serving.threads_per_replica if service else None,
            service=service,
        )
        _show(stage, config, accounts, root_path)
    finally:
        if service is not None:
            # In a cluster that was joined, what this page deployed shall not outlive it either.
            service.close(remove=True)


def _show(stage: "Stage", config: DemoConfig, accounts: "Accounts | None", root_path: str | None) -> None:
    """Serve the page of a stage, and close that in the end."""
    from demo.access.public_link import SHARE_WARNING, ShareState

    setup = stage.default()
    adapter = stage.choices[setup.adapter].adapter
    say(f"showing {adapter.folder} ({adapter.task.name}, on validation {adapter.scores})")
    try:
        # In this thread, so that Ctrl-C ends an export that is under way.
        stage.bundle(setup.adapter)
        say("starting the engines, each in a process of its own")
        stage.start(setup)
        # Gradio takes seconds to import; meanwhile the engines load.
        from demo.access.gate import launch_options
        from demo.page.app import build_page, page_style

        share = ShareState(requested=config.share)
        page = build_page(stage, stage.open(setup), share)
        # Gradio uses a name that its own Starlette renamed, and the warning would come with every refused request.
        warnings.filterwarnings("ignore", message="'HTTP_422_UNPROCESSABLE_ENTITY' is deprecated")
        style = page_style()
        # Gradio awaits a coroutine function; its type says less.
        login: Any = accounts.login if accounts else None
        _launch(
            page,
            config,
            # Anew: while the engines loaded, somebody else may have taken the one that was free.
            find_port(config.host, config.port),
            root_path=root_path,
            auth=login,
            theme=style.theme,
            css=style.css,
            head=style.head,
            # Behind a password its tools could be listed but not called.
            mcp_server=accounts is None,
            **launch_options(),
        )
        say(f"the page is at {page.local_url}  (Ctrl-C stops it)")
        if stage.service is not None:
            say(f"POST {stage.service.url} needs no page")
        if config.share:
            if accounts is None:
                say(SHARE_WARNING)
            _share(page, share)
        threading.Event().wait()
    finally:
        stage.close()


def _launch(page: "gr.Blocks", config: DemoConfig, port: int, **options: Any) -> None:
    """Serve the page.

    Raises:
        UsageError: it cannot listen there.
    """
    try:
        page.launch(
            server_name=config.host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            # The link is made by `_share`; GRADIO_SHARE shall not make another.
            share=False,
            footer_links=["api"],
            **options,
        )
    except OSError as cause:
        raise UsageError(f"The page cannot listen on {config.host}:{port} ({cause}). Try --port.") from cause


def _share(page: "gr.Blocks", share: "ShareState") -> None:
    """Make the public link, say what came of it, and keep it until an exception ends the page."""
    from demo.access.public_link import close_tunnel, open_tunnel

    try:
        share.tunnel = open_tunnel(page)
        if share.tunnel.url:
            say(f"public link: {share.tunnel.url}")
        else:
            say(f"no public link: {share.tunnel.why_not} The local address works.")
        threading.Event().wait()
    finally:
        close_tunnel(page)


def _command(argv: Sequence[str] | None) -> None:
    config = parse_config(argv)
    # An exception, as Ctrl-C's is: it ends a start that is under way as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
