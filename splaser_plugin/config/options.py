"""How the options of a stage are declared and checked: a frozen pydantic dataclass with a docstring under each field.

The command line makes its flags of these classes (`splaser_plugin.cli.options`), `run.yaml` its keys.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from typing_extensions import dataclass_transform

from splaser_plugin.errors import ConfigError, in_python, nearest

_Class = TypeVar("_Class")
_Options = TypeVar("_Options", bound="Options")

CHECKS = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""No value is turned into another type, except whole numbers into float."""
RENAMED = {"max_prompt_chars": "max_prompt_tokens", "max_answer_chars": "max_answer_tokens"}
"""Options of earlier versions, which counted characters."""


def _with_options(options: Any) -> str:
    """A class's docstring with its options below, as `help` shows it."""
    paragraphs = [inspect.cleandoc(options.__doc__ or "")]  # `python -OO` has no docstrings
    for name, field in options.__pydantic_fields__.items():
        text = f"{name} = {field.default!r}: {in_python(' '.join((field.description or '').split()))}"
        paragraphs.append(textwrap.fill(text, 100, subsequent_indent="    ", break_on_hyphens=False))
    return "\n\n".join(paragraphs)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def stage(options: type[_Class]) -> type[_Class]:
    """Make a class the configuration of a stage: a frozen dataclass of keywords, checked when it is made.

    A value or a name that can't be raises ConfigError, which says what was expected.
    """
    made: Any = dataclass(frozen=True, kw_only=True, config=CHECKS)(options)
    for base in made.__mro__[1:-1]:  # pydantic reads the docstrings of a class's own fields only
        for name, field in getattr(base, "__pydantic_fields__", {}).items():
            made.__pydantic_fields__[name].description = made.__pydantic_fields__[name].description or field.description
    made.__doc__ = _with_options(made)
    check: Callable[..., None] = made.__init__

    @functools.wraps(check)
    def __init__(self: Any, **values: Any) -> None:  # noqa: N807
        try:
            check(self, **values)
        except ValidationError as error:
            raise ConfigError(_message(error, type(self), values)) from error

    made.__init__ = __init__
    return typing.cast("type[_Class]", made)


@stage
class Options:
    """What the configurations of all stages can do."""

    @classmethod
    def fields(cls) -> dict[str, FieldInfo]:
        """Each option by its name: default, description, type and limits."""
        return dict(cls.__pydantic_fields__)  # type: ignore[attr-defined]

    @classmethod
    def from_dict(cls: type[_Options], values: Mapping[str, Any]) -> _Options:
        """A configuration from plain values. Raises ConfigError when a key is not known."""
        return cls(**{str(key): value for key, value in values.items()})

    @classmethod
    def check_option(cls, name: str, value: Any) -> None:
        """Raises ConfigError when the option can't have this value, whatever the others are."""
        try:
            cls.__init__.__wrapped__(object.__new__(cls), **{name: value})  # type: ignore[attr-defined]
        except ValidationError as error:
            raise ConfigError(_message(error, cls, {name: value})) from error
        except ConfigError:  # of options that don't go together, which is checked once all of them are there
            return

    @property
    def changes(self) -> dict[str, Any]:
        """The options that aren't at their defaults."""
        return {
            name: getattr(self, name) for name, field in self.fields().items() if getattr(self, name) != field.default
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a JSON or YAML file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def flag(name: str) -> str:
    """How an option is called on the command line."""
    return "--" + name.replace("_", "-")


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The texts that an option may have; () where it takes others too."""
    kinds = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is not typing.Literal else ()
    of_choices = [kind for kind in (field.annotation, *kinds) if typing.get_origin(kind) is typing.Literal]
    return tuple(text for kind in of_choices for text in typing.get_args(kind))


def instead_of(name: str, known: Iterable[str]) -> str:
    """What to write in place of an option that isn't known, as a phrase for an error message."""
    if name in RENAMED:
        return f"it is {RENAMED[name]} now, counted in tokens, of some 4 characters each in English"
    return nearest(name, known)


def _message(error: ValidationError, options: type[Options], values: Mapping[str, Any]) -> str:
    """The first fault, as one line."""
    first = error.errors()[0]
    name, known = str(first["loc"][0]), options.fields()
    if name not in known:
        return f"option '{name}' is not known; {instead_of(name, known)}."
    value = list(values[name]) if isinstance(values[name], (list, tuple)) else values[name]
    shown = f"'{value}'" if first["type"] == "literal_error" else repr(value)
    return f"{flag(name)}: got {shown}, expected {_expected(first['type'], first.get('ctx', {}), known[name])}."


def _expected(fault: str, limits: Mapping[str, Any], field: FieldInfo) -> str:
    if fault == "greater_than_equal":
        return f"at least {limits['ge']}"
    if fault == "greater_than":
        return f"more than {limits['gt']}"
    if fault == "less_than":
        return f"less than {limits['lt']}"
    if fault == "less_than_equal":
        return f"at most {limits['le']}"
    if fault == "literal_error":
        return f"one of {', '.join(choices(field))}"
    if fault == "finite_number":
        return "a finite number"
    kind = plain_type(field)
    return "a list of text" if kind is list else kind.__name__


def plain_type(field: FieldInfo) -> type:
    """What a value of this option is in a YAML file or as a flag: bool, int, float, str, or list for several texts."""
    kind: Any = field.annotation
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(member for member in typing.get_args(kind) if member is not type(None))
    if typing.get_origin(kind) is tuple:
        return list
    return kind if kind in (bool, int, float) else str
