"""The tab "Score a file": a file in, both engines' labels out, and where they differ. View only; see `demo.measure.label_file`."""

import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from demo.access.limits import MAX_BYTES
from demo.engines.stage import Setup, Stage
from demo.measure.label_file import Progress, Scored, label_upload, write_labelled
from demo.measure.upload import MAX_ROWS, Upload, read_upload
from demo.page.controls import Selectors, facing_visitors, text
from train.common.errors import PromptfoldError
from train.data.read_rows import FILE_TYPES
from train.data.tasks import METRICS

SCORE_QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "score"}
"""One file at a time, beside the other tabs' queue: a file takes minutes, and lets others measure meanwhile."""


NAMES = {"pytorch": "PyTorch", "onnx": "ONNX Runtime"}
"""Of the engines, for people."""


MATRIX_LABELS = 20
"""A larger matrix says nothing to the eye; the endpoint gives it."""


SHOWN_CHARACTERS = 160
"""Of a text in the preview."""


STATUS_HEIGHT, RESULTS_HEIGHT = 84, 160


CANCELLED = "Cancelled. Nothing was kept."


@dataclass(frozen=True, eq=False)
class _Job:
    """A file that a visitor wants labelled: with what, where it lies, whether its turn has come, and whether it ends."""

    setup: Setup
    upload: Upload
    path: Path
    begun: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)


_Jobs = dict[int, _Job]


def build_score_tab(stage: Stage, selectors: Selectors) -> None:
    """Build the tab, and the endpoint ``/score_file``."""
    gr.Markdown(
        f"Every row labelled by {'both engines' if stage.has_pytorch else 'ONNX Runtime'}, with the choices above. "
        f"CSV, JSON lines or Parquet in UTF-8, at most {MAX_BYTES / 1e6:g} MB and {MAX_ROWS:,} rows. The file is "
        "deleted here as soon as it is labelled. In CSV, a cell that a spreadsheet would take for a formula (it "
        "begins with `=`, `+`, `-`, `@`, a tab or a carriage return, and is no number) gets an apostrophe in front."
    )
    with gr.Row():
        file = gr.File(
            label="File to label", file_types=list(FILE_TYPES), type="filepath", height=180, elem_id="score-file"
        )
        with gr.Column(min_width=260):
            text_columns = gr.Textbox(
                label="Text columns", info="With a comma between; empty: as in training", elem_id="score-text-columns"
            )
            label_column = gr.Textbox(
                label="Label column", info="Empty: as in training, where the file has it", elem_id="score-label-column"
            )
    with gr.Row():
        start_button = gr.Button("Label the file", variant="primary", min_width=120)
        cancel_button = gr.Button("Cancel", interactive=False, min_width=120)
        download = gr.DownloadButton("Download the labelled file", interactive=False, min_width=200)
    status = gr.HTML(_status("Choose a file, then press Label the file."), min_height=STATUS_HEIGHT)
    results = gr.HTML("", elem_id="score-results", min_height=RESULTS_HEIGHT)
    # A visitor's jobs by number. An event that waits gets the state of its turn, but the number of its start: so it
    # leaves alone what the visitor, having cancelled it, asked for since.
    jobs = gr.State({})
    number = gr.Number(0, visible=False)

    def prepare(jobs: _Jobs, number: int, *chosen: Any) -> list[Any]:
        file, *columns = chosen[3:]
        try:
            setup = stage.setup(*chosen[:3])
            jobs[number + 1] = _Job(setup, _read(stage, setup, file, *columns), Path(file))
        except PromptfoldError as error:
            return [*[gr.skip()] * 4, _refused(error), gr.skip(), gr.skip()]
        waiting = _status(f"{Path(file).name}: waiting for a turn and for the engines …")
        return [jobs, number + 1, *_buttons(runs=True), waiting, "", gr.DownloadButton(value=None, interactive=False)]

    def label(jobs: _Jobs, number: int) -> Iterator[list[Any]]:
        yield from _label(stage, jobs, number, download.GRADIO_CACHE)

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    buttons = [start_button, cancel_button]
    prepared = start_button.click(
        prepare,
        [jobs, number, *selectors.inputs, file, text_columns, label_column],
        [jobs, number, *buttons, status, results, download],
        queue=False,
        **quiet,
    )
    labelled = prepared.success(
        label,
        [jobs, number],
        [*buttons, file, status, results, download],
        trigger_mode="multiple",
        **quiet,
        **SCORE_QUEUE,
    )
    labelled.failure(lambda: _buttons(runs=False), None, buttons, queue=False, **quiet)
    # Not with Gradio's "cancels": what was under way to the browser would come after what is said here.
    cancel_button.click(_cancel, [jobs, number], [*buttons, file, status], queue=False, **quiet)
    _build_endpoint(stage)


