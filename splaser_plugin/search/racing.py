"""Racing: score a candidate on more and more of the items, and stop once it can't win any more."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from splaser_plugin.scoring.scores import Scorer, Scores
from splaser_plugin.search.acceptance import Acceptance
from splaser_plugin.statistics import upper_bound

RACE_RISK = 0.1
FIRST = 16


class Race:
    """In which order all candidates of a search meet the items, and when they stop.

    The order is random, the same for every candidate: first 16 items, then as many again as there were, and so
    on. After each part a candidate stops whose mean difference to the model it is compared with is bound to end
    below what acceptance asks for.

    size: number of items. seed: of their order. risk: probability that a candidate is stopped that would have
    been accepted; the parts share it evenly.
    Source of the idea: Maron & Moore 1994 (Hoeffding races).
    """

    def __init__(self, size: int, *, seed: int = 0, risk: float = RACE_RISK) -> None:
        order = np.random.default_rng(seed).permutation(size).tolist()
        ends = [0, *(FIRST * 2**doublings for doublings in range(size) if FIRST * 2**doublings < size), size]
        self.size = size
        self.parts = [sorted(order[start:end]) for start, end in pairwise(ends)]
        self.risk = risk / max(1, len(self.parts) - 1)

    def measure(self, scorer: Scorer) -> Scores:
        """Scores of all items, in the same parts as everything that is compared with them.

        In other parts, and so in other batches, the same model's scores differ in their last bits.
        """
        scores = Scores((), ())
        for part in self.parts:
            scores = scores.joined(scorer.score(part))
        return scores

    def run(self, scorer: Scorer, other: Scores, acceptance: Acceptance, like: Scores | None = None) -> Scores:
        """Scores of the model as it is now: of all items, or of those it was stopped after.

        other: what it is compared with. like: see `Scorer.score`; `other` if not given.
        """
        scores = Scores((), ())
        for part in self.parts:
            scores = scores.joined(scorer.score(part, like=like or other))
            differences = scores.differences(other)
            bar = acceptance.bar(differences, self.size)
            if len(scores.items) < self.size and upper_bound(differences, self.size, self.risk) < bar:
                break
        return scores
