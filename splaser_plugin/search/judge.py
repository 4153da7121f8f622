"""The judge: compares the model as it is with the best so far or the base, and says whether a candidate is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from splaser_plugin.errors import ScoreError
from splaser_plugin.scoring.scores import Scorer, Scores
from splaser_plugin.search.acceptance import Acceptance, Improve
from splaser_plugin.search.guard import Guard
from splaser_plugin.search.racing import Race

Outcome: TypeAlias = Literal["kept", "restored", "stopped", "guarded", "failed"]
"""`restored` after all items; `stopped` after some of them; `guarded`: it would have been kept, but for the guard;
`failed`: it can't be scored."""
UNBOUNDED = "the ratio of perplexities is too large for a number"


@dataclass(frozen=True)
class Judgement:
    """What the scores say about one candidate."""

    outcome: Outcome
    scores: Scores | None
    """Of the items it was scored on; None if it can't be scored."""
    best_before: float | None
    """Mean score that it was compared with, on the same items: the best model's, or under `harmless` the base's."""
    guard_loss: float | None = None
    """What the guard that was asked last measured, in its limit's unit; None where none was, and with a reason."""
    reason: str | None = None
    """Why it failed, or why the guard has no number."""
    guard: str = ""
    """Name of the guard that was asked last: the one that turned it down, where one did. Empty where none was."""

    @property
    def change(self) -> str:
        """Of the score, for people; empty where there is none."""
        if self.scores is None or self.best_before is None:
            return ""
        return f"{self.scores.mean - self.best_before:+.4f}"

    @property
    def summary(self) -> str:
        """The outcome for people, and how far a candidate came that didn't win."""
        if self.outcome == "stopped" and self.scores:
            return f"stopped after {len(self.scores.items)} items"
        if self.outcome == "guarded" and self.guard_loss is not None:
            return f"guarded at {self.guard} {self.guard_loss:.4f}"
        return self.outcome


def judged(judge: Judge) -> Judgement:
    """The judge's judgement, `failed` where the model can't be scored with the candidate."""
    try:
        return judge.judge()
    except ScoreError as error:
        return Judgement("failed", None, None, reason=str(error))


class Judge:
    """Compares the model as it is with the best so far or the base, and holds what is known of both.

    acceptance: the rule; the published one if not given. race: stop scoring a candidate that can't win any more.
    guards: asked last, one after the other, about what would be kept. With the scorer alone every candidate is scored
    on every item, as in the published laser scripts.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        acceptance: Acceptance | None = None,
        race: Race | None = None,
        guards: Sequence[Guard] = (),
    ) -> None:
        self._scorer = scorer
        self._acceptance = acceptance or Improve()
        self._race = race
        self._guards = guards
        self.baseline = Scores((), ())
        self.best = Scores((), ())

    @property
    def baseline_size(self) -> int:
        """How many items are measured for the baseline, by all of its scorers together."""
        return self._scorer.size + sum(guard.size for guard in self._guards)

    def measure_baseline(self) -> Scores:
        """Score the model as the base and the best so far, on every item."""
        everything = range(self._scorer.size)
        self.best = self._race.measure(self._scorer) if self._race else self._scorer.score(everything)
        self.baseline = self.best
        for guard in self._guards:
            guard.measure_baseline()
        return self.best

    def judge(self) -> Judgement:
        """Compare the model as the acceptance says; where the outcome is `kept` it is the best from now on."""
        other = self.baseline if self._acceptance.against_base else self.best
        scores = self._scores(other)
        before = other.on(scores.items).mean
        if len(scores.items) < self._scorer.size:
            return Judgement("stopped", scores, before)
        if not self._acceptance.accepts(scores, other):
            return Judgement("restored", scores, before)
        loss, name = None, ""
        for guard in self._guards:
            loss, name = guard.loss(), guard.name
            if loss is None:
                return Judgement("guarded", scores, before, reason=UNBOUNDED, guard=name)
            if loss > guard.limit:
                return Judgement("guarded", scores, before, loss, guard=name)
        self.best = scores
        return Judgement("kept", scores, before, loss, guard=name)

    def _scores(self, other: Scores) -> Scores:
        if self._race:
            return self._race.run(self._scorer, other, self._acceptance, like=self.best)
        return self._scorer.score(range(self._scorer.size), like=self.best)
