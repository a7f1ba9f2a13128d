"""The tab "Latency lab": both engines' latencies over batch sizes and lengths. View only; see `demo.measure.sweep`."""

import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from demo.engines.stage import Setup, Stage
from demo.measure.compare import PAUSE_SECONDS
from demo.measure.sweep import MAX_CELLS, ROUNDS, Cell, Row, Sweep, choose_cells, sweep
from demo.page.controls import AT_ONCE, ONE_AT_A_TIME, QUIET, Selectors, errors_shown, run_buttons, served_folder
from demo.page.html import render, render_text
from demo.page.sweep_charts import charts_png, charts_svg, engine_lines
from train.common.errors import PromptfoldError

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
LENGTHS = (16, 32, 64, 128, 256, 512)
"""Lengths to choose from, as far as the model reads them; the longest that it reads is added."""

CHOSEN_BATCH_SIZES, CHOSEN_LENGTHS = (1, 8), (16, 64, 128)
"""Chosen at first."""

STATUS_HEIGHT = 84


@dataclass(frozen=True, eq=False)
class _Run:
    """A measurement that a visitor asked for."""

    setup: Setup
    cells: tuple[Cell, ...]
    stop: threading.Event


def build_lab_tab(stage: Stage, selectors: Selectors) -> None:
    """Build the tab and the endpoint ``/latency``."""
    gr.Markdown(
        f"How latency grows with the batch and with the text, on random token ids without padding. At most {MAX_CELLS} "
        "combinations at once; other visitors wait meanwhile."
    )
    _LabTab(stage).wire(selectors)
    gr.Markdown(render_text("lab.md", rounds=ROUNDS, pause_s=PAUSE_SECONDS))
    _build_endpoint(stage)


class _LabTab:
    """The tab's components and the handlers of their events."""

    def __init__(self, stage: Stage) -> None:
        """Lay out the components."""
        self._stage = stage
        lengths = _lengths(stage, stage.default().adapter)
        chosen = sorted({*CHOSEN_LENGTHS} & {*lengths})
        with gr.Row():
            self._batch_sizes = gr.CheckboxGroup(
                list(BATCH_SIZES), value=list(CHOSEN_BATCH_SIZES), label="Batch sizes", min_width=260
            )
            self._lengths = gr.CheckboxGroup(lengths, value=chosen, label="Lengths in tokens", min_width=260)
        with gr.Row():
            self._start_button = gr.Button("Measure", variant="primary", min_width=120)
            self._stop_button = gr.Button("Stop", interactive=False, min_width=120)
        self._status = gr.HTML(_status("Choose batch sizes and lengths, then press Measure."), min_height=STATUS_HEIGHT)
        table = gr.HTML(_table(()), elem_id="lab-table", min_height=120)
        charts = gr.HTML(_charts(), elem_id="lab-charts")
        with gr.Row():
            self._csv_button = gr.DownloadButton("Download CSV", interactive=False, min_width=160)
            png_button = gr.DownloadButton("Download charts (PNG)", interactive=False, min_width=160)
        self._results = [self._status, table, charts, self._csv_button, png_button]

    def wire(self, selectors: Selectors) -> None:
        """Connect the events with their handlers."""
        run = gr.State(None)  # set anew by each start, as Gradio copies a first value
        buttons = [self._start_button, self._stop_button]
        # Queued, though it is quick, as Gradio shows errors only of queued events; but not behind a measurement.
        prepared = self._start_button.click(
            self.prepare,
            [*selectors.inputs, self._batch_sizes, self._lengths],
            [run, *self._results, *buttons],
            concurrency_limit=None,
            **QUIET,
        )
        # "minimal", as the full progress animation, in a browser on the same cores, would slow both engines.
        shown: dict[str, Any] = QUIET | {"show_progress": "minimal", "show_progress_on": self._status}
        measured = prepared.success(self.measure, run, self._results, **shown, **ONE_AT_A_TIME)
        measured.then(lambda: run_buttons(running=False), None, buttons, **AT_ONCE)
        self._stop_button.click(_halt, run, None, **AT_ONCE)
        selectors.adapter.change(self.refresh, [selectors.adapter, self._lengths], self._lengths, **AT_ONCE)

    @errors_shown()
    def prepare(self, *chosen: Any) -> list[Any]:
        """Check what the visitor chose, and show a table without figures."""
        setup = self._stage.setup(*chosen[:3])
        run = _Run(setup, _cells(self._stage, setup, *chosen[3:]), threading.Event())
        files = [gr.DownloadButton(value=None, interactive=False)] * 2
        waiting = _status("Waiting for the engines …")
        return [run, waiting, _table(run.cells), _charts(), *files, *run_buttons(running=True)]

    def measure(self, run: _Run) -> Iterator[list[Any]]:
        """Show a sweep as it goes on."""
        now, n_rows = None, 0
        # At once: Gradio shows what waits so pale that it can hardly be read.
        yield [_status("Starting the engines …"), *[gr.skip()] * 4]
        try:
            for now in sweep(self._stage, run.setup, run.cells, stop=run.stop):
                new = [gr.skip()] * 4
                if len(now.rows) > n_rows:
                    n_rows = len(now.rows)
                    files = _files(now, served_folder(self._csv_button))
                    new = [_table(run.cells, now), _charts(*charts_svg(now)), *files]
                yield [_progress(now), *new]
        except PromptfoldError as error:
            # Not gr.Error, which would cover the rows that were measured.
            gr.Warning(str(error), title="The measurement ended early")
            yield [_progress(now, str(error)), *[gr.skip()] * 4]

    def refresh(self, adapter: str, chosen: list[int]) -> Any:
        """The lengths that another adapter reads."""
        choices = _lengths(self._stage, adapter)
        return gr.CheckboxGroup(choices=choices, value=[length for length in chosen if length in choices])


