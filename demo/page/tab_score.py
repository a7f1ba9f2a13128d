"""The tab "Score a file": a file in, both engines' labels out. View only; see `demo.measure.label_file`."""

import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
import numpy as np
from markupsafe import Markup

from demo.access.limits import MAX_BYTES
from demo.engines.stage import Setup, Stage
from demo.measure.label_file import Progress, Scored, label_upload, write_labelled
from demo.measure.upload import MAX_ROWS, UPLOAD_TYPES, Upload, read_upload
from demo.page.controls import AT_ONCE, QUIET, Selectors, errors_shown, run_buttons, served_folder
from demo.page.html import render, render_text
from export.runtime.batches import Classified
from train.common.errors import PromptfoldError
from train.config import CLASSIFICATION, MULTI_LABEL, REGRESSION
from train.data.labels import Label
from train.data.tasks import METRICS, Task

SCORE_QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "score"}
"""One file at a time, in a queue of its own: a file takes minutes, during which others can measure."""

MAX_NAME_BYTES = 255
"""The longest name of a file on the file systems in use."""

NAMES = {"pytorch": "PyTorch", "onnx": "ONNX Runtime"}
"""Names of the engines for people."""

MATRIX_LABELS = 20
"""With more labels a confusion matrix cannot be read; the endpoint gives it."""

NO_LABEL = "(none)"
"""Shown for a text without any label, where several are possible."""

SHOWN_CHARACTERS = 160
"""Length of a text in the preview."""

STATUS_HEIGHT, RESULTS_HEIGHT = 84, 160

CANCELLED = "Cancelled. Nothing was kept."


@dataclass(frozen=True, eq=False)
class _Job:
    """A file that a visitor wants labelled."""

    setup: Setup
    upload: Upload
    path: Path
    begun: threading.Event = field(default_factory=threading.Event)
    """Set when its turn has come."""
    cancelled: threading.Event = field(default_factory=threading.Event)


_Jobs = dict[int, _Job]
"""A visitor's jobs by number. An event that waits gets the state of its turn, but the number of its start: so it does
not touch what the visitor, having cancelled it, asked for since."""


