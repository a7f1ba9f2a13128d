"""The tab "The prompt": what was learned, and its effect on a text. View only; see `demo.measure.prompt`."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import gradio as gr
from markupsafe import Markup

from demo.engines.adapters import Choice
from demo.engines.pytorch import EAGER
from demo.engines.stage import Setup, Stage
from demo.measure.prompt import (
    RANDOM_PROMPTS,
    Curves,
    LearnedPrompt,
    PromptEffect,
    PromptPart,
    Sizes,
    learned_prompt,
    measure_sizes,
    training_curves,
)
from demo.measure.prompt import prompt_effect as measure_effect
from demo.page.charts import drawing, to_svg
from demo.page.controls import (
    EXAMPLES,
    LABELS_SHOWN,
    LATEST_LAST,
    ONE_AT_A_TIME,
    QUIET,
    Selectors,
    errors_shown,
    sentence_boxes,
    task_updates,
)
from demo.page.html import render
from export.bundle.folder import FP32
from train.adapter.record import Adapter
from train.config import P_TUNING_V2
from train.data.tasks import Task

FIRST_COLOR, SECOND_COLOR = "#0d9488", "#b45309"
"""Colours of curves; both stand out on white and on near-black, and neither is an engine's."""

MARK_COLOR = "#808080"

Bar = tuple[str, float, str]
"""Name, size and label of a bar."""

MINIMAL: dict[str, Any] = QUIET | {"show_progress": "minimal"}
"""For events of the page that take a moment; larger animations would slow the engines."""


def build_prompt_tab(stage: Stage, selectors: Selectors, tab: gr.Tab) -> None:
    """Build the tab and the endpoints ``/prompt`` and ``/prompt_effect``, inside ``with gr.Tab(...) as tab``.

    It is filled when it is first opened.
    """
    _PromptTab(stage, selectors).wire(selectors, tab)
    _build_endpoints(stage)


class _PromptTab:
    """The tab's components and the handlers of their events."""

    def __init__(self, stage: Stage, selectors: Selectors) -> None:
        """Lay out the components."""
        self._stage = stage
        self._shown = gr.State("")
        self._learned = gr.HTML(render("prompt_waiting.html"), elem_id="prompt-learned")
        gr.HTML(render("prompt_does.html", has_pytorch=stage.has_pytorch))
        self._effect_boxes = self._build_effect(selectors) if stage.has_pytorch else []
        about = gr.HTML(elem_id="prompt-about")
        self._outputs = [self._learned, about, self._shown, *self._effect_boxes]

    def _build_effect(self, selectors: Selectors) -> list[Any]:
        """Sentences to classify with and without the prompt; the components that depend on the adapter."""
        task = _choice(self._stage, "").adapter.task
        with gr.Row():
            boxes = sentence_boxes(task, elem_id="prompt-sentence", values=_example_texts(task))
        examples = boxes.examples(task, "Examples: click one, then the button").dataset
        button = gr.Button("Classify with and without the prompt", variant="primary")
        effect = gr.HTML(effect_html(None), elem_id="prompt-effect")
        gr.on(
            [button.click, boxes.sentence1.submit, boxes.sentence2.submit],
            self.show_effect,
            [*selectors.inputs, *boxes.inputs],
            effect,
            **MINIMAL,
            **LATEST_LAST,
            **ONE_AT_A_TIME,
        )
        return [*boxes.inputs, examples, effect]

    def wire(self, selectors: Selectors, tab: gr.Tab) -> None:
        """Fill the tab when it is opened and when another adapter is chosen."""
        for event, handler in ((tab.select, self.fill), (selectors.adapter.change, self.refill)):
            event(handler, [selectors.adapter, self._shown], self._outputs, show_progress_on=self._learned, **MINIMAL)

    @errors_shown()
    def fill(self, adapter: str, shown: str) -> list[Any]:
        """Show an adapter; a text that the visitor wrote stays if it suits the task."""
        choice = _choice(self._stage, adapter)
        if choice.adapter.is_merged:
            nothing = [gr.skip()] * len(self._effect_boxes)
            return [render("prompt_none.html", method=choice.adapter.method), "", choice.name, *nothing]
        learned = learned_prompt(choice.adapter)
        # Not `Stage.bundle`, which would export one.
        sizes = measure_sizes(choice.adapter, self._stage.bundle_if_there(choice.name))
        about = about_html(learned, choice.adapter, sizes, training_curves(choice.adapter))
        updates: list[Any] = [gr.skip()] * len(self._effect_boxes)
        if choice.name != shown:
            task = choice.adapter.task
            updates = [*task_updates(task), effect_html(None)]
            if task.is_pair != _choice(self._stage, shown).adapter.task.is_pair:
                for update, value in zip(updates, _example_texts(task), strict=False):
                    update["value"] = value
        return [learned_html(learned, choice), about, choice.name, *updates[: len(self._effect_boxes)]]

    def refill(self, adapter: str, shown: str) -> list[Any]:
        """Show another adapter, if the tab was opened before."""
        return self.fill(adapter, shown) if shown else [gr.skip()] * len(self._outputs)

    @errors_shown()
    def show_effect(self, adapter: str, onnx: str, pytorch: str, sentence1: str, sentence2: str) -> Markup:
        """Classify a text with and without the prompt."""
        setup = self._stage.setup(adapter, onnx, pytorch)
        # A hidden second box may still have a text for another task.
        second = sentence2 if self._stage.choices[setup.adapter].adapter.task.is_pair else ""
        return effect_html(measure_effect(self._stage, setup, sentence1, second))


