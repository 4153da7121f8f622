"""Every error that splaser raises on purpose. A message says what, where, got against expected, the next step."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_on_command_line: ContextVar[bool] = ContextVar("on_command_line", default=False)
_FLAG = re.compile(r"--([a-z]+(?:-[a-z]+)*)|`[^`]*`")


class SplaserError(Exception):
    """Base of all errors of this package. The command line prints it as one line and exits 1.

    Options stand in messages as flags. Who calls from Python reads the names of fields and arguments in their place,
    see `in_python`.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if _on_command_line.get() else in_python(text)


def in_python(text: str) -> str:
    """Options as Python callers write them: `max_new_tokens` for `--max-new-tokens`; commands in backquotes stay."""

    def as_name(found: re.Match[str]) -> str:
        return found[1].replace("-", "_") if found[1] else found[0]

    return _FLAG.sub(as_name, text)


@contextmanager
def on_command_line() -> Iterator[None]:
    """Inside, errors name options as flags."""
    before = _on_command_line.set(True)
    try:
        yield
    finally:
        _on_command_line.reset(before)


class ConfigError(SplaserError):
    """An option has a value it can't have. The command line exits 2."""


class CheckpointError(SplaserError):
    """A model's files are missing, damaged or of a kind that is not read."""


class ModelError(SplaserError):
    """A loaded model is of a kind the job can't be done on."""


class MatrixError(SplaserError):
    """A weight matrix can't be found, chosen or changed."""


class SpectrumError(SplaserError):
    """Singular values can't be computed, or an edge can't be placed in them."""


class RankError(SplaserError):
    """A rank or a fraction is outside what a matrix's shape allows."""


class PairsError(SplaserError):
    """Preference pairs can't be read, or none of them can be used."""


class ScoreError(SplaserError):
    """A model can't be scored: it fails at the answers, or gives a number that isn't finite."""


class EmbedderError(SplaserError):
    """The embedding model can't be loaded or used."""


class TextError(SplaserError):
    """A text can't be read, or is too short for what is asked of it."""


class ScorerError(SplaserError):
    """A scorer of the user's own can't be loaded, or returns no usable scores."""


class TaskError(SplaserError):
    """A task of lm-evaluation-harness can't be found, loaded or used."""


class RecipeError(SplaserError):
    """A recipe or scan file is damaged, of another version, or made for another model."""


class OutputError(SplaserError):
    """The output can't be written where it was asked for."""


class MissingExtraError(SplaserError):
    """An optional package is needed; the message has the exact command that installs it."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The `count` known names most like `name`, as a phrase for an error message."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.0)
    return "nearest: " + ", ".join(matches) if matches else "there are none"
