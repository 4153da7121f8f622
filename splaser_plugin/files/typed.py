"""Whether what was read from a file has the types that its dataclass says."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from array import array
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

LARGEST_INT = 2**63


def check_types(record: Any) -> None:
    """Raises TypeError, with the field's name, unless each value in the dataclass is of its annotated type.

    Numbers have to be finite and whole ones below 2^63; dataclasses inside are checked, too.
    """
    of_record: Any = type(record)
    for name, kind in _hints(of_record).items():
        value = getattr(record, name)
        if not _is_of(value, kind):
            raise TypeError(f"{name} is {repr(value)[:80]}, expected {getattr(kind, '__name__', kind)}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _is_of(value: object, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind in (float, int):
        return _is_number(value, kind)
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, each) for each in inside)
    if origin is tuple and inside[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(inside) and all(map(_is_of, value, inside))
    if origin in (tuple, Sequence):
        if isinstance(value, array):
            return all(map(math.isfinite, value))
        return isinstance(value, (tuple, list)) and all(_is_of(each, inside[0]) for each in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            _is_of(key, inside[0]) and _is_of(each, inside[1]) for key, each in value.items()
        )
    if dataclasses.is_dataclass(value):
        check_types(value)
    return isinstance(value, kind)


def _is_number(value: object, kind: type) -> bool:
    if type(value) is int:
        return -LARGEST_INT <= value < LARGEST_INT
    return kind is float and type(value) is float and math.isfinite(value)
