"""Step 6, write: manifest.json, which says what the bundle is and what was measured."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.bundle.folder import BUNDLE, GRAPH_FILES
from export.fold.read import ExportTask
from train.common.folder_record import write_record

if TYPE_CHECKING:
    from export.fold.compare import ParityReport
    from export.fold.precision.quantize import MadeGraph


def write_manifest(
    folder: Path,
    manifest: Mapping[str, Any],
    tasks: Sequence[ExportTask],
    reports: "Sequence[ParityReport]",
    *,
    kept: "Sequence[MadeGraph]",
    refused: "Sequence[MadeGraph]",
) -> None:
    """Add tasks and graphs to a manifest, new or old, and write it with the hash of every file in the folder.

    What the graphs cost that are ``kept`` or ``refused`` comes after what the old manifest says.
    """
    records = [_task_record(task, report) for task, report in zip(tasks, reports, strict=True)]
    graphs = {record["precision"]: record for record in manifest.get("graphs", [])}
    for made in kept:
        graphs[made.precision] = _graph_record(made, graphs.get(made.precision, {}))
    more = {
        "tasks": [*manifest.get("tasks", []), *records],
        "graphs": list(graphs.values()),
        "refused": [*manifest.get("refused", []), *(_graph_record(made, {}) for made in refused)],
    }
    write_record(folder, BUNDLE, {"versions": _versions(), **manifest, **more})


def _task_record(task: ExportTask, report: "ParityReport") -> dict[str, object]:
    adapter = task.adapter
    record: dict[str, object] = {
        "name": task.name,
        "adapter_sha256": adapter.sha256,
        "task": adapter.task.as_json(),
        "parity": asdict(report),
    }
    # An adapter made elsewhere may never have been measured here.
    if adapter.scores.values:
        record["quality"] = {
            "n_validation": adapter.n_validation,
            "validation": adapter.scores.values,
            "baselines": {name: scores.values for name, scores in adapter.baselines.items()},
        }
    return record


def _graph_record(made: "MadeGraph", old: Mapping[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "precision": made.precision,
        "file": GRAPH_FILES[made.precision],
        "gates": [],
        "int8": old.get("int8"),
    }
    if made.int8:
        record["int8"] = asdict(made.int8)
    if made.no_fidelity:
        record["no_fidelity"] = made.no_fidelity
    for name, costs in (("gates", made.cost.gates), ("fidelity", made.cost.fidelity)):
        # One for each task, or none.
        if costs and (not old or old.get(name)):
            record[name] = [*old.get(name, []), *map(asdict, costs)]
    return {name: value for name, value in record.items() if value is not None}


def _versions() -> dict[str, str]:
    """The versions of the libraries that made the graphs, with one of the two packages of ONNX Runtime."""
    names = ("torch", "transformers", "peft", "optimum", "optimum-onnx", "onnx", "onnxruntime-gpu", "onnxruntime")
    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
