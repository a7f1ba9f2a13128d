"""From what the engines' processes measured to figures, a table, a chart and one JSON document."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from export.bench.config import FILE, TUTORIAL, Cell
from export.bench.engines import ENGINES, OURS, REFERENCE, Engine, Measured, Peak
from export.bench.prepare import Prepared
from train.data.tasks import METRICS, Scores

FP32_TOLERANCE = 1e-3
"""By how much a logit in fp32 may differ from PEFT's before an engine is taken to compute something else."""


MEASURED, WRONG, NOT_RUN = "measured", "wrong", "not run"


@dataclass(frozen=True)
class CellResult:
    """One engine on one cell, over all rounds.

    Attributes:
        cell: its name.
        latency_ms: of one pass; the median of the rounds' medians.
        latency_ms_per_round: the rounds' medians.
        p95_ms: the median of the rounds' 95th percentiles.
        runs: timed passes, of all rounds together.
        first_run_ms: the slowest round's first pass, with what is compiled then.
        pairs_per_second: texts (or pairs of them) by the median latency.
        speedup: PEFT's latency over this one's; the median of the rounds' ratios. None where PEFT was not timed.
        speedup_per_round: the ratios, each within one round.
        gflop: 2 · multiply-adds that this engine spends on a pass, in 10⁹.
        gflop_per_second: those by the median latency.
        peak_share: of the machine's fastest matrix product in the same precision. None where that is not known.
    """

    cell: str
    latency_ms: float
    latency_ms_per_round: tuple[float, ...]
    p95_ms: float
    runs: int
    first_run_ms: float
    pairs_per_second: float
    speedup: float | None
    speedup_per_round: tuple[float, ...]
    gflop: float
    gflop_per_second: float
    peak_share: float | None


@dataclass(frozen=True)
class EngineResult:
    """One engine over all rounds; the figures are those of the costliest round.

    Attributes:
        engine: its name.
        what: for people.
        precision: see `Engine`.
        status: `MEASURED`, `WRONG` (its logits are not PEFT's) or `NOT_RUN`.
        reason: why it is not measured, or not in every round; else empty.
        library, note: see `Measured`.
        load_seconds, peak_memory_mib, gpu_memory_mib, file_mib: see `Measured`.
        max_logit_difference: see `Measured`.
        scores: the task's metrics on the file, by name; None without one.
        label_flips: rows of the file whose label is not PEFT's; None without one.
        cells: in order.
    """

    engine: str
    what: str
    precision: str
    status: str
    reason: str
    library: str = ""
    note: str = ""
    load_seconds: float = 0.0
    peak_memory_mib: float = 0.0
    gpu_memory_mib: float | None = None
    file_mib: float = 0.0
    max_logit_difference: float | None = None
    scores: dict[str, float] | None = None
    label_flips: int | None = None
    cells: tuple[CellResult, ...] = ()

    def cell(self, name: str) -> CellResult | None:
        """What it did on a cell, if it did."""
        return next((cell for cell in self.cells if cell.cell == name), None)


@dataclass(frozen=True)
class Best:
    """Ours against everybody else's on one cell.

    Attributes:
        cell: its name.
        ours, peer: names of the fastest engines.
        peer_speedup: the peer's latency over ours; the median of the rounds' ratios.
        peer_speedup_per_round: the ratios, each within one round.
        speedup: PEFT's latency over ours; None where PEFT was not timed.
        tutorial_speedup: of a file, the latency of the tutorial's own loop over ours; else None.
    """

    cell: str
    ours: str
    peer: str
    peer_speedup: float
    peer_speedup_per_round: tuple[float, ...]
    speedup: float | None
    tutorial_speedup: float | None


