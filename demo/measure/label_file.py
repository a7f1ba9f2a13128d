"""A visitor's file through both engines: labelled, held against its labels, written again."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo.engines.pytorch import COMPILED
from demo.engines.stage import AnyEngine, OpenedEngines, Setup, Stage
from demo.measure.compare import finite
from demo.measure.upload import AGREE, SIDES, Upload
from export.runtime.batches import Classified, differ, in_batches
from export.score.label import PREDICTION, PROBABILITY
from export.score.write_rows import encode_rows
from train.config import CLASSIFICATION, MULTI_LABEL, REGRESSION
from train.data.files.find import PACKED
from train.data.tasks import Scores, count_pairs, score_counts, score_numbers

BATCH_ROWS = 8
"""Rows in one run. On a CPU more are no faster, and a cancelled file ends the sooner."""
SLICE_SECONDS = 0.5
"""How long the engines are held before others may measure."""
GIVE_WAY_SECONDS = 0.02
"""Pause between two slices: a lock that is taken again at once never gets to those who wait for it."""
MAX_PREVIEW_ROWS = 50


@dataclass(frozen=True, eq=False)
class Scored:
    """What both engines predict for a file."""

    upload: Upload
    setup: Setup
    onnx: Classified
    """In the order of the rows."""
    pytorch: Classified | None
    """None where the page runs without PyTorch."""
    max_length: int
    """How many tokens the model reads."""

    @property
    def sides(self) -> dict[str, Classified]:
        """The predictions by the names in `SIDES`."""
        return {"onnx": self.onnx} if self.pytorch is None else {"pytorch": self.pytorch, "onnx": self.onnx}

    @property
    def texts_cut(self) -> int:
        """How many rows were longer than the model reads and lost their end."""
        return int(self.onnx.cut.sum())

    @property
    def differs(self) -> np.ndarray:
        """Whether the engines give a row different labels; bool, shape = (n_rows,); False for numbers"""
        predicted = [classified.predicted for classified in self.sides.values()]
        return differ(self.upload.task, predicted[0], predicted[-1])

    @property
    def is_regression(self) -> bool:
        return self.upload.task.kind == REGRESSION

    @property
    def differences(self) -> np.ndarray:
        """How far the engines' numbers of a row are apart; float64, shape = (n_rows,); of a regression alone"""
        predicted = [classified.predicted for classified in self.sides.values()]
        return np.asarray(np.abs(predicted[0] - predicted[-1]))

    @property
    def wrong(self) -> np.ndarray:
        """Whether an engine's label differs from the file's; bool, shape = (n_rows,); False where the file has none"""
        if self.upload.expected is None:
            return np.zeros(len(self.upload.rows), bool)
        expected = np.array(self.upload.expected)
        wrong = [differ(self.upload.task, classified.predicted, expected) for classified in self.sides.values()]
        return np.asarray(np.stack(wrong).any(axis=0))

    def counts(self, side: str) -> dict[str, int]:
        """How many rows were given each label; empty for a regression."""
        task, predicted = self.upload.task, self.sides[side].predicted
        if self.is_regression:
            return {}
        n_rows = predicted.sum(axis=0) if predicted.ndim > 1 else np.bincount(predicted, minlength=len(task.labels))
        return dict(zip(task.labels, n_rows.tolist(), strict=True))

    def confusion(self, side: str) -> np.ndarray | None:
        """As from `count_pairs`, a classification's confusion matrix; None where the file has no labels, or numbers."""
        if self.upload.expected is None or self.is_regression:
            return None
        return count_pairs(self.upload.task, self.upload.expected, self.sides[side].predicted)

    def scores(self, side: str) -> Scores | None:
        """The task's metrics; None where the file has no labels, or has the same number in every row."""
        confusion, expected = self.confusion(side), self.upload.expected
        if confusion is not None:
            return score_counts(self.upload.task, confusion)
        if expected is None or self.upload.has_equal_numbers:
            return None
        return score_numbers(self.sides[side].predicted, expected)

    @property
    def preview(self) -> list[int]:
        """Numbers of rows worth a look: first where the engines differ, then where one is wrong, then the others.

        A regression's rows begin with those whose numbers are furthest apart.
        """
        differs, wrong = self.differs, self.wrong
        if self.is_regression:
            return np.argsort(-self.differences, kind="stable")[:MAX_PREVIEW_ROWS].tolist()
        return sorted(range(len(differs)), key=lambda row: (not differs[row], not wrong[row]))[:MAX_PREVIEW_ROWS]

    def as_json(self) -> dict[str, Any]:
        """For the endpoint ``/score_file``."""
        value: dict[str, Any] = {"file": self.upload.name, "adapter": self.setup.adapter, "precision": self.setup.onnx}
        labels = list(self.upload.task.labels)
        value |= {
            "read_as": self.upload.description,
            "rows": len(self.upload.rows),
            "texts_cut": self.texts_cut,
            "labels": labels,
        }
        if self.pytorch is not None:
            value |= {"pytorch_mode": self.setup.pytorch, "disagreements": int(self.differs.sum())}
            if self.is_regression:
                value["largest_difference"] = float(self.differences.max())
        for side in self.sides:
            scores, confusion = self.scores(side), self.confusion(side)
            value[side] = {"counts": self.counts(side), "scores": None, "confusion": None}
            if scores is not None:
                value[side] |= {"scores": scores.values, "recalls": scores.recalls}
            if confusion is not None:
                value[side]["confusion"] = confusion.tolist()
        return value


