"""The tab "Compare": one text, both engines side by side. View only; what it shows comes from `demo.measure.compare`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from demo.engines.stage import AnyEngine, OpenedEngines, Stage
from demo.engines.timing import Served
from demo.measure.compare import PAUSE_SECONDS, ROUNDS, Answer, Comparison
from demo.measure.compare import compare as compare_engines
from demo.page.charts import ONNX_COLOR, PYTORCH_COLOR, drawing, histogram, to_svg
from demo.page.controls import (
    ONE_AT_A_TIME,
    Selectors,
    StopButtons,
    facing_visitors,
    streaming_to_visitors,
    table,
    text,
)
from export.runtime.classifier import Execution
from train.data.tasks import MRPC, Task

LABELS_SHOWN = 10
"""A task may have a hundred."""


HISTOGRAM_BINS = 24


@dataclass(frozen=True)
class Example:
    """A pair to click."""

    name: str
    sentence1: str
    sentence2: str


EXAMPLES = (
    Example(
        "Coast redwoods",
        "Coast redwood trees are the tallest trees on the planet and can grow over 300 feet tall.",
        "The coast redwood trees, which can attain a height of over 300 feet, are the tallest trees on earth.",
    ),
    Example(
        "Library hours",
        "The library will stay open until ten in the evening during the exam weeks.",
        "During exam weeks, the library closes at ten in the evening.",
    ),
    Example(
        "Two pieces of news",
        "Shares of the airline fell 4 percent after it reported a loss for the third quarter.",
        "The airline named a new chief financial officer, who will start in January.",
    ),
    Example(
        "One word apart",
        "The company said on Tuesday that it will open forty new stores before the end of the year.",
        "The company said on Tuesday that it will close forty of its stores before the end of the year.",
    ),
)
"""For MRPC. The first is the PEFT tutorial's; the others were written for this page, the last one to be hard."""


@dataclass(frozen=True)
class CompareTab:
    """What of this tab depends on the visitor's choices.

    Attributes:
        outputs: the components, in the order of `refresh`'s values.
        refresh: from an opened setup to their new values.
    """

    outputs: list[Any]
    refresh: Callable[[OpenedEngines], list[Any]]


def build_compare_tab(stage: Stage, selectors: Selectors, opened: OpenedEngines, stops: StopButtons) -> CompareTab:
    """Build the tab.

    Args:
        opened: what the page starts with.
        stops: of the page's visitors.
    """

    @streaming_to_visitors
    def show(  # noqa: PLR0917 -- Gradio hands an event's inputs over by position
        adapter: str, onnx: str, pytorch: str, sentence1: str, sentence2: str, request: gr.Request
    ) -> Iterator[list[Any]]:
        stopped = stops.start(str(request.session_hash))
        now = stage.open(stage.setup(adapter, onnx, pytorch))
        for comparison in compare_engines(stage, now, sentence1, sentence2, stopped=stopped):
            yield [*_results(comparison, now), gr.update(interactive=True)]
        yield [*_results(comparison, now, is_over=True), gr.update(interactive=False)]

    @facing_visitors
    def compare(sentence1: str, sentence2: str = "", adapter: str = "", precision: str = "", pytorch: str = "") -> dict:
        """Classify a text with both engines and measure both, one after the other.

        Args:
            sentence1: the first sentence, or the only one
            sentence2: the second sentence, where the task is about pairs
            adapter: name of the adapter; empty for the one the page starts with
            precision: of the ONNX graph: fp32, fp16 or int8; empty for fp32
            pytorch: how PyTorch runs: eager, compiled or bf16; empty for eager
        """
        setup = stage.setup(adapter, precision, pytorch)
        *_, last = compare_engines(stage, stage.open(setup), sentence1, sentence2)
        return last.as_json()

    def stop(request: gr.Request) -> None:
        stops.stop(str(request.session_hash))

    def refresh(now: OpenedEngines) -> list[Any]:
        first, second = box_labels(now.task)
        n_labels = min(len(now.task.labels), LABELS_SHOWN)
        labels = [gr.Label(value=None, num_top_classes=n_labels) for _ in range(1 + stage.has_pytorch)]
        return [
            gr.Textbox(label=first),
            gr.Textbox(label=second, visible=now.task.is_pair),
            gr.Dataset(visible=now.task == MRPC),
            _empty_speedup(now.task, has_pytorch=stage.has_pytorch),
            "",
            *labels,
            *_engine_facts(now),
        ]

    task = opened.task
    n_labels = min(len(task.labels), LABELS_SHOWN)
    first, second = box_labels(task)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            sentence1 = gr.Textbox(label=first, lines=3, placeholder="Write a sentence …", elem_id="sentence1")
            sentence2 = gr.Textbox(
                label=second,
                lines=3,
                placeholder="… and another one.",
                visible=task.is_pair,
                elem_id="sentence2",
            )
            with gr.Row():
                button = gr.Button("Compare", variant="primary")
                stop_button = gr.Button("Stop measuring", interactive=False)
            examples = gr.Examples(
                [[example.sentence1, example.sentence2] for example in EXAMPLES],
                [sentence1, sentence2],
                label="Examples: click one, then Compare",
                example_labels=[example.name for example in EXAMPLES],
                cache_examples=False,
                api_visibility="private",
                visible=task == MRPC,
            )
        with gr.Column(scale=3, min_width=280):
            speedup = gr.HTML(_empty_speedup(task, has_pytorch=stage.has_pytorch), elem_id="speedup")
            distribution = gr.HTML("", elem_id="distribution")
            with gr.Row():
                facts = _engine_facts(opened)
                labels, panels = [], []
                sides = [("onnx", "ONNX Runtime")]
                if stage.has_pytorch:
                    sides.insert(0, ("pytorch", "PyTorch (PEFT)"))
                for (side, name), known in zip(sides, facts, strict=True):
                    with gr.Column(min_width=240):
                        labels.append(
                            gr.Label(
                                label=name, num_top_classes=n_labels, elem_id=f"{side}-answer", elem_classes="answer"
                            )
                        )
                        panels.append(gr.HTML(known, elem_id=f"{side}-facts", elem_classes="facts"))

    results = [speedup, distribution, *labels, *panels, stop_button]
    gr.on(
        [button.click, sentence1.submit, sentence2.submit],
        show,
        [*selectors.inputs, sentence1, sentence2],
        results,
        api_visibility="private",
        # The page says itself that it measures: Gradio's own animations, in a browser on the same cores, slow both engines.
        show_progress="hidden",
        **ONE_AT_A_TIME,
    )
    # Past the queue, in which what it shall stop may still be waiting.
    stop_button.click(stop, None, None, api_visibility="private", queue=False)
    own = "Each engine has a process of its own with the same number of threads."
    if stage.service is not None:
        own = (
            "PyTorch has a process of its own, with as many threads as each replica of ONNX Runtime's in Ray Serve, "
            "whose latency holds the way to a replica and back."
        )
    gr.Markdown(
        "**What is measured.** One forward pass of this text, token ids in, logits out, at batch size 1; "
        f"tokenising is the same for both and left out. {own} They are asked in turn, {ROUNDS} rounds, with a pause of "
        f"{PAUSE_SECONDS} s and a warm-up before each burst, so that neither disturbs the other. The figure in large "
        "type is the ratio of the two medians over all rounds; beside it stands the least and the greatest of the rounds."
    )
    gr.api(compare, api_name="compare", **ONE_AT_A_TIME)

    return CompareTab([sentence1, sentence2, examples.dataset, speedup, distribution, *labels, *panels], refresh)