def summarise(
    prepared: Prepared, rounds: Sequence[Mapping[str, Measured | str]], peaks: Sequence[Peak]
) -> tuple[EngineResult, ...]:
    """The rounds' measurements → one result for each engine.

    Args:
        rounds: by an engine's name, what was measured, or why nothing was.
    """
    roofs = {peak.precision: peak.gflop_per_second for peak in peaks}
    reference = next((result for found in rounds if isinstance(result := found.get(REFERENCE), Measured)), None)
    results = []
    for name in rounds[0]:
        engine = ENGINES[name]
        measured = {i: result for i, found in enumerate(rounds) if isinstance(result := found[name], Measured)}
        reason = next((result for found in rounds if isinstance(result := found[name], str)), "")
        if not measured:
            results.append(EngineResult(name, engine.what, engine.precision, NOT_RUN, reason))
            continue
        all_of = list(measured.values())
        difference = max(item.max_logit_difference for item in all_of)
        status = MEASURED
        if engine.precision == "fp32" and difference > FP32_TOLERANCE:
            status, reason = WRONG, f"a logit differs from PEFT's by {difference:.3g}; {FP32_TOLERANCE:g} is allowed"
        labels = all_of[0].predictions.get(FILE)
        peft_labels = None if reference is None else reference.predictions.get(FILE)
        results.append(
            EngineResult(
                engine=name,
                what=engine.what,
                precision=engine.precision,
                status=status,
                reason=reason,
                library=all_of[0].library,
                note=all_of[0].note,
                load_seconds=max(item.load_seconds for item in all_of),
                peak_memory_mib=max(item.peak_memory_mib for item in all_of),
                gpu_memory_mib=max((mib for item in all_of if (mib := item.gpu_memory_mib) is not None), default=None),
                file_mib=all_of[0].file_bytes / 2**20,
                max_logit_difference=difference,
                scores=None if labels is None else _score(prepared, labels),
                label_flips=None if labels is None or peft_labels is None else _flips(labels, peft_labels),
                cells=tuple(
                    _cell(prepared, engine, cell, rounds, roofs)
                    for cell in prepared.cells
                    if cell.name in all_of[0].cells
                ),
            )
        )
    return tuple(results)


def _score(prepared: Prepared, labels: Sequence[int]) -> dict[str, float]:
    from train.data.tasks import score

    return score(prepared.task, labels, prepared.expected).values


def _flips(labels: Sequence[int], others: Sequence[int]) -> int:
    return sum(one != other for one, other in zip(labels, others, strict=True))


def _medians(rounds: Sequence[Mapping[str, Measured | str]], engine: str, cell: str) -> dict[int, float]:
    """An engine's median latency on a cell in ms, by the number of the round, where it has one."""
    return {
        number: statistics.median(result.cells[cell].latencies_ms)
        for number, found in enumerate(rounds)
        if isinstance(result := found.get(engine), Measured) and cell in result.cells
    }


def _ratios(slow: Mapping[int, float], fast: Mapping[int, float]) -> tuple[float, ...]:
    """Of each round in which both were timed."""
    return tuple(slow[number] / fast[number] for number in fast if number in slow)


def _cell(
    prepared: Prepared,
    engine: Engine,
    cell: Cell,
    rounds: Sequence[Mapping[str, Measured | str]],
    roofs: Mapping[str, float],
) -> CellResult:
    times = [result.cells[cell.name] for found in rounds if isinstance(result := found[engine.name], Measured)]
    medians = _medians(rounds, engine.name, cell.name)
    latency_ms = statistics.median(medians.values())
    speedups = _ratios(_medians(rounds, REFERENCE, cell.name), medians)
    products = sum(
        prepared.dimensions.multiply_adds(engine.family, shape.batch_size, shape.length) for shape in cell.shapes
    )
    gflop = 2 * products / 1e9
    roof = roofs.get(engine.precision)
    return CellResult(
        cell=cell.name,
        latency_ms=latency_ms,
        latency_ms_per_round=tuple(medians.values()),
        p95_ms=statistics.median(float(np.percentile(item.latencies_ms, 95)) for item in times),
        runs=sum(len(item.latencies_ms) for item in times),
        first_run_ms=max(item.first_run_ms for item in times),
        pairs_per_second=1000 * cell.texts / latency_ms,
        speedup=statistics.median(speedups) if speedups else None,
        speedup_per_round=speedups,
        gflop=gflop,
        gflop_per_second=1000 * gflop / latency_ms,
        peak_share=None if roof is None else 1000 * gflop / latency_ms / roof,
    )


def compare(
    prepared: Prepared, rounds: Sequence[Mapping[str, Measured | str]], results: Sequence[EngineResult]
) -> tuple[Best, ...]:
    """The fastest of ours against the fastest of the others, cell by cell, where there are both and they are right."""
    found = []
    for cell in prepared.cells:
        if cell.name == TUTORIAL:
            continue
        timed = {
            result.engine: of_cell
            for result in results
            if result.status == MEASURED and (of_cell := result.cell(cell.name)) is not None
        }
        fastest = sorted(timed, key=lambda name: timed[name].latency_ms)
        ours = next((name for name in fastest if ENGINES[name].family == OURS), None)
        peer = next((name for name in fastest if ENGINES[name].family != OURS), None)
        if ours is None or peer is None:
            continue
        medians = _medians(rounds, ours, cell.name)
        ratios = _ratios(_medians(rounds, peer, cell.name), medians)
        tutorial = _ratios(_medians(rounds, REFERENCE, TUTORIAL), medians) if cell.name == FILE else ()
        found.append(
            Best(
                cell=cell.name,
                ours=ours,
                peer=peer,
                peer_speedup=statistics.median(ratios),
                peer_speedup_per_round=ratios,
                speedup=timed[ours].speedup,
                tutorial_speedup=statistics.median(tutorial) if tutorial else None,
            )
        )
    return tuple(found)


