"""The page: the visitor's choices on top, and a tab for each thing that can be done with them. View only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from demo.access.limits import QUEUE_SIZE
from demo.engines.adapters import Choice
from demo.engines.pytorch import PYTORCH_MODES
from demo.engines.stage import OpenedEngines, Stage
from demo.page.controls import LABELS_SHOWN, LATEST_LAST, ONE_AT_A_TIME, Selectors, StopFlags, errors_shown
from demo.page.html import render
from demo.page.tab_compare import CompareTab, build_compare_tab
from demo.page.tab_lab import build_lab_tab
from demo.page.tab_prompt import build_prompt_tab
from demo.page.tab_score import build_score_tab
from demo.page.tab_use import build_share_box, build_use_tab
from export.bundle.folder import FP16, FP32, INT8
from train.config import P_TUNING, P_TUNING_V2
from train.data.tasks import METRICS, best_scores

METHODS = {P_TUNING: "P-Tuning", P_TUNING_V2: "P-Tuning v2"}
"""Names of methods for people."""

PRECISIONS = {
    FP32: "fp32: PyTorch's numbers",
    FP16: "fp16: rounded, for CUDA",
    INT8: "int8: rounded, for CPUs",
}
"""Precisions of ONNX Runtime's graph for people."""

KEPT_SECONDS = 3600
"""How long visitors' files and results are kept at most."""

_FOLDER = Path(__file__).parent


def page_style() -> dict[str, Any]:
    """Keyword arguments of `gr.Blocks.launch`. The fonts are the system's: without network the page looks the same."""
    fonts = [gr.themes.Font(name) for name in ("system-ui", "Segoe UI", "Roboto", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "Consolas", "monospace")]
    theme = gr.themes.Soft(primary_hue="indigo", font=fonts, font_mono=mono)
    # The theme's own colours have contrasts from 2.4 to 4.5; WCAG 2 AA asks for at least 4.5.
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
    css, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "repair_gradio.js"))
    return {"theme": theme, "css": css, "head": f"<script>{script}</script>"}


def build_page(stage: Stage, opened: OpenedEngines, *, share: bool, shows_example: bool = False) -> gr.Blocks:
    """Build the page, which starts with `opened`.

    Args:
        share: it is launched with a public link.
        shows_example: it opens with the first example answered; the examples are for the adapters that ship.
    """
    stops = StopFlags()
    with gr.Blocks(title="promptfold", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(
            "# promptfold\n"
            "One P-tuned model, two engines: a frozen transformer with its learned virtual tokens in PyTorch, as PEFT "
            "runs it, and with the prompt folded into one ONNX graph."
        )
        selectors = _build_selectors(stage, opened)
        model = gr.HTML(model_facts(opened), elem_id="model", elem_classes="facts")
        build_share_box(page, requested=share)
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
        _follow_choices(stage, selectors, model, quality, compare_tab)
        if shows_example:
            compare_tab.answer_first_example(page, stops)
        page.unload(stops.forget)
    # Direct calls past the queue stay off: they would not wait for their turn.
    page.queue(max_size=QUEUE_SIZE, api_open=False)
    return page


def _build_selectors(stage: Stage, opened: OpenedEngines) -> Selectors:
    with gr.Row():
        return Selectors(
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


def _follow_choices(
    stage: Stage, selectors: Selectors, model: gr.HTML, quality: gr.HTML, compare_tab: CompareTab
) -> None:
    """Load what the visitor chooses, and show what it is."""

    @errors_shown()
    def choose(adapter: str, onnx: str, pytorch: str) -> list[Any]:
        setup = stage.setup(adapter, onnx, pytorch)
        if setup.onnx not in stage.bundle(setup.adapter).precisions:
            # The adapter before may have a precision that this one lacks.
            setup = stage.setup(adapter, FP32, pytorch)
        with stage.measuring:  # loading an engine disturbs a measurement as running one does
            now = stage.open(setup)
        precisions = gr.Dropdown(choices=precision_choices(now.bundle.precisions), value=now.setup.onnx)
        return [precisions, model_facts(now), quality_words(now.choice), *compare_tab.refresh(now)]

    gr.on(
        # Not "change", which the new value of the precision would trigger again.
        [selectors.adapter.input, selectors.onnx.input, selectors.pytorch.input],
        choose,
        selectors.inputs,
        [selectors.onnx, model, quality, *compare_tab.outputs],
        api_visibility="private",
        show_progress_on=model,
        **LATEST_LAST,
        **ONE_AT_A_TIME,
    )


def precision_choices(precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Choices of a dropdown: words for people, and the value behind them."""
    return [(PRECISIONS[precision], precision) for precision in precisions]


def model_facts(opened: OpenedEngines) -> Markup:
    """The model, its task, and how far the chosen graph is from PEFT."""
    bundle = opened.bundle
    return render(
        "model.html",
        # Only the folder's name: visitors need not know where it is on this machine.
        base_model=Path(bundle.base_model).name,
        method=METHODS.get(bundle.method, bundle.method),
        opened=opened,
        not_for_use=not_for_use(opened.choice),
        task=opened.task,
        labels_shown=LABELS_SHOWN,
    )


def not_for_use(choice: Choice) -> str:
    """That an answer without a learned prompt is better, and which adapter to take; empty where the adapter is better."""
    scores = choice.adapter.scores
    _, baseline = best_scores(choice.adapter.baselines)
    metric = next(iter(baseline.values), "")
    if not metric or scores.values[metric] >= baseline.values[metric]:
        return ""
    better = [rival.folder.name for rival in choice.rivals if rival.scores.key > scores.key]
    take = f"; take {better[0]}" if better else ""
    return f"An answer that needs no learned prompt has a better {METRICS[metric]}{take}."


def quality_words(choice: Choice) -> Markup:
    """Scores, beside the best baseline and the other adapters that ship."""
    adapter = choice.adapter
    # Both are missing where nothing was measured here, as of an adapter made elsewhere.
    baseline_name, baseline = best_scores(adapter.baselines)
    metric = next(iter(adapter.scores.values), "")
    return render(
        "quality.html",
        adapter=adapter,
        baseline_name=baseline_name,
        baseline=baseline,
        rivals=choice.rivals,
        metric=METRICS.get(metric),
        command=f"python -m train.evaluate {adapter.folder.name} --file FILE",
        percent=lambda scores: 100 * scores.values[metric],
        methods=METHODS,
    )
