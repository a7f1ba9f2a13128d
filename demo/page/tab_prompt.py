"""The tab "The prompt": what was learned, and what it does. View only; what it shows comes from `demo.measure.prompt`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gradio as gr

from demo.engines.adapters import Choice
from demo.engines.pytorch import EAGER
from demo.engines.stage import Setup, Stage
from demo.measure.prompt import (
    NEAREST_WORDS,
    RANDOM_PROMPTS,
    Curves,
    LearnedPrompt,
    PromptEffect,
    PromptPart,
    Sizes,
    Vocabulary,
    learned_prompt,
    measure_sizes,
    training_curves,
)
from demo.measure.prompt import prompt_effect as measure_effect
from demo.page.charts import drawing, to_svg
from demo.page.controls import ONE_AT_A_TIME, Selectors, facing_visitors, text
from demo.page.tab_compare import EXAMPLES, box_labels
from export.bundle.folder import FP32
from train.adapter.record import Adapter
from train.config import P_TUNING_V2
from train.data.tasks import MRPC, Task

LABELS_SHOWN = 10
"""A task may have a hundred."""


FIRST_COLOR, SECOND_COLOR = "#0d9488", "#b45309"
"""Of curves; both stand out on white and on near-black, and neither is an engine's."""


MARK_COLOR = "#808080"


CSS = """
.sheet h3 { font-size: 1rem; margin: .8rem 0 .3rem; }
.sheet p { max-width: 46rem; }
.sheet table { width: 100%; border-collapse: collapse; margin: .3rem 0; }
.sheet caption { text-align: left; font-weight: 600; padding: .3rem 0; }
.sheet table, .sheet tbody, .sheet tr, .sheet th, .sheet td { border: 0 !important; }
.sheet th, .sheet td { text-align: left; vertical-align: top; padding: .2rem .6rem .2rem 0; }
.sheet th[scope=row] { font-weight: 400; overflow-wrap: anywhere; }
.sheet .bars th { min-width: 7.5rem; }
.sheet .number { white-space: nowrap; font-variant-numeric: tabular-nums; }
.sheet .track { min-width: 3.5rem; width: 40%; }
.sheet .bar { display: block; height: .8rem; margin-top: .3rem; min-width: 1px; background: var(--primary-500); }
.sheet .side { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: flex-start; }
.sheet .side > * { flex: 1 1 16rem; min-width: 0; }
.sheet .words { min-width: 9.5rem; width: 60%; }
.sheet .words code { overflow-wrap: break-word; }
.sheet .box { border: 1px solid currentColor; border-radius: .4rem; padding: .4rem .6rem; text-align: center; }
.sheet .dashed { border-style: dashed; }
.sheet .thick { border-width: 3px; }
.sheet .inputs { display: flex; gap: .5rem; }
.sheet .inputs > * { flex: 1 1 0; min-width: 0; }
.sheet .arrow { text-align: center; line-height: 1.4; }
"""


EMPTY_EFFECT = (
    '<div class="sheet" style="min-height:13rem"><p>Press the button: the same text is classified with the learned '
    f"prompt, with {RANDOM_PROMPTS} random ones, and with none.</p></div>"
)


WAITING = '<div class="sheet" style="min-height:90vh"><p>The prompt is being read …</p></div>'
"""As high as a window, so that what comes later moves nothing that is seen."""