def table(
    prepared: Prepared, results: Sequence[EngineResult], best: Sequence[Best], peaks: Sequence[Peak]
) -> Iterator[str]:
    """Everything for people, line by line."""
    ran = [result for result in results if result.status != NOT_RUN]
    width = max(len(name) for name in ENGINES) + 2
    for cell in prepared.cells:
        rows = [(result, of_cell) for result in ran if (of_cell := result.cell(cell.name)) is not None]
        yield f"\n{cell.name}: {cell.what}"
        yield f"  {'engine':<{width}}{'median ms':>10}{'p95 ms':>10}{'pairs/s':>10}{'× PEFT':>8}  {'in each round':<18}{'GFLOP/s':>9}{'of peak':>9}"
        for result, row in rows:
            speedup = "–" if row.speedup is None else f"{row.speedup:.2f}"
            each = " ".join(f"{ratio:.2f}" for ratio in row.speedup_per_round)
            share = "–" if row.peak_share is None else f"{100 * row.peak_share:.0f} %"
            yield (
                f"  {result.engine:<{width}}{row.latency_ms:>10.2f}{row.p95_ms:>10.2f}{row.pairs_per_second:>10.1f}"
                f"{speedup:>8}  {each:<18}{row.gflop_per_second:>9.0f}{share:>9}"
            )
    yield f"\n{'engine':<{width}}{'load s':>9}{'first run s':>13}{'memory MiB':>12}{'GPU MiB':>9}{'file MiB':>10}{'logits differ':>15}  quality"
    for result in ran:
        first = max((cell.first_run_ms for cell in result.cells), default=0.0) / 1000
        on_gpu = "–" if result.gpu_memory_mib is None else f"{result.gpu_memory_mib:.0f}"
        yield (
            f"{result.engine:<{width}}{result.load_seconds:>9.2f}{first:>13.2f}{result.peak_memory_mib:>12.0f}{on_gpu:>9}"
            f"{result.file_mib:>10.1f}{result.max_logit_difference:>15.1e}  {_quality(result)}"
        )
    yield ""
    for result in results:
        if result.reason:
            yield f"{result.engine}: {result.status}: {result.reason}"
    for peak in peaks:
        yield f"peak {peak.precision}: {peak.gflop_per_second:.0f} GFLOP/s ({peak.product})"
    for item in best:
        yield _sentence(item)


def _quality(result: EngineResult) -> str:
    """ "accuracy 80.4, F1 86.0, 3 labels changed" """
    if result.scores is None:
        return ""
    parts = [str(Scores(result.scores))]
    if result.label_flips is not None:
        parts.append(f"{result.label_flips} labels changed")
    return ", ".join(parts)


def _sentence(best: Best) -> str:
    each = ", ".join(f"{ratio:.2f}" for ratio in best.peer_speedup_per_round)
    parts = [f"{best.peer_speedup:.2f} times as fast as the best peer, {best.peer} ({each})"]
    if best.speedup is not None:
        parts.append(f"{best.speedup:.2f} times as fast as PEFT")
    if best.tutorial_speedup is not None:
        parts.append(f"{best.tutorial_speedup:.2f} times as fast as the tutorial's loop")
    return f"{best.cell}: {best.ours} is {', '.join(parts)}"


def document(
    prepared: Prepared, results: Sequence[EngineResult], best: Sequence[Best], peaks: Sequence[Peak]
) -> dict[str, Any]:
    """Everything for programs; the settings are the caller's."""
    return {
        "model": prepared.model,
        "machine": prepared.machine,
        "versions": prepared.versions,
        "dimensions": asdict(prepared.dimensions),
        "cells": [
            {"cell": cell.name, "texts": cell.texts, "shapes": [str(shape) for shape in cell.shapes]}
            for cell in prepared.cells
        ],
        "peaks": [asdict(peak) for peak in peaks],
        "metrics": {name: METRICS[name] for name in prepared.task.metrics} if prepared.expected else {},
        "engines": [asdict(result) for result in results],
        "best": [asdict(item) for item in best],
    }
