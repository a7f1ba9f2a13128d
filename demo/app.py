"""The page: view only. What it shows comes from `demo.compare`."""

import html
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from demo.compare import PAUSE_SECONDS, Answer, Comparison
from demo.shipped import Choice
from export.bundle import Bundle, BundleTask
from export.runtime import Execution
from train.adapter import Adapter
from train.config import P_TUNING, P_TUNING_V2
from train.errors import PromptfoldError
from train.tasks import METRICS, MRPC, Scores, Task

QUEUE_SIZE = 32
"""Visitors that may wait; the next one is told that the page is busy."""

LABELS_SHOWN = 10
"""A task may have a hundred."""

METHODS = {P_TUNING: "P-Tuning", P_TUNING_V2: "P-Tuning v2"}
"""Names in artefacts → names for people."""


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

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
#speedup .figure { font-size: 3.25rem; font-weight: 700; line-height: 1.1; color: var(--primary-600); }
.dark #speedup .figure { color: var(--primary-400); }
#speedup { text-align: center; min-height: 6.5rem; }
#speedup .caption, .facts .quiet { color: var(--body-text-color-subdued); }
.facts table { width: 100%; border-collapse: collapse; }
.facts table, .facts tr, .facts td { border: 0 !important; }
#model table { width: auto; }
#model .html-container, #quality .html-container { padding: 0; }
.facts td { padding: .2rem .6rem .2rem 0 !important; vertical-align: baseline; }
.facts td:first-child { color: var(--body-text-color-subdued); white-space: nowrap; }
.facts .latency { font-size: 1.35rem; font-weight: 600; }
"""


@dataclass(frozen=True)
class PageInfo:
    """What the page says whatever the text: the model, and on what each engine runs."""

    choice: Choice
    bundle: Bundle
    task: BundleTask
    pytorch: Execution
    onnx: Execution


@dataclass(frozen=True)
class PageStyle:
    """What `gr.Blocks.launch` wants beside the page itself."""

    theme: gr.themes.Base
    css: str


def page_style() -> PageStyle:
    """Theme and CSS. The fonts are the system's: a page for machines without network fetches none."""
    fonts = [gr.themes.Font(name) for name in ("system-ui", "Segoe UI", "Roboto", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "Consolas", "monospace")]
    return PageStyle(theme=gr.themes.Soft(primary_hue="indigo", font=fonts, font_mono=mono), css=CSS)


