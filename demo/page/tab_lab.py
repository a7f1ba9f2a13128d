"""The tab "Latency lab": batch sizes and lengths to choose, and both engines' latencies. View only; see `demo.measure.sweep`."""

import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from demo.engines.stage import Setup, Stage
from demo.measure.compare import PAUSE_SECONDS
from demo.measure.sweep import MAX_CELLS, ROUNDS, Cell, Row, Sweep, choose_cells, sweep
from demo.page.controls import ONE_AT_A_TIME, Selectors, facing_visitors, text
from demo.page.sweep_charts import charts_png, charts_svg, describe
from train.common.errors import PromptfoldError

BATCH_SIZES = (1, 2, 4, 8, 16, 32)


LENGTHS = (16, 32, 64, 128, 256, 512)
"""To tick, as far as the model reads them; besides them the longest that it reads."""


CHOSEN_BATCH_SIZES, CHOSEN_LENGTHS = (1, 8), (16, 64, 128)
"""Ticked at first."""


STATUS_HEIGHT = 84


CHART_BOX = "flex:1 1 260px;max-width:5.2in;aspect-ratio:5.2/3.6"
"""As large as the chart that comes there, so that nothing moves when it comes."""


NO_CHART = '<div style="height:100%;border:1px dashed var(--border-color-primary);border-radius:8px"></div>'


_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


_AT_ONCE: dict[str, Any] = {"queue": False, **_QUIET}
"""Past the queue, in which what a visitor wants to stop may still be waiting."""


@dataclass(frozen=True, eq=False)
class _Run:
    """A measurement that a visitor asked for: which, and what ends it before its time."""

    setup: Setup
    cells: tuple[Cell, ...]
    stop: threading.Event


def build_lab_tab(stage: Stage, selectors: Selectors) -> None:
    """Build the tab, and the endpoint ``/latency``."""
    gr.Markdown(
        f"How latency grows with the batch and with the text, on random token ids without padding. At most {MAX_CELLS} "
        "combinations at once; other visitors wait meanwhile."
    )
    choices = _lengths(stage, stage.default().adapter)
    with gr.Row():
        batch_sizes = gr.CheckboxGroup(
            list(BATCH_SIZES), value=list(CHOSEN_BATCH_SIZES), label="Batch sizes", min_width=260
        )
        lengths = gr.CheckboxGroup(
            choices, value=sorted({*CHOSEN_LENGTHS} & {*choices}), label="Lengths in tokens", min_width=260
        )
    with gr.Row():
        start_button = gr.Button("Measure", variant="primary", min_width=120)
        stop_button = gr.Button("Stop", interactive=False, min_width=120)
    status = gr.HTML(_status("Choose batch sizes and lengths, then press Measure."), min_height=STATUS_HEIGHT)
    table = gr.HTML(_table(()), elem_id="lab-table", min_height=120)
    charts = gr.HTML(_charts(), elem_id="lab-charts")
    with gr.Row():
        csv_button = gr.DownloadButton("Download CSV", interactive=False, min_width=160)
        png_button = gr.DownloadButton("Download charts (PNG)", interactive=False, min_width=160)
    gr.Markdown(
        f"**What is measured.** One forward pass, token ids in, logits out. In each cell the engines take turns, {ROUNDS} "
        f"rounds, with a pause of {PAUSE_SECONDS} s and a warm-up before each burst, and the same number of runs. The "
        "speed-up is the ratio of the medians over all rounds; in brackets are the least and the greatest of a round."
    )
    # What is in it is made anew for each run and goes with the session; a first value would be copied.
    wanted = gr.State(None)
    results = [status, table, charts, csv_button, png_button]
    buttons = [start_button, stop_button]

    @facing_visitors
    def prepare(*chosen: Any) -> list[Any]:
        setup = stage.setup(*chosen[:3])
        run = _Run(setup, _cells(stage, setup, *chosen[3:]), threading.Event())
        files = [gr.DownloadButton(value=None, interactive=False)] * 2
        return [run, _status("Waiting for the engines …"), _table(run.cells), _charts(), *files, *_buttons(runs=True)]

    def measure(run: _Run) -> Iterator[list[Any]]:
        now, n_rows = None, 0
        # At once: what waits, Gradio shows so pale that it can hardly be read.
        yield [_status("Starting the engines …"), *[gr.skip()] * 4]
        try:
            for now in sweep(stage, run.setup, run.cells, stop=run.stop):
                new = [gr.skip()] * 4
                if len(now.rows) > n_rows:
                    n_rows = len(now.rows)
                    new = [_table(run.cells, now), _charts(*charts_svg(now)), *_files(now, csv_button.GRADIO_CACHE)]
                yield [_progress(now), *new]
        except PromptfoldError as error:
            # No gr.Error: it would lay itself over the rows that were measured.
            gr.Warning(str(error), title="The measurement ended early")
            yield [_progress(now, str(error)), *[gr.skip()] * 4]

    @facing_visitors
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

    def refresh(adapter: str, chosen: list[int]) -> Any:
        choices = _lengths(stage, adapter)
        return gr.CheckboxGroup(choices=choices, value=[length for length in chosen if length in choices])

    chosen_now = [*selectors.inputs, batch_sizes, lengths]
    # Queued though it is quick: Gradio shows an error of nothing else. But beside whatever measures.
    prepared = start_button.click(prepare, chosen_now, [wanted, *results, *buttons], concurrency_limit=None, **_QUIET)
    # The full progress animation, in a browser on the same cores, would cost both engines time.
    shown: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": status, "api_visibility": "private"}
    measured = prepared.success(measure, wanted, results, **shown, **ONE_AT_A_TIME)
    measured.then(lambda: _buttons(runs=False), None, buttons, **_AT_ONCE)
    stop_button.click(_halt, wanted, None, **_AT_ONCE)
    selectors.adapter.change(refresh, [selectors.adapter, lengths], lengths, **_AT_ONCE)
    gr.api(latency, api_name="latency", **ONE_AT_A_TIME)