def build_score_tab(stage: Stage, selectors: Selectors) -> None:
    """Build the tab and the endpoint ``/score_file``."""
    gr.Markdown(
        render_text("score.md", has_pytorch=stage.has_pytorch, max_mb=MAX_BYTES // 1_000_000, max_rows=MAX_ROWS)
    )
    _ScoreTab(stage).wire(selectors)
    _build_endpoint(stage)


class _ScoreTab:
    """The tab's components and the handlers of their events."""

    def __init__(self, stage: Stage) -> None:
        """Lay out the components."""
        self._stage = stage
        with gr.Row():
            self._file = gr.File(
                label="File to label", file_types=list(UPLOAD_TYPES), type="filepath", height=180, elem_id="score-file"
            )
            with gr.Column(min_width=260):
                info = "With a comma between; empty: as in training"
                self._text_columns = gr.Textbox(label="Text columns", info=info, elem_id="score-text-columns")
                info = "Empty: as in training, where the file has it"
                self._label_column = gr.Textbox(label="Label column", info=info, elem_id="score-label-column")
        with gr.Row():
            self._start_button = gr.Button("Label the file", variant="primary", min_width=120)
            self._cancel_button = gr.Button("Cancel", interactive=False, min_width=120)
            self._download = gr.DownloadButton("Download the labelled file", interactive=False, min_width=200)
        self._status = gr.HTML(_status("Choose a file, then press Label the file."), min_height=STATUS_HEIGHT)
        self._results = gr.HTML("", elem_id="score-results", min_height=RESULTS_HEIGHT)

    def wire(self, selectors: Selectors) -> None:
        """Connect the events with their handlers."""
        jobs, number = gr.State({}), gr.Number(0, visible=False)
        buttons = [self._start_button, self._cancel_button]
        prepared = self._start_button.click(
            self.prepare,
            [jobs, number, *selectors.inputs, self._file, self._text_columns, self._label_column],
            [jobs, number, *buttons, self._status, self._results, self._download],
            **AT_ONCE,
        )
        labelled = prepared.success(
            self.label,
            [jobs, number],
            [*buttons, self._file, self._status, self._results, self._download],
            trigger_mode="multiple",
            **QUIET,
            **SCORE_QUEUE,
        )
        labelled.failure(lambda: run_buttons(running=False), None, buttons, **AT_ONCE)
        # Not Gradio's "cancels": what is on its way to the browser would arrive after the answer to this.
        self._cancel_button.click(_cancel, [jobs, number], [*buttons, self._file, self._status], **AT_ONCE)

    def prepare(self, jobs: _Jobs, number: int, *chosen: Any) -> list[Any]:
        """Read the visitor's file, and refuse it or make a job of it."""
        file, *columns = chosen[3:]
        try:
            setup = self._stage.setup(*chosen[:3])
            jobs[number + 1] = _Job(setup, _read(self._stage, setup, file, *columns), Path(file))
        except PromptfoldError as error:
            return [*[gr.skip()] * 4, _refused(error), gr.skip(), gr.skip()]
        waiting = _status(f"{Path(file).name}: waiting for a turn and for the engines …")
        no_file = gr.DownloadButton(value=None, interactive=False)
        return [jobs, number + 1, *run_buttons(running=True), waiting, "", no_file]

    def label(self, jobs: _Jobs, number: int) -> Iterator[list[Any]]:
        """Label a job's file; values of both buttons, the file, the status, the results and the download."""
        job = jobs.get(number)
        if job is None:
            # Without any values Gradio would empty every component.
            yield [gr.skip()] * 6
            return
        job.begun.set()
        over = [*run_buttons(running=False), None]
        try:
            for now in label_upload(self._stage, job.setup, job.upload, cancelled=job.cancelled):
                if now.result is None:
                    yield [*[gr.skip()] * 3, _progress(now), gr.skip(), gr.skip()]
                else:
                    written = gr.DownloadButton(value=_write(now.result, self._download), interactive=True)
                    yield [*over, _progress(now), results_html(now.result), written]
            if job.cancelled.is_set():
                yield [*over, _status(CANCELLED), gr.skip(), gr.skip()]
        except PromptfoldError as error:
            yield [*over, _refused(error), gr.skip(), gr.skip()]
        finally:
            # Also when the visitor leaves: Gradio closes this generator then.
            job.path.unlink(missing_ok=True)
            jobs.pop(number, None)


def _cancel(jobs: _Jobs, number: int) -> list[Any]:
    """Values of both buttons, the file and the status."""
    job = jobs.get(number)
    if job is None:
        return [gr.skip()] * 4
    job.cancelled.set()
    if job.begun.is_set():
        # The job itself reports the end, after everything else that it reports.
        return [gr.skip(), gr.Button(interactive=False), gr.skip(), gr.skip()]
    job.path.unlink(missing_ok=True)
    jobs.pop(number, None)
    return [*run_buttons(running=False), None, _status(CANCELLED)]


def _build_endpoint(stage: Stage) -> None:
    served = gr.File(label="Labelled file", render=False)

    @errors_shown()
    def score_file(  # noqa: PLR0917 -- Gradio passes by position and shows these names
        file: str, text_columns: str, label_column: str, adapter: str, precision: str, pytorch: str
    ) -> list[Any]:
        """Label every row of a CSV, JSON, Parquet or Arrow file with both engines, and score them where it has labels.

        Gives a summary (rows, counts by label, metrics and confusion matrix of each engine, how many rows they
        disagree on) and the labelled file.

        Args:
            file: the file, whose name ends in .csv, .tsv, .json, .jsonl, .parquet or .arrow
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
        return [last.result.as_json(), _write(last.result, served)]

    # Not gr.api, which would pass on any path that a visitor names: components let only uploaded files through.
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


def _write(scored: Scored, served: gr.DownloadButton | gr.File) -> str:
    """Write the labelled file into a folder of its own, so that its name can be chosen freely; the path for Gradio.

    Gradio puts a path into an address as it stands, where "#" and "?" end it and "%" begins a code. The path that it gets
    is a second name of the file: as an address it means the first one, under which the file is sent.
    """
    path = write_labelled(scored, Path(tempfile.mkdtemp(prefix="labelled-", dir=served_folder(served))))
    coded = path.with_name(re.sub("[%#?]", lambda found: quote(found[0], safe=""), path.name))
    if len(os.fsencode(coded.name)) > MAX_NAME_BYTES:
        return str(path.rename(path.with_name(re.sub("[%#?]", "_", path.name))))
    if coded != path:
        os.link(path, coded)
    return str(coded)


def _refused(error: PromptfoldError) -> Markup:
    """An error as status; not gr.Error, which would cover the results of the file before."""
    return _status("", error=str(error))


def _progress(now: Progress) -> Markup:
    words = f"{now.engine}: {now.done:,} of {now.rows:,} rows labelled"
    if now.result is not None:
        words = f"Done: {now.rows:,} rows of {now.result.upload.name} labelled."
    return _status(words, now.fraction)


def _status(words: str, fraction: float = 0.0, *, error: str = "") -> Markup:
    return render("status.html", label="Part that is done", fraction=fraction, words=words, role="status", error=error)


@dataclass(frozen=True)
class _Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def results_html(scored: Scored) -> Markup:
    """Everything about a labelled file: facts, counts, scores and rows."""
    task = scored.upload.task
    tables = [_numbers(scored) if scored.is_regression else _counts(scored)]
    has_many_labels = len(task.labels) > MATRIX_LABELS and task.kind == CLASSIFICATION
    if scored.upload.expected is not None and not scored.upload.has_equal_numbers:
        tables += [_scores(scored), *([] if has_many_labels else _matrices(scored))]
    return render(
        "score_results.html",
        scored=scored,
        task=task,
        n_rows=len(scored.upload.rows),
        tables=tables,
        has_many_labels=has_many_labels and scored.upload.expected is not None,
        preview=_preview(scored),
    )


def _counts(scored: Scored) -> _Table:
    columns = {NAMES[side]: list(scored.counts(side).values()) for side in scored.sides}
    if (counts := scored.confusion("onnx")) is not None:
        is_classification = scored.upload.task.kind == CLASSIFICATION
        columns["In the file"] = (counts if is_classification else counts[:, 2:]).sum(axis=1).tolist()
    rows = zip(scored.upload.task.labels, *columns.values(), strict=True)
    return _Table("Rows by label", ["Label", *columns], _with_commas(rows))


def _numbers(scored: Scored) -> _Table:
    columns = {NAMES[side]: classified.predicted for side, classified in scored.sides.items()}
    if scored.upload.expected is not None:
        columns["In the file"] = np.array(scored.upload.expected)
    parts: dict[str, Callable[[np.ndarray], float]] = {"Least": np.min, "Mean": np.mean, "Greatest": np.max}
    rows = [[name, *(f"{part(values):.4f}" for values in columns.values())] for name, part in parts.items()]
    return _Table("Numbers", ["", *columns], rows)


def _scores(scored: Scored) -> _Table:
    """Metrics, and the recall of each label; of many labels the lowest."""
    scores = {NAMES[side]: found for side in scored.sides if (found := scored.scores(side)) is not None}
    rows = [
        [METRICS[name], *(f"{100 * found.values[name]:.1f}" for found in scores.values())]
        for name in scored.upload.task.metrics
    ]
    recalls = [found.recalls for found in scores.values()]
    labels = list(recalls[0])
    lowest = sorted(labels, key=lambda name: min(found[name] for found in recalls))[:MATRIX_LABELS]
    rows += [
        [f"recall of {name}", *(f"{100 * found[name]:.1f}" for found in recalls)] for name in labels if name in lowest
    ]
    return _Table("Against the file's labels, in percent", ["Metric", *scores], rows)


def _matrices(scored: Scored) -> list[_Table]:
    labels = scored.upload.task.labels
    return [
        _Table(
            f"Confusion matrix, {NAMES[side]} (rows: the file's labels)",
            ["", *labels],
            _with_commas([label, *counts] for label, counts in zip(labels, confusion, strict=True)),
        )
        for side in scored.sides
        if scored.upload.task.kind == CLASSIFICATION and (confusion := scored.confusion(side)) is not None
    ]


def _with_commas(rows: Iterable[Sequence[Any]]) -> list[list[str]]:
    """Rows of a name and counts."""
    return [[name, *(f"{count:,}" for count in counts)] for name, *counts in rows]


def _preview(scored: Scored) -> _Table:
    """Rows that are worth a look, and why."""
    upload, texts, differs, wrong = scored.upload, scored.upload.sentences, scored.differs, scored.wrong
    has_labels = upload.expected is not None
    columns = ["Row", *upload.task.text_columns, *(NAMES[side] for side in scored.sides)]
    columns += ["In the file"] * has_labels + ["Note"] * (scored.pytorch is not None or has_labels)
    rows = []
    for row in scored.preview:
        cells = [f"{row + 1:,}", *map(_shortened, texts[row])]
        for answers in scored.sides.values():
            cells.append(_words(answers, row))
        if upload.expected is not None:
            cells.append(_label_words(upload.task, upload.expected[row]))
        notes = ["engines differ"] * bool(differs[row]) + ["wrong"] * bool(wrong[row])
        rows.append([*cells, ", ".join(notes)][: len(columns)])
    title = f"{len(rows)} of {len(texts):,} rows" if len(rows) < len(texts) else f"All {len(texts):,} rows"
    if scored.is_regression:
        title += ", first those on which the engines are furthest apart" if len(scored.sides) > 1 else ""
        return _Table(title, columns, rows)
    if len(scored.sides) > 1:
        title += ", first those on which the engines differ"
    if has_labels:
        title += ", then those that are wrong" if len(scored.sides) > 1 else ", first those that are wrong"
    return _Table(title, columns, rows)


def _words(answers: Classified, row: int) -> str:
    """What an engine predicts for a row, and how sure it is."""
    prediction = answers.predictions[row]
    if answers.task.kind == REGRESSION:
        return f"{prediction:.4f}"
    if answers.task.kind == MULTI_LABEL:
        return str(prediction) or NO_LABEL
    return f"{prediction} {answers.best_probabilities[row]:.3f}"


def _label_words(task: Task, label: Label) -> str:
    if isinstance(label, tuple):
        return task.join_labels(label) or NO_LABEL
    return f"{label:.4f}" if isinstance(label, float) else task.labels[label]


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