def _label(stage: Stage, jobs: _Jobs, number: int, folder: str) -> Iterator[list[Any]]:
    """Values of both buttons, the file, the status, the results and the download, as a file is labelled.

    Args:
        folder: for what is labelled.
    """
    job = jobs.get(number)
    if job is None:
        # Gradio would empty every component if nothing were said at all.
        yield [gr.skip()] * 6
        return
    job.begun.set()
    over = [*_buttons(runs=False), None]
    try:
        for now in label_upload(stage, job.setup, job.upload, cancelled=job.cancelled):
            if now.result is None:
                yield [*[gr.skip()] * 3, _progress(now), gr.skip(), gr.skip()]
            else:
                written = gr.DownloadButton(value=_write(now.result, folder), interactive=True)
                yield [*over, _progress(now), _results(now.result), written]
        if job.cancelled.is_set():
            yield [*over, _status(CANCELLED), gr.skip(), gr.skip()]
    except PromptfoldError as error:
        yield [*over, _refused(error), gr.skip(), gr.skip()]
    finally:
        # Also where the visitor has gone: Gradio closes this generator then.
        job.path.unlink(missing_ok=True)
        jobs.pop(number, None)


def _cancel(jobs: _Jobs, number: int) -> list[Any]:
    """Values of both buttons, the file and the status."""
    job = jobs.get(number)
    if job is None:
        return [gr.skip()] * 4
    job.cancelled.set()
    if job.begun.is_set():
        # It says so itself, after the last of what it says.
        return [gr.skip(), gr.Button(interactive=False), gr.skip(), gr.skip()]
    job.path.unlink(missing_ok=True)
    jobs.pop(number, None)
    return [*_buttons(runs=False), None, _status(CANCELLED)]


def _build_endpoint(stage: Stage) -> None:
    """Build ``/score_file``."""
    served = gr.File(label="Labelled file", render=False)

    @facing_visitors
    def score_file(  # noqa: PLR0917 -- Gradio passes by position and shows these names
        file: str, text_columns: str, label_column: str, adapter: str, precision: str, pytorch: str
    ) -> list[Any]:
        """Label every row of a CSV, JSON lines or Parquet file with both engines, and score them where it has labels.

        Gives a summary (rows, counts by label, metrics and confusion matrix of each engine, how many rows they
        disagree on) and the labelled file.

        Args:
            file: the file, whose name ends in .csv, .jsonl or .parquet
            text_columns: its text columns, with a comma between; empty for those of the training
            label_column: its label column; empty for that of the training, where the file has it
            adapter: name of the adapter; empty for the one the page starts with
            precision: of the ONNX graph: fp32, fp16 or int8; empty for fp32
            pytorch: how PyTorch runs: eager, compiled or bf16; empty for eager
        """
        setup = stage.setup(adapter, precision, pytorch)
        upload = _read(stage, setup, file, text_columns, label_column)
        try:
            *_, last = label_upload(stage, setup, upload, cancelled=threading.Event())
        finally:
            Path(file).unlink(missing_ok=True)
        assert last.result is not None
        return [last.result.as_json(), _write(last.result, served.GRADIO_CACHE)]

    # Not gr.api, which would hand over whatever path a visitor names: components let only uploaded files through.
    with gr.Row(visible=False):
        served.render()
        names = ("Text columns", "Label column", "Adapter", "Precision", "PyTorch")
        gr.Button("Score a file").click(
            score_file,
            [gr.File(label="File"), *(gr.Textbox("", label=name) for name in names)],
            [gr.JSON(label="Summary"), served],
            api_name="score_file",
            **SCORE_QUEUE,
        )


def _read(stage: Stage, setup: Setup, file: str | None, text_columns: str | None, label_column: str | None) -> Upload:
    return read_upload(
        Path(file) if file else None,
        stage.choices[setup.adapter].adapter.task,
        text_columns=text_columns or "",
        label_column=label_column or "",
    )


def _buttons(*, runs: bool) -> list[Any]:
    return [gr.Button(interactive=not runs), gr.Button(interactive=runs)]


def _refused(error: PromptfoldError) -> str:
    """What went wrong, as a status; no gr.Error, which would lay itself over the results of the file before."""
    return f'{_status("")}<p role="alert"><b>{text(error)}</b></p>'


