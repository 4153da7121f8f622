"""What is read from files: each value that is missing or can't be is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from pydantic import Field

from splaser_plugin.files.validation import (
    NO_OTHER_KEYS,
    InvalidRecordError,
    Number,
    Truth,
    Whole,
    plain,
    validated,
)


@dataclass(frozen=True)
class Inner:
    ratio: Number | None


@dataclass(frozen=True)
class Outer:
    __pydantic_config__ = NO_OTHER_KEYS

    name: str
    count: Whole
    is_cut: Truth
    shape: Annotated[tuple[Whole, Whole], Field(alias="size")]
    inner: dict[str, Inner]
    numbers: tuple[Number, ...]
    anything: Mapping[str, Any]


GOOD = {
    "name": "a",
    "count": 1,
    "is_cut": True,
    "size": [2, 3],
    "inner": {"b": {"ratio": None}},
    "numbers": [1.5, 2],
    "anything": {"c": [None]},
}


def test_what_was_written_is_read_again():
    record = validated(Outer, GOOD)
    assert record == Outer("a", 1, True, (2, 3), {"b": Inner(None)}, (1.5, 2.0), {"c": [None]})
    assert plain(record) == GOOD
    assert validated(Outer, plain(record)) == record


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": None}, "name is None, expected a valid string"),
        ({"name": 1}, "name is 1, expected a valid string"),
        ({"count": 1.0}, r"count is 1\.0, expected a valid integer"),
        ({"count": True}, "count is True, expected a valid integer"),
        ({"count": 2**63}, "count is 9223372036854775808, expected less than 9223372036854775808"),
        ({"count": 10**400}, "count is 10000"),
        ({"is_cut": 1}, "is_cut is 1, expected a valid boolean"),
        ({"size": [2]}, r"size\.1 is missing"),
        ({"size": [2, 3, 4]}, r"size is \[2, 3, 4\], expected"),
        ({"size": "23"}, "size is '23', expected a valid tuple"),
        ({"inner": {"b": None}}, r"inner\.b is None, expected"),
        ({"inner": {"b": {"ratio": float("nan")}}}, r"inner\.b\.ratio is nan, expected a finite number"),
        ({"inner": {"b": {"ratio": "1"}}}, r"inner\.b\.ratio is '1', expected a valid number"),
        ({"inner": {"b": {"ratio": 10**400}}}, r"inner\.b\.ratio is 1000"),
        ({"inner": {"b": {}}}, r"inner\.b\.ratio is missing"),
        ({"numbers": ["1"]}, r"numbers\.0 is '1', expected a valid number"),
        ({"anything": {1: 2}}, r"anything\.1\.\[key\] is 1, expected a valid string"),
        ({"other": 1}, "other is not known"),
        ({"name": "a" * 1000, "count": "b" * 1000}, "^.{1,120}$"),
    ],
    ids=str,
)
def test_a_value_that_is_not_of_its_fields_type_is_named(wrong, message):
    with pytest.raises(InvalidRecordError, match=message):
        validated(Outer, {**GOOD, **wrong})


@pytest.mark.parametrize("stored", [None, 1, "text", [], [GOOD]])
def test_what_is_no_object_is_no_record(stored):
    with pytest.raises(InvalidRecordError, match=r"it is .*, expected a dictionary"):
        validated(Outer, stored)