def _build_endpoints(stage: Stage) -> None:
    @errors_shown()
    def prompt(adapter: str = "") -> dict:
        """What an adapter learned: the norms of its vectors and, for P-Tuning, the words nearest to each virtual token.

        Args:
            adapter: name of the adapter; empty for the one the page starts with
        """
        choice = _choice(stage, adapter)
        known = {"adapter": choice.name, "method": choice.adapter.method}
        return known | learned_prompt(choice.adapter).as_json()

    @errors_shown()
    def prompt_effect(sentence1: str, sentence2: str = "", adapter: str = "") -> dict:
        """Classify a text with the learned prompt, with random prompts, and with none.

        Args:
            sentence1: the first sentence, or the only one
            sentence2: the second sentence, where the task is about pairs
            adapter: name of the adapter; empty for the one the page starts with
        """
        return measure_effect(stage, Setup(_choice(stage, adapter).name), sentence1, sentence2).as_json()

    gr.api(prompt, api_name="prompt")
    gr.api(prompt_effect, api_name="prompt_effect", **ONE_AT_A_TIME)


def _choice(stage: Stage, adapter: str) -> Choice:
    """The adapter of a name; the first if the name is empty."""
    return stage.choices[stage.setup(adapter, FP32, EAGER).adapter]


def _example_texts(task: Task) -> tuple[str, str]:
    """What the boxes start with; nothing for single sentences, whose subject is not known."""
    return next(iter(EXAMPLES.values())) if task.is_pair else ("", "")


def learned_html(learned: LearnedPrompt, choice: Choice) -> Markup:
    """The learned prompt: norms, nearest words and cosines."""
    vocabulary, norms = learned.vocabulary, learned.parts[0].norms[0]
    return render(
        "prompt_learned.html",
        name=choice.name,
        learned=learned,
        layer_norms=map(_layer_norms, learned.parts) if choice.adapter.method == P_TUNING_V2 else None,
        norms=norms,
        largest=max([*norms, vocabulary.median_norm if vocabulary else 0.0]) or 1,
        best_cosine=max(words[0].cosine for words in vocabulary.nearest) if vocabulary else None,
        heat_maps=map(_heat_map, learned.parts),
    )


def _layer_norms(part: PromptPart) -> tuple[str, list[Bar]]:
    """A part's name, and a bar for each layer: the mean norm of the virtual tokens."""
    means = [sum(norms) / len(norms) for norms in part.norms]
    return part.name, [(f"layer {number}", norm, f"{norm:.2f}") for number, norm in enumerate(means, start=1)]


