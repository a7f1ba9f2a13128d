"""The tab "Compare": one text, both engines side by side. View only; see `demo.measure.compare`."""

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from math import isfinite
from typing import Any

import gradio as gr
from markupsafe import Markup

from demo.engines.stage import PYTORCH, AnyEngine, OpenedEngines, Stage
from demo.measure.all_engines import EngineLatency, measure_all
from demo.measure.compare import PAUSE_SECONDS, ROUNDS, Answer, Comparison
from demo.measure.compare import compare as compare_engines
from demo.page.charts import ONNX_COLOR, PYTORCH_COLOR, drawing, to_svg
from demo.page.controls import (
    AT_ONCE,
    EXAMPLES,
    LABELS_SHOWN,
    LATEST_LAST,
    ONE_AT_A_TIME,
    QUIET,
    Selectors,
    StopFlags,
    errors_shown,
    sentence_boxes,
    task_updates,
)
from demo.page.html import render, render_text
from train.common.machine import core_limit
from train.config import MULTI_LABEL, REGRESSION
from train.data.tasks import MRPC, Task

HISTOGRAM_BINS = 24
_AGREEMENT = {True: ", same label", False: ", ANOTHER LABEL", None: ""}

ENGINES = (("PyTorch (PEFT)", "pytorch"), ("ONNX Runtime", "onnx"))
"""Names of the engines for people, and in ids of elements."""


def build_compare_tab(stage: Stage, selectors: Selectors, opened: OpenedEngines, stops: StopFlags) -> "CompareTab":
    """Build the tab, which starts with `opened`, and the endpoint ``/compare``."""
    tab = CompareTab(stage, opened)
    tab.wire(selectors, stops)
    gr.Markdown(render_text("compare.md", rounds=ROUNDS, pause_s=PAUSE_SECONDS, on_ray=stage.service is not None))
    _build_endpoint(stage)
    return tab


