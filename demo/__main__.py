"""``python -m demo``: open the page that compares PyTorch and ONNX Runtime. See ``--help``."""

import errno
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from train.console import Parser, run_main, say
from train.errors import BundleError, UsageError

DEFAULT_PORT = 7860
PORTS_TRIED = 100


@dataclass(frozen=True)
class DemoConfig:
    """The flags of ``python -m demo``."""

    adapter: Path | None
    bundle: Path | None
    host: str
    port: int | None
    share: bool


def parse_config(argv: Sequence[str] | None) -> DemoConfig:
    """Parse the command line.

    Raises:
        UsageError: an unknown flag or a value that cannot be used.
    """
    parser = Parser(prog="python -m demo", description="Compare PyTorch and ONNX Runtime on one page.")
    parser.add_argument(
        "--adapter",
        type=Path,
        help="folder that `python -m train` wrote (default: the best of those that ship)",
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        help="folder that `python -m export` wrote from this adapter (default: exported on the first start)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, help=f"port to listen on (default: the first free one from {DEFAULT_PORT} on)"
    )
    parser.add_argument("--share", action="store_true", help="ask Gradio for a public link as well")
    config = DemoConfig(**vars(parser.parse_args(argv)))
    if config.port is not None and not 1 <= config.port <= 65535:
        raise UsageError(f"--port {config.port}: give a number from 1 to 65535.")
    return config


def find_port(host: str, port: int | None) -> int:
    """The port to listen on, found before anything slow is done.

    Raises:
        UsageError: the port is in use, none is free, or the host is not this machine's.
    """
    candidates = [port] if port is not None else range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED)
    for candidate in candidates:
        try:
            family = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # As a server does, so that a port whose last connections still linger counts as free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, candidate))
            return candidate
        except socket.gaierror as cause:
            raise UsageError(f"--host {host}: there is no such address. Try 127.0.0.1 or 0.0.0.0.") from cause
        except PermissionError as cause:
            raise UsageError(f"--port {candidate}: this user may not use it. Take one above 1023.") from cause
        except OSError as cause:
            if cause.errno != errno.EADDRINUSE:
                raise UsageError(
                    f"--host {host}: this machine has no such address. Try 127.0.0.1 or 0.0.0.0."
                ) from cause
            if port is not None:
                raise UsageError(
                    f"--port {port} is in use on {host}. Stop what listens there, or choose another --port."
                ) from cause
    raise UsageError(
        f"The ports {DEFAULT_PORT} to {DEFAULT_PORT + PORTS_TRIED - 1} are all in use. Choose one with --port."
    )


def run(config: DemoConfig) -> None:
    """Serve the page until an exception, such as Ctrl-C's, ends it.

    Raises:
        PromptfoldError: what the user can mend: flags, folders, the base model.
    """
    from demo.backends import Engine, make_onnx_backend, make_pytorch_backend
    from demo.cache import cached_bundle
    from demo.shipped import choose_adapter
    from export.bundle import load_bundle
    from export.runtime import bundle_tokenizer, usable_cores

    port = find_port(config.host, config.port)
    choice = choose_adapter(config.adapter)
    adapter = choice.adapter
    say(f"showing {adapter.folder} ({adapter.task.name}, on validation {adapter.scores})")
    bundle = load_bundle(config.bundle) if config.bundle else cached_bundle(adapter)
    task = bundle.task_of(adapter.sha256)
    if task is None:
        raise BundleError(
            f"{bundle.folder} was exported from another adapter than {adapter.folder}, so the two engines would "
            "run different models. Give the --adapter it was made from, or export this one: "
            f"python -m export {adapter.folder} --out BUNDLE"
        )

    say("starting both engines, each in a process of its own")
    threads = usable_cores()
    pytorch = Engine("PyTorch", make_pytorch_backend, adapter.folder, threads=threads)
    onnx = Engine("ONNX Runtime", partial(make_onnx_backend, task=task.name), bundle.folder, threads=threads)
    try:
        # Gradio takes seconds to import; meanwhile the engines load.
        from demo.app import PageInfo, build_page, page_style
        from demo.compare import Comparer

        comparer = Comparer(bundle_tokenizer(bundle), task.task, pytorch=pytorch, onnx=onnx)
        info = PageInfo(choice, bundle, task, pytorch=pytorch.wait_until_ready(), onnx=onnx.wait_until_ready())
        # Gradio uses a name that its own Starlette renamed, and the warning would come with every refused request.
        warnings.filterwarnings("ignore", message="'HTTP_422_UNPROCESSABLE_ENTITY' is deprecated")
        page = build_page(comparer.compare, info)
        style = page_style()
        try:
            page.launch(
                server_name=config.host,
                server_port=port,
                share=config.share,
                theme=style.theme,
                css=style.css,
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
                footer_links=["api"],
            )
        except OSError as cause:
            raise UsageError(f"The page cannot listen on {config.host}:{port} ({cause}). Try --port.") from cause
        say(f"the page is at {page.local_url}  (Ctrl-C stops it)")
        if page.share_url:
            say(f"public link: {page.share_url}")
        elif config.share:
            say(
                "no public link: Gradio's tunnel could not be set up (see above; it needs network and downloads a "
                "helper program). The local address works."
            )
        threading.Event().wait()
    finally:
        pytorch.close()
        onnx.close()


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