def build_prompt_tab(stage: Stage, selectors: Selectors, tab: gr.Tab) -> None:
    """Build the tab, inside ``with gr.Tab(...) as tab``; it is filled when it is first opened.

    Args:
        tab: the tab itself, for the event of its being opened.
    """

    def choice_of(adapter: str) -> Choice:
        setup = stage.setup(adapter or stage.default().adapter, FP32, EAGER)
        return stage.choices[setup.adapter]

    @facing_visitors
    def fill(adapter: str, shown: str) -> list[Any]:
        """Everything of an adapter; a text that the visitor wrote stays where it fits."""
        choice = choice_of(adapter)
        learned = learned_prompt(choice.adapter)
        # Not `stage.bundle`, which would export.
        sizes = measure_sizes(choice.adapter, stage.bundle_if_there(choice.name))
        pages = [
            _learned(learned, choice),
            _about(learned, choice.adapter, sizes, training_curves(choice.adapter)),
            choice.name,
        ]
        if choice.name == shown:
            return pages + [gr.skip()] * len(boxes)
        before, task = choice_of(shown).adapter.task, choice.adapter.task
        look = _text_boxes(task)
        values: list[dict[str, Any]] = [
            {"value": value} if task.is_pair != before.is_pair else {} for value in look.values
        ]
        updates = [
            gr.update(label=look.labels[0], **values[0]),
            gr.update(label=look.labels[1], visible=task.is_pair, **values[1]),
            gr.update(visible=task == MRPC),
            EMPTY_EFFECT,
        ]
        return pages + updates[: len(boxes)]

    def refill(adapter: str, shown: str) -> list[Any]:
        """The same once the tab was opened; before that there is nothing to keep right."""
        return fill(adapter, shown) if shown else [gr.skip()] * len(outputs)

    @facing_visitors
    def show_effect(adapter: str, onnx: str, pytorch: str, sentence1: str, sentence2: str) -> str:
        setup = stage.setup(adapter, onnx, pytorch)
        # The box that a task does not show may hold what was written for another one.
        second = sentence2 if stage.choices[setup.adapter].adapter.task.is_pair else ""
        return _effect(measure_effect(stage, setup, sentence1, second))

    @facing_visitors
    def prompt(adapter: str = "") -> dict:
        """What an adapter learned: the norms of its vectors and, for P-Tuning, the words nearest to each virtual token.

        Args:
            adapter: name of the adapter; empty for the one the page starts with
        """
        choice = choice_of(adapter)
        known = {"adapter": choice.name, "method": choice.adapter.method}
        return known | learned_prompt(choice.adapter).as_json()

    @facing_visitors
    def prompt_effect(sentence1: str, sentence2: str = "", adapter: str = "") -> dict:
        """Classify a text with the learned prompt, with random prompts, and with none.

        Args:
            sentence1: the first sentence, or the only one
            sentence2: the second sentence, where the task is about pairs
            adapter: name of the adapter; empty for the one the page starts with
        """
        return measure_effect(stage, Setup(choice_of(adapter).name), sentence1, sentence2).as_json()

    task = stage.choices[stage.default().adapter].adapter.task
    shown = gr.State("")
    learned = gr.HTML(WAITING, css_template=CSS, elem_id="prompt-learned")
    gr.HTML(f'<div class="sheet"><h2>What the prompt does</h2>{_effect_words(stage)}</div>', css_template=CSS)
    boxes: list[Any] = []
    if stage.has_pytorch:
        look = _text_boxes(task)
        with gr.Row():
            sentence1 = gr.Textbox(look.values[0], label=look.labels[0], lines=3, elem_id="prompt-sentence1")
            sentence2 = gr.Textbox(
                look.values[1], label=look.labels[1], lines=3, visible=task.is_pair, elem_id="prompt-sentence2"
            )
        examples = gr.Examples(
            [[example.sentence1, example.sentence2] for example in EXAMPLES],
            [sentence1, sentence2],
            label="Examples: click one, then the button",
            example_labels=[example.name for example in EXAMPLES],
            cache_examples=False,
            api_visibility="private",
            visible=task == MRPC,
        )
        button = gr.Button("Classify with and without the prompt", variant="primary")
        effect = gr.HTML(EMPTY_EFFECT, css_template=CSS, elem_id="prompt-effect")
        boxes = [sentence1, sentence2, examples.dataset, effect]
        gr.on(
            [button.click, sentence1.submit, sentence2.submit],
            show_effect,
            [*selectors.inputs, sentence1, sentence2],
            effect,
            api_visibility="private",
            # As in the other tabs: a large animation costs the engines time.
            show_progress="minimal",
            **ONE_AT_A_TIME,
        )
    about = gr.HTML(css_template=CSS, elem_id="prompt-about")
    outputs = [learned, about, shown, *boxes]
    for event, handler in ((tab.select, fill), (selectors.adapter.change, refill)):
        event(
            handler,
            [selectors.adapter, shown],
            outputs,
            api_visibility="private",
            show_progress="minimal",
            show_progress_on=learned,
        )
    gr.api(prompt, api_name="prompt")
    gr.api(prompt_effect, api_name="prompt_effect", **ONE_AT_A_TIME)


