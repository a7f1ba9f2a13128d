"""The model card of an adapter, rendered from card.md.jinja or card_imported.md.jinja."""

from pathlib import Path
from typing import Any

from train.adapter.record import FILES
from train.config import CLASSIFICATION, P_TUNING, P_TUNING_V2
from train.data.tasks import METRICS, Scores

_DESCRIPTIONS = {
    P_TUNING: "learned embeddings before the text (P-Tuning, arXiv 2103.10385)",
    P_TUNING_V2: "learned keys and values in every layer (P-Tuning v2, arXiv 2110.07602)",
}


def model_card(training: dict[str, Any]) -> str:
    """Content of training.json → README.md of the folder, with the front matter that the Hugging Face hub reads."""
    from huggingface_hub import ModelCardData
    from jinja2 import StrictUndefined, Template

    data = ModelCardData(
        base_model=training["model"]["hub_name"], library_name="peft", pipeline_tag="text-classification"
    )
    # An adapter made elsewhere tells nothing of its training.
    name = "card_imported.md.jinja" if "imported" in training else "card.md.jinja"
    source = Path(__file__).with_name(name).read_text(encoding="utf-8")
    recalls = training.get("recalls", {"validation": {}, "baselines": {}})
    return Template(source, undefined=StrictUndefined, keep_trailing_newline=True).render(
        training,
        front_matter=data.to_yaml(),
        description=_DESCRIPTIONS.get(training["method"]),
        metric_names=METRICS,
        recall_words=lambda found: Scores({}, found).recall_words,
        recalls=recalls,
        more_validation=training.get("more_validation", {}),
        kind=training["task"].get("kind", CLASSIFICATION),
        percent=lambda value: f"{100 * value:.1f}",
        curves=FILES.curves,
    )
