"""The search: try the candidates one at a time, keep what makes the score better, put back the rest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from splaser_plugin.distributed import my_part
from splaser_plugin.files.text import printable
from splaser_plugin.progress import SILENT, Progress, counting, duration
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.search.budgets import BudgetTrial
from splaser_plugin.search.candidates import Candidate
from splaser_plugin.search.journal import Journal
from splaser_plugin.search.judge import Judge, Judgement, judged
from splaser_plugin.tables import Table
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import Matrix

WORTH_TELLING_S = 1.0
"""Of a baseline, for which the time that the search may take is said; one that a journal has takes none."""


@dataclass(frozen=True)
class Trial:
    """One candidate tried."""

    candidate: Candidate
    judgement: Judgement
    elapsed_s: float

    @property
    def kept(self) -> bool:
        return self.judgement.outcome == "kept"

    @property
    def summary(self) -> str:
        """All about it in one line for people."""
        matrix, judgement = self.candidate.matrix, self.judgement
        line = f"{printable(matrix.name)}  rank {self.candidate.rank} of {min(matrix.shape)}  "
        if judgement.reason is not None:
            return f"{line}failed: {printable(judgement.reason)}"
        if judgement.scores is not None:
            line += f"score {judgement.scores.mean:+.4f} ({judgement.change})  "
        return line + judgement.summary


@dataclass(frozen=True)
class SearchResult(Table):
    """Every candidate, or every budget, that a search tried, and the scores before and after."""

    baseline: Scores
    """The model as it came."""
    final: Scores
    """The model with everything that was kept."""
    trials: tuple[Trial, ...]
    budgets: tuple[BudgetTrial, ...] = ()
    """Of a search that tries whole models, one a budget; it has no trials."""

    def __repr__(self) -> str:
        score = f"{self.baseline.mean:+.4f} -> {self.final.mean:+.4f}"
        if self.budgets:
            return f"SearchResult({self.kept_budget or 'no budget'} kept, score {score})"
        return f"SearchResult({len(self.kept)} of {len(self.trials)} candidates kept, score {score})"

    def rows(self) -> list[dict[str, Any]]:
        """One of each trial, in the order tried."""
        if self.budgets:
            return [_budget_row(trial) for trial in self.budgets]
        return [
            {
                "name": trial.candidate.matrix.name,
                "rank": trial.candidate.rank,
                "full_rank": min(trial.candidate.matrix.shape),
                "outcome": trial.judgement.outcome,
                "score": trial.judgement.scores.mean if trial.judgement.scores else None,
                "compared_with": trial.judgement.best_before,
                "seconds": round(trial.elapsed_s, 3),
            }
            for trial in self.trials
        ]

    @property
    def kept(self) -> tuple[Candidate, ...]:
        return tuple(trial.candidate for trial in self.trials if trial.kept)

    @property
    def kept_budget(self) -> str:
        """The name of the budget that was kept, `8 %`; empty for none."""
        return next((trial.budget.name for trial in reversed(self.budgets) if trial.kept), "")

    @property
    def ranks(self) -> dict[Matrix, int]:
        """What the kept matrices were reduced to in the end."""
        for trial in reversed(self.budgets):
            if trial.kept:
                return dict(trial.budget.ranks)
        return {candidate.matrix: candidate.rank for candidate in self.kept}

    @property
    def parameters_removed(self) -> int:
        """By all that was kept, if each of these matrices is stored as factors."""
        if self.budgets:
            return max((trial.budget.parameters_removed for trial in self.budgets if trial.kept), default=0)
        last_of = {candidate.matrix: candidate for candidate in self.kept}
        return sum(candidate.parameters_removed for candidate in last_of.values())

    @property
    def generated_tokens(self) -> int:
        """By the baseline and all candidates."""
        judgements = [*(trial.judgement for trial in self.trials), *(trial.judgement for trial in self.budgets)]
        tried = [judgement.scores for judgement in judgements if judgement.scores is not None]
        return sum(scores.generated_tokens for scores in (self.baseline, *tried))


def measured_baseline(judge: Judge, progress: Progress, name: str = "baseline") -> Scores:
    """The scores of the model as it came, from which the judge starts; name: what they are called to people."""
    with progress.phase(name, len(my_part(range(judge.baseline_size)))) as advance, counting(advance):
        baseline = judge.measure_baseline()
    progress.fact(f"{name} score", f"{baseline.mean:+.4f}")
    if baseline.empty_answers or baseline.cut_answers:
        progress.fact(
            "answers",
            f"of {len(baseline.answers)} the model left {baseline.empty_answers} empty and did not end "
            f"{baseline.cut_answers}, which were cut at --max-new-tokens",
        )
    if baseline.half_read_answers:
        progress.result("warning", baseline.half_read_warning)
    return baseline


def _budget_row(trial: BudgetTrial) -> dict[str, Any]:
    return {
        "budget": trial.budget.share,
        "matrices": len(trial.budget.ranks),
        "parameters_removed": trial.budget.parameters_removed,
        "predicted_cost": trial.budget.predicted_cost,
        "outcome": trial.outcome,
        "score": trial.judgement.scores.mean if trial.judgement.scores else None,
        "compared_with": trial.judgement.best_before,
        "seconds": round(trial.elapsed_s, 3),
    }


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
    began = time.monotonic()
    baseline = measured_baseline(judge, progress)
    baseline_s = time.monotonic() - began
    trials: list[Trial] = []
    most = len(candidates) if limit is None else min(limit, len(candidates))
    if baseline_s >= WORTH_TELLING_S:
        progress.fact("time left", f"{duration(most * baseline_s)} at most for {most} candidates")
    with progress.phase("search", most) as advance:
        for candidate in candidates:
            if len(trials) == most:
                break
            if is_passed_over(candidate, trials):
                continue
            started = time.monotonic()
            progress.event(candidate)
            subject = f"{candidate.matrix.name} rank {candidate.rank}"
            with journal.measuring(subject), weights.trying(candidate.matrix) as attempt:
                attempt.reduce(candidate.rank)
                judgement = judged(judge)
                if judgement.outcome == "kept":
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
