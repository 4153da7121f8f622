"""The verdict: what items that the search never saw say about its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from splaser_plugin.scoring.scores import Scores
from splaser_plugin.statistics import RISK, can_reach, largest_share, paired_bootstrap, trimmed_mean

SURE = f"{100 * (1 - RISK / 2):g} % sure"
"""Of what one end of the interval says."""


@dataclass(frozen=True)
class HeldOut:
    """The base model and the result, measured on the held-out pairs."""

    base: Scores
    result: Scores
    difference: float
    """Mean of result minus base."""
    interval: tuple[float, float]
    """95 % interval of that mean over all pairs of this kind, by paired bootstrap."""
    better: int
    """Pairs with a higher score than the base's."""
    worse: int
    equal: int
    verdict: str
    """`better`, `worse`, or `no difference` and what that means."""
    unit: str = "pairs"
    """What the items are: `pairs`, `windows` of text, or `documents` of a task."""
    trimmed: float = 0.0
    """Mean without the lowest and the highest tenth of the differences."""
    loss_verdict: str = ""
    """Whether a loss of the tolerance can be ruled out, where there is a tolerance and something was kept."""

    @property
    def summary(self) -> str:
        """One line for people: the difference, its interval, and the pairs counted."""
        low, high = self.interval
        return (
            f"{self.difference:+.4f} (95 % interval {low:+.4f} to {high:+.4f}) on {len(self.base.items)} {self.unit}: "
            f"{self.better} better, {self.worse} worse, {self.equal} equal"
        )


@dataclass(frozen=True)
class Verdicts:
    """What was held out says about the result."""

    scored: HeldOut | None
    """By the run's scorer; None where nothing is held out."""
    text: HeldOut | None
    """By windows of text; None where they aren't judged, or none are held out."""


def compare(
    base: Scores, result: Scores, *, seed: int = 0, unit: str = "pairs", tolerance: float | None = None
) -> HeldOut:
    """What two measurements of the same items say. Give `base` itself as the result where nothing was kept.

    unit: what the items are, `pairs` or `windows`. tolerance: loss of the mean that counts as none.
    """
    differences = result.differences(base)
    better = sum(difference > 0 for difference in differences)
    worse = sum(difference < 0 for difference in differences)
    low, high = paired_bootstrap(differences, risk=RISK, seed=seed)
    verdict = f"no difference that {len(differences)} {unit} can show"
    if result is base:
        verdict = "no difference: nothing was kept"
    elif can_reach(differences, RISK / 2) and (low > 0 or high < 0):
        verdict = "better" if low > 0 else "worse"
    return HeldOut(
        base=base,
        result=result,
        difference=float(np.mean(differences)),
        interval=(low, high),
        better=better,
        worse=worse,
        equal=len(differences) - better - worse,
        verdict=verdict,
        unit=unit,
        trimmed=trimmed_mean(differences),
        loss_verdict="" if tolerance is None or result is base else _loss_verdict(differences, low, tolerance, unit),
    )


def _loss_verdict(differences: Sequence[float], low: float, tolerance: float, unit: str) -> str:
    """low: end of the interval. Where few pairs differ it says nothing of losses that these pairs have no sign of."""
    if low <= -tolerance:
        return f"a loss of the tolerance of {tolerance:g} can't be ruled out"
    if can_reach(differences, RISK / 2):
        return f"loses less than the tolerance of {tolerance:g} ({SURE})"
    count, size = sum(difference < 0 for difference in differences), len(differences)
    seen = f"a loss seen on {count} of {size} {unit}" if count else f"no loss seen on {size} {unit}"
    return f"{seen}; one on up to {100 * largest_share(count, size, RISK / 2):.0f} % of all can't be ruled out ({SURE})"
