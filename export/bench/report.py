"""From the engines' measurements to a JSON document, and from that to tables and a chart. Heavy: import it late."""

import io
import math
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window system is touched
from pandas import DataFrame, Series

from export.bench.config import FILE, TUTORIAL
from export.bench.engines import ENGINES, OURS, REFERENCE, Measured, Peak, Rounds
from export.bench.prepare import Prepared
from export.fold.config import GATE_TOLERANCE
from train.common.atomic_folder import write_whole
from train.common.errors import UsageError
from train.config import CLASSIFICATION
from train.data.tasks import METRICS, Scores, score

FP32_TOLERANCE = 1e-3
"""An fp32 engine whose logits differ from PEFT's by more computes something else: its status is `WRONG`."""
MEASURED, WRONG, NOT_RUN = "measured", "wrong", "not run"
NOTHING = Measured("", "", 0.0, 0.0, None, 0.0, math.nan, {}, {})
"""Stands for an engine that did not run."""
Record = Mapping[str, Any]
"""A part of the JSON document."""


def document(prepared: Prepared, rounds: Rounds, peaks: Sequence[Peak]) -> dict[str, Any]:
    """Everything for programs but the settings; at least one engine was measured."""
    per_round = _per_round(prepared, rounds)
    cells = _cell_figures(prepared, per_round, peaks)
    engines = DataFrame([_engine_figures(prepared, name, rounds) for name in rounds[0]], dtype=object)
    engines["cells"] = [_records(cells[cells["engine"] == name].drop(columns="engine")) for name in engines["engine"]]
    right = cells[cells["engine"].isin(engines["engine"][engines["status"] == MEASURED])]
    medians = per_round["latency_ms"].unstack("round").sort_index(axis="columns")
    return {
        **prepared.about,
        "cells": [
            {"cell": cell.name, "texts": cell.texts, "shapes": [*map(str, cell.shapes)]} for cell in prepared.cells
        ],
        "peaks": [asdict(peak) for peak in peaks],
        "metrics": {name: METRICS[name] for name in prepared.task.metrics} if prepared.expected else {},
        "engines": (records := _records(engines)),
        "best": _records(DataFrame(_best(right, medians, _failing(records)))),
    }