def _write(scored: Scored, folder: str) -> str:
    """Into Gradio's own folder, which it serves, and empties where the page has ``delete_cache``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    # A folder of its own, so that the file may have a name for people.
    return str(write_labelled(scored, Path(tempfile.mkdtemp(prefix="labelled-", dir=folder))))


def _progress(now: Progress) -> str:
    words = f"{now.engine}: {now.done:,} of {now.rows:,} rows labelled"
    if now.result is not None:
        words = f"Done: {now.rows:,} rows of {now.result.upload.name} labelled."
    return _status(words, now.fraction)


def _status(words: str, fraction: float = 0.0) -> str:
    bar = f'<progress max="1" value="{fraction:.4f}" aria-label="Part that is done" style="width:100%"></progress>'
    return bar + (f'<p role="status">{text(words)}</p>' if words else "")


def _results(scored: Scored) -> str:
    """All that is known of a labelled file."""
    upload = scored.upload
    facts = []
    if scored.pytorch is not None:
        n_differ, n_rows = int(scored.differs.sum()), len(upload.rows)
        facts.append(
            f"<b>The engines give different labels to {n_differ:,} of {n_rows:,} rows.</b>"
            if n_differ
            else f"<b>Both engines give the same label to each of the {n_rows:,} rows.</b>"
        )
    if scored.texts_cut:
        facts.append(
            f"{scored.texts_cut:,} texts are longer than the {scored.max_length} tokens that the model reads, and lost "
            "their end."
        )
    if upload.expected is None:
        facts.append(f"The file has no column {text(repr(upload.task.label_column))}, so nothing is scored.")
    tables = [_counts(scored)]
    if upload.expected is not None:
        tables += [_scores(scored), *_matrices(scored)]
    return (
        f"<p>{'<br>'.join(facts)}</p>"
        f'<div style="display:flex;flex-wrap:wrap;gap:0 2.5rem">{"".join(tables)}</div>{_preview(scored)}'
    )


def _counts(scored: Scored) -> str:
    labels = scored.upload.task.labels
    columns = {NAMES[side]: list(scored.counts(side).values()) for side in scored.sides}
    if (confusion := scored.confusion("onnx")) is not None:
        columns["In the file"] = confusion.sum(axis=1).tolist()
    rows = [
        [label, *(f"{count:,}" for count in counts)] for label, *counts in zip(labels, *columns.values(), strict=True)
    ]
    return _table("Rows by label", ["Label", *columns], rows)


def _scores(scored: Scored) -> str:
    scores = {NAMES[side]: found.values for side in scored.sides if (found := scored.scores(side)) is not None}
    rows = [
        [METRICS[name], *(f"{100 * values[name]:.1f}" for values in scores.values())]
        for name in scored.upload.task.metrics
    ]
    return _table("Against the file's labels, in percent", ["Metric", *scores], rows)


def _matrices(scored: Scored) -> list[str]:
    labels = scored.upload.task.labels
    if len(labels) > MATRIX_LABELS:
        return [f"<p>The confusion matrices of {len(labels)} labels are in the answer of the endpoint alone.</p>"]
    matrices = []
    for side in scored.sides:
        confusion = scored.confusion(side)
        assert confusion is not None
        rows = [[label, *(f"{count:,}" for count in counts)] for label, counts in zip(labels, confusion, strict=True)]
        title = f"Confusion matrix, {NAMES[side]} (rows: the file's labels)"
        matrices.append(_table(title, ["", *labels], rows))
    return matrices


def _preview(scored: Scored) -> str:
    """Rows worth a look, and why."""
    upload, differs, wrong = scored.upload, scored.differs, scored.wrong
    shown = scored.preview
    head = ["Row", *upload.task.text_columns, *(NAMES[side] for side in scored.sides)]
    if upload.expected is not None:
        head.append("In the file")
    if scored.pytorch is not None or upload.expected is not None:
        head.append("Note")
    texts = upload.sentences
    rows = []
    for row in shown:
        cells = [f"{row + 1:,}", *map(_short, texts[row])]
        for classified in scored.sides.values():
            cells.append(f"{classified.labels[classified.indices[row]]} {classified.best_probabilities[row]:.3f}")
        if upload.expected is not None:
            cells.append(upload.task.labels[upload.expected[row]])
        notes = ["engines differ"] * bool(differs[row]) + ["wrong"] * bool(wrong[row])
        rows.append([*cells, ", ".join(notes)][: len(head)])
    n_rows = len(texts)
    title = f"{len(shown)} of {n_rows:,} rows" if len(shown) < n_rows else f"All {n_rows:,} rows"
    if len(scored.sides) > 1:
        title += ", first those on which the engines differ"
    if upload.expected is not None:
        title += ", then those that are wrong" if len(scored.sides) > 1 else ", first those that are wrong"
    return _table(title, head, rows, box="max-height:32rem", table="width:100%;min-width:44rem")


def _short(words: str) -> str:
    return words if len(words) <= SHOWN_CHARACTERS else f"{words[:SHOWN_CHARACTERS]} …"


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, box: str = "", table: str = "") -> str:
    """Texts as a table that scrolls within its own box, the first column naming the rows.

    Args:
        box, table: CSS of both.
    """
    top = "".join(f'<th scope="col">{text(cell)}</th>' if cell else "<td></td>" for cell in head)
    body = "".join(
        f'<tr><th scope="row">{text(first)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    name = text(title)
    return (
        f'<div style="min-width:0"><h3>{name}</h3>'
        f'<div style="overflow:auto;{box}" tabindex="0" role="region" aria-label="{name}">'
        f'<table style="{table}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div></div>'
    )
