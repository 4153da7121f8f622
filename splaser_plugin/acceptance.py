"""When a candidate counts as better than the best model so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from splaser_plugin.scoring import Scores
from splaser_plugin.statistics import can_reach, least_significant_mean


class Acceptance(Protocol):
    """A rule for scores of the same items."""

    def accepts(self, scores: Scores, best: Scores) -> bool:
        """Whether the candidate takes the best model's place. Both are scored on all items."""

    def bar(self, differences: Sequence[float], size: int) -> float:
        """What the mean difference over all `size` items has to exceed, as far as some of them tell."""


class Improve:
    """Any strict improvement of the mean: the rule of the published laser scripts."""

    def accepts(self, scores: Scores, best: Scores) -> bool:
        return scores.mean > best.mean

    def bar(self, differences: Sequence[float], size: int) -> float:
        return 0.0


class Confident:
    """An improvement that a one-sided paired t test calls significant.

    alpha: probability that a search in which nothing is better accepts anything. candidates: how many it tries;
    each is tested at alpha / candidates (Bonferroni).
    """

    def __init__(self, alpha: float, candidates: int) -> None:
        self._risk = alpha / candidates

    def accepts(self, scores: Scores, best: Scores) -> bool:
        differences = scores.differences(best)
        mean = sum(differences) / len(differences)
        return can_reach(differences, self._risk) and mean > self.bar(differences, len(differences))

    def bar(self, differences: Sequence[float], size: int) -> float:
        return least_significant_mean(differences, size, self._risk) if len(differences) > 1 else math.inf
