"""How well a model predicts plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from splaser_plugin.distributed import share
from splaser_plugin.generation.teacher_forcing import fitting_batch, mean_log_probabilities
from splaser_plugin.scoring.scores import Scores


class PerplexityScorer:
    """Mean log-probability of all tokens of a window but its first, in nats a token: minus transformers' own loss.

    All windows are equally long, so the mean over some of them is that over their tokens; see `perplexity`.
    windows: token ids, at least 2 in each. batch_size: most windows in one forward pass.
    """

    name = "perplexity"

    def __init__(self, model: Any, windows: Sequence[Sequence[int]], *, batch_size: int) -> None:
        self.model = model
        self.size = len(windows)
        self.windows = windows
        self.batch_size = fitting_batch(batch_size, max(map(len, windows)))

    def score(self, items: Sequence[int], like: Scores | None = None) -> Scores:
        return Scores(tuple(items), tuple(share(items, self._means, self.model)))

    def _means(self, items: list[int]) -> list[float]:
        starts = [self.windows[item][:1] for item in items]
        rests = [self.windows[item][1:] for item in items]
        return mean_log_probabilities(self.model, starts, rests, batch_size=self.batch_size)


def perplexity(scores: Scores) -> float | None:
    """exp of minus the mean log-probability: of all tokens that a PerplexityScorer measured, together; see `exp`."""
    return exp(-scores.mean)


def exp(value: float) -> float | None:
    """e to the power of `value`, or None where that is too large for a number: above about 709 nats."""
    try:
        return math.exp(value)
    except OverflowError:
        return None
