"""What was read from a file, checked by pydantic against the dataclass that it becomes."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, TypeVar, cast

from pydantic import AllowInfNan, ConfigDict, Field, Strict, TypeAdapter, ValidationError

_Record = TypeVar("_Record")

Number = Annotated[float, Strict(), AllowInfNan(False)]
"""A finite number; true is none, and neither is a text of digits."""
Whole = Annotated[int, Strict(), Field(ge=-(2**63), lt=2**63)]
"""A whole number that fits into 64 bits; JSON's have no bound."""
Truth = Annotated[bool, Strict()]
"""true or false; 0 and 1 are numbers."""
NO_OTHER_KEYS = ConfigDict(extra="forbid")
"""For the `__pydantic_config__` of a dataclass: a key that it has no field for is refused."""


class InvalidRecordError(Exception):
    """A value is missing or can't be; the message names its field."""


def validated(kind: type[_Record], stored: Any) -> _Record:
    """A dataclass from the plain values that JSON gives: objects for dataclasses, lists for tuples.

    kind: its numbers have to be annotated as `Number`, `Whole` and `Truth`, which turn nothing else into numbers.
    Raises InvalidRecordError, about the first field that is at fault.
    """
    try:
        record: _Record = _adapter(cast("Any", kind)).validate_python(stored)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidRecordError(_message(first["type"], first["loc"], first["input"], first["msg"])) from error
    return record


def plain(record: Any) -> dict[str, Any]:
    """A dataclass as plain values, under the names that `validated` reads."""
    kind: Any = type(record)
    values: dict[str, Any] = _adapter(kind).dump_python(record, mode="json", by_alias=True)
    return values


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _message(fault: str, place: tuple[int | str, ...], value: Any, expected: str) -> str:
    name = ".".join(map(str, place)) or "it"
    if fault == "missing":
        return f"{name} is missing"
    if fault in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{name} is not known"
    for opening in ("Input should be ", "Value error, "):
        expected = expected.removeprefix(opening)
    return f"{name} is {repr(value)[:80]}, expected {expected}"
