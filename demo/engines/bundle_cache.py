"""Bundles that the page exported by itself, one for each adapter, in the user's cache."""

import multiprocessing
import shutil
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from export.bundle.folder import BUNDLE, Bundle, load_bundle
from train.adapter.record import Adapter
from train.common.console import say
from train.common.errors import BundleError, PromptfoldError, UsageError

CONTENT = "precisions"
"""Part of the folder's name: what the page needs in a bundle. A cache of an older page lacks it."""


def cached_bundle_folder(adapter: Adapter) -> Path:
    """Where the bundle of an adapter lies, by the adapter's hash and the bundle format's version."""
    import platformdirs

    cache = Path(platformdirs.user_cache_dir("promptfold", appauthor=False))
    return cache / "bundles" / f"{adapter.sha256[:16]}-v{BUNDLE.format_version}-{CONTENT}"


def cached_bundle(adapter: Adapter) -> Bundle:
    """The bundle of an adapter: from the cache, or exported into it now.

    Raises:
        PromptfoldError: whatever the export raises.
    """
    folder = cached_bundle_folder(adapter)
    if folder.is_dir():
        try:
            bundle = load_bundle(folder)
        except BundleError as error:
            say(f"the cached bundle cannot be used and is made again: {error}")
        else:
            if bundle.task_of(adapter.sha256) is not None:
                return bundle
        # Ours alone: nobody else puts anything there.
        shutil.rmtree(folder, ignore_errors=True)
    say(f"first start with this adapter: exporting it to {folder}")
    _export_in_child(adapter.folder, folder)
    return load_bundle(folder)


def _export_in_child(adapter_folder: Path, folder: Path) -> None:
    """Export in a process of its own: the page's shall not carry torch and its thread pool around."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_export, args=(sender, adapter_folder, folder), name="promptfold-export")
    process.start()
    sender.close()
    try:
        error: PromptfoldError | None = receiver.recv()
    except (KeyboardInterrupt, SystemExit):
        process.terminate()
        process.join()
        raise
    except EOFError:
        process.join()
        error = BundleError(
            f"The export of {adapter_folder} ended unexpectedly (exit code {process.exitcode}). "
            f"See why with: python -m export {adapter_folder} --out BUNDLE"
        )
    process.join()
    if error is not None:
        raise error


def _export(sender: Connection, adapter_folder: Path, folder: Path) -> None:
    """The export's process."""
    # An exception, so that what is half-written is removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    from export.fold.config import ExportConfig
    from export.fold.pipeline import export_adapters

    try:
        # The page says of an ungated graph that nobody knows what it costs, and starts with fp32.
        export_adapters(ExportConfig((adapter_folder,), folder, ungated=True, overwrite=True))
    except UsageError as error:
        sender.send(
            BundleError(
                f"The bundle cannot be kept in the cache ({error}) Make one elsewhere and give it with --bundle: "
                f"python -m export {adapter_folder} --out BUNDLE"
            )
        )
    except PromptfoldError as error:
        sender.send(error)
    except KeyboardInterrupt:
        return  # the page's process had it too and says so
    else:
        sender.send(None)