@lru_cache(maxsize=16)
def _heat_map(part: PromptPart) -> Markup:
    """The cosines between the virtual tokens, in colour."""
    from matplotlib.ticker import MaxNLocator

    n_virtual = len(part.cosines)
    others = [value for i, row in enumerate(part.cosines) for j, value in enumerate(row) if i != j]
    words = f"from {min(others):.2f} to {max(others):.2f}, mean {sum(others) / len(others):.2f}" if others else "one"
    with drawing(4.2, 3.4) as figure:
        axes = figure.subplots()
        edges = (0.5, n_virtual + 0.5)
        image = axes.imshow(
            part.cosines, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest", extent=(*edges, *edges[::-1])
        )
        axes.set_title(part.name)
        axes.set_xlabel("virtual token")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
        figure.colorbar(image, ax=axes, label="cosine")
        return to_svg(figure, f"Cosines of the {n_virtual} virtual tokens' {part.name} among themselves: {words}")


def effect_html(effect: PromptEffect | None) -> Markup:
    """The probabilities with the learned, random and no prompt; None before the first text."""
    if effect is None:
        return render("prompt_effect.html", effect=None, n_random=RANDOM_PROMPTS)
    labels = effect.task.labels
    shown = sorted(sorted(range(len(labels)), key=lambda index: -effect.learned[index])[:LABELS_SHOWN])
    sides = {
        "The learned prompt": effect.learned,
        f"{len(effect.random)} random prompts, mean": effect.random_mean,
        "No prompt": effect.none,
    }
    tables: dict[str, list[Bar]] = {
        name: [(labels[index], values[index], f"{100 * values[index]:.1f} %") for index in shown]
        for name, values in sides.items()
    }
    number_rows = [(name, f"{values[0]:.4f}") for name, values in sides.items()]
    return render(
        "prompt_effect.html", effect=effect, tables=tables, number_rows=number_rows, n_hidden=len(labels) - len(shown)
    )


def about_html(learned: LearnedPrompt, adapter: Adapter, sizes: Sizes, curves: Curves | None) -> Markup:
    """How the prompt was trained, if that is known, how large it is, and how it is folded."""
    files: list[Bar] = [(file.name, file.n_bytes, f"{file.n_bytes / 1e6:,.2f} MB") for file in sizes.files]
    counts = {
        "prompt, learned": sizes.prompt_numbers,
        "head, learned": sizes.head_numbers,
        "base model, frozen": sizes.frozen_numbers,
    }
    numbers: list[Bar] = [(name, count, f"{count:,}") for name, count in counts.items() if count is not None]
    series: tuple[tuple[str, tuple[float, ...]], ...] = ()
    charts = []
    if curves is not None:
        losses = (("training loss", curves.train_loss), ("validation loss", curves.validation_loss))
        series = (*losses, *curves.scores)
        charts = [_lines(curves, losses, "loss"), _lines(curves, curves.scores, "on validation rows")]
    return render(
        "prompt_about.html",
        learned=learned,
        is_v2=adapter.method == P_TUNING_V2,
        n_virtual=adapter.virtual_tokens,
        sizes=sizes,
        has_graph=any(file.name.startswith("ONNX") for file in sizes.files),
        files=files,
        numbers=numbers,
        curves=curves,
        series=series,
        charts=charts,
    )


@lru_cache(maxsize=32)
def _lines(curves: Curves, series: Sequence[tuple[str, tuple[float, ...]]], unit: str) -> Markup:
    from matplotlib.ticker import MaxNLocator

    with drawing(4.4, 2.8) as figure:
        axes = figure.subplots()
        styles = ((FIRST_COLOR, "o-"), (SECOND_COLOR, "s--"))
        for number, (name, values) in enumerate(series):
            color, style = styles[number % len(styles)]
            axes.plot(curves.epochs, values, style, color=color, markersize=4, label=name)
        axes.axvline(curves.kept_epoch, color=MARK_COLOR, linestyle=":", label=f"kept: epoch {curves.kept_epoch}")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(unit)
        figure.legend(loc="outside upper center", ncols=2)
        words = "; ".join(f"{name} from {values[0]:.3f} to {values[-1]:.3f}" for name, values in series)
        return to_svg(figure, f"Per epoch: {words}; epoch {curves.kept_epoch} was kept")
