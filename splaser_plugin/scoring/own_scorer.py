"""A scorer of the user's own: a function, given by its dotted path."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from splaser_plugin.data.pairs import Pair
from splaser_plugin.distributed import share
from splaser_plugin.errors import ScoreError, ScorerError
from splaser_plugin.generation.evaluation import evaluating
from splaser_plugin.progress import count_items
from splaser_plugin.scoring.scores import Scores

Function = Callable[[Any, Any, list[Pair]], Sequence[float]]


class CallableScorer:
    """Scores the model by a function: one number a pair, higher is better.

    function: called with the model in evaluation mode, its tokenizer and some of the pairs, without gradients; the
    same model and pairs have to give the same numbers. name: how it is called in messages.
    """

    def __init__(self, function: Function, model: Any, tokenizer: Any, pairs: Sequence[Pair], name: str) -> None:
        self.name = name
        self.size = len(pairs)
        self._function = function
        self._model = model
        self._tokenizer = tokenizer
        self._pairs = pairs

    def score(self, items: Sequence[int], like: Scores | None = None) -> Scores:
        """Raises ScoreError when the function raises or gives a number that isn't finite, as a broken model can make
        it, and ScorerError when it returns anything but one number a pair.
        """
        return Scores(tuple(items), tuple(share(items, self._values, self._model)))

    def _values(self, items: list[int]) -> list[float]:
        with torch.no_grad(), evaluating(self._model):
            pairs = [self._pairs[item] for item in items]
            try:
                returned = self._function(self._model, self._tokenizer, pairs)
            except (
                MemoryError,
                torch.OutOfMemoryError,
            ):  # The machine is too small, which is not the candidate's fault.
                raise
            except Exception as error:  # The user's code may raise anything.
                raise ScoreError(f"--scorer {self.name}: it raised {type(error).__name__}: {error!s:.200}.") from error
        try:
            values = [float(value) for value in returned]
        except (TypeError, ValueError) as error:
            raise ScorerError(f"--scorer {self.name}: expected one number a pair, got {returned!r:.80}.") from error
        if len(values) != len(items):
            raise ScorerError(f"--scorer {self.name}: returned {len(values)} scores for {len(items)} pairs.")
        for item, value in zip(items, values, strict=True):
            if not math.isfinite(value):
                prompt = self._pairs[item].prompt
                raise ScoreError(f"--scorer {self.name}: {value} for the pair '{prompt:.40}', expected a finite score.")
        count_items(len(items))
        return values


def code_of(path: str) -> str:
    """Identity of the function's code: sha256 of the file it is in, empty where there is none."""
    source = module_source(load_function(path))
    return source and hashlib.sha256(source.encode()).hexdigest()


def module_source(function: Any) -> str:
    """The text of the module that a function or class is in, empty where there is none."""
    try:
        return inspect.getsource(sys.modules[function.__module__])
    except (OSError, TypeError, KeyError, AttributeError):
        return ""


def load_function(path: str) -> Function:
    """The function `package.module.function`, looked for in the current folder too.

    Raises ScorerError when there is no such module or function.
    """
    module_name, _, name = path.rpartition(".")
    folder = str(Path.cwd())
    if not {"", folder} & set(sys.path):
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ScorerError(
            f"--scorer {path}: the module {module_name} can't be imported ({error}). Install it, or run in its folder."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ScorerError(f"--scorer {path}: {module_name} has no function '{name}'.")
    return function
