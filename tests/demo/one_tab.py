"""A page with nothing but the selectors and one tab, and the handlers of its events. Imports no torch."""

import asyncio
from collections.abc import Callable
from typing import Any

import gradio as gr

from demo.engines.pytorch import PYTORCH_MODES
from demo.engines.stage import Stage
from demo.page.controls import Selectors


def make_page(stage: Stage, build: Callable[[Stage, Selectors, gr.Tab], object]) -> gr.Blocks:
    """Build the page where no event loop runs: there Gradio would make one for each of its locks, and close none."""

    async def build_page() -> gr.Blocks:
        with gr.Blocks(analytics_enabled=False) as page:
            selectors = Selectors(
                gr.Dropdown(list(stage.choices), label="Adapter"),
                gr.Dropdown(["fp32"], label="Precision"),
                gr.Dropdown(list(PYTORCH_MODES), label="PyTorch"),
            )
            with gr.Tab("The tab") as tab:
                build(stage, selectors, tab)
        return page

    return asyncio.run(build_page())


def handler(page: gr.Blocks, name: str) -> Callable[..., Any]:
    (found,) = {event.fn for event in page.fns.values() if event.fn and event.fn.__name__ == name}
    return found