def _results(comparison: Comparison, opened: OpenedEngines, *, is_over: bool = False) -> list[Any]:
    """Values of the result components, in their order."""
    answers = [answer for answer in (comparison.pytorch, comparison.onnx) if answer is not None]
    return [
        _speedup(comparison, opened, is_over=is_over),
        _distribution(comparison),
        *(answer.probabilities for answer in answers),
        *_engine_facts(opened, answers, is_over=is_over),
    ]


def box_labels(task: Task) -> tuple[str, str]:
    """Of the two text boxes; with the names of a task's columns where those say more."""
    if not task.is_pair:
        return "Sentence", "Second sentence"
    labels = ("Sentence 1", "Sentence 2")
    if task.text_columns == ("sentence1", "sentence2"):
        return labels
    first, second = (f"{label}: {column}" for label, column in zip(labels, task.text_columns, strict=True))
    return first, second


def _engine_facts(opened: OpenedEngines, answers: list[Answer] | None = None, *, is_over: bool = False) -> list[str]:
    """Of each engine, PyTorch first: latency, if measured, and on what it runs."""
    engines: list[AnyEngine] = [engine for engine in (opened.pytorch, opened.onnx) if engine is not None]
    return [
        _facts(engine, answers[index] if answers else None, is_over=is_over) for index, engine in enumerate(engines)
    ]


def _facts(engine: AnyEngine, answer: Answer | None, *, is_over: bool) -> str:
    loaded = engine.wait_until_ready()
    execution = loaded.execution
    memory_mib = loaded.memory_mib
    rows = []
    if answer is None:
        rows += [("Latency", '<span class="latency quiet">–</span><br>&nbsp;'), ("Logits", "–")]
    else:
        if answer.latency is None:
            waiting = "not measured" if is_over else "measuring …"
            rows.append(("Latency", f'<span class="latency quiet">{waiting}</span><br>&nbsp;'))
        else:
            latency = answer.latency
            memory_mib = latency.memory_mib
            rows.append(
                (
                    "Latency",
                    f'<span class="latency">{latency.median_ms:.2f} ms</span> median<br>'
                    f"{latency.p95_ms:.2f} ms p95, {latency.p99_ms:.2f} ms p99 "
                    f'<span class="quiet">of {len(latency.runs_ms)} runs</span>',
                )
            )
        rows.append(("Logits", text(", ".join(f"{logit:+.4f}" for logit in answer.logits))))
    rows += execution_rows(execution)
    if (served := answer.served if answer else engine.served) is not None:
        rows += _served_rows(served)
    rows += [("Memory", f"{memory_mib:,.0f} MiB at most"), ("Load time", f"{loaded.load_seconds:.1f} s")]
    return table(rows)