@dataclass(frozen=True)
class _TextBoxes:
    """How the two text boxes look for a task; one of single sentences shows the first alone.

    Attributes:
        labels: of both, with the names of the task's columns where those say more.
        values: what they start with; nothing where the task is of single sentences, which may be of any kind.
    """

    labels: tuple[str, str]
    values: tuple[str, str]


def _text_boxes(task: Task) -> _TextBoxes:
    labels = box_labels(task)
    if not task.is_pair:
        return _TextBoxes(labels, ("", ""))
    return _TextBoxes(labels, (EXAMPLES[0].sentence1, EXAMPLES[0].sentence2))


def _effect_words(stage: Stage) -> str:
    if not stage.has_pytorch:
        return (
            "<p>This page runs without PyTorch. The ONNX graph's prompt is a constant and cannot be taken out of it, "
            "so there is nothing to compare it with.</p>"
        )
    return (
        "<p>PyTorch classifies your text with the learned prompt, with random prompts whose vectors are as long as the "
        "learned ones, and with no prompt. The learned head is the same each time. It was trained together with the "
        "prompt, so not all of the difference is the prompt's own merit.</p>"
    )


def _bar(share: float) -> str:
    """A bar as wide as a share of its cell; a number beside it says the same."""
    return f'<span class="bar" style="width:{100 * share:.3f}%"></span>'


def _scrolling(label: str, content: str) -> str:
    """What may be wider than a phone, and can then be scrolled with the keyboard too."""
    return f'<div style="overflow-x:auto" tabindex="0" role="region" aria-label="{text(label)}">{content}</div>'


def _grid(caption: str, columns: Sequence[str], rows: Iterable[str]) -> str:
    """A table of rows that are HTML, under columns that are text."""
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return _scrolling(caption, f"<table><caption>{text(caption)}</caption><tr>{head}</tr>{body}</table>")


def _bar_table(caption: str, rows: Sequence[tuple[str, float, str]], *, full: float | None = None) -> str:
    """Names, sizes and what is written beside them; the bars are to scale, by default that of the largest."""
    largest = full or max(size for _, size, _ in rows) or 1
    body = "".join(
        f'<tr><th scope="row">{text(name)}</th><td class="track">{_bar(size / largest)}</td><td class="number">{text(written)}</td></tr>'
        for name, size, written in rows
    )
    return f'<table class="bars"><caption>{text(caption)}</caption>{body}</table>'


def _learned(learned: LearnedPrompt, choice: Choice) -> str:
    """What was learned, as numbers and pictures."""
    n_virtual = len(learned.parts[0].cosines)
    head = f"<h2>What {text(choice.name)} learned</h2>"
    maps = "".join(_heat_map(part) for part in learned.parts)
    likeness = (
        "<h3>How alike the virtual tokens are</h3><p>The cosine of each two of them: 1 means the same direction, 0 "
        f"none in common. {'Mean over the layers.' if len(learned.parts) > 1 else ''}</p>"
        f'<div class="side">{maps}</div>'
    )
    if choice.adapter.method == P_TUNING_V2:
        keys, values = learned.parts
        means = [[sum(norms) / n_virtual for norms in part.norms] for part in (keys, values)]
        tables = "".join(
            _bar_table(
                f"Norm of the {part.name}, mean over the virtual tokens",
                [(f"layer {number}", norm, f"{norm:.2f}") for number, norm in enumerate(norms, start=1)],
            )
            for part, norms in zip((keys, values), means, strict=True)
        )
        body = f'<p>{text(learned.why_no_words)}</p><div class="side">{tables}</div>'
    else:
        body = _virtual_tokens(learned.parts[0].norms[0], learned.vocabulary, learned.why_no_words)
    return f'<div class="sheet" style="min-height:90vh">{head}{body}{likeness}</div>'


