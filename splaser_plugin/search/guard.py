"""A second scorer, by which nothing that is kept may be much worse than the base model."""

from __future__ import annotations

from splaser_plugin.scoring.perplexity import exp
from splaser_plugin.scoring.scores import Scorer, Scores


class Guard:
    """Compares the model with the base, not with the best so far, so that many small losses don't add up.

    limit: the largest ratio of perplexities, or, with another scorer than perplexity, the largest fall of the mean.
    """

    def __init__(self, scorer: Scorer, limit: float) -> None:
        self.name = scorer.name
        self.size = scorer.size
        self.limit = limit
        self.scorer = scorer
        self._base = Scores((), ())

    def measure_baseline(self) -> None:
        """Take the model as the base."""
        self._base = self.scorer.score(range(self.scorer.size))

    def loss(self) -> float | None:
        """What the model lost since, in the limit's unit: a ratio of perplexities, or a fall of the mean.

        None for a ratio that is too large for a number: it is over any limit.
        """
        fall = self._base.mean - self.scorer.score(range(self.scorer.size), like=self._base).mean
        return exp(fall) if self.name == "perplexity" else fall
