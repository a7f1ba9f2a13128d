"""``python -m demo``: open the page that compares PyTorch and ONNX Runtime. See ``--help``."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from export.serve.config import LOCAL, ServingConfig
from export.serve.ports import PortFlags, check_port
from export.serve.ports import find_port as find_free_port
from export.serve.service import Service
from train.common.child import ExitOnce, uninterrupted
from train.common.command_line import Command
from train.common.console import print_line, said_to, say
from train.common.errors import UsageError

if TYPE_CHECKING:
    import gradio as gr

    from demo.engines.stage import Stage
    from demo.starting_page import StartingPage

RAY = "ray"
ENGINES = ("both", "onnx", RAY)
DEFAULT_PORT = 7860
SERVING_FLAGS = PortFlags("--http-host", "--http-port")
"""Flags for the cluster's own HTTP; ``--host`` and ``--port`` are the page's."""


@dataclass(frozen=True)
class PageServingConfig(ServingConfig):
    """How a bundle is served beside the page, whose flags take the names ``--host`` and ``--port``."""

    host: Annotated[str, Parameter(name=SERVING_FLAGS.host)] = LOCAL
    """address for the cluster's HTTP"""
    port: Annotated[int | None, Parameter(name=SERVING_FLAGS.port)] = None
    """port for the cluster's HTTP (default: the first free one from 8000 on)"""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Compare PyTorch and ONNX Runtime on one page."""

    adapters: Annotated[tuple[Path, ...], Parameter(name="--adapter", consume_multiple=1)] = ()
    """folders that `python -m train` wrote; the page starts with the first and offers those that ship as well (default:
    the best of those that ship)"""
    base_model: str | None = None
    """folder of the base model of the adapters at --adapter, if it lies elsewhere than at the training"""
    bundles: Annotated[tuple[Path, ...], Parameter(name="--bundle", consume_multiple=1)] = ()
    """folders that `python -m export` wrote from these adapters (default: exported on first use, and kept)"""
    engine: Annotated[str, Parameter(choices=ENGINES)] = "both"
    """both; onnx: ONNX Runtime alone, without PyTorch; or ray: both, ONNX Runtime in Ray Serve, which answers plain
    HTTP as well"""
    host: str = LOCAL
    """address to listen on"""
    port: int | None = None
    """port to listen on (default: the first free one from 7860 on)"""
    root_path: str | None = None
    """path at which a reverse proxy shows the page, such as /promptfold"""
    share: bool = False
    """ask Gradio for a public link as well"""
    auth: Annotated[str | None, Parameter(metavar="USER:PASSWORD")] = None
    """let in only visitors who give these"""
    auth_file: Path | None = None
    """the same for many visitors: USER:PASSWORD in each line"""
    serving: Annotated[PageServingConfig, Parameter(name="*", group=Group.create_ordered("With --engine ray"))] = field(
        default_factory=PageServingConfig
    )

    def __post_init__(self) -> None:
        check_port(self.port, "--port")
        if self.base_model is not None and not self.adapters:
            raise UsageError("--base-model is that of the adapters at --adapter, and none is given. Leave it out.")
        if self.engine == RAY:
            self.serving.check(SERVING_FLAGS)
        elif self.serving != PageServingConfig():
            raise UsageError("--replicas, --batch-size and what else is about replicas needs --engine ray.")


find_port = partial(find_free_port, first=DEFAULT_PORT)


def _run(config: DemoConfig) -> None:
    """Serve the page until an exception, such as Ctrl-C's, ends it."""
    # As an exception, so that a start under way ends as well.
    signal.signal(signal.SIGTERM, ExitOnce(0))
    with ExitStack() as at_end:
        if "GRADIO_TEMP_DIR" not in os.environ:
            # Gradio's own folder is that of every Gradio page on this machine, and is left behind when they end.
            files = TemporaryDirectory(prefix="promptfold-page-", ignore_cleanup_errors=True)
            os.environ["GRADIO_TEMP_DIR"] = at_end.enter_context(files)
            at_end.callback(os.environ.pop, "GRADIO_TEMP_DIR")
        _serve(config, at_end)


