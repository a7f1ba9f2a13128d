"""The page: the visitor's choices on top, and a tab for each thing that can be done with them. View only."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from demo.access.limits import QUEUE_SIZE
from demo.access.public_link import ShareState
from demo.engines.adapters import Choice
from demo.engines.pytorch import PYTORCH_MODES
from demo.engines.stage import OpenedEngines, Stage
from demo.page.controls import ONE_AT_A_TIME, Selectors, StopButtons, facing_visitors, table, text
from demo.page.tab_compare import LABELS_SHOWN, build_compare_tab
from demo.page.tab_lab import build_lab_tab
from demo.page.tab_prompt import build_prompt_tab
from demo.page.tab_score import build_score_tab
from demo.page.tab_use import build_share_box, build_use_tab
from export.bundle.folder import FP16, FP32, INT8, GraphFile
from train.adapter.record import Adapter
from train.config import P_TUNING, P_TUNING_V2
from train.data.tasks import METRICS, Scores

METHODS = {P_TUNING: "P-Tuning", P_TUNING_V2: "P-Tuning v2"}
"""Names in artefacts → names for people."""


PRECISIONS = {
    FP32: "fp32: PyTorch's numbers",
    FP16: "fp16: rounded, for CUDA",
    INT8: "int8: rounded, for CPUs",
}
"""Of ONNX Runtime's graph, with words for people."""


KEPT_SECONDS = 3600
"""How long files that visitors brought or made are kept at most."""


CSS = """
.gradio-container { max-width: min(1180px, 100vw) !important; margin: 0 auto !important; }
.gradio-container, .gradio-container .main, .gradio-container .wrap, .gradio-container .contain { min-width: 0; }

.gradio-container :is(td, th) { border-color: var(--border-color-primary) !important; }
#speedup .figure { font-size: 3.25rem; font-weight: 700; line-height: 1.1; color: var(--primary-600); }
.dark #speedup .figure { color: var(--primary-400); }
#speedup { text-align: center; min-height: 10.5rem; }
#distribution { min-height: 9.5rem; }
.answer { min-height: 9.5rem; }
#speedup .caption, .quiet { color: var(--body-text-color-subdued); }
.facts table { width: 100%; border-collapse: collapse; }
.facts table, .facts tr, .facts td, .facts th { border: 0 !important; }
#model table { width: auto; }
#model .html-container, #quality .html-container { padding: 0; }
.facts td, .facts th { padding: .2rem .6rem .2rem 0 !important; vertical-align: baseline; text-align: left; }
.facts th { color: var(--body-text-color-subdued); white-space: nowrap; font-weight: 400; }
#score-file .download-link { color: var(--body-text-color); }
/* The frame that pulses while a handler streams would be drawn all through the bursts, by the cores that they measure. */
.gradio-container .generating { animation: none !important; }
.cm-content span { color: inherit !important; }
.facts .latency { font-size: 1.35rem; font-weight: 600; }
"""


MENDED = """
<script>
function mend() {
  // The tab bar's hidden copy, which Gradio measures, can be reached by keyboard though nobody sees it.
  for (const copy of document.querySelectorAll(".tab-container[aria-hidden=true]")) copy.inert = true;
  for (const more of document.querySelectorAll(".overflow-menu > button:not([aria-label])"))
    more.setAttribute("aria-label", "More tabs");
  // A name on what has no role is read to nobody.
  for (const empty of document.querySelectorAll("div.empty[aria-label]:not([role])")) empty.setAttribute("role", "img");
  // Code that is wider than a phone is scrolled by keyboard too.
  for (const code of document.querySelectorAll(".cm-scroller[tabindex='-1']")) code.tabIndex = 0;
  // A message is a button around a button; the outer one only folds it.
  for (const header of document.querySelectorAll(".toast-header[role=button]")) {
    header.removeAttribute("role");
    header.removeAttribute("tabindex");
  }
}
new MutationObserver(mend).observe(document, { childList: true, subtree: true });
</script>
"""
"""What axe-core finds serious in Gradio 6.17's own components."""


@dataclass(frozen=True)
class PageStyle:
    """What `gr.Blocks.launch` wants beside the page itself."""

    theme: gr.themes.Base
    css: str
    head: str


