"""Values out of somebody's file, checked to be what they have to be. Each raises TypeError with what it got."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

LARGEST = 2**53
"""Whole numbers up to it are the same everywhere, also as floats."""

_Value = TypeVar("_Value")


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(value, "a text")
    return value


def number(value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(value, "a number")
    if (abs(value) > LARGEST and isinstance(value, int)) or not math.isfinite(value):
        raise _wrong(value, "a finite number")
    return float(value)


def count(value: Any, least: int = 0) -> int:
    """A whole number from `least` on."""
    if type(value) is not int or not least <= value <= LARGEST:
        raise _wrong(value, f"a whole number from {least} on")
    return value


def optional(check: Callable[[Any], _Value], value: Any) -> _Value | None:
    return None if value is None else check(value)


def _wrong(value: Any, expected: str) -> TypeError:
    shown = f"a number of {len(hex(value))} digits" if isinstance(value, int) and value > LARGEST else repr(value)[:40]
    return TypeError(f"{shown} where {expected} is expected")
