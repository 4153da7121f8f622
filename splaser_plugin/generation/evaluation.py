"""A model as it computes while it is measured, and what its own code may raise then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig

from splaser_plugin.distributed import is_out_of_memory
from splaser_plugin.errors import ModelError, ScoreError

MODEL_ERRORS = (RuntimeError, ValueError, LookupError, ArithmeticError, AttributeError, TypeError, AssertionError)
"""What a model's own code may raise, over the numbers that it computes or over its configuration."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def failures_told(no_room: str, fails: str) -> Iterator[None]:
    """What the model's own code raises inside is told in one line.

    no_room: the ModelError where the device is out of memory. fails: how the ScoreError begins otherwise.
    """
    try:
        yield
    except MODEL_ERRORS as error:
        if is_out_of_memory(error):
            raise ModelError(no_room) from error
        raise ScoreError(f"{fails}: {type(error).__name__}: {error}") from error


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Hide the model's own generation defaults: its sampling settings and penalties would change greedy answers."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