def page_style() -> PageStyle:
    """Theme, CSS and script. The fonts are the system's: a page for machines without network fetches none."""
    fonts = [gr.themes.Font(name) for name in ("system-ui", "Segoe UI", "Roboto", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "Consolas", "monospace")]
    theme = gr.themes.Soft(primary_hue="indigo", font=fonts, font_mono=mono)
    # The theme's own colours reach a contrast of 2.4 to 4.5; 4.5 is the least that WCAG 2 AA allows.
    theme.set(
        block_label_text_color="*primary_700",
        block_label_text_color_dark="white",
        block_title_text_color="*primary_700",
        block_info_text_color="*neutral_600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        checkbox_label_background_fill_selected="*primary_600",
        checkbox_label_background_fill_selected_dark="*primary_600",
        color_accent="*primary_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
    return PageStyle(theme=theme, css=CSS, head=MENDED)


def build_page(stage: Stage, opened: OpenedEngines, share: ShareState) -> gr.Blocks:
    """Build the page.

    Args:
        stage: the adapters and their engines.
        opened: what the page starts with, running already.
        share: whether there is a public link, once that is known.
    """
    stops = StopButtons()

    @facing_visitors
    def choose(adapter: str, onnx: str, pytorch: str) -> list[Any]:
        setup = stage.setup(adapter, onnx, pytorch)
        if setup.onnx not in stage.bundle(setup.adapter).precisions:
            # The adapter before may have had a graph that this one lacks.
            setup = stage.setup(adapter, FP32, pytorch)
        with stage.measuring:  # an engine that loads is as bad for a burst as one that runs
            now = stage.open(setup)
        return [*common(now), *compare_tab.refresh(now)]

    def common(now: OpenedEngines) -> list[Any]:
        return [
            gr.Dropdown(choices=precision_choices(now.bundle.precisions), value=now.setup.onnx),
            model_facts(now),
            quality_words(now.choice),
        ]

    with gr.Blocks(title="promptfold", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(
            "# promptfold\n"
            "One P-tuned model, two engines: a frozen transformer with its learned virtual tokens in PyTorch, as PEFT "
            "runs it, and with the prompt folded into one ONNX graph."
        )
        with gr.Row():
            selectors = Selectors(
                adapter=gr.Dropdown(list(stage.choices), value=opened.choice.name, label="Adapter", min_width=200),
                onnx=gr.Dropdown(
                    precision_choices(opened.bundle.precisions),
                    value=opened.setup.onnx,
                    label="ONNX Runtime",
                    min_width=200,
                ),
                pytorch=gr.Dropdown(
                    [(words, mode) for mode, words in PYTORCH_MODES.items()],
                    value=opened.setup.pytorch,
                    label="PyTorch",
                    visible=stage.has_pytorch,
                    min_width=200,
                ),
            )
        model = gr.HTML(model_facts(opened), elem_id="model", elem_classes="facts")
        build_share_box(share, page)
        with gr.Tabs():
            with gr.Tab("Compare"):
                compare_tab = build_compare_tab(stage, selectors, opened, stops)
                quality = gr.HTML(quality_words(opened.choice), elem_id="quality")
            with gr.Tab("Latency lab"):
                build_lab_tab(stage, selectors)
            with gr.Tab("Score a file"):
                build_score_tab(stage, selectors)
            with gr.Tab("The prompt") as prompt_tab:
                build_prompt_tab(stage, selectors, prompt_tab)
            with gr.Tab("Use it"):
                build_use_tab(stage, page)
        gr.on(
            # Not "change", which a new value from here would set off again.
            [selectors.adapter.input, selectors.onnx.input, selectors.pytorch.input],
            choose,
            selectors.inputs,
            [selectors.onnx, model, quality, *compare_tab.outputs],
            api_visibility="private",
            show_progress_on=model,
            **ONE_AT_A_TIME,
        )
        page.unload(stops.goodbye)
    # Not open: past the queue nobody would wait for a turn.
    page.queue(max_size=QUEUE_SIZE, api_open=False)
    return page


def precision_choices(precisions: Sequence[str]) -> list[tuple[str, str]]:
    """For a dropdown: words for people, and the value behind them."""
    return [(PRECISIONS[precision], precision) for precision in precisions]


def model_facts(opened: OpenedEngines) -> str:
    """What the model is, what it tells apart, and what the chosen precision costs."""
    bundle, task = opened.bundle, opened.task
    shown = ", ".join(f"<code>{text(label)}</code>" for label in task.labels[:LABELS_SHOWN])
    if len(task.labels) > LABELS_SHOWN:
        shown += f" and {len(task.labels) - LABELS_SHOWN} more"
    texts = "pairs of sentences" if task.is_pair else "single sentences"
    method = METHODS.get(bundle.method, bundle.method)
    return table(
        [
            # Of a folder its last part: where it lies on this machine is nobody's business.
            ("Base model", text(Path(bundle.base_model).name)),
            ("Method", text(f"{method}, {bundle.virtual_tokens} virtual tokens")),
            ("Task", f"{text(task.name)}, {texts}: {shown}"),
            ("ONNX graph", text(graph_words(opened.graph, opened.bundle_task.number, opened))),
        ]
    )


def graph_words(graph: GraphFile, task_number: int, opened: OpenedEngines) -> str:
    """How far a graph is from PEFT's forward pass, as measured when it was exported."""
    if graph.precision == FP32:
        return (
            f"fp32, logits at most {opened.bundle_task.max_logit_difference:.1e} from PEFT's, over shapes and paddings "
            "that were not traced"
        )
    if not graph.gates:
        return (
            f"{graph.precision}: what it costs in quality was not measured here. python -m export with "
            "--validation-file measures it."
        )
    gate = graph.gates[task_number]
    return f"{graph.precision}, on {gate.n_rows} labelled rows: {gate}"


def quality_words(choice: Choice) -> str:
    """Scores, beside those of answers that need no prompt and of the other adapters that ship, as HTML."""
    adapter = choice.adapter
    name, baseline = max(adapter.baselines.items(), key=lambda item: item[1].key)
    sentences = [
        f"On {adapter.n_validation} validation rows: {adapter.scores}.",
        f"The best answer that needs no learned prompt ({name}) has {baseline}: the model's "
        f"{_gap(adapter.scores, baseline)}.",
        *(_against(adapter, rival) for rival in choice.rivals),
        "What the page compares is the engines: a text that one of them gets wrong, the other gets wrong too.",
    ]
    # The names of baselines hold labels in backticks, as their model card wants them.
    words = re.sub("`([^`]*)`", r"<code>\1</code>", text(" ".join(sentences)))
    return f"<p><b>How good the model is.</b> {words}</p>"


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
    mine, others = (METHODS.get(method, method) for method in (adapter.method, rival.method))
    return (
        f"{mine}: {METRICS[name]} {100 * value:.1f}, against {100 * other:.1f} of {others} ({rival.folder.name}), which "
        f"ships too: {abs(points):.1f} points {'more' if points >= 0 else 'less'}."
    )
