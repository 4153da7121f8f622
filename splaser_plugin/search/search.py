"""The search: try the candidates one at a time, keep what makes the score better, put back the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from splaser_plugin.distributed import my_part
from splaser_plugin.errors import ScoreError
from splaser_plugin.progress import SILENT, Progress, counting
from splaser_plugin.scoring.scores import Scorer, Scores
from splaser_plugin.search.acceptance import Acceptance, Improve
from splaser_plugin.search.candidates import Candidate
from splaser_plugin.search.guard import Guard
from splaser_plugin.search.journal import Journal
from splaser_plugin.search.racing import Race
from splaser_plugin.statistics import upper_bound
from splaser_plugin.weights.in_memory import Weights

SCREEN_RISK = 0.05
UNBOUNDED = "the ratio of perplexities is too large for a number"


@dataclass(frozen=True)
class Judgement:
    """What the scores say about one candidate."""

    verdict: str
    """`kept`; `restored` after all items; `stopped` after some of them; `screened` before the first; `failed`: can't
    be scored; `guarded`: it would have been kept, but for the guard."""
    scores: Scores | None
    """Of the items it was scored on; None if it was screened out."""
    best_before: float | None
    """Mean score that it was compared with, on the same items: the best model's, or under `harmless` the base's."""
    screen_change: float | None
    """Change of the screen's mean score, if there is a screen."""
    guard_loss: float | None = None
    """What the guard measured, in its limit's unit; None where it wasn't asked, and with a reason."""
    reason: str | None = None
    """Why it failed, or why the guard has no number."""


@dataclass(frozen=True)
class Trial:
    """One candidate tried."""

    candidate: Candidate
    judgement: Judgement
    elapsed_s: float

    @property
    def kept(self) -> bool:
        return self.judgement.verdict == "kept"


@dataclass(frozen=True)
class SearchResult:
    baseline: Scores
    """The model as it came."""
    final: Scores
    """The model with everything that was kept."""
    trials: tuple[Trial, ...]

    @property
    def kept(self) -> tuple[Candidate, ...]:
        return tuple(trial.candidate for trial in self.trials if trial.kept)

    @property
    def parameters_removed(self) -> int:
        """By all that was kept, if each of these matrices is stored as two factors."""
        last_of = {candidate.matrix: candidate for candidate in self.kept}
        return sum(candidate.parameters_removed for candidate in last_of.values())

    @property
    def generated_tokens(self) -> int:
        """By the baseline and all candidates."""
        tried = [trial.judgement.scores for trial in self.trials if trial.judgement.scores is not None]
        return sum(scores.generated_tokens for scores in (self.baseline, *tried))


def search(
    weights: Weights,
    candidates: Sequence[Candidate],
    judge: Judge,
    *,
    limit: int | None = None,
    journal: Journal | None = None,
    progress: Progress = SILENT,
) -> SearchResult:
    """Try each candidate on top of what was kept so far, and keep what the judge says is better.

    limit: most candidates to try; those that `is_passed_over` don't count.
    journal: told which candidate is being measured, if the judge's scorers are recorded in one.
    An exception or Ctrl-C leaves kept changes in place and the undecided matrix bit for bit as it was.
    """
    journal = journal or Journal()
    with progress.phase("baseline", len(my_part(range(judge.baseline_size)))) as advance, counting(advance):
        baseline = judge.measure_baseline()
    progress.fact("baseline score", f"{baseline.mean:+.4f}")
    if baseline.empty_answers or baseline.cut_answers:
        progress.fact(
            "answers",
            f"of {len(baseline.answers)} the model left {baseline.empty_answers} empty and did not end "
            f"{baseline.cut_answers}, which were cut at --max-new-tokens",
        )
    trials: list[Trial] = []
    most = len(candidates) if limit is None else min(limit, len(candidates))
    with progress.phase("search", most) as advance:
        for candidate in candidates:
            if len(trials) == most:
                break
            if is_passed_over(candidate, trials):
                continue
            started = time.monotonic()
            progress.event(candidate)
            journal.subject = f"{candidate.matrix.name} rank {candidate.rank}"
            with weights.trying(candidate.matrix) as attempt:
                attempt.reduce(candidate.rank)
                judgement = judged(judge)
                if judgement.verdict == "kept":
                    attempt.keep()
            trials.append(Trial(candidate, judgement, time.monotonic() - started))
            progress.event(trials[-1])
            advance(1)
    return SearchResult(baseline, judge.best, tuple(trials))


