"""Requests to a served bundle, its responses and errors, and their JSON over HTTP.

``POST /v1/classify`` takes a `ClassifyRequest` and answers with a `ClassifyResponse`. Every error is
``{"error": sentence}`` with a status of HTTP.
"""

import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

import numpy as np
from annotated_types import Len
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from export.runtime.batches import Classified
from export.runtime.check_text import check_sentence
from export.runtime.classifier import Execution
from train.common.errors import LongTextError, RequestError, TextError
from train.common.limits import MIB
from train.config import MULTI_LABEL, REGRESSION
from train.data.tasks import Task

MAX_TEXTS = 256
"""Texts in one request. Send several requests for more, or label a file with `export.score`."""
MAX_BODY_BYTES = 8 * MIB
FORMS = ("pair", "pairs", "text", "texts")
EXAMPLE = 'Send {"pair": ["…", "…"]}, say.'


def _check(value: object) -> object:
    try:
        return check_sentence(value, "The sentence")
    except TextError as cause:
        raise ValueError from cause  # `_explain` says what is wrong, and where


Sentence = Annotated[str, BeforeValidator(_check)]
Pair = Annotated[list[Sentence], Len(2, 2)]


class ClassifyRequest(BaseModel):
    """Texts to classify, in exactly one of four forms; null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pair: Pair | None = None
    """For tasks of pairs: [sentence1, sentence2]"""
    pairs: Annotated[list[Pair], Len(1, MAX_TEXTS)] | None = None
    text: Sentence | None = None
    """For tasks of single sentences."""
    texts: Annotated[list[Sentence], Len(1, MAX_TEXTS)] | None = None
    task: str | None = None
    """Name of a task; may be left out where the bundle holds one."""

    @model_validator(mode="after")
    def _has_one_form(self) -> "ClassifyRequest":
        forms = [form for form in FORMS if getattr(self, form) is not None]
        if len(forms) != 1:
            message = f"The request has {' and '.join(forms) or 'no text'}. Give exactly one of {', '.join(FORMS)}."
            raise RequestError(HTTPStatus.UNPROCESSABLE_ENTITY, message)  # not a ValueError, so pydantic passes it on
        return self

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The one or two sentences of each text, in order; at least one text."""
        if self.text is not None or self.texts is not None:
            return tuple((text,) for text in self.texts or [self.text or ""])
        return tuple(tuple(pair) for pair in self.pairs or [self.pair or []])


class Answer(BaseModel):
    """What a bundle says of one text, by kind of task; what the kind has not is left out of the JSON."""

    label: str | None = None
    """A classification's class"""
    probability: float | None = None
    """The probability of that class."""
    labels: list[str] | None = None
    """Those of a text that may have several"""
    value: float | None = None
    """A regression's number"""
    probabilities: dict[str, float] | None = None
    """Probability of every label."""
    cut: bool
    """Whether the text was longer than the model reads and lost its end."""

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}


class ClassifyResponse(BaseModel):
    """Answers to a `ClassifyRequest`, in its order."""

    model_config = ConfigDict(from_attributes=True)

    answers: list[Answer]
    task: str
    bundle_sha256: str
    """SHA-256 of the manifest of the bundle that answered."""
    batch_size: int
    """Most texts, those of other requests included, that shared a run of the graph with one of these."""
    replica: str
    """Identifier of the replica that answered."""


@dataclass(frozen=True, eq=False)
class LogitsResponse:
    """What a replica returns; as `ClassifyResponse` where the names are the same."""

    logits: np.ndarray
    """float32, shape = (n_texts, n_labels)"""
    cut: tuple[bool, ...]
    task: str
    meaning: Task
    """What the logits mean."""
    bundle_sha256: str
    batch_size: int
    replica: str
    memory_mib: float
    """Largest resident size of the replica's process so far."""

    @property
    def answers(self) -> list[Answer]:
        """What the logits mean, text by text."""
        found, names = Classified.of(self.meaning, self.logits, np.array(self.cut, bool)), self.meaning.labels
        if self.meaning.kind == REGRESSION:
            return [Answer(value=value, cut=cut) for value, cut in zip(found.predictions, self.cut, strict=True)]
        each = [dict(zip(names, row, strict=True)) for row in found.probabilities.tolist()]
        if self.meaning.kind == MULTI_LABEL:
            return [
                Answer(labels=[names[index] for index in np.flatnonzero(row)], probabilities=probabilities, cut=cut)
                for row, probabilities, cut in zip(found.predicted, each, self.cut, strict=True)
            ]
        columns = zip(found.predictions, found.best_probabilities.tolist(), each, self.cut, strict=True)
        return [
            Answer(label=label, probability=best, probabilities=probabilities, cut=cut)
            for label, best, probabilities, cut in columns
        ]


@dataclass(frozen=True)
class ErrorResponse:
    """Why there is no answer. A replica returns it: Ray would wrap and log an exception."""

    status: int
    """Status of HTTP."""
    message: str


@dataclass(frozen=True)
class ReplicaFacts:
    """What a replica says of itself."""

    execution: Execution
    tasks: tuple[str, ...]
    bundle_sha256: str
    memory_mib: float
    """Largest resident size of its process so far."""


def parse_request(body: bytes) -> ClassifyRequest:
    """A request's JSON, checked as far as it can be without the bundle; a RequestError says what is wrong with it."""
    try:
        # Not pydantic's parser, which takes half a surrogate pair for a mistake of JSON.
        value = json.loads(body)
    except (ValueError, RecursionError) as cause:
        raise RequestError(HTTPStatus.BAD_REQUEST, f"The request is not JSON. {EXAMPLE}") from cause
    try:
        return ClassifyRequest.model_validate(value)
    except ValidationError as cause:
        raise _explain(cause.errors(include_url=False)[0]) from cause


def _explain(error: ErrorDetails) -> RequestError:
    """What pydantic found first, as a status and one sentence."""
    kind, value, (field, *place) = error["type"], error["input"], error["loc"] or ("",)
    status, form = HTTPStatus.UNPROCESSABLE_ENTITY, str(field).removesuffix("s")
    is_list = field in {"pairs", "texts"}
    entry = f"{form.capitalize()} {int(place.pop(0)) + 1}: " if is_list and place else ""
    if not error["loc"]:
        message = f"The request is no JSON object. {EXAMPLE}"
    elif kind == "extra_forbidden":
        message = f"There is no field {str(field)[:80]!r}. Known are {', '.join(FORMS)}, task."
    elif field == "task":
        message = "task is no text. Give the name of a task, or leave it out."
    elif is_list and not entry and kind == "too_long":
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        message = f"{field} has {len(value):,} entries; at most {MAX_TEXTS} are answered at once. Ask several times."
    elif is_list and not entry:
        message = f"{field} is no list of at least one {form}."
    elif form == "pair" and not place:
        message = f"{entry}A pair is a list of two sentences."
    else:
        try:
            message = check_sentence(value, entry + (f"Sentence {int(place[0]) + 1}" if place else "The sentence"))
        except TextError as cause:
            status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if isinstance(cause, LongTextError) else status
            message = str(cause)
    return RequestError(status, message)