def _served_rows(served: Served) -> list[tuple[str, str]]:
    """How many replicas there are, and what the last request went through, as names and HTML."""
    texts = f"{served.batch_size} text{'s' * (served.batch_size > 1)}, by replica {text(served.replica)}"
    return [("Replicas", f"{served.replicas} running"), ("Last batch", texts if served.batch_size else "–")]


def execution_rows(execution: Execution) -> list[tuple[str, str]]:
    """On what an engine runs, as names and HTML."""
    note = f' <span class="quiet">({text(execution.note)})</span>' if execution.note else ""
    threads = "thread" if execution.threads == 1 else "threads"
    return [
        ("Runs on", f"{text(execution.provider)}{note}"),
        ("Threads", f"{execution.threads} {threads}"),
        ("Precision", text(execution.precision)),
        ("Engine", text(execution.engine)),
    ]


def _empty_speedup(task: Task, *, has_pytorch: bool) -> str:
    wanted = "Give two sentences" if task.is_pair else "Write a sentence"
    alone = "" if has_pytorch else "<br>This page runs ONNX Runtime alone; there is nothing to compare it with."
    return f'<div class="figure">–</div><div class="caption">{wanted} and press Compare.{alone}</div>'


@dataclass(frozen=True)
class _Headline:
    """The one figure in large type, and what it means; both HTML."""

    figure: str
    meaning: str


def _speedup(comparison: Comparison, opened: OpenedEngines, *, is_over: bool) -> str:
    """The headline, and what belongs beside it."""
    headline = _headline(comparison, is_over=is_over)
    lines = [headline.meaning, *_agreement(comparison)]
    if opened.pytorch is not None:
        devices = {engine.wait_until_ready().execution.on_cuda for engine in (opened.pytorch, opened.onnx)}
        if len(devices) > 1:
            lines.append("<b>They do not run on the same device, so this figure compares devices, not engines.</b>")
    lines += map(text, comparison.notices)
    return f'<div class="figure">{headline.figure}</div><div class="caption" role="status">{"<br>".join(lines)}</div>'


def _headline(comparison: Comparison, *, is_over: bool) -> _Headline:
    factor = comparison.speedup
    if comparison.pytorch is None and comparison.onnx.latency is not None:
        latency = comparison.onnx.latency
        return _Headline(
            f"{latency.median_ms:.2f} ms",
            f"ONNX Runtime's median of {comparison.runs} runs<br>{comparison.tokens} tokens",
        )
    if factor is None:
        return _Headline("–", "Stopped before anything was measured.") if is_over else _Headline("…", "measuring …")
    words = (
        f"ONNX Runtime is {factor:.2f} times as fast as PyTorch"
        if factor >= 1
        else f"ONNX Runtime is slower: it takes {1 / factor:.2f} times as long as PyTorch"
    )
    rounds = comparison.round_speedups
    spread = f"{min(rounds):.2f} to {max(rounds):.2f} in {len(rounds)} round{'s' * (len(rounds) > 1)}"
    state = "" if is_over else ", measuring …"
    return _Headline(
        f"{factor:.2f}×",
        f"{words}<br>{spread}{state}; {comparison.tokens} tokens, median of {comparison.runs} runs each",
    )


def _agreement(comparison: Comparison) -> list[str]:
    if comparison.pytorch is None:
        return []
    same = comparison.pytorch.label == comparison.onnx.label
    agree = "both give the same label" if same else "<b>the labels differ</b>"
    return [f"{agree}; largest logit difference {comparison.max_logit_difference:.1e}"]


def _distribution(comparison: Comparison) -> str:
    """A small histogram for each engine over the same axis; empty until there is something to show."""
    sides = [
        (name, answer.latency.runs_ms, color)
        for name, answer, color in (
            ("PyTorch", comparison.pytorch, PYTORCH_COLOR),
            ("ONNX Runtime", comparison.onnx, ONNX_COLOR),
        )
        if answer is not None and answer.latency is not None
    ]
    if not sides:
        return ""
    everything = [value for _, runs_ms, _ in sides for value in runs_ms]
    low, high = min(everything), max(everything)
    step = (high - low or 1.0) / HISTOGRAM_BINS
    bins = [low + step * number for number in range(HISTOGRAM_BINS + 1)]
    with drawing(6.4, 0.5 + 0.62 * len(sides)) as figure:
        all_axes = figure.subplots(len(sides), sharex=True, squeeze=False)[:, 0]
        for axes, (name, runs_ms, color) in zip(all_axes, sides, strict=True):
            histogram(axes, runs_ms, color=color, bins=bins)
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
            axes.set_xlabel("")
        all_axes[-1].set_xlabel("latency of one forward pass, ms")
        words = "; ".join(f"{name} from {min(runs):.2f} to {max(runs):.2f} ms" for name, runs, _ in sides)
        return to_svg(figure, f"How often each latency was measured: {words}")