class CompareTab:
    """The tab's components and the handlers of their events."""

    def __init__(self, stage: Stage, opened: OpenedEngines) -> None:
        """Lay out the components for what the page starts with."""
        self._stage = stage
        self._answers: list[gr.Label] = []
        self._facts: list[gr.HTML] = []
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self._boxes = sentence_boxes(opened.task, elem_id="sentence")
                with gr.Row():
                    self._button = gr.Button("Compare", variant="primary")
                    self._stop_button = gr.Button("Stop measuring", interactive=False)
                    self._all_button = gr.Button("All engines on this text")
                self._examples = self._boxes.examples(opened.task, "Examples: a click runs one")
            with gr.Column(scale=3, min_width=280):
                self._speedup = gr.HTML(self._no_speedup(opened.task), elem_id="speedup")
                self._distribution = gr.HTML("", elem_id="distribution")
                self._all_engines = gr.HTML("", elem_id="all-engines")
                with gr.Row():
                    facts = _engine_facts(opened)
                    for (name, side), html in zip(ENGINES[-len(facts) :], facts, strict=True):
                        self._lay_out_engine(name, side, html, opened.task)
        self._results = [self._speedup, self._distribution, *self._answers, *self._facts]
        self._opened = opened
        self.outputs: list[Any] = [*self._boxes.inputs, self._examples.dataset, *self._results]
        """The components that depend on the visitor's choices, in the order of `refresh`."""

    def _lay_out_engine(self, name: str, side: str, html: Markup, task: Task) -> None:
        with gr.Column(min_width=240):
            answer = gr.Label(label=name, elem_id=f"{side}-answer", elem_classes="answer", **_label_options(task))
            self._answers.append(answer)
            self._facts.append(gr.HTML(html, elem_id=f"{side}-facts", elem_classes="facts"))

    def refresh(self, now: OpenedEngines) -> list[Any]:
        """Values of `outputs` for another choice, before anything is measured."""
        answers = [gr.Label(value=None, **_label_options(now.task)) for _ in self._answers]
        return [*task_updates(now.task), self._no_speedup(now.task), "", *answers, *_engine_facts(now)]

    def _no_speedup(self, task: Task) -> Markup:
        return render("speedup.html", comparison=None, is_pair=task.is_pair, has_pytorch=self._stage.has_pytorch)

    def wire(self, selectors: Selectors, stops: StopFlags) -> None:
        """Connect the events with their handlers."""

        def show(  # noqa: PLR0917 -- Gradio passes an event's inputs by position
            adapter: str, onnx: str, pytorch: str, sentence1: str, sentence2: str, request: gr.Request
        ) -> Iterator[list[Any]]:
            with errors_shown():
                stopped = stops.start(request)
                now = self._stage.open(self._stage.setup(adapter, onnx, pytorch))
                for comparison in compare_engines(self._stage, now, sentence1, sentence2, stopped=stopped):
                    yield [*_results(comparison, now, is_over=False), gr.update(interactive=True)]
                yield [*_results(comparison, now, is_over=True), gr.update(interactive=False)]

        call: dict[str, Any] = {
            "fn": show,
            "inputs": [*selectors.inputs, *self._boxes.inputs],
            "outputs": [*self._results, self._stop_button],
            **QUIET,
            **LATEST_LAST,
            **ONE_AT_A_TIME,
        }
        gr.on([self._button.click, self._boxes.sentence1.submit, self._boxes.sentence2.submit], **call)
        self._examples.load_input_event.then(**call)
        self._all_button.click(
            self._show_all(stops),
            [selectors.adapter, *self._boxes.inputs],
            [self._all_engines, self._stop_button],
            **QUIET,
            **LATEST_LAST,
            **ONE_AT_A_TIME,
        )
        self._stop_button.click(stops.stop, None, None, **AT_ONCE)

    def _show_all(self, stops: StopFlags) -> Callable[..., Iterator[list[Any]]]:
        def show_all(adapter: str, sentence1: str, sentence2: str, request: gr.Request) -> Iterator[list[Any]]:
            with errors_shown():
                stopped = stops.start(request)
                setup = self._stage.setup(adapter, "", "")
                yield [Markup("measuring …"), gr.update(interactive=True)]
                chart = Markup()
                for done in measure_all(self._stage, setup.adapter, sentence1, sentence2, stopped=stopped):
                    chart = _bars(done)
                    yield [chart, gr.update(interactive=True)]
                yield [chart, gr.update(interactive=False)]

        return show_all

    def answer_first_example(self, page: gr.Blocks, stops: StopFlags) -> None:
        """Answer the first example when the page is opened: one visitor sees it being measured, the next ones the result."""
        setup, example = self._opened.setup, next(iter(EXAMPLES.values()))
        answered: list[list[Any]] = []
        if self._opened.task != MRPC:
            return

        def answer(request: gr.Request) -> Iterator[list[Any]]:
            if answered:
                yield [*example, *answered[0]]
                return
            with errors_shown():
                stopped, now = stops.start(request), self._stage.open(setup)
                boxes: list[Any] = list(example)
                for comparison in compare_engines(self._stage, now, *example, stopped=stopped):
                    yield [*boxes, *_results(comparison, now, is_over=False), gr.update(interactive=True)]
                    # The visitor may be writing by now.
                    boxes = [gr.skip() for _ in example]
                results = [*_results(comparison, now, is_over=True), gr.update(interactive=False)]
                if not stopped():
                    answered.append(results)
                yield [*boxes, *results]

        page.load(answer, None, [*self._boxes.inputs, *self._results, self._stop_button], **QUIET, **ONE_AT_A_TIME)


def _build_endpoint(stage: Stage) -> None:
    @errors_shown()
    def compare(sentence1: str, sentence2: str = "", adapter: str = "", precision: str = "", pytorch: str = "") -> dict:
        """Classify a text with both engines and measure both, one after the other.

        Args:
            sentence1: the first sentence, or the only one
            sentence2: the second sentence, where the task is about pairs
            adapter: name of the adapter; empty for the one the page starts with
            precision: of the ONNX graph: fp32, fp16 or int8; empty for the fastest that passed
            pytorch: how PyTorch runs: eager, compiled or bf16; empty for eager
        """
        setup = stage.setup(adapter, precision, pytorch)
        *_, last = compare_engines(stage, stage.open(setup), sentence1, sentence2)
        return last.as_json()

    gr.api(compare, api_name="compare", **ONE_AT_A_TIME)


