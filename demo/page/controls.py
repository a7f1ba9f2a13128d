"""What the tabs share: the visitor's choices, the queue for the engines, sentence boxes, and how errors are shown."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.helpers import Examples

from train.common.console import say
from train.common.errors import (
    AdapterError,
    BundleError,
    HubError,
    ModelError,
    ParityError,
    PrecisionError,
    PromptfoldError,
)
from train.data.tasks import MRPC, Task

ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "engines"}
"""For every event that runs an engine: one queue, so that no two measurements overlap."""

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""For events of the page alone. Gradio's animations, in a browser on the same cores, would slow the engines."""

AT_ONCE: dict[str, Any] = {"queue": False, **QUIET}
"""For events that must not wait in the queue, where the event that they stop may be waiting."""

LATEST_LAST: dict[str, Any] = {"trigger_mode": "always_last"}
"""For events about what the visitor may change meanwhile: the latest one follows the one that runs. By default Gradio
drops it without a word, and the page would show results of an older text or adapter beside the new one."""

ABOUT_THE_HOST = (AdapterError, BundleError, HubError, ModelError, ParityError, PrecisionError)
"""Errors that name folders of this machine and flags, with which a visitor can do nothing."""

HOST_TROUBLE = "This adapter cannot be used here. The terminal in which the page runs says why; choose another one."

LABELS_SHOWN = 10
"""The most probable ones; a task may have a thousand."""


@dataclass(frozen=True)
class Selectors:
    """The visitor's choices at the top of the page, which all tabs use."""

    adapter: gr.Dropdown
    onnx: gr.Dropdown
    """Precision of ONNX Runtime's graph."""
    pytorch: gr.Dropdown
    """One of `demo.engines.pytorch.PYTORCH_MODES`; hidden on a page without PyTorch."""

    @property
    def inputs(self) -> list[Any]:
        """Inputs of an event, in the order of `Stage.setup`'s arguments."""
        return [self.adapter, self.onnx, self.pytorch]


class StopFlags:
    """One flag per session: whether the visitor's measurement has to end."""

    def __init__(self) -> None:
        self._flags: dict[str, threading.Event] = {}

    def start(self, request: gr.Request) -> Callable[[], bool]:
        """Begin a visitor's measurement; the function returned says whether it has to end."""
        flag = self._flags[str(request.session_hash)] = threading.Event()
        return flag.is_set

    def stop(self, request: gr.Request) -> None:
        """End the visitor's measurement, if there is one."""
        if flag := self._flags.get(str(request.session_hash)):
            flag.set()

    def forget(self, request: gr.Request) -> None:
        """The visitor left: stop their measurement."""
        self.stop(request)
        self._flags.pop(str(request.session_hash), None)


@contextmanager
def errors_shown() -> Iterator[None]:
    """Show a `PromptfoldError` to the visitor instead of a traceback. Also decorates handlers that do not yield."""
    try:
        yield
    except ABOUT_THE_HOST as error:
        say(str(error))
        raise gr.Error(HOST_TROUBLE, print_exception=False) from error
    except PromptfoldError as error:
        raise gr.Error(str(error), print_exception=False) from error


def run_buttons(*, running: bool) -> list[Any]:
    """Updates of a start button and a stop button."""
    return [gr.Button(interactive=not running), gr.Button(interactive=running)]


def served_folder(component: gr.DownloadButton | gr.File) -> Path:
    """Gradio's own folder for files that it serves; it empties it where the page has ``delete_cache``."""
    folder = Path(component.GRADIO_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


EXAMPLES = {
    "Coast redwoods": (
        "Coast redwood trees are the tallest trees on the planet and can grow over 300 feet tall.",
        "The coast redwood trees, which can attain a height of over 300 feet, are the tallest trees on earth.",
    ),
    "Library hours": (
        "The library will stay open until ten in the evening during the exam weeks.",
        "During exam weeks, the library closes at ten in the evening.",
    ),
    "Two pieces of news": (
        "Shares of the airline fell 4 percent after it reported a loss for the third quarter.",
        "The airline named a new chief financial officer, who will start in January.",
    ),
    "One word apart": (
        "The company said on Tuesday that it will open forty new stores before the end of the year.",
        "The company said on Tuesday that it will close forty of its stores before the end of the year.",
    ),
}
"""Pairs of sentences that a click fills in, for MRPC. The first is from PEFT's tutorial; the others were written for this page, the last one to be hard."""


@dataclass(frozen=True)
class SentenceBoxes:
    """Two text boxes; a task of single sentences shows only the first."""

    sentence1: gr.Textbox
    sentence2: gr.Textbox

    @property
    def inputs(self) -> list[Any]:
        """Inputs of an event."""
        return [self.sentence1, self.sentence2]

    def examples(self, task: Task, label: str) -> Examples:
        """Buttons that fill the boxes with an example; its ``load_input_event`` comes after that."""
        return gr.Examples(
            [list(pair) for pair in EXAMPLES.values()],
            self.inputs,
            label=label,
            example_labels=list(EXAMPLES),
            cache_examples=False,
            api_visibility="private",
            visible=task == MRPC,
        )


def sentence_boxes(task: Task, *, elem_id: str, values: tuple[str, str] = ("", "")) -> SentenceBoxes:
    """Text boxes for a task; their ids in the page are ``elem_id`` with a number."""
    first, second = _sentence_labels(task)
    box = partial(gr.Textbox, lines=3)
    return SentenceBoxes(
        box(values[0], label=first, placeholder="Write a sentence …", elem_id=f"{elem_id}1"),
        box(values[1], label=second, placeholder="… and another one.", elem_id=f"{elem_id}2", visible=task.is_pair),
    )


def task_updates(task: Task) -> list[dict[str, Any]]:
    """Updates of both boxes and the examples for another task."""
    first, second = _sentence_labels(task)
    return [gr.update(label=first), gr.update(label=second, visible=task.is_pair), gr.update(visible=task == MRPC)]


def _sentence_labels(task: Task) -> tuple[str, str]:
    """Labels of the two text boxes, with the names of the task's columns if they are not MRPC's."""
    if not task.is_pair:
        return "Sentence", "Second sentence"
    if task.text_columns == MRPC.text_columns:
        return "Sentence 1", "Sentence 2"
    return f"Sentence 1: {task.text_columns[0]}", f"Sentence 2: {task.text_columns[1]}"
