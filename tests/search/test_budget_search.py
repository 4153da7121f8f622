from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from splaser_plugin.errors import RankError
from splaser_plugin.reduction.measured_reducer import measured_reducer
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.search.acceptance import Harmless
from splaser_plugin.search.budget_search import search_budgets
from splaser_plugin.search.budgets import packed, plan_budgets, shares, unpacked
from splaser_plugin.search.guard import Guard
from splaser_plugin.search.judge import Judge
from splaser_plugin.weights.in_memory import Weights
from tests.builders import changed, states, tiny_llama


class Losing:
    """A scorer whose mean falls by a planted loss for each budget that is measured, one after the other."""

    name = "losing"

    def __init__(self, losses, *, size=64, noise=0.01):
        self.size = size
        self._left = [0.0, *losses]
        self._noise = noise
        self.calls = 0

    def score(self, items, like=None):
        random = np.random.default_rng(self.calls)
        values = random.normal(-self._left[min(self.calls, len(self._left) - 1)], self._noise, self.size)
        self.calls += 1
        return Scores(tuple(range(self.size)), tuple(values.tolist())).on(items)


@pytest.fixture
def planned():
    """Weights of a tiny model that are reduced by their own singular values, and budgets for them."""
    weights = Weights(tiny_llama(vocabulary=64))
    matrices, _ = weights.matrices()
    weights.reduce_by(measured_reducer(weights, matrices, (), way="svd"))
    entries = sum(math.prod(matrix.shape) for matrix in matrices)
    return weights, plan_budgets(weights.reducer.costs, entries, 0.1, in_nats=False)


def judge_of(losses, *, tolerance=0.05, **options):
    return Judge(Losing(losses), acceptance=Harmless(tolerance, 0.05), **options)


def test_budgets_rise_by_two_percent_up_to_the_largest():
    assert shares(0.1) == [0.02, 0.04, 0.06, 0.08, 0.1]
    assert shares(0.05) == [0.02, 0.04, 0.05]
    assert shares(0.01) == [0.01]


def test_each_budget_removes_its_share_and_goes_on_from_the_one_before(planned):
    weights, budgets = planned
    entries = sum(math.prod(matrix.shape) for matrix in weights.matrices()[0])
    assert [budget.share for budget in budgets] == [0.02, 0.04, 0.06, 0.08, 0.1]
    for budget, harder in pairwise(budgets):
        assert budget.share * entries <= budget.parameters_removed <= harder.parameters_removed
        assert all(harder.ranks[matrix] <= rank for matrix, rank in budget.ranks.items())
    assert budgets[0].predicted_cost is None
    assert unpacked(packed(budgets), weights.matrices()[0]) == budgets


def test_a_budget_below_the_lowest_ranks_is_refused_and_harder_ones_are_left_out(planned):
    weights, _ = planned
    costs = weights.reducer.costs
    with pytest.raises(RankError, match=r"budget 0.02 can't be reached: .* the lowest ranks of 14 matrices take"):
        plan_budgets(costs, 10**9, 0.5, in_nats=True)
    found = plan_budgets(costs, 18_432, 0.99, in_nats=True)
    assert 0.8 < found[-1].share < 0.99


def test_the_last_budget_that_passed_is_kept_and_all_else_put_back(planned):
    weights, budgets = planned
    before = states(weights.model)
    found = search_budgets(weights, budgets, judge_of([0.0, 0.01, 0.2, 0.0, 0.0]))
    assert [trial.outcome for trial in found.budgets] == ["kept", "kept", "restored"]
    assert found.ranks == dict(budgets[1].ranks)
    assert found.parameters_removed == budgets[1].parameters_removed
    assert found.final.mean == pytest.approx(-0.01, abs=0.005)
    reduced = {matrix.parameter for matrix in found.ranks}
    assert changed(before, weights.model.state_dict()) == reduced
    once = Weights(tiny_llama(vocabulary=64))
    once.reduce_by(weights.reducer)
    for matrix, rank in found.ranks.items():
        once.reduce(matrix, rank)
    assert not changed(once.model.state_dict(), weights.model.state_dict())


