"""A visitor's file through both engines: labelled, held against its labels, written again."""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo.engines.pytorch import COMPILED
from demo.engines.stage import AnyEngine, OpenedEngines, Setup, Stage
from demo.measure.upload import AGREE, PREDICTION, PROBABILITY, SIDES, Upload, naming
from demo.measure.weights import is_decoder
from export.runtime.batches import Classified, count_pairs, in_batches, score_counts
from export.score.write_rows import write_part
from train.common.errors import EngineError
from train.data.tasks import Scores

BATCH_ROWS = 8
"""Texts in one run. On a CPU more are no faster, and a cancelled file ends the sooner."""


SLICE_SECONDS = 0.5
"""So long the engines are held, then others may measure."""


GIVE_WAY_SECONDS = 0.02
"""Between two slices; a lock that is taken again at once never gets to whoever waits for it."""


MAX_PREVIEW_ROWS = 50


@dataclass(frozen=True, eq=False)
class Scored:
    """What both engines say of a file.

    Attributes:
        upload: the file.
        setup: the adapter and how the engines ran.
        onnx: its answers, in the order of the rows.
        pytorch: its answers; None where the page runs without PyTorch.
        max_length: how many tokens the model reads.
    """

    upload: Upload
    setup: Setup
    onnx: Classified
    pytorch: Classified | None
    max_length: int

    @property
    def sides(self) -> dict[str, Classified]:
        """The answers by the names in `SIDES`."""
        return {"onnx": self.onnx} if self.pytorch is None else {"pytorch": self.pytorch, "onnx": self.onnx}

    @property
    def texts_cut(self) -> int:
        """How many texts were longer than the model reads and lost their end."""
        return int(self.onnx.cut.sum())

    @property
    def differs(self) -> np.ndarray:
        """Whether the engines give a row different labels; bool, shape = (n_rows,)"""
        answers = [classified.indices for classified in self.sides.values()]
        different: np.ndarray = answers[0] != answers[-1]
        return different

    @property
    def wrong(self) -> np.ndarray:
        """Whether an engine's label is not the file's; bool, shape = (n_rows,); nowhere where that has none"""
        if self.upload.expected is None:
            return np.zeros(len(self.upload.rows), bool)
        answers = np.stack([classified.indices for classified in self.sides.values()])
        mistaken: np.ndarray = (answers != np.array(self.upload.expected)).any(axis=0)
        return mistaken

    def counts(self, side: str) -> dict[str, int]:
        """How many rows got each label."""
        found = Counter(self.sides[side].predictions)
        return {label: found[label] for label in self.upload.task.labels}

    def confusion(self, side: str) -> np.ndarray | None:
        """As `count_pairs` gives it; None where the file has no labels."""
        if self.upload.expected is None:
            return None
        return count_pairs(self.upload.task, self.upload.expected, self.sides[side].indices)

    def scores(self, side: str) -> Scores | None:
        """The task's metrics; None where the file has no labels."""
        confusion = self.confusion(side)
        return None if confusion is None else score_counts(self.upload.task, confusion)

    @property
    def preview(self) -> list[int]:
        """Numbers of rows worth a look: first where the engines differ, then where one is wrong, then the others."""
        differs, wrong = self.differs, self.wrong
        return sorted(range(len(differs)), key=lambda row: (not differs[row], not wrong[row]))[:MAX_PREVIEW_ROWS]

    def as_json(self) -> dict[str, Any]:
        """For the endpoint ``/score_file``."""
        value: dict[str, Any] = {
            "file": self.upload.name,
            "adapter": self.setup.adapter,
            "precision": self.setup.onnx,
            "rows": len(self.upload.rows),
            "texts_cut": self.texts_cut,
            "labels": list(self.upload.task.labels),
        }
        if self.pytorch is not None:
            value |= {"pytorch_mode": self.setup.pytorch, "disagreements": int(self.differs.sum())}
        for side in self.sides:
            scores, confusion = self.scores(side), self.confusion(side)
            value[side] = {
                "counts": self.counts(side),
                "scores": None if scores is None else scores.values,
                "confusion": None if confusion is None else confusion.tolist(),
            }
        return value