def is_passed_over(candidate: Candidate, trials: Sequence[Trial]) -> bool:
    """Whether what became of the same matrix's other ranks leaves no reason to try this one.

    In the published order, from gentle to hard, a matrix is given up once a rank of it was not kept; candidates with
    a prediction stand on their own, but for what wouldn't go below a rank that was kept.
    """
    earlier = [trial for trial in trials if trial.candidate.matrix == candidate.matrix]
    if candidate.predicted is None:
        return not all(trial.kept for trial in earlier)
    return any(trial.kept and trial.candidate.rank <= candidate.rank for trial in earlier)


def judged(judge: Judge) -> Judgement:
    """The judge's verdict, `failed` where the model can't be scored with the candidate."""
    try:
        return judge.judge()
    except ScoreError as error:
        return Judgement("failed", None, None, None, reason=str(error))


class Judge:
    """Compares the model as it is with the best so far or the base, and holds what is known of both.

    acceptance: the rule; the published one if not given. race: stop scoring a candidate that can't win any more.
    screen: a cheaper scorer; what it calls worse is not scored. guard: asked last, about what would be kept.
    With the scorer alone every candidate is scored
    on every item, as in the published laser scripts.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        acceptance: Acceptance | None = None,
        race: Race | None = None,
        screen: Scorer | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._scorer = scorer
        self._acceptance = acceptance or Improve()
        self._race = race
        self._screen = screen
        self._guard = guard
        self.baseline = Scores((), ())
        self.best = Scores((), ())
        self._best_screened = Scores((), ())

    @property
    def baseline_size(self) -> int:
        """How many items are measured for the baseline, by all of its scorers together."""
        return sum(each.size for each in (self._scorer, self._guard, self._screen) if each)

    def measure_baseline(self) -> Scores:
        """Score the model as the base and the best so far, on every item."""
        everything = range(self._scorer.size)
        self.best = self._race.measure(self._scorer) if self._race else self._scorer.score(everything)
        self.baseline = self.best
        if self._guard:
            self._guard.measure_baseline()
        self._best_screened = self._screened()
        return self.best

    def judge(self) -> Judgement:
        """Compare the model as the acceptance says; where the verdict is `kept` it is the best from now on."""
        screened = self._screened()
        change = screened.mean - self._best_screened.mean if self._screen else None
        if self._screen and is_worse(screened, self._best_screened):
            return Judgement("screened", None, None, change)
        other = self.baseline if self._acceptance.against_base else self.best
        scores = self._scores(other)
        before = other.on(scores.items).mean
        if len(scores.items) < self._scorer.size:
            return Judgement("stopped", scores, before, change)
        if not self._acceptance.accepts(scores, other):
            return Judgement("restored", scores, before, change)
        guard_loss = self._guard.loss() if self._guard else None
        if self._guard and guard_loss is None:
            return Judgement("guarded", scores, before, change, reason=UNBOUNDED)
        if self._guard and guard_loss is not None and guard_loss > self._guard.limit:
            return Judgement("guarded", scores, before, change, guard_loss)
        self.best, self._best_screened = scores, screened
        return Judgement("kept", scores, before, change, guard_loss)

    def _screened(self) -> Scores:
        return self._screen.score(range(self._screen.size)) if self._screen else Scores((), ())

    def _scores(self, other: Scores) -> Scores:
        if self._race:
            return self._race.run(self._scorer, other, self._acceptance, like=self.best)
        return self._scorer.score(range(self._scorer.size), like=self.best)


def is_worse(scores: Scores, best: Scores) -> bool:
    """Whether a one-sided t test says, at a risk of 0.05, that the mean went down."""
    return len(scores.items) > 1 and upper_bound(scores.differences(best), math.inf, SCREEN_RISK) < 0
