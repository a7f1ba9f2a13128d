"""The model card of an adapter."""

from typing import Any

from train.adapter.record import FILES
from train.data.tasks import METRICS


def model_card(training: dict[str, Any]) -> str:
    """The README.md of an adapter folder, with the front matter that the Hugging Face hub reads."""
    model, task = training["model"], training["task"]
    kept, limits = training["epochs"], training["limits"]
    names = list(task["metrics"])
    head = " | ".join(METRICS[name] for name in names)
    rule = "|---" * (len(names) + 1) + "|"

    def cells(scores: dict[str, float]) -> str:
        return " | ".join(f"{100 * scores[name]:.1f}" for name in names)

    results = [f"| this adapter, loaded again from this folder | {cells(training['validation'])} |"]
    spread = training["seed_summary"]
    # Empty in the adapter of one seed while the others still run.
    if len(training["seeds"]) > 1 and spread:
        means = " | ".join(f"{100 * spread[name]['mean']:.1f} ± {100 * spread[name]['std']:.1f}" for name in names)
        results.append(f"| mean ± standard deviation over seeds {', '.join(map(str, training['seeds']))} | {means} |")
    results += [f"| {name} | {cells(scores)} |" for name, scores in training["baselines"].items()]
    rows = [
        f"| {row['epoch']} | {row['train_loss']:.4f} | {row['validation_loss']:.4f} | {cells(row['scores'])} |"
        for row in kept
    ]
    method = {
        "p-tuning": "learned embeddings before the text (P-Tuning, arXiv 2103.10385)",
        "p-tuning-v2": "learned keys and values in every layer (P-Tuning v2, arXiv 2110.07602)",
    }[training["method"]]
    versions = ", ".join(f"{name} {version}" for name, version in training["versions"].items())
    newline = "\n"
    return f"""---
base_model: {model["hub_name"]}
library_name: peft
pipeline_tag: text-classification
---

# {model["name"]}, P-tuned on {task["name"]}

A prompt of {training["virtual_tokens"]} virtual tokens, {method}, and a classification head for a frozen
`{model["hub_name"]}`. `peft.PeftModel.from_pretrained` loads this folder. Labels in the order of the logits:
{", ".join(f"`{label}`" for label in task["labels"])}.

Made by

    {training["command"]}

with seed {training["seed"]}, on {training["n_train"]} training rows, in {training["seconds"]:.0f} s on {training["machine"]}.
It was scored on {training["n_validation"]} validation rows after every epoch; the epoch with the best score was kept,
which is epoch {training["best_epoch"]} of {len(kept)}.

| on validation | {head} |
{rule}
{newline.join(results)}

![Loss and scores per epoch]({FILES.curves})

| epoch | training loss | validation loss | {head} |
|---|---{rule}
{newline.join(rows)}

## Limits

{newline.join(f"- {limit}" for limit in limits)}

Made with {versions}.
"""
