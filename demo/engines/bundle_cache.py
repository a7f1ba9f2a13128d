"""Bundles that the page exported itself, one for each adapter, in the user's cache."""

import shutil
from pathlib import Path

from export.bundle.folder import BUNDLE, Bundle, load_bundle
from train.adapter.record import Adapter
from train.common.child import run_in_child
from train.common.console import say
from train.common.errors import BundleError, UsageError

CONTENT = "fidelity"
"""Part of the folder's name: what the page needs in a bundle. The cache of an older page lacks it."""


def cached_bundle_folder(adapter: Adapter) -> Path:
    """Where an adapter's bundle lies, by the adapter's hash and the bundle format's version."""
    import platformdirs

    cache = Path(platformdirs.user_cache_dir("promptfold", appauthor=False))
    return cache / "bundles" / f"{adapter.sha256[:16]}-v{BUNDLE.format_version}-{CONTENT}"


def cached_bundle(adapter: Adapter) -> Bundle:
    """The bundle of an adapter: from the cache, or exported into it now."""
    folder = cached_bundle_folder(adapter)
    if folder.is_dir():
        try:
            bundle = load_bundle(folder)
        except BundleError as error:
            say(f"the cached bundle cannot be used and is made again: {error}")
        else:
            if bundle.task_of(adapter.sha256) is not None:
                return bundle
        # The folder belongs to the page alone.
        shutil.rmtree(folder, ignore_errors=True)
    say(
        f"first start with this adapter: exporting it to {folder}, half a minute on two cores; later starts find it there"
    )
    command = f"python -m export {adapter.folder} --out BUNDLE"
    try:
        # In a child process, so that the page's own never loads torch and its thread pool.
        run_in_child(
            _export, adapter, folder, name=f"The export of {adapter.folder}", remedy=f"See why with: {command}"
        )
    except UsageError as error:
        raise BundleError(
            f"The bundle cannot be kept in the cache ({error}) Make one elsewhere and give it with --bundle: {command}"
        ) from error
    return load_bundle(folder)


def _export(adapter: Adapter, folder: Path) -> None:
    from export.fold.config import ExportConfig
    from export.fold.pipeline import export_adapters

    # Where not even everyday English can say what int8 costs, it is kept ungated: the page says so and starts with fp32.
    export_adapters(ExportConfig((adapter.folder,), out=folder, base_model=adapter.model, ungated=True, overwrite=True))