def _lengths(stage: Stage, adapter: str) -> list[int]:
    longest = stage.choices[adapter].adapter.max_length
    return [length for length in LENGTHS if length < longest] + [longest]


def _cells(stage: Stage, setup: Setup, batch_sizes: object, lengths: object) -> tuple[Cell, ...]:
    # The adapter's limit is its bundle's, and known before that is exported.
    return choose_cells(batch_sizes, lengths, max_length=stage.choices[setup.adapter].adapter.max_length)


def _halt(run: _Run | None) -> None:
    if run is not None:
        run.stop.set()


def _buttons(*, runs: bool) -> list[Any]:
    return [gr.Button(interactive=not runs), gr.Button(interactive=runs)]


def _files(now: Sweep, folder: str) -> list[Any]:
    """Put into Gradio's own folder, which it serves, and empties where the page has ``delete_cache``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    buttons = []
    for suffix, content in ((".csv", now.as_csv().encode()), (".png", charts_png(now))):
        with tempfile.NamedTemporaryFile(prefix="promptfold-latency-", suffix=suffix, dir=folder, delete=False) as file:
            file.write(content)
        buttons.append(gr.DownloadButton(value=file.name, interactive=True))
    return buttons


def _progress(now: Sweep | None, error: str = "") -> str:
    if now is None:
        return _status(error)
    left = f"; about {now.seconds_left:.0f} s left" if now.seconds_left is not None else ""
    measured = f"{len(now.rows)} of {len(now.cells)} cells measured."
    words = f"{now.doing}{left}" if now.doing else f"{'Done' if now.is_complete else 'Stopped'}: {measured}"
    return _status(f"{error} {measured}" if error else words, now.bursts_done, now.n_bursts)


def _status(words: str, done: int = 0, of: int = 1) -> str:
    percent = round(100 * done / of)
    return (
        f'<div role="progressbar" aria-label="Bursts measured" aria-valuenow="{percent}" style="height:8px;border-radius:4px;'
        f'background:var(--border-color-primary)"><div style="width:{percent}%;height:100%;border-radius:4px;'
        f'background:var(--color-accent)"></div></div><p style="margin-top:.4rem">{text(words)}</p>'
    )


def _table(cells: tuple[Cell, ...], now: Sweep | None = None) -> str:
    """Every cell from the start, so that the page below stays where it is."""
    unit = now.unit if now else "pairs"
    columns = ("median ms", "p95 ms", f"{unit}/s")
    heads = [
        "Batch",
        "Tokens",
        *(f"{name}<br>{column}" for name in ("PyTorch", "ONNX") for column in columns),
        "Speed-up",
    ]
    right = 'style="text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums"'
    head = "".join(f'<th scope="col" {right}>{name}</th>' for name in heads)
    rows = {row.cell: row for row in now.rows} if now else {}
    lines = [[cell.batch_size, cell.tokens, *_figures(rows.get(cell))] for cell in cells]
    body = "".join(f"<tr>{''.join(f'<td {right}>{value}</td>' for value in line)}</tr>" for line in lines)
    ran_on = [describe(execution) for execution in (now.pytorch, now.onnx) if execution] if now else []
    return (
        '<div style="overflow-x:auto" tabindex="0" role="region" aria-label="Measured latencies">'
        f'<table style="width:100%"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<p style='min-height:3.2em;margin-top:.4rem'>{'<br>'.join(map(text, (*ran_on, *(now.notes if now else ()))))}</p>"
    )


def _figures(row: Row | None) -> list[str]:
    """What stands behind batch size and length."""
    if row is None:
        return ["…"] * 7
    figures: list[str] = []
    for times in (row.pytorch, row.onnx):
        known = times and (f"{times.median_ms:.2f}", f"{times.p95_ms:.2f}", f"{row.pairs_per_s(times):,.0f}")
        figures += known or ["–"] * 3
    rounds = row.round_speedups
    spread = f" ({min(rounds):.2f}–{max(rounds):.2f})" if rounds else ""
    return [*figures, f"{row.speedup:.2f}×{spread}" if row.speedup else "–"]


def _charts(*drawn: str) -> str:
    boxes = "".join(f'<div style="{CHART_BOX}">{svg}</div>' for svg in drawn or (NO_CHART, NO_CHART))
    return f'<div style="display:flex;flex-wrap:wrap;gap:1rem;justify-content:center">{boxes}</div>'
