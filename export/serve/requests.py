"""What goes between those who ask a served bundle and its replicas: questions, answers, refusals, and their JSON.

A question over HTTP is one JSON object. It holds exactly one of

    pair     [sentence1, sentence2]             for tasks of pairs
    pairs    [[sentence1, sentence2], …]
    text     sentence                           for tasks of single sentences
    texts    [sentence, …]

and ``task``, the name of one, where the bundle holds several. The answer to it:

    answers        of each pair or text, in order: label, probability, probabilities of every label, and cut, whether it
                   was longer than the model reads and lost its end
    task           which one answered
    bundle_sha256  of the bundle's manifest: which model answered
    batch_size     with how many texts, other requests' included, it went through the graph at most
    replica        which one answered

Everything else is a refusal with a status of HTTP, ``{"error": sentence}``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.runtime.batches import Classified
from export.runtime.check_text import check_sentence
from export.runtime.classifier import Execution
from train.common.errors import LongTextError, RequestError, TextError
from train.common.limits import MIB

MAX_TEXTS = 256
"""Of one question. Whoever has more asks several times, or labels a file with `export.score`."""


MAX_BODY_BYTES = 8 * MIB
"""Of one question over HTTP."""


BAD_REQUEST, NOT_FOUND, METHOD_NOT_ALLOWED, WRONG_BUNDLE, TOO_LARGE = 400, 404, 405, 409, 413


UNPROCESSABLE, TOO_MANY, INTERNAL, UNAVAILABLE = 422, 429, 500, 503
"""Statuses of HTTP."""


_FORMS = ("pair", "pairs", "text", "texts")


@dataclass(frozen=True)
class Question:
    """Texts to classify.

    Attributes:
        texts: of each its one or two sentences; at least one text, and all of them alike.
        task: the name of one; None where the bundle holds one.
    """

    texts: tuple[tuple[str, ...], ...]
    task: str | None = None


@dataclass(frozen=True, eq=False)
class TokenQuestion:
    """The same of a caller who tokenises: only the bundle with the same tokenizer may answer.

    Attributes:
        arrays: as from `OnnxClassifier.tokenize`; each int64, shape = (n_batch, n_text)
        task: the name of one.
        bundle_sha256: `Bundle.manifest_sha256` of the bundle that the token ids are for.
    """

    arrays: Mapping[str, np.ndarray]
    task: str
    bundle_sha256: str


@dataclass(frozen=True, eq=False)
class Reply:
    """What a replica answers.

    Attributes:
        logits: float32, shape = (n_texts, n_labels)
        cut: of each text, whether it lost its end.
        task: name of the task.
        labels: of that task, in the order of the logits.
        bundle_sha256: of the bundle that answered.
        batch_size: with how many texts it went through the graph at most.
        replica: which one.
        memory_mib: largest resident size of the replica's process so far.
    """

    logits: np.ndarray
    cut: tuple[bool, ...]
    task: str
    labels: tuple[str, ...]
    bundle_sha256: str
    batch_size: int
    replica: str
    memory_mib: float


@dataclass(frozen=True)
class Refusal:
    """Why there is no answer.

    Attributes:
        status: of HTTP.
        message: for people; what was wrong and what to do.
    """

    status: int
    message: str


@dataclass(frozen=True)
class ReplicaFacts:
    """What a replica says of itself.

    Attributes:
        execution: on what it runs.
        tasks: names of the bundle's.
        bundle_sha256: of its bundle.
        memory_mib: largest resident size of its process so far.
    """

    execution: Execution
    tasks: tuple[str, ...]
    bundle_sha256: str
    memory_mib: float


def read_question(body: bytes) -> Question:
    """A question from HTTP, as far as it can be checked without its bundle.

    Raises:
        RequestError: it is no JSON, has too many or too long texts, or is not as this module's docstring says.
    """
    try:
        question = json.loads(body)
    except (ValueError, RecursionError) as cause:
        raise RequestError(BAD_REQUEST, 'The request is not JSON. Send {"pair": ["…", "…"]}, say.') from cause
    if not isinstance(question, dict):
        raise RequestError(UNPROCESSABLE, 'The request is no JSON object. Send {"pair": ["…", "…"]}, say.')
    unknown = [name for name in question if name not in {*_FORMS, "task"}]
    if unknown:
        raise RequestError(
            UNPROCESSABLE, f"There is no field {unknown[0][:80]!r}. Known are {', '.join((*_FORMS, 'task'))}."
        )
    forms = [name for name in _FORMS if name in question]
    if len(forms) != 1:
        found = f"has {' and '.join(forms)}" if forms else "has no text"
        raise RequestError(UNPROCESSABLE, f"The request {found}. Give exactly one of {', '.join(_FORMS)}.")
    task = question.get("task")
    if task is not None and not isinstance(task, str):
        raise RequestError(UNPROCESSABLE, "task is no text. Give the name of a task, or leave it out.")
    return Question(_read_texts(forms[0], question[forms[0]]), task)


def _read_texts(form: str, value: object) -> tuple[tuple[str, ...], ...]:
    if not form.endswith("s"):
        return (_read_text(form, value, ""),)
    if not isinstance(value, list) or not value:
        raise RequestError(UNPROCESSABLE, f"{form} is no list of at least one {form.removesuffix('s')}.")
    if len(value) > MAX_TEXTS:
        raise RequestError(
            TOO_LARGE,
            f"{form} has {len(value):,} entries; at most {MAX_TEXTS} are answered at once. Ask several times.",
        )
    kind = form.removesuffix("s")
    return tuple(
        _read_text(kind, entry, f"{kind.capitalize()} {number}: ") for number, entry in enumerate(value, start=1)
    )


def _read_text(kind: str, value: object, where: str) -> tuple[str, ...]:
    """A pair, or a single sentence; ``where`` is for complaints."""
    try:
        if kind == "text":
            return (check_sentence(value, f"{where}The sentence"),)
        if not isinstance(value, list) or len(value) != 2:
            raise RequestError(UNPROCESSABLE, f"{where}A pair is a list of two sentences.")
        return tuple(check_sentence(text, f"{where}Sentence {number}") for number, text in enumerate(value, start=1))
    except LongTextError as error:
        raise RequestError(TOO_LARGE, str(error)) from error
    except TextError as error:
        raise RequestError(UNPROCESSABLE, str(error)) from error


def reply_json(reply: Reply) -> dict[str, Any]:
    """An answer for HTTP."""
    classified = Classified.of(reply.labels, reply.logits, np.array(reply.cut, bool))
    return {
        "answers": [
            {
                "label": label,
                "probability": float(probability),
                "probabilities": dict(zip(reply.labels, map(float, probabilities), strict=True)),
                "cut": cut,
            }
            for label, probability, probabilities, cut in zip(
                classified.predictions, classified.best_probabilities, classified.probabilities, reply.cut, strict=True
            )
        ],
        "task": reply.task,
        "bundle_sha256": reply.bundle_sha256,
        "batch_size": reply.batch_size,
        "replica": reply.replica,
    }
