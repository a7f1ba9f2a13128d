"""JSON records as frozen dataclasses, read strictly by pydantic."""

import json
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from train.common.errors import PromptfoldError

T = TypeVar("T")


def parse_record(kind: type[T], value: object, error: type[PromptfoldError], where: str, remedy: str) -> T:
    """A JSON value → the pydantic dataclass that describes it.

    ``error`` is raised where a field is missing, unknown, of another type or out of bounds; ``where`` begins its
    message with the file, and the place in it.
    """
    try:
        # As JSON, whose lists may be tuples: as Python, strict means that they may not.
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as cause:
        first = cause.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise error(f"{where}{f', {field}' if field else ''}: {first['msg']}. {remedy}") from cause