def _serve(config: DemoConfig, at_end: ExitStack) -> None:
    from demo.access.accounts import parse_auth
    from demo.access.public_link import SHARE_WARNING, parse_root_path
    from demo.starting_page import StartingPage

    port = find_port(config.host, config.port)  # before anything slow is done
    accounts = parse_auth(config.auth, config.auth_file)
    root_path = parse_root_path(config.root_path)
    with _listening(config.host, port):
        starting = StartingPage(config.host, port)
    at_end.callback(starting.close)
    with said_to(print_line, starting.hear):
        say(f"open {starting.url} to watch the start")
        stage = _open_stage(config, at_end)
        first = stage.default().adapter
        adapter = stage.choices[first].adapter
        say(f"showing {adapter.folder} ({adapter.task.name}, quality: {adapter.quality})")
        # In this thread, so that Ctrl-C ends an export that is under way.
        stage.bundle(first)
        setup = stage.default()
        say(f"starting the engines, each in a process of its own; ONNX Runtime in {setup.onnx}")
        stage.start(setup)
    # Gradio takes seconds to import; meanwhile the engines load.
    uninterrupted(import_module, "demo.page.app")
    from demo.page.app import build_page

    page = build_page(stage, stage.open(setup), share=config.share, shows_example=not config.adapters)
    if config.share and accounts is None:
        say(SHARE_WARNING)
    # Gradio awaits a coroutine function; its type says less. Behind a password its tools could be listed but not called.
    login: Any = accounts.login if accounts else None
    _launch(page, config, starting, auth=login, mcp_server=accounts is None, root_path=root_path)
    say(f"the page is at {page.local_url}  (Ctrl-C stops it)")
    if stage.service is not None:
        say(f"POST {stage.service.url} needs no page")
    threading.Event().wait()


def _open_stage(config: DemoConfig, at_end: ExitStack) -> "Stage":
    from demo.engines.adapters import choose_adapters
    from demo.engines.stage import Stage

    choices = choose_adapters(config.adapters, config.base_model)
    service = None
    if config.engine == RAY:
        say(f"starting Ray Serve in {config.serving.address or 'a cluster on this machine'}")
        service = Service(config.serving, flags=SERVING_FLAGS)
        # In a cluster that was joined, what this page deployed shall not outlive it either.
        at_end.callback(service.close, remove=True)
    stage = Stage(
        choices,
        bundles=config.bundles,
        has_pytorch=config.engine != "onnx",
        threads=config.serving.threads_per_replica if service else None,
        service=service,
    )
    at_end.callback(stage.close)
    return stage


def _launch(page: "gr.Blocks", config: DemoConfig, starting: "StartingPage", **options: Any) -> None:
    """Serve the page where the starting page was; a UsageError where it cannot listen."""
    from demo.access.gate import launch_options
    from demo.access.public_link import launch_page
    from demo.page.app import page_style

    # Gradio uses a name that its own Starlette renamed, and the warning would come with every refused request.
    warnings.filterwarnings("ignore", message="'HTTP_422_UNPROCESSABLE_ENTITY' is deprecated")
    options |= page_style() | launch_options()
    starting.close()
    # For a moment it was free, so somebody else may have it.
    port = find_port(config.host, config.port, first=starting.port)
    with _listening(config.host, port):
        launch_page(page, share=config.share, server_name=config.host, server_port=port, **options)


@contextmanager
def _listening(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        raise UsageError(f"The page cannot listen on {host}:{port} ({cause}). Try --port.") from cause


main = Command(DemoConfig, _run, "python -m demo", takes_settings=True)

if __name__ == "__main__":
    sys.exit(main())
