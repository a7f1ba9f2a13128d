"""`parse_record`: what a record may hold, and where one is wrong."""

import json
from typing import Annotated

import pytest
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from train.common.errors import AdapterError
from train.common.records import parse_record

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class Inner:
    labels: tuple[str, ...]


@dataclass(frozen=True, config=STRICT)
class Outer:
    count: Annotated[int, Field(ge=1)]
    inner: Inner


def test_a_record_is_read_as_its_dataclass() -> None:
    value = json.loads('{"count": 2, "inner": {"labels": ["a", "b"]}}')
    assert parse_record(Outer, value, AdapterError, "x.json", "Train it again.") == Outer(2, Inner(("a", "b")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"count": 2}', "x.json, inner: Field required. Train it again."),
        ('{"count": "2", "inner": {"labels": []}}', "x.json, count: Input should be a valid integer. Train it again."),
        ('{"count": 0, "inner": {"labels": []}}', "x.json, count: Input should be greater than or equal to 1"),
        ('{"count": true, "inner": {"labels": []}}', "x.json, count: Input should be a valid integer"),
        ('{"count": 1, "inner": {"labels": [1]}}', "x.json, inner.labels.0: Input should be a valid string"),
        ('{"count": 1, "inner": {"labels": [], "more": 1}}', "x.json, inner.more: "),
        ("[]", "x.json: Input should be "),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, words: str) -> None:
    with pytest.raises(AdapterError) as raised:
        parse_record(Outer, json.loads(text), AdapterError, "x.json", "Train it again.")
    assert str(raised.value).startswith(words)