def _virtual_tokens(norms: Sequence[float], vocabulary: Vocabulary | None, why_no_words: str) -> str:
    """Of each virtual token its norm and the words around it."""
    largest = max([*norms, vocabulary.median_norm if vocabulary else 0.0]) or 1
    rows = []
    for number, norm in enumerate(norms):
        row = f'<th scope="row">{number + 1}</th><td class="track number">{norm:.2f}{_bar(norm / largest)}</td>'
        if vocabulary is not None:
            near = (f"<code>{text(word.token)}</code> {word.cosine:.2f}" for word in vocabulary.nearest[number])
            row += f'<td class="words">{", ".join(near)}</td>'
        rows.append(row)
    columns = ["Token", "Norm, to scale"]
    if vocabulary is None:
        return f"<p>{text(why_no_words)}</p>" + _grid("The virtual tokens and their norms", columns, rows)
    median = vocabulary.median_norm
    rows.append(
        f'<th scope="row">real words</th><td class="track number">{median:.2f}{_bar(median / largest)}</td>'
        '<td class="words">(median)</td>'
    )
    best = max(words[0].cosine for words in vocabulary.nearest)
    intro = (
        f"<p>Each virtual token is a row of its own beside the {vocabulary.n_words:,} rows of the base model's words. "
        f"These are the {NEAREST_WORDS} words with the largest cosine to it. The largest of all is {best:.2f}; a random "
        f"vector's nearest word has {vocabulary.random_cosine:.2f} on average. So a virtual token means a word only as "
        "far as it is above that.</p>"
    )
    return intro + _grid("The virtual tokens and the words nearest to them", [*columns, "Nearest words, cosine"], rows)


@lru_cache(maxsize=16)
def _heat_map(part: PromptPart) -> str:
    """The cosines of the virtual tokens among themselves, in colour."""
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


def _effect(effect: PromptEffect) -> str:
    """Three sets of bars and what they say."""
    label = effect.label(effect.learned)
    none = effect.label(effect.none)
    shown = sorted(range(len(effect.labels)), key=lambda index: -effect.learned[index])[:LABELS_SHOWN]
    shown.sort()
    n_random = len(effect.random)
    sides = (
        ("The learned prompt", effect.learned),
        (f"{n_random} random prompts, mean", effect.random_mean),
        ("No prompt", effect.none),
    )
    tables = "".join(
        _bar_table(name, [(effect.labels[i], values[i], f"{100 * values[i]:.1f} %") for i in shown], full=1.0)
        for name, values in sides
    )
    left_out = len(effect.labels) - len(shown)
    words = [
        f"With the learned prompt the label is <code>{text(label)}</code>.",
        f"{effect.random_kept} of {n_random} random prompts leave it so.",
        f"With no prompt it is {'the same' if none == label else f'<code>{text(none)}</code>'}.",
    ]
    if left_out:
        words.append(f"{left_out} less probable labels are not shown.")
    if effect.cut:
        words.append(f"The text was cut to the {effect.tokens} tokens that the model can read beside its prompt.")
    return f'<div class="sheet" style="min-height:13rem"><div class="side">{tables}</div><p>{" ".join(words)}</p></div>'


def _about(learned: LearnedPrompt, adapter: Adapter, sizes: Sizes, curves: Curves) -> str:
    """Training, sizes and the fold."""
    return (
        f'<div class="sheet"><h2>How it was learned</h2>{_curves(curves)}'
        f"<h2>How large it is</h2>{_sizes(sizes)}<h2>How it is folded</h2>{_fold(learned, adapter)}</div>"
    )