def _build_endpoint(stage: Stage) -> None:
    @errors_shown()
    def latency(
        batch_sizes: list[int], lengths: list[int], adapter: str = "", precision: str = "", pytorch: str = ""
    ) -> dict:
        """Measure how long a forward pass takes at batch sizes and lengths, in PyTorch and in ONNX Runtime.

        Every batch size is measured with every length, on random token ids without padding. The two engines take
        turns, with an idle pause before each burst, so each combination takes seconds. Latencies are in milliseconds.

        Args:
            batch_sizes: how many texts a batch has: whole numbers from 1 to 64
            lengths: of a text, in tokens: whole numbers from 1 to what the model reads
            adapter: name of the adapter; empty for the one the page starts with
            precision: of the ONNX graph: fp32, fp16 or int8; empty for fp32
            pytorch: how PyTorch runs: eager, compiled or bf16; empty for eager
        """
        setup = stage.setup(adapter, precision, pytorch)
        *_, last = sweep(stage, setup, _cells(stage, setup, batch_sizes, lengths), stop=threading.Event())
        return last.as_json()

    gr.api(latency, api_name="latency", **ONE_AT_A_TIME)


def _lengths(stage: Stage, adapter: str) -> list[int]:
    longest = stage.choices[adapter].adapter.max_length
    return [length for length in LENGTHS if length < longest] + [longest]


def _cells(stage: Stage, setup: Setup, batch_sizes: object, lengths: object) -> tuple[Cell, ...]:
    # The adapter's limit is its bundle's, and is known before the bundle is exported.
    return choose_cells(batch_sizes, lengths, max_length=stage.choices[setup.adapter].adapter.max_length)


def _halt(run: _Run | None) -> None:
    if run is not None:
        run.stop.set()


def _files(now: Sweep, folder: Path) -> list[Any]:
    """Both download buttons with their files."""
    buttons = []
    for suffix, content in ((".csv", now.as_csv().encode()), (".png", charts_png(now))):
        with tempfile.NamedTemporaryFile(prefix="promptfold-latency-", suffix=suffix, dir=folder, delete=False) as file:
            file.write(content)
        buttons.append(gr.DownloadButton(value=file.name, interactive=True))
    return buttons


def _progress(now: Sweep | None, error: str = "") -> Markup:
    if now is None:
        return _status(error)
    left = f"; about {now.seconds_left:.0f} s left" if now.seconds_left is not None else ""
    measured = f"{len(now.rows)} of {len(now.cells)} cells measured."
    words = f"{now.doing}{left}" if now.doing else f"{'Done' if now.is_complete else 'Stopped'}: {measured}"
    return _status(f"{error} {measured}" if error else words, now.bursts_done / now.n_bursts)


def _status(words: str, fraction: float = 0.0) -> Markup:
    return render("status.html", label="Bursts measured", fraction=fraction, words=words, role="", error="")


def _table(cells: tuple[Cell, ...], now: Sweep | None = None) -> Markup:
    """All cells, measured or not, so that nothing below moves when a row comes."""
    measured = {row.cell: row for row in now.rows} if now else {}
    rows = [[cell.batch_size, cell.tokens, *_figures(measured.get(cell))] for cell in cells]
    notes = [*engine_lines(now), *now.notes] if now else []
    return render("lab_table.html", rows=rows, notes=notes, texts=now.unit if now else "pairs")


def _figures(row: Row | None) -> list[str]:
    """The cells of a row after batch size and length."""
    if row is None:
        return ["…"] * 7
    figures: list[str] = []
    for times in (row.pytorch, row.onnx):
        known = times and (f"{times.median_ms:.2f}", f"{times.p95_ms:.2f}", f"{row.pairs_per_s(times):,.0f}")
        figures += known or ["–"] * 3
    rounds = row.round_speedups
    spread = f" ({min(rounds):.2f}–{max(rounds):.2f})" if rounds else ""
    return [*figures, f"{row.speedup:.2f}×{spread}" if row.speedup else "–"]


def _charts(*charts: Markup) -> Markup:
    """The charts, or empty boxes in their places."""
    return render("lab_charts.html", charts=charts or ("", ""))
