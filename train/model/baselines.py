"""What a task scores without any prompt: the figures that a learned prompt has to beat."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from train.data.tasks import Scores, Task, score
from train.model.find import BaseModel

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Threshold:
    """Label ``above`` where a value reaches the threshold, the other label elsewhere."""

    value: float
    above: int

    @staticmethod
    def fit(values: np.ndarray, labels: np.ndarray) -> "Threshold":
        """The one with the best accuracy; values and labels (0 or 1) of shape = (n_rows,)."""
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        ones = np.concatenate([[0], np.cumsum(labels[order])])
        # right[i]: correct answers when the i smallest values are called 0 and the rest 1
        right = (np.arange(len(values) + 1) - ones) + (ones[-1] - ones)
        # Equal values cannot be told apart: no threshold lies between two of them.
        inner = np.arange(1, len(values))[ordered[1:] == ordered[:-1]]
        best, worst = right.astype(float), right.astype(float)
        best[inner], worst[inner] = -np.inf, np.inf
        # No infinities: JSON has none. Cosines end at 1.
        edges = np.concatenate([[ordered[0] - 1], (ordered[1:] + ordered[:-1]) / 2, [ordered[-1] + 1]])
        if best.max() >= len(values) - worst.min():
            return Threshold(float(edges[best.argmax()]), above=1)
        return Threshold(float(edges[worst.argmin()]), above=0)

    def predict(self, values: np.ndarray) -> np.ndarray:
        """Class indices, shape = (n_rows,)"""
        return np.where(values >= self.value, self.above, 1 - self.above)


@dataclass(frozen=True)
class Baselines:
    """Two ways to answer that need no prompt, settled on training data.

    Attributes:
        constant: the class that is always given.
        cosine: a threshold on the cosine of two mean-pooled sentence embeddings of the same frozen base
            model; None for tasks that are not pairs with two labels.
    """

    constant: int
    cosine: Threshold | None

    @staticmethod
    def fit(task: Task, base: BaseModel, train: "Dataset") -> "Baselines":
        """Settle both on training data, as from `train.data.load.load_split`.

        The constant is the most frequent label; for a task scored by F1 of a class it is that class, since
        always giving the other one has an F1 of 0. The threshold is the one with the best accuracy.
        """
        labels = np.array(train[task.label_column])
        constant = int(np.bincount(labels, minlength=len(task.labels)).argmax())
        if task.positive_label is not None:
            constant = task.labels.index(task.positive_label)
        cosine = None
        if task.is_pair and len(task.labels) == 2:
            cosine = Threshold.fit(_cosines(base, task, train), labels)
        return Baselines(constant, cosine)

    def score(self, task: Task, base: BaseModel, dataset: "Dataset") -> dict[str, Scores]:
        """Scores of both on other rows, by a name for people."""
        expected = np.array(dataset[task.label_column])
        scores = {
            f"always `{task.labels[self.constant]}`": score(task, np.full(len(expected), self.constant), expected)
        }
        if self.cosine is not None:
            predicted = self.cosine.predict(_cosines(base, task, dataset))
            scores["cosine of the frozen model's embeddings"] = score(task, predicted, expected)
        return scores

    def as_json(self) -> dict[str, Any]:
        """For training.json."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Baselines":
        """The inverse of `as_json`."""
        cosine = value["cosine"]
        return Baselines(
            int(value["constant"]),
            None if cosine is None else Threshold(float(cosine["value"]), int(cosine["above"])),
        )


def _cosines(base: BaseModel, task: Task, dataset: "Dataset") -> np.ndarray:
    """Cosine of the two sentences of each row, shape = (n_rows,)"""
    # In one call: it loads the model.
    embedded = _embed(base, [text for column in task.text_columns for text in dataset[column]])
    first, second = np.split(embedded, 2)
    return (first * second).sum(axis=1)


def _embed(base: BaseModel, texts: list[str], *, batch_size: int = 64) -> np.ndarray:
    """Mean of a text's last hidden states, at length 1, shape = (n_texts, n_hidden). The order of `texts` is kept."""
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModel

    from train.common.console import quiet_transformers
    from train.common.processes import is_main_process
    from train.model.tokenizer import load_tokenizer

    # The tokenizer's own special tokens, not those for a classifier: this is the frozen model as it is.
    tokenizer = load_tokenizer(base.folder, base.positions, gguf_file=base.gguf_file)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with quiet_transformers():
        model = AutoModel.from_pretrained(**base.source).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    embedded: list[np.ndarray] = [np.zeros(0)] * len(texts)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    starts = range(0, len(order), batch_size)
    # A decoder takes minutes for this on a CPU.
    for start in tqdm(starts, desc="cosine baseline", unit="batch", leave=False, disable=not is_main_process()):
        rows = order[start : start + batch_size]
        batch = tokenizer([texts[row] for row in rows], truncation=True, padding=True, return_tensors="pt")
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
        unit = torch.nn.functional.normalize(mean.float(), dim=1).cpu().numpy()
        for row, vector in zip(rows, unit, strict=True):
            embedded[row] = vector
    return np.stack(embedded)