@dataclass(frozen=True)
class Progress:
    """How far the labelling of a file is."""

    engine: str
    """Name of the engine whose turn it was."""
    done: int
    """Rows that it has labelled."""
    rows: int
    fraction: float
    """Part of all the work that is done, from 0 to 1."""
    result: Scored | None = None
    """At the end."""


def label_upload(stage: Stage, setup: Setup, upload: Upload, *, cancelled: threading.Event) -> Iterator[Progress]:
    """Label every row with both engines, one after the other, in batches of similar length.

    The engines are held for `SLICE_SECONDS` at a time, so that other visitors need not wait for a whole file. Once
    ``cancelled`` is set, nothing more is yielded, and there is no result.
    """
    opened = stage.open(setup)
    sentences = upload.sentences
    predictions: dict[str, Classified] = {}
    # The whole file by one engine first: the threads of one would disturb the other's batches.
    sides = [side for side in reversed(SIDES) if side == "onnx" or opened.pytorch is not None]
    for number, side in enumerate(sides):
        logits = np.empty((len(sentences), len(upload.task.labels)), np.float64)
        cut = np.zeros(len(sentences), bool)
        batches = deque(in_batches(sentences, _batch_rows(opened, side)))
        done = 0
        while batches:
            with stage.measuring:
                # Opened again each time: another visitor's engines may have taken the place of these.
                opened = stage.open(setup)
                engine = _engine(opened, side)
                end = time.perf_counter() + SLICE_SECONDS
                while batches and not cancelled.is_set():
                    rows = batches.popleft()
                    encoded = opened.tokenize([sentences[row] for row in rows])
                    logits[rows] = finite(engine.logits(encoded.arrays), engine.name)
                    cut[rows] = encoded.cut
                    done += len(rows)
                    if time.perf_counter() >= end:
                        break
            if cancelled.is_set():
                return
            fraction = (number + done / len(sentences)) / len(sides)
            yield Progress(_engine(opened, side).name, done, len(sentences), fraction)
            time.sleep(GIVE_WAY_SECONDS)
        predictions[side] = Classified.of(upload.task, logits, cut)
    scored = Scored(upload, setup, predictions["onnx"], predictions.get("pytorch"), opened.bundle.max_length)
    yield Progress(_engine(opened, side).name, len(sentences), len(sentences), 1.0, scored)


def _engine(opened: OpenedEngines, side: str) -> AnyEngine:
    engine = opened.onnx if side == "onnx" else opened.pytorch
    assert engine is not None
    return engine


def _batch_rows(opened: OpenedEngines, side: str) -> int:
    """How many rows an engine takes at once."""
    if side == "onnx":
        return BATCH_ROWS
    # A decoder takes one row (`train.adapter.peft.load_peft_model`). What torch.compile made of a batch of one serves
    # others only once it is compiled again, which takes longer than a request may.
    return 1 if opened.bundle.is_decoder or opened.setup.pytorch == COMPILED else BATCH_ROWS


def write_labelled(scored: Scored, folder: Path) -> Path:
    """Write the file with the added columns into a folder, in its own format; no cell of a CSV file is a formula."""
    upload, added = scored.upload, {}
    for side, classified in scored.sides.items():
        added[f"{PREDICTION}_{side}"] = classified.predictions
        if upload.task.kind == CLASSIFICATION:
            added[f"{PROBABILITY}_{side}"] = classified.best_probabilities.tolist()
        if upload.task.kind == MULTI_LABEL:
            columns = zip(upload.task.labels, classified.probabilities.T.tolist(), strict=True)
            added |= {f"{PROBABILITY}_{label}_{side}": values for label, values in columns}
    if scored.pytorch is not None and not scored.is_regression:
        added[AGREE] = (~scored.differs).tolist()
    stem = Path(upload.name).stem
    stem = Path(stem).stem if upload.name.lower().endswith(PACKED) else stem
    path = folder / f"{stem}-labelled{upload.suffix}"
    content = encode_rows(upload.rows, added, upload.schema, upload.suffix, style=upload.style, no_formulas=True)
    path.write_bytes(content)
    return path
