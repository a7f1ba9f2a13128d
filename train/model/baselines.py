"""Classifiers without any prompt, whose scores a learned prompt has to beat."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from train.common.console import quiet_transformers
from train.common.processes import is_main_process
from train.data.tasks import Scores, Task, score
from train.model.find import BaseModel
from train.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Threshold:
    """Predicts label ``above`` where a number reaches ``value``, else the other of two labels."""

    value: float
    above: int

    @staticmethod
    def fit(values: np.ndarray, labels: np.ndarray) -> "Threshold":
        """The threshold with the best accuracy for values and labels (0 or 1), both of shape = (n_rows,)."""
        distinct, place = np.unique(values, return_inverse=True)
        zeros, ones = (np.concatenate([[0], np.cumsum(np.bincount(place, labels == label))]) for label in (0, 1))
        # right[i]: correct predictions when the i smallest distinct values get label 0 and the others 1
        right = zeros + ones[-1] - ones
        # The outermost thresholds are finite, as JSON has no infinities.
        edges = np.concatenate([[distinct[0] - 1], (distinct[1:] + distinct[:-1]) / 2, [distinct[-1] + 1]])
        if right.max() >= len(values) - right.min():
            return Threshold(float(edges[right.argmax()]), above=1)
        return Threshold(float(edges[right.argmin()]), above=0)

    def predict(self, values: np.ndarray) -> np.ndarray:
        """Values → class indices, both of shape = (n_rows,)."""
        return np.where(values >= self.value, self.above, 1 - self.above)


@dataclass(frozen=True)
class Baselines:
    """Two classifiers that need no prompt, fitted on training data."""

    constant: int
    """The class that is always predicted."""
    cosine: Threshold | None
    """On the cosine of the mean-pooled embeddings of both sentences, by the same frozen base model; None for tasks
    that are not pairs with two labels."""

    @staticmethod
    def fit(task: Task, base: BaseModel, train: "Dataset") -> "Baselines":
        """Fit both on training data, as from `train.data.load.load_split`."""
        labels = np.array(train[task.label_column])
        constant = int(np.bincount(labels, minlength=len(task.labels)).argmax())
        if task.positive_label is not None:  # always predicting the other class has an F1 of 0
            constant = task.labels.index(task.positive_label)
        cosine = None
        if task.is_pair and len(task.labels) == 2:
            cosine = Threshold.fit(_cosines(base, task, train), labels)
        return Baselines(constant, cosine)

    def score(self, task: Task, base: BaseModel, dataset: "Dataset") -> dict[str, Scores]:
        """The scores of both on other rows, by a name for people."""
        expected = np.array(dataset[task.label_column])
        predicted = {f"always `{task.labels[self.constant]}`": np.full(len(expected), self.constant)}
        if self.cosine is not None:
            predicted["cosine of the frozen model's embeddings"] = self.cosine.predict(_cosines(base, task, dataset))
        return {name: score(task, indices, expected) for name, indices in predicted.items()}

    def as_json(self) -> dict[str, Any]:
        """For training.json."""
        return asdict(self)


def _cosines(base: BaseModel, task: Task, dataset: "Dataset", *, batch_size: int = 64) -> np.ndarray:
    """The cosine of the two sentences of each row, each as the mean of its last hidden states, shape = (n_rows,)."""
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModel

    # The tokenizer as it is, without the special tokens that `base_tokenizer` adds for a classifier.
    tokenizer = load_tokenizer(base.folder, base.positions, gguf_file=base.gguf_file)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with quiet_transformers():
        model = AutoModel.from_pretrained(**base.source).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    texts = [text for column in task.text_columns for text in dataset[column]]
    embedded: list[np.ndarray] = []
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="cosine baseline", unit="batch", leave=False, disable=not is_main_process()):
        rows = [texts[row] for row in order[start : start + batch_size]]
        batch = tokenizer(rows, truncation=True, padding=True, return_tensors="pt")
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
        embedded.append(torch.nn.functional.normalize(mean.float(), dim=1).cpu().numpy())
    first, second = np.split(np.concatenate(embedded)[np.argsort(order)], 2)
    cosines: np.ndarray = (first * second).sum(axis=1)
    return cosines
