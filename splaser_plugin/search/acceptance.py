"""When a candidate is kept: it counts as better than the best model so far, or as no worse than the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from splaser_plugin.scoring.scores import Scores
from splaser_plugin.statistics import can_reach, least_significant_mean


class Acceptance(Protocol):
    """A rule for scores of the same items."""

    against_base: bool
    """Whether candidates are compared with the base model, instead of with the best so far."""

    def accepts(self, scores: Scores, other: Scores) -> bool:
        """Whether the candidate takes the best model's place. other: what it is compared with, on all items too."""

    def bar(self, differences: Sequence[float], size: int) -> float:
        """What the mean difference over all `size` items has to exceed, as far as some of them tell."""


class Improve:
    """Any strict improvement of the mean: the rule of the published laser scripts."""

    against_base = False

    def accepts(self, scores: Scores, other: Scores) -> bool:
        return scores.mean > other.mean

    def bar(self, differences: Sequence[float], size: int) -> float:
        return 0.0


class Confident:
    """An improvement that a one-sided paired t test calls significant.

    alpha: probability that a search in which nothing is better accepts anything. candidates: how many it tries;
    each is tested at alpha / candidates (Bonferroni).
    """

    against_base = False

    def __init__(self, alpha: float, candidates: int) -> None:
        self._risk = alpha / candidates

    def accepts(self, scores: Scores, other: Scores) -> bool:
        differences = scores.differences(other)
        return can_reach(differences, self._risk) and _mean(differences) > self.bar(differences, len(differences))

    def bar(self, differences: Sequence[float], size: int) -> float:
        return least_significant_mean(differences, size, math.log(self._risk)) if len(differences) > 1 else math.inf


class Harmless:
    """A loss that a one-sided paired t test calls smaller than the tolerance, against the base model.

    The model with all that is kept and the candidate is compared with the base, so small losses don't add up.
    tolerance: in the score's unit. alpha: probability that a search accepts anything that loses the tolerance or
    more. candidates: how many it tries; each is tested at alpha / 2^candidates, and at alpha with 0, for a fixed
    sequence of tests that ends at the first that fails. What is tested depends on what was
    kept before, on the same pairs, so the luck of all that was kept adds up; but before the k-th candidate at most
    2^(k-1) models can have come about, so that in all fewer than 2^candidates are ever tested (union bound).
    The test takes the mean for normal. Where a candidate ruins a few answers and leaves the rest as they were, it
    isn't: none of them may be among these pairs. See `unseen_share`.
    Source: non-inferiority margin of a paired t test (Wellek, Testing Statistical Hypotheses of Equivalence and
    Noninferiority, 2010).
    """

    against_base = True

    def __init__(self, tolerance: float, alpha: float, candidates: int = 0) -> None:
        self._tolerance = tolerance
        self._log_risk = math.log(alpha) - candidates * math.log(2)

    def accepts(self, scores: Scores, other: Scores) -> bool:
        differences = scores.differences(other)
        return _mean(differences) > self.bar(differences, len(differences))

    def bar(self, differences: Sequence[float], size: int) -> float:
        if len(differences) < 2:
            return math.inf
        return least_significant_mean(differences, size, self._log_risk) - self._tolerance

    def unseen_share(self, size: int) -> float:
        """On how large a share of all pairs a candidate may lose anything, with no loss on any of `size` pairs.

        Exact at the same risk: no such candidate is then accepted in more than alpha of searches.
        """
        return -math.expm1(self._log_risk / size)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