def _records(rows: DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON, which has no NaN."""
    return list(rows.astype(object).where(rows.notna(), None).to_dict("records"))


def _engine_figures(prepared: Prepared, name: str, rounds: Rounds) -> Record:
    """One engine over all rounds; its figures are those of the costliest round."""
    engine = ENGINES[name]
    measured, of_peft = (
        [result for found in rounds if isinstance(result := found.get(other), Measured)] or [NOTHING]
        for other in (name, REFERENCE)
    )
    status = NOT_RUN if measured[0] is NOTHING else MEASURED
    reason = next((result for found in rounds if isinstance(result := found[name], str)), "")
    difference = max(result.max_logit_difference for result in measured)
    if engine.precision == "fp32" and difference > FP32_TOLERANCE:
        status, reason = WRONG, f"a logit differs from PEFT's by {difference:.3g}; {FP32_TOLERANCE:g} is allowed"
    labels, peft_labels = measured[0].predictions.get(FILE), of_peft[0].predictions.get(FILE)
    if prepared.task.kind != CLASSIFICATION:  # an engine reports class indices alone
        labels = peft_labels = None
    return {
        "engine": name,
        "what": engine.what,
        "precision": engine.precision,
        "status": status,
        "reason": reason,
        "library": measured[0].library,
        "note": measured[0].note,
        "load_seconds": max(result.load_seconds for result in measured),
        "peak_memory_mib": max(result.peak_memory_mib for result in measured),
        "gpu_memory_mib": max((mib for result in measured if (mib := result.gpu_memory_mib) is not None), default=None),
        "file_mib": measured[0].file_mib,
        "max_logit_difference": difference,
        "scores": score(prepared.task, labels, prepared.expected).values if labels else None,
        # rows of the file whose label is not PEFT's
        "label_flips": sum(map(int.__ne__, labels, peft_labels)) if labels and peft_labels else None,
    }


def _per_round(prepared: Prepared, rounds: Rounds) -> DataFrame:
    """A row for each cell, engine and round, in the order of the tables."""
    passes = DataFrame(
        {"cell": cell.name, "engine": name, "round": number, "first_run_ms": timed.first_run_ms, "latency_ms": latency}
        for cell in prepared.cells
        for name in rounds[0]
        for number, found in enumerate(rounds)
        if isinstance(measured := found[name], Measured) and (timed := measured.cells.get(cell.name))
        for latency in timed.latencies_ms
    )
    per_round: DataFrame = passes.groupby(["cell", "engine", "round"], sort=False).agg(
        latency_ms=("latency_ms", "median"),
        p95_ms=("latency_ms", lambda latencies: latencies.quantile(0.95)),
        runs=("latency_ms", "size"),
        first_run_ms=("first_run_ms", "max"),
    )
    reference = per_round["latency_ms"][per_round.index.get_level_values("engine") == REFERENCE].droplevel("engine")
    # NaN where PEFT was not timed in the same round.
    per_round["speedup"] = reference.reindex(per_round.index.droplevel("engine")).array / per_round["latency_ms"]
    return per_round


def _cell_figures(prepared: Prepared, per_round: DataFrame, peaks: Sequence[Peak]) -> DataFrame:
    """A row for each cell and engine: medians of the rounds' figures, the slowest first run, and rates from them."""
    aggregated = per_round.groupby(["cell", "engine"], sort=False).agg(
        latency_ms=("latency_ms", "median"),
        latency_ms_per_round=("latency_ms", tuple),
        p95_ms=("p95_ms", "median"),
        runs=("runs", "sum"),
        first_run_ms=("first_run_ms", "max"),
        speedup=("speedup", "median"),
        speedup_per_round=("speedup", lambda ratios: tuple(ratios.dropna())),
    )
    cells: DataFrame = aggregated.reset_index()
    texts = {cell.name: cell.texts for cell in prepared.cells}
    peak_rates = {peak.precision: peak.gflop_per_second for peak in peaks}
    engines = [ENGINES[name] for name in cells["engine"]]
    multiply_adds = [prepared.multiply_adds[engine.family] for engine in engines]
    cells["pairs_per_second"] = 1000 * cells["cell"].map(texts) / cells["latency_ms"]
    cells["gflop"] = [2 * counts[cell] / 1e9 for counts, cell in zip(multiply_adds, cells["cell"], strict=True)]
    cells["gflop_per_second"] = 1000 * cells["gflop"] / cells["latency_ms"]
    cells["peak_share"] = cells["gflop_per_second"] / [peak_rates.get(engine.precision, math.nan) for engine in engines]
    return cells


def _best(right: DataFrame, medians: DataFrame, failing: Collection[str]) -> Iterator[Record]:
    """Our fastest engine against others, of those whose logits are right, for each cell that both ran.

    The others are the fastest of all, and the fastest that is not among the ``failing``, which the gate would refuse.
    ``medians`` are latencies in ms, a row for each cell and engine, a column for each round.
    """

    def ratios(cell: str, ours: str, other: tuple[str | None, str | None]) -> Series:
        """How many times as long another row took, in each round."""
        return (medians.reindex([other]) / medians.loc[cell, ours]).iloc[0].dropna()

    for cell, rows in right[right["cell"] != TUTORIAL].groupby("cell", sort=False):
        speedups = rows.sort_values("latency_ms", kind="stable").set_index("engine")["speedup"]
        ours = next((name for name in speedups.index if ENGINES[name].family == OURS), None)
        peers = [name for name in speedups.index if ENGINES[name].family != OURS]
        if ours is None or not peers:
            continue
        passing = next((name for name in peers if name not in failing), None)
        found = {"peer": peers[0], "passing_peer": passing}
        of_peers = {what: ratios(cell, ours, (cell, name)) for what, name in found.items()}
        yield {
            "cell": cell,
            "ours": ours,
            **found,
            **{f"{what}_speedup": each.median() for what, each in of_peers.items()},
            **{f"{what}_speedup_per_round": tuple(each) for what, each in of_peers.items()},
            "speedup": speedups[ours],  # over PEFT
            # over the tutorial's own loop
            "tutorial_speedup": ratios(cell, ours, (TUTORIAL if cell == FILE else None, REFERENCE)).median(),
        }


def _failing(engines: Sequence[Record]) -> set[str]:
    """Engines that lose more of a metric to PEFT than the gate allows a graph of ours."""
    scores = {engine["engine"]: engine["scores"] for engine in engines if engine["scores"]}
    reference = scores.get(REFERENCE, {})
    return {
        name
        for name, values in scores.items()
        if any(value - values[metric] > GATE_TOLERANCE for metric, value in reference.items())
    }


Columns = Mapping[str, tuple[str, Callable[[Any], str]]]
"""Title and format of each column of a table."""
CELL_COLUMNS: Columns = {
    "latency_ms": ("median ms", "{:.2f}".format),
    "p95_ms": ("p95 ms", "{:.2f}".format),
    "pairs_per_second": ("pairs/s", "{:.1f}".format),
    "speedup": ("× PEFT", "{:.2f}".format),
    "speedup_per_round": ("in each round", lambda ratios: " ".join(f"{ratio:.2f}" for ratio in ratios)),
    "gflop_per_second": ("GFLOP/s", "{:.0f}".format),
    "peak_share": ("of peak", lambda share: f"{100 * share:.0f} %"),
}
ENGINE_COLUMNS: Columns = {
    "load_seconds": ("load s", "{:.2f}".format),
    "first_run_seconds": ("first run s", "{:.2f}".format),
    "peak_memory_mib": ("memory MiB", "{:.0f}".format),
    "gpu_memory_mib": ("GPU MiB", "{:.0f}".format),
    "file_mib": ("file MiB", "{:.1f}".format),
    "max_logit_difference": ("logits differ", "{:.1e}".format),
    "quality": ("quality", str),
}


def tables(prepared: Prepared, report: Record) -> Iterator[str]:
    """The `document` for people, part by part."""
    ran = [engine for engine in report["engines"] if engine["status"] != NOT_RUN]
    for cell in prepared.cells:
        rows = _rows_of(cell.name, ran)
        if not rows.empty:
            yield f"\n{cell.name}: {cell.what}"
            yield textwrap.indent(_table(rows, CELL_COLUMNS), "  ")
    rows = DataFrame(ran, index=[engine["engine"] for engine in ran])
    rows["first_run_seconds"] = [max(cell["first_run_ms"] for cell in engine["cells"]) / 1000 for engine in ran]
    rows["quality"] = [_quality(engine) for engine in ran]
    yield "\n" + _table(rows, ENGINE_COLUMNS)
    yield ""
    yield from ("{engine}: {status}: {reason}".format(**engine) for engine in report["engines"] if engine["reason"])
    yield from (
        "peak {precision}: {gflop_per_second:.0f} GFLOP/s ({product})".format(**peak) for peak in report["peaks"]
    )
    yield from map(_sentence, report["best"])


def _rows_of(cell: str, engines: Sequence[Record]) -> DataFrame:
    """The figures of a cell, a row for each engine that ran on it."""
    found = {engine["engine"]: figures for engine in engines for figures in engine["cells"] if figures["cell"] == cell}
    return DataFrame(found.values(), index=list(found))


def _table(rows: DataFrame, columns: Columns) -> str:
    shown = rows.where(rows.notna(), math.nan).rename_axis(columns="engine")
    text: str = shown.to_string(
        columns=list(columns),
        header=[title for title, _ in columns.values()],
        formatters={name: form for name, (_, form) in columns.items()},
        na_rep="–",
    )
    return text


def _quality(engine: Record) -> str:
    parts = [] if engine["scores"] is None else [str(Scores(engine["scores"]))]
    if engine["label_flips"] is not None:
        parts.append(f"{engine['label_flips']} labels changed")
    return ", ".join(parts)


def _sentence(best: Record) -> str:
    parts = [f"{_ratios(best, 'peer')} the fastest other one, {best['peer']}"]
    if best["passing_peer"] not in {None, best["peer"]}:
        parts.append(
            f"{_ratios(best, 'passing_peer')} {best['passing_peer']}, the fastest that the gate would let pass"
        )
    for name, other in (("speedup", "PEFT"), ("tutorial_speedup", "the tutorial's loop")):
        if best[name] is not None:
            parts.append(f"{best[name]:.2f} times as fast as {other}")
    return f"{best['cell']}: {best['ours']} is {', '.join(parts)}"


def _ratios(best: Record, what: str) -> str:
    each = ", ".join(f"{ratio:.2f}" for ratio in best[f"{what}_speedup_per_round"])
    return f"{best[f'{what}_speedup']:.2f} times ({each}) as fast as"


def draw(path: Path, prepared: Prepared, report: Record) -> None:
    """One panel for each cell, one bar for each engine: how many times as fast as PEFT it is (else texts per second)."""
    ran = [engine for engine in report["engines"] if engine["status"] != NOT_RUN]
    has_reference = any(engine["engine"] == REFERENCE for engine in ran)
    cells = [cell for cell in prepared.cells if cell.name != TUTORIAL]
    columns, n_rows = min(3, len(cells)), -(-len(cells) // 3)
    figure = Figure(figsize=(2.2 + 3.4 * columns, n_rows * (1.1 + 0.27 * len(ran)) + 0.6), layout="constrained")
    panels = figure.subplots(n_rows, columns, squeeze=False, sharey=True).flat
    for panel, cell in zip(panels, cells, strict=False):
        _draw_panel(panel, cell.name, ran, has_reference=has_reference)
        panel.set_title(cell.name if cell.name == FILE else cell.what, fontsize=9)
    for panel in panels:  # those that are left
        panel.set_visible(False)
    unit = "times as fast as PEFT eager" if has_reference else "texts per second"
    figure.suptitle(f"{report['model']}: {unit}, and the median latency ({report['machine']})", fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    try:
        write_whole(path, image.getvalue())
    except OSError as cause:
        raise UsageError(f"--png {path} cannot be written ({cause.strerror or cause}). Choose another name.") from cause


def _draw_panel(panel: Axes, cell: str, engines: Sequence[Record], *, has_reference: bool) -> None:
    """One bar for each engine."""
    names = [engine["engine"] for engine in engines]
    rows = _rows_of(cell, engines).reindex(names, columns=["speedup", "pairs_per_second", "latency_ms"])
    values = rows["speedup" if has_reference else "pairs_per_second"]
    bars = panel.barh(
        range(len(names)),
        values,
        color=["#c0392b" if ENGINES[name].family == OURS else "#8a99a8" for name in names],
        hatch=["//" if engine["status"] == WRONG else "" for engine in engines],
    )
    figures = [f"{value:.2f}×" if has_reference else f"{value:.0f}" for value in values]
    latencies = [f"{ms / 1000:.2f} s" if ms >= 1000 else f"{ms:.3g} ms" for ms in rows["latency_ms"]]
    panel.bar_label(bars, [f" {one}  {latency}" for one, latency in zip(figures, latencies, strict=True)], fontsize=7)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.margins(x=0.55)
    panel.set(xlim=(0, None), ylim=(len(names) - 0.4, -0.6))
    panel.tick_params(axis="x", labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
