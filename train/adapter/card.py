"""The model card of an adapter, rendered from card.md.jinja or card_imported.md.jinja, and card_code.md.jinja."""

import json
from pathlib import Path
from typing import Any

from train.adapter.record import FILES
from train.config import CLASSIFICATION, P_TUNING, P_TUNING_V2
from train.data.tasks import METRICS, Scores, best_scores
from train.model.loss import PROBLEM_TYPES

_DESCRIPTIONS = {
    P_TUNING: "learned embeddings before the text (P-Tuning, arXiv 2103.10385)",
    P_TUNING_V2: "learned keys and values in every layer (P-Tuning v2, arXiv 2110.07602)",
}


def model_card(training: dict[str, Any]) -> str:
    """Content of training.json → README.md of the folder, with the front matter that the Hugging Face hub reads."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=training["model"]["hub_name"], library_name="peft", pipeline_tag="text-classification"
    )
    # An adapter made elsewhere tells nothing of its training.
    name = "card_imported.md.jinja" if "imported" in training else "card.md.jinja"
    baselines = {name: Scores(values) for name, values in training.get("baselines", {}).items()}
    recalls = training.get("recalls", {"validation": {}, "baselines": {}})
    return _render(
        name,
        training,
        code=_loading_code(training),
        front_matter=data.to_yaml(),
        description=_DESCRIPTIONS.get(training["method"]),
        metric_names=METRICS,
        recall_words=lambda found: Scores({}, found).recall_words,
        recalls=recalls,
        best_baseline=best_scores(baselines)[0],
        more_validation=training.get("more_validation", {}),
        kind=training["task"].get("kind", CLASSIFICATION),
        percent=lambda value: f"{100 * value:.1f}",
        curves=FILES.curves,
    )


def _loading_code(training: dict[str, Any]) -> str:
    """The part of a card with code that gives the adapter's logits without promptfold, see `load_peft_model`."""
    task, kind = training["task"], training["task"].get("kind", CLASSIFICATION)
    source, examples = Path(training["model"]["hub_name"]), ("A first sentence.", "A second one.")
    # A hub name stays as it is; a GGUF file is named apart from its folder.
    places = [str(source.parent), source.name] if source.suffix == ".gguf" else [training["model"]["hub_name"]]
    return _render(
        "card_code.md.jinja",
        training,
        # As Python has them.
        source=", gguf_file=".join(json.dumps(place, ensure_ascii=False) for place in places),
        sentences=", ".join(map(json.dumps, examples[: len(task["text_columns"])])),
        n_labels=len(task["labels"]),
        problem_type=PROBLEM_TYPES[kind] if kind != CLASSIFICATION else None,
        # Adapters of earlier versions do not tell.
        is_decoder=training["model"].get("is_decoder", False),
        takes_keys_values=training["method"] == P_TUNING_V2,
    )


def _render(name: str, training: dict[str, Any], **values: Any) -> str:
    from jinja2 import StrictUndefined, Template

    source = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return Template(source, undefined=StrictUndefined, keep_trailing_newline=True).render(training, **values)