def test_a_search_whose_first_budget_fails_changes_nothing(planned):
    weights, budgets = planned
    before = states(weights.model)
    found = search_budgets(weights, budgets, judge_of([0.2, 0.0]))
    assert [trial.outcome for trial in found.budgets] == ["restored"]
    assert found.final == found.baseline and not found.ranks and found.parameters_removed == 0
    assert not changed(before, weights.model.state_dict())


def test_every_budget_may_pass(planned):
    weights, budgets = planned
    found = search_budgets(weights, budgets, judge_of([0.0] * 5))
    assert found.kept_budget == "10 %" and len(found.budgets) == 5
    assert found.rows()[4]["budget"] == 0.1


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_search_leaves_the_model_as_it_came(planned, raised):
    weights, budgets = planned
    before = states(weights.model)

    class Breaks(Losing):
        def score(self, items, like=None):
            if self.calls == 2:
                raise raised
            return super().score(items, like)

    with pytest.raises(raised):
        search_budgets(weights, budgets, Judge(Breaks([0.0] * 5), acceptance=Harmless(0.05, 0.05)))
    assert not changed(before, weights.model.state_dict())


def test_the_text_and_the_guard_have_to_accept_a_budget_too(planned):
    weights, budgets = planned
    before = states(weights.model)
    found = search_budgets(weights, budgets, judge_of([0.0] * 5), judge_of([0.0, 0.0, 0.2]))
    assert [trial.outcome for trial in found.budgets] == ["kept", "kept", "restored"]
    assert found.budgets[2].judgement.outcome == "kept" and found.budgets[2].text.outcome == "restored"
    assert found.kept_budget == "4 %"
    for matrix in found.ranks:
        weights.parameters[matrix.parameter].data.copy_(before[matrix.parameter])
    guarded = search_budgets(weights, budgets, judge_of([0.0] * 5, guards=[Guard(Losing([0.0, 0.4]), 0.1)]))
    assert [trial.outcome for trial in guarded.budgets] == ["kept", "guarded"]


def simulated(random, losses, *, tolerance=0.02, alpha=0.05, noise=0.1, size=48):
    """Of a search whose budgets have these true losses: how many it accepts. What differs is partly common to them."""
    rule, base = Harmless(tolerance, alpha), Scores(tuple(range(size)), (0.0,) * size)
    common = random.normal(0, noise, size)
    for place, loss in enumerate(losses):
        values = -loss + 0.8 * common + random.normal(0, 0.6 * noise, size)
        if not rule.accepts(Scores(base.items, tuple(values.tolist())), base):
            return place
    return len(losses)


@pytest.mark.parametrize("alpha", [0.05, 0.2])
@pytest.mark.parametrize(
    "losses",
    [
        (0.02, 0.03, 0.04, 0.05, 0.06),  # all of them harmful, the first just so
        (-0.05, -0.05, -0.05, 0.02, 0.02, 0.02, 0.02, 0.02),  # many that are just harmful, after some that aren't
        (-0.1, 0.02),
    ],
)
def test_a_harmful_budget_is_accepted_in_at_most_alpha_of_the_searches(alpha, losses):
    random = np.random.default_rng(0)
    harmless = sum(loss < 0.02 for loss in losses)
    searches = 2000
    wrong = sum(simulated(random, losses, alpha=alpha) > harmless for _ in range(searches))
    assert wrong / searches <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / searches)


def test_harmless_budgets_are_accepted_without_a_correction_for_their_number():
    random = np.random.default_rng(0)
    kept = [simulated(random, [-0.02] * 20, noise=0.05) for _ in range(200)]
    assert np.mean([count == 20 for count in kept]) > 0.9
