"""What the tabs of the page share: the visitor's choices, the one queue for whatever runs an engine, and errors."""

import html
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypedDict, TypeVar

import gradio as gr

from train.common.errors import PromptfoldError

P = ParamSpec("P")


T = TypeVar("T")


class _Queue(TypedDict):
    concurrency_limit: int
    concurrency_id: str


ONE_AT_A_TIME: _Queue = {"concurrency_limit": 1, "concurrency_id": "engines"}
"""For every event that runs an engine: one queue, so that no two bursts overlap."""


@dataclass(frozen=True)
class Selectors:
    """The visitor's choices, at the top of the page, for all tabs.

    Attributes:
        adapter: names of `Stage.choices`.
        onnx: precisions of the adapter's bundle.
        pytorch: `demo.engines.pytorch.PYTORCH_MODES`; hidden where the page runs without PyTorch.
    """

    adapter: gr.Dropdown
    onnx: gr.Dropdown
    pytorch: gr.Dropdown

    @property
    def inputs(self) -> list[Any]:
        """As inputs of an event, in the order of `Stage.setup`'s arguments."""
        return [self.adapter, self.onnx, self.pytorch]


class StopButtons:
    """Which visitors' measurements shall end: one flag a session."""

    def __init__(self) -> None:
        self._flags: dict[str, threading.Event] = {}

    def start(self, session: str) -> Callable[[], bool]:
        """A new measurement of a visitor; returns what says whether it shall end."""
        flag = self._flags[session] = threading.Event()
        return flag.is_set

    def stop(self, session: str) -> None:
        """End the visitor's measurement, if there is one."""
        if flag := self._flags.get(session):
            flag.set()

    def goodbye(self, request: gr.Request) -> None:
        """A visitor has gone, and so has whoever would see the end."""
        session = str(request.session_hash)
        self.stop(session)
        self._flags.pop(session, None)


def facing_visitors(function: Callable[P, T]) -> Callable[P, T]:
    """A handler of an event whose `PromptfoldError` is shown to the visitor instead of a traceback."""

    @wraps(function)
    def handle(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except PromptfoldError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return handle


def streaming_to_visitors(function: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """The same for a handler that yields."""

    @wraps(function)
    def handle(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        try:
            yield from function(*args, **kwargs)
        except PromptfoldError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return handle


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, both HTML, as a table of facts."""
    cells = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
    return f"<table>{cells}</table>"


def text(value: object) -> str:
    """As HTML that shows it as it is."""
    return html.escape(str(value))