def _label_options(task: Task) -> dict[str, Any]:
    """Options of a `gr.Label`; where a text may have several labels, the most probable one is no heading."""
    return {"num_top_classes": min(len(task.labels), LABELS_SHOWN), "show_heading": task.kind != MULTI_LABEL}


def _engines(opened: OpenedEngines) -> list[AnyEngine]:
    """The engines, PyTorch's first."""
    return [engine for engine in (opened.pytorch, opened.onnx) if engine is not None]


def _results(comparison: Comparison, opened: OpenedEngines, *, is_over: bool) -> list[Any]:
    """Values of the components that a measurement fills."""
    answers = [answer for answer in (comparison.pytorch, comparison.onnx) if answer is not None]
    on_cuda = {engine.wait_until_ready().execution.on_cuda for engine in _engines(opened)}
    speedup = render(
        "speedup.html",
        comparison=comparison,
        has_pytorch=comparison.pytorch is not None,
        same_device=len(on_cuda) == 1,
        is_over=is_over,
    )
    shown = [_shown(answer) for answer in answers]
    return [speedup, _distribution(comparison), *shown, *_engine_facts(opened, answers, is_over=is_over)]


def _shown(answer: Answer) -> Any:
    """Value of a `gr.Label`: a number, or a bar for each label."""
    return answer.label if answer.task.kind == REGRESSION else answer.probabilities


def _engine_facts(opened: OpenedEngines, answers: Sequence[Answer] = (), *, is_over: bool = False) -> list[Markup]:
    """Each engine's latency, if measured, and what it runs on."""
    return [
        render(
            "engine.html",
            loaded=engine.wait_until_ready(),
            answer=answer,
            served=answer.served if answer else engine.served,
            is_over=is_over,
            core_limit=core_limit(),
        )
        for engine, answer in zip_longest(_engines(opened), answers)
    ]


def _bars(done: Sequence[EngineLatency]) -> Markup:
    """A bar for each engine, with its median and whether it agrees with the first."""
    ran = [one for one in done if isfinite(one.median_ms)]
    with drawing(6.4, 0.6 + 0.36 * len(done)) as figure:
        axes = figure.subplots()
        colors = [PYTORCH_COLOR if one.library == PYTORCH else ONNX_COLOR for one in done]
        axes.barh([one.name for one in done], [one.median_ms if one in ran else 0 for one in done], color=colors)
        axes.invert_yaxis()
        axes.margins(x=0.3)
        axes.set_xlabel("median latency of one forward pass, ms")
        words = [f"{one.median_ms:.2f} ms{_AGREEMENT[one.agrees]}" if one in ran else "cannot run here" for one in done]
        for place, (one, shown) in enumerate(zip(done, words, strict=True)):
            axes.text(one.median_ms if one in ran else 0, place, f" {shown}", va="center")
        described = "; ".join(f"{one.name} {shown}" for one, shown in zip(done, words, strict=True))
        return to_svg(figure, f"All engines on this text: {described}")


def _distribution(comparison: Comparison) -> Markup:
    """A small histogram of each engine's latencies on the same axis; empty until there are any."""
    sides = [
        (name, answer.latency.runs_ms, color)
        for name, answer, color in (
            ("PyTorch", comparison.pytorch, PYTORCH_COLOR),
            ("ONNX Runtime", comparison.onnx, ONNX_COLOR),
        )
        if answer is not None and answer.latency is not None
    ]
    if not sides:
        return Markup()
    everything = [value for _, runs_ms, _ in sides for value in runs_ms]
    with drawing(6.4, 0.5 + 0.62 * len(sides)) as figure:
        all_axes = figure.subplots(len(sides), sharex=True, squeeze=False)[:, 0]
        for axes, (name, runs_ms, color) in zip(all_axes, sides, strict=True):
            axes.hist(runs_ms, HISTOGRAM_BINS, (min(everything), max(everything)), color=color, alpha=0.85)
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
        all_axes[-1].set_xlabel("latency of one forward pass, ms")
        words = "; ".join(f"{name} from {min(runs):.2f} to {max(runs):.2f} ms" for name, runs, _ in sides)
        return to_svg(figure, f"How often each latency was measured: {words}")
