"""What writes the tokens of answers: the loop, or an engine of others that keeps its batch full."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from splaser_plugin.distributed import is_sharded
from splaser_plugin.errors import ModelError, ScoreError
from splaser_plugin.generation.evaluation import failures_told
from splaser_plugin.generation.long_rope import turning_point
from splaser_plugin.generation.teacher_forcing import forced_logits

PROBES = (tuple(range(1, 9)), tuple(range(20, 23)))
"""Prompts, token ids, that an engine and the loop have to answer alike before the engine is used."""
PROBE_TOKENS = 8
PROBE_LENGTH = max(map(len, PROBES)) + PROBE_TOKENS
"""Tokens of the longest probe and its answer."""
TIE = 1e-4
"""Largest difference of two logits, in standard deviations of all, that counts as a tie: rounding decides there."""
EXACT = (torch.float32, torch.float64)
"""Dtypes in which engines answer alike up to ties."""


class Engine(Protocol):
    """Writes greedy tokens with one model, as its weights are at each call."""

    name: str

    @property
    def at_once(self) -> int:
        """Most prompts in one forward pass."""

    def write(self, prompts: Sequence[Sequence[int]], rooms: Sequence[int], expected: Sequence[int]) -> list[list[int]]:
        """The token ids that follow each prompt, up to and with the first end token.

        Args:
            prompts: Token ids.
            rooms: Most tokens that may follow each.
            expected: Guessed numbers of tokens.

        Raises:
            ModelError: When the device's memory is too small.
            ScoreError: When the model has no answers.
        """

    def fixed(self) -> Engine:
        """The same, without any change by what it measures."""


def answering(engine: Engine) -> AbstractContextManager[None]:
    """Inside, the model's failures are told in one line; of an engine that keeps its number of prompts at once."""
    return failures_told(
        f"the device's memory has no room for {engine.at_once} answers at once. Lower --max-new-tokens or "
        "--batch-size, or use --engine transformers.",
        "the model fails at its answers",
    )


def obstacle(model: Any) -> str:
    """What keeps any engine but the loop from taking the model, as the end of a sentence; empty for nothing."""
    if is_sharded(model):
        return "is sharded over processes"
    if len({parameter.device for parameter in model.parameters()}) > 1 or hasattr(model, "hf_device_map"):
        return "is spread over several devices"
    if turning_point(model) is not None:
        return "has position embeddings that depend on the longest row of a batch"
    return ""


def check_alike(engine: Engine, loop: Engine, model: Any) -> None:
    """Raise ModelError unless the engine writes what the loop does, up to ties, where the dtype lets it."""
    rooms, expected = [PROBE_TOKENS] * len(PROBES), [0] * len(PROBES)
    by_loop = loop.fixed().write(PROBES, rooms, expected)
    try:
        by_engine = engine.fixed().write(PROBES, rooms, expected)
    except ScoreError as error:
        raise ModelError(
            f"--engine {engine.name} doesn't take {type(model).__name__}: {str(error).rstrip('.')}. Use --engine "
            "transformers."
        ) from error
    if model.dtype in EXACT and not all(map(lambda *row: _alike(model, *row), PROBES, by_engine, by_loop)):
        raise ModelError(
            f"--engine {engine.name} doesn't write what transformers' own generate does with this model. Use "
            "--engine transformers."
        )


@torch.no_grad()
def _alike(model: Any, prompt: Sequence[int], some: Sequence[int], others: Sequence[int]) -> bool:
    """Whether two answers are equal, or differ first where their tokens tie."""
    place = next((place for place, (one, other) in enumerate(zip(some, others, strict=False)) if one != other), None)
    if place is None:
        return len(some) == len(others)
    logits = forced_logits(model, [prompt], [some[: place + 1]])[0][place].float()
    return bool((logits[some[place]] - logits[others[place]]).abs() <= TIE * logits.std())