@lru_cache(maxsize=16)
def _curves(curves: Curves) -> str:
    """Loss and scores per epoch, drawn and as a table."""
    losses = (("training loss", curves.train_loss), ("validation loss", curves.validation_loss))
    pictures = _lines(curves, losses, "nats") + _lines(curves, curves.scores, "on validation rows")
    columns = ["Epoch", *(name for name, _ in (*losses, *curves.scores))]
    rows = [
        f'<th scope="row">{epoch}{" (kept)" if epoch == curves.kept_epoch else ""}</th>'
        + "".join(f"<td>{values[index]:.4f}</td>" for _, values in (*losses, *curves.scores))
        for index, epoch in enumerate(curves.epochs)
    ]
    table = _grid("Loss and scores per epoch", columns, rows)
    return (
        f"<p>After every epoch the validation rows were scored; the weights of epoch {curves.kept_epoch} of "
        f"{len(curves.epochs)} were kept.</p>"
        f'<div class="side">{pictures}</div><details><summary>The numbers</summary>{table}</details>'
    )


def _lines(curves: Curves, series: Sequence[tuple[str, tuple[float, ...]]], unit: str) -> str:
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


def _sizes(sizes: Sizes) -> str:
    """Files and numbers, each to scale."""
    files = [(file.name, file.n_bytes, f"{file.n_bytes / 1e6:,.2f} MB") for file in sizes.files]
    numbers = [("prompt, learned", sizes.prompt_numbers), ("head, learned", sizes.head_numbers)]
    if sizes.frozen_numbers is not None:
        numbers.append(("base model, frozen", sizes.frozen_numbers))
    counted = [(name, count, f"{count:,}") for name, count in numbers]
    notes = []
    if sizes.why_unknown:
        notes.append(text(sizes.why_unknown))
    if not any(file.name.startswith("ONNX") for file in sizes.files):
        notes.append("The ONNX graph is not made yet: that is done when this adapter is first run.")
    note = f"<p>{' '.join(notes)}</p>" if notes else ""
    return (
        f'{note}<div class="side">{_bar_table("Files, 1 MB = 1,000,000 bytes", files)}'
        f"{_bar_table('Numbers (weights)', counted)}</div>"
        "<p>The bars are to scale. Frozen is what the base model's files hold, less what the head replaces.</p>"
    )


def _fold(learned: LearnedPrompt, adapter: Adapter) -> str:
    """What PEFT does at every request beside what the graph does."""
    n_virtual, n_layers = adapter.virtual_tokens, learned.n_layers
    in_every_layer = adapter.method == P_TUNING_V2
    if in_every_layer:
        table = f"prompt: keys and values of {n_virtual} virtual tokens for {n_layers} layers, reshaped and split"
        peft = f"{n_layers} frozen layers; each attends to the prompt's keys and values too"
    else:
        table = f"prompt: {n_virtual} rows, put before the text's"
        peft = f"{n_layers} frozen layers over prompt and text"
    if in_every_layer or learned.is_decoder:
        constant = f"constants: keys and values of {n_virtual} virtual tokens in each of {n_layers} layers"
        graph = f"{n_layers} frozen layers over the text alone; each attends to its constants"
    else:
        constant = f"one constant: {n_virtual} rows, with all that the embedding layer adds to them"
        graph = f"{n_layers} frozen layers over prompt and text"
    arrow = '<div class="arrow" aria-hidden="true">↓</div>'

    def column(title: str, prompt: str, layers: str, *, outer: str) -> str:
        inputs = f'<div class="box">text: token ids</div><div class="box thick">{text(prompt)}</div>'
        return (
            f'<div><h3>{text(title)}</h3><div class="box {outer}"><div class="inputs">{inputs}</div>{arrow}'
            f'<div class="box">{text(layers)}</div>{arrow}'
            f'<div class="box thick">head, learned</div>{arrow}<div>logits</div></div></div>'
        )

    return (
        f'<div class="side">{column("PEFT, at every request", table, peft, outer="dashed")}'
        f"{column('One ONNX graph', constant, graph, outer='thick')}</div>"
        "<p>Thick boxes were learned. On the left Python puts the prompt and the model together for every request. "
        "On the right the prompt is part of a static graph, as the weights are: whatever does not depend on the text "
        "was computed once, at the export. In fp32 both give the same logits up to rounding.</p>"
    )
