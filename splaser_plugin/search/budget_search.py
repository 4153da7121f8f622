"""The search of `--objective compress`: budgets from gentle to hard, until one of them fails its test.

Which budgets there are, and their order, is settled before the first is tested, and the first that fails ends the
search. Such a fixed sequence needs no correction for the number of tests: with each at the full alpha, anything
harmful is accepted with a probability of alpha at most, since the first harmful budget has to pass its own test
(Maurer, Hothorn & Lehmacher 1995). Where a budget has to pass two tests, it takes both, which makes neither easier.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from splaser_plugin.progress import SILENT, Progress
from splaser_plugin.search.budgets import Budget, BudgetTrial
from splaser_plugin.search.journal import Journal
from splaser_plugin.search.judge import Judge, judged
from splaser_plugin.search.search import SearchResult, measured_baseline
from splaser_plugin.weights.in_memory import Attempt, Weights
from splaser_plugin.weights.matrices import Matrix


def search_budgets(
    weights: Weights,
    budgets: Sequence[Budget],
    judge: Judge,
    text: Judge | None = None,
    *,
    journal: Journal | None = None,
    progress: Progress = SILENT,
) -> SearchResult:
    """Reduce the model to one budget after the other, and keep the last before the first that isn't accepted.

    Args:
        weights: The model's; their reducer is what the budgets were planned by.
        budgets: From gentle to hard.
        judge: Says whether a budget's model is accepted, compared with the base.
        text: A second judge that has to accept it too.
        journal: Told which budget is being measured, if the judges' scorers are recorded in one.
        progress: Told of each budget tried.

    Returns:
        What was tried. Beside the model, a copy of every matrix that a budget reduces is held until then. An
        exception or Ctrl-C leaves the model bit for bit as it came.
    """
    journal = journal or Journal()
    baseline = measured_baseline(judge, progress)
    if text is not None:
        measured_baseline(text, progress, "text baseline")
    trials: list[BudgetTrial] = []
    kept: Budget | None = None
    with ExitStack() as held, progress.phase("search", len(budgets)) as advance:
        matrices = {matrix: None for budget in budgets for matrix in budget.ranks}
        model = _Reduced({matrix: held.enter_context(weights.trying(matrix)) for matrix in matrices})
        for budget in budgets:
            started = time.monotonic()
            model.bring_to(budget.ranks)
            with journal.measuring(f"budget {budget.share:g}"):
                judgement = judged(judge)
                of_text = judged(text) if text is not None and judgement.outcome == "kept" else None
            trials.append(BudgetTrial(budget, judgement, of_text, time.monotonic() - started))
            progress.event(trials[-1])
            advance(1)
            if not trials[-1].kept:
                break
            kept = budget
        model.bring_to(kept.ranks if kept else {})
        model.keep()
    accepted = [trial.judgement.scores for trial in trials if trial.kept and trial.judgement.scores]
    return SearchResult(baseline, accepted[-1] if accepted else baseline, (), tuple(trials))


class _Reduced:
    """A model whose matrices are brought to one set of ranks after the other, each time from what they were."""

    def __init__(self, attempts: Mapping[Matrix, Attempt]) -> None:
        self._attempts = attempts
        self._ranks: Mapping[Matrix, int] = {}

    def bring_to(self, ranks: Mapping[Matrix, int]) -> None:
        """ranks: of the matrices that are reduced; all others are as they were, bit for bit."""
        for matrix, attempt in self._attempts.items():
            if ranks.get(matrix) == self._ranks.get(matrix):
                continue
            attempt.undo()
            if matrix in ranks:
                attempt.reduce(ranks[matrix])
        self._ranks = ranks

    def keep(self) -> None:
        """Make the present ranks final."""
        for matrix in self._ranks:
            self._attempts[matrix].keep()