def build_page(compare: Callable[[str, str], Comparison], info: PageInfo) -> gr.Blocks:
    """Build the page around a comparison.

    Args:
        compare: classifies and measures one text, whose second sentence is empty where the task has single
            ones; a `PromptfoldError` of it is shown to the visitor.
        info: what the page says whatever the text.
    """

    def ask(sentence1: str, sentence2: str) -> Comparison:
        try:
            return compare(sentence1, sentence2)
        except PromptfoldError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def compare_endpoint(sentence1: str, sentence2: str = "") -> dict:
        """Classify a text with both engines and measure both, one after the other.

        Args:
            sentence1: the first sentence, or the only one
            sentence2: the second sentence, where the task is about pairs
        """
        return ask(sentence1, sentence2).as_json()

    def show(sentence1: str, sentence2: str) -> tuple:
        comparison = ask(sentence1, sentence2)
        if comparison.notice:
            gr.Warning(comparison.notice)
        return (
            comparison.pytorch.probabilities,
            _facts(info.pytorch, comparison.pytorch, comparison.runs),
            comparison.onnx.probabilities,
            _facts(info.onnx, comparison.onnx, comparison.runs),
            _speedup(comparison, info),
        )

    bundle, task = info.bundle, info.task.task
    n_labels = min(len(task.labels), LABELS_SHOWN)
    first, second = _box_labels(task)
    with gr.Blocks(title="promptfold", analytics_enabled=False) as page:
        gr.Markdown(
            "# promptfold\n"
            f"One P-tuned model, two engines: a frozen transformer with its {bundle.virtual_tokens} learned virtual "
            "tokens on the left in PyTorch, as PEFT runs it, on the right with the prompt folded into one ONNX graph."
        )
        gr.HTML(model_facts(bundle, task), elem_id="model", elem_classes="facts")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                sentence1 = gr.Textbox(label=first, lines=3, placeholder="Write a sentence …")
                sentence2 = gr.Textbox(label=second, lines=3, placeholder="… and another one.", visible=task.is_pair)
                button = gr.Button("Compare", variant="primary")
                if task == MRPC:
                    gr.Examples(
                        [[example.sentence1, example.sentence2] for example in EXAMPLES],
                        [sentence1, sentence2],
                        label="Examples: click one, then Compare",
                        example_labels=[example.name for example in EXAMPLES],
                        cache_examples=False,
                        api_visibility="private",
                    )
            with gr.Column(scale=3, min_width=300):
                speedup = gr.HTML(_empty_speedup(task), elem_id="speedup")
                with gr.Row():
                    with gr.Column(min_width=240):
                        pytorch_label = gr.Label(
                            label="PyTorch (PEFT)", num_top_classes=n_labels, elem_id="pytorch-answer"
                        )
                        pytorch_facts = gr.HTML(_facts(info.pytorch), elem_id="pytorch-facts", elem_classes="facts")
                    with gr.Column(min_width=240):
                        onnx_label = gr.Label(label="ONNX Runtime", num_top_classes=n_labels, elem_id="onnx-answer")
                        onnx_facts = gr.HTML(_facts(info.onnx), elem_id="onnx-facts", elem_classes="facts")

        outputs = [pytorch_label, pytorch_facts, onnx_label, onnx_facts, speedup]
        # One queue for whatever measures, so that no two bursts overlap.
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "engines"}
        gr.on(
            [button.click, sentence1.submit, sentence2.submit],
            show,
            [sentence1, sentence2],
            outputs,
            api_visibility="private",
            # The full progress animation, in a browser on the same two cores, cost both engines a fifth.
            show_progress="minimal",
            show_progress_on=speedup,
            **one_at_a_time,
        )
        gr.Markdown(
            "**What is measured.** One forward pass of this text, token ids in, logits out, at batch size 1; "
            "tokenising is the same for both and left out. Each engine has a process of its own with the same number "
            f"of threads; they are asked one at a time, with a pause of {PAUSE_SECONDS} s and a warm-up before each "
            "burst, so that neither disturbs the other.\n\n"
            f"**How equal they are.** When this graph was exported, its logits differed from PEFT's by at most "
            f"{info.task.max_logit_difference:.1e} over shapes and paddings that it was not traced with."
        )
        gr.HTML(
            f"<p><b>How good the model is.</b> {quality(info.choice)} What the page compares is the engines: a text "
            "that one of them gets wrong, the other gets wrong too.</p>",
            elem_id="quality",
        )
        gr.api(compare_endpoint, api_name="compare", **one_at_a_time)
    page.queue(max_size=QUEUE_SIZE)
    return page


def _box_labels(task: Task) -> tuple[str, str]:
    """Of the two text boxes; with the names of a task's columns where those say more."""
    if not task.is_pair:
        return "Sentence", ""
    labels = ("Sentence 1", "Sentence 2")
    if task.text_columns == ("sentence1", "sentence2"):
        return labels
    first, second = (f"{label}: {column}" for label, column in zip(labels, task.text_columns, strict=True))
    return first, second


def model_facts(bundle: Bundle, task: Task) -> str:
    """What the model is and what it tells apart."""
    shown = ", ".join(f"<code>{html.escape(label)}</code>" for label in task.labels[:LABELS_SHOWN])
    if len(task.labels) > LABELS_SHOWN:
        shown += f" and {len(task.labels) - LABELS_SHOWN} more"
    texts = "pairs of sentences" if task.is_pair else "single sentences"
    return _table(
        [
            # Of a folder its last part: where it lies on this machine is nobody's business.
            ("Base model", html.escape(Path(bundle.base_model).name)),
            ("Method", html.escape(_method(bundle.method))),
            ("Task", f"{html.escape(task.name)}, {texts}"),
            ("Labels", shown),
        ]
    )