@dataclass(frozen=True)
class Progress:
    """How far a file is.

    Attributes:
        engine: whose turn it was.
        done: rows that it has labelled.
        rows: in the file.
        fraction: of all the work, from 0 to 1.
        result: at the end.
    """

    engine: str
    done: int
    rows: int
    fraction: float
    result: Scored | None = None


def label_upload(stage: Stage, setup: Setup, upload: Upload, *, cancelled: threading.Event) -> Iterator[Progress]:
    """Label every row with both engines, one after the other, in batches of like length.

    The engines are held for `SLICE_SECONDS` at a time, so that other visitors need not wait for a whole file.

    Args:
        upload: for the setup's adapter.
        cancelled: asked before each batch; once it is set, nothing more is yielded, and there is no result.

    Raises:
        EngineError: an engine died, did not answer, or gave what is no number.
        PromptfoldError: as `Stage.open`.
    """
    opened = stage.open(setup)
    texts = upload.texts
    answers: dict[str, Classified] = {}
    # The whole file by one engine first: in turn, the threads of each would disturb the other's batches.
    sides = [side for side in reversed(SIDES) if side == "onnx" or opened.pytorch is not None]
    for number, side in enumerate(sides):
        logits = np.empty((len(texts), len(upload.task.labels)), np.float64)
        cut = np.zeros(len(texts), bool)
        batches = deque(in_batches(texts, _batch_rows(opened, side)))
        done = 0
        while batches:
            with stage.measuring:
                # Again each time: meanwhile another visitor's engines may have taken the place of these.
                opened = stage.open(setup)
                end = time.perf_counter() + SLICE_SECONDS
                while batches and not cancelled.is_set():
                    rows = batches.popleft()
                    encoded = opened.tokenize([texts[row] for row in rows])
                    logits[rows] = _finite_logits(opened, side, encoded.arrays)
                    cut[rows] = encoded.cut
                    done += len(rows)
                    if time.perf_counter() >= end:
                        break
            if cancelled.is_set():
                return
            yield Progress(_engine(opened, side).name, done, len(texts), (number + done / len(texts)) / len(sides))
            time.sleep(GIVE_WAY_SECONDS)
        answers[side] = Classified.of(upload.task.labels, logits, cut)
    scored = Scored(upload, setup, answers["onnx"], answers.get("pytorch"), opened.bundle.max_length)
    yield Progress(_engine(opened, side).name, len(texts), len(texts), 1.0, scored)


def _engine(opened: OpenedEngines, side: str) -> AnyEngine:
    engine = opened.onnx if side == "onnx" else opened.pytorch
    assert engine is not None
    return engine


def _batch_rows(opened: OpenedEngines, side: str) -> int:
    """How many texts an engine takes at once."""
    if side == "onnx":
        return BATCH_ROWS
    # See `train.adapter.peft.load_peft_model`; a larger batch would end the engine's process. And what torch.compile made
    # of a batch of one does for others only once it is compiled anew, for longer than a request may take.
    return 1 if is_decoder(opened.choice.adapter) or opened.setup.pytorch == COMPILED else BATCH_ROWS


def _finite_logits(opened: OpenedEngines, side: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    engine = _engine(opened, side)
    logits = engine.logits(arrays)
    if not np.isfinite(logits).all():
        # argmax would make a label of it all the same.
        raise EngineError(f"The {engine.name} engine gave logits that are no numbers. Choose another precision.")
    return logits


def write_labelled(scored: Scored, folder: Path) -> Path:
    """Write the file with the added columns into a folder, in its own format and under a name like its own.

    In CSV no cell is a formula: see `export.score.write_rows.write_part`.

    Raises:
        DataError: a value cannot be written.
    """
    upload = scored.upload
    added: dict[str, Sequence[Any]] = {}
    for side, classified in scored.sides.items():
        added[f"{PREDICTION}_{side}"] = classified.predictions
        added[f"{PROBABILITY}_{side}"] = classified.best_probabilities.tolist()
    if scored.pytorch is not None:
        added[AGREE] = (~scored.differs).tolist()
    path = folder / f"{Path(upload.name).stem}-labelled{upload.suffix}"
    with naming(path):
        write_part(path, upload.rows, added, columns=upload.rows.columns, schema=upload.schema, neutralise=True)
    return path