def _method(method: str) -> str:
    return METHODS.get(method, method)


def quality(choice: Choice) -> str:
    """Scores, beside those of answers that need no prompt and of the other adapters that ship, as HTML."""
    adapter = choice.adapter
    name, baseline = max(adapter.baselines.items(), key=lambda item: item[1].key)
    sentences = [
        f"On {adapter.n_validation} validation rows: {adapter.scores}.",
        f"The best answer that needs no learned prompt ({name}) has {baseline}: the model's "
        f"{_gap(adapter.scores, baseline)}.",
        *(_against(adapter, rival) for rival in choice.rivals),
    ]
    # The names of baselines hold labels in backticks, as their model card wants them.
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(" ".join(sentences)))


def _gap(scores: Scores, other: Scores) -> str:
    """How far the first metric is above another's: "accuracy is 2.7 points above it"."""
    name, value = next(iter(scores.values.items()))
    points = 100 * (value - other.values[name])
    if abs(points) < 0.05:
        return f"{METRICS[name]} is no better"
    return f"{METRICS[name]} is {abs(points):.1f} points {'above' if points > 0 else 'BELOW'} it"


def _against(adapter: Adapter, rival: Adapter) -> str:
    """The first metric of two adapters that ship, in one sentence."""
    name, value = next(iter(adapter.scores.values.items()))
    other = rival.scores.values[name]
    points = 100 * (value - other)
    return (
        f"{_method(adapter.method)}: {METRICS[name]} {100 * value:.1f}, against {100 * other:.1f} of "
        f"{_method(rival.method)} ({rival.folder.name}), which ships too: {abs(points):.1f} points "
        f"{'more' if points >= 0 else 'less'}."
    )


def _facts(execution: Execution, answer: Answer | None = None, runs: int = 0) -> str:
    """Latency, if measured, and on what an engine runs."""
    rows = []
    if answer is not None:
        latency = answer.latency
        rows.append(
            (
                "Latency",
                f'<span class="latency">{latency.median_ms:.2f} ms</span> median<br>'
                f'{latency.p95_ms:.2f} ms p95 <span class="quiet">of {runs} runs</span>',
            )
        )
        logits = ", ".join(f"{logit:+.4f}" for logit in answer.logits)
        rows.append(("Logits", html.escape(logits)))
    note = f' <span class="quiet">({html.escape(execution.note)})</span>' if execution.note else ""
    threads = "thread" if execution.threads == 1 else "threads"
    rows += [
        ("Runs on", f"{html.escape(execution.provider)}{note}"),
        ("Threads", f"{execution.threads} {threads}"),
        ("Precision", html.escape(execution.precision)),
        ("Engine", html.escape(execution.engine)),
    ]
    return _table(rows)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, both HTML."""
    cells = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _empty_speedup(task: Task) -> str:
    wanted = "Give two sentences" if task.is_pair else "Write a sentence"
    return f'<div class="figure">–</div><div class="caption">{wanted} and press Compare.</div>'


def _speedup(comparison: Comparison, info: PageInfo) -> str:
    """The one figure in large type, and what belongs beside it."""
    factor = comparison.speedup
    words = (
        f"ONNX Runtime is {factor:.2f} times as fast as PyTorch"
        if factor >= 1
        else f"ONNX Runtime is slower: it takes {1 / factor:.2f} times as long as PyTorch"
    )
    agree = (
        "both give the same label" if comparison.pytorch.label == comparison.onnx.label else "<b>the labels differ</b>"
    )
    unfair = (
        ""
        if info.pytorch.on_cuda == info.onnx.on_cuda
        else "<br><b>They do not run on the same device, so this figure compares devices, not engines.</b>"
    )
    notice = f"<br>{html.escape(comparison.notice)}" if comparison.notice else ""
    return (
        f'<div class="figure">{factor:.2f}×</div>'
        f'<div class="caption">{words} ({comparison.tokens} tokens, median of {comparison.runs} runs each)<br>'
        f"{agree}; largest logit difference {comparison.max_logit_difference:.1e}{unfair}{notice}</div>"
    )
