from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.random import Generator
from scipy import stats
from torch import nn

from splaser_plugin.errors import RankError
from splaser_plugin.reduction.measured_reducer import measured_reducer
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.search.acceptance import Harmless
from splaser_plugin.search.budget_search import search_budgets
from splaser_plugin.search.budgets import Budget, least_removed, packed, plan_budgets, shares, unpacked
from splaser_plugin.search.guard import Guard
from splaser_plugin.search.journal import Journal, RecordedScorer
from splaser_plugin.search.judge import Judge
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import Matrix
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
    told = r"budget 0.5: not even 0.02 can be reached, which removes 20,000,000 of 1,000,000,000 parameters; "
    with pytest.raises(RankError, match=told + r"14 matrices .* factors have 17,\d\d\d to give. Lower"):
        plan_budgets(costs, 10**9, 0.5, in_nats=True)
    with pytest.raises(RankError, match=r"0 matrices that can be stored as factors have 0 to give"):
        plan_budgets({}, 1000, 0.2, in_nats=True)
    found = plan_budgets(costs, 18_432, 0.99, in_nats=True)
    assert 0.8 < found[-1].share < 0.99


def test_every_budget_removes_something_however_small_it_is(planned):
    weights, _ = planned
    [budget] = plan_budgets(weights.reducer.costs, 18_432, 1e-12, in_nats=False)
    assert budget.parameters_removed > 0 and budget.ranks


def test_a_share_asks_for_no_more_than_its_own_parameters():
    assert 0.07 * 100 > 7 and 0.1 * 18_430 == 1843
    assert [least_removed(0.07, 100), least_removed(0.1, 18_430), least_removed(0.1, 18_431)] == [7, 1843, 1844]
    assert least_removed(1e-12, 1000) == 1


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


class Drawn:
    """A scorer with a row of drawn values for each state of a matrix, which it tells by the sum of the weights."""

    name = "drawn"

    def __init__(self, weight, states, values):
        self.size = values.shape[1]
        self._weight, self._states, self._values = weight, states, values

    def score(self, items, like=None):
        values = self._values[self._states[float(self._weight.sum())]]
        return Scores(tuple(items), tuple(values[list(items)].tolist()))


class Columns:
    """A reducer that keeps the first columns."""

    def truncated(self, matrix, weight, rank):
        return torch.where(torch.arange(weight.shape[1]) < rank, weight, 0)


class Ladder:
    """Budgets of one small matrix, which are searched again and again with other draws."""

    def __init__(self, budgets):
        self._weights = Weights(nn.Linear(16, 16))
        self._weights.reduce_by(Columns())
        self._matrix = Matrix("linear", "weight", "linear", None, (16, 16))
        self._before = self._weights.hold(self._matrix)
        self._weight = self._weights.parameters[self._matrix.parameter].detach()
        self._states, self._budgets = {float(self._weight.sum()): 0}, []
        for place in range(1, budgets + 1):
            rank = min(self._matrix.shape) - place
            self._budgets.append(Budget(place / 50, {self._matrix: rank}, place, None))
            self._weights.reduce(self._matrix, rank)
            self._states[float(self._weight.sum())] = place
            self._weights.put_back(self._matrix, self._before)

    def judge(self, values, alpha):
        """values: (1 + budgets, items), the base's first."""
        scorer = RecordedScorer(Drawn(self._weight, self._states, values), Journal())
        content = Guard(Drawn(self._weight, self._states, np.zeros_like(values)), 0.1)
        return Judge(scorer, acceptance=Harmless(TOLERANCE, alpha), guards=[content])

    def accepted(self, *judges):
        """Which budgets a search accepts, the first being 0."""
        found = search_budgets(self._weights, self._budgets, *judges)
        kept = [place for place, trial in enumerate(found.budgets) if trial.kept]
        assert self._states[float(self._weight.sum())] == (kept[-1] + 1 if kept else 0)
        self._weights.put_back(self._matrix, self._before)
        return kept


TOLERANCE, NOISE, ITEMS, SEARCHES = 0.02, 0.1, 48, 500
ALL_HARMFUL = (0.02, 0.03, 0.04, 0.05, 0.06)
"""The first just so."""
HARMFUL_LATER = (-0.05, 0.02, 0.02, 0.02, 0.02)
DRAWS = {"normal": Generator.standard_normal, "skewed": lambda random, shape: 1 - random.standard_exponential(shape)}
"""Of how far pairs differ from the mean; skewed: most lose a little less, and few much more."""


def drawn(random, losses, draw, noise=NOISE):
    """Scores of the base and of budgets of these true losses, (1 + budgets, items): what differs is mostly common."""
    common, own = draw(random, (1, ITEMS)), draw(random, (len(losses), ITEMS))
    base = random.standard_normal(ITEMS)
    return np.vstack([base, base + noise * (0.8 * common + 0.6 * own) - np.array(losses)[:, None]])


def errs(random, draw, alpha):
    """How often a single t test of such values, whose mean is minus the tolerance, says that it is above that."""
    values = 0.8 * draw(random, (20_000, ITEMS)) + 0.6 * draw(random, (20_000, ITEMS))
    return np.mean(stats.ttest_1samp(values, 0, axis=1, alternative="greater").pvalue < alpha)


@pytest.mark.parametrize(
    ("losses", "alpha", "noise", "of_text"),
    [
        (ALL_HARMFUL, 0.05, "normal", False),
        (ALL_HARMFUL, 0.05, "skewed", False),
        (ALL_HARMFUL, 0.2, "normal", True),
        (HARMFUL_LATER, 0.2, "normal", False),
        (HARMFUL_LATER, 0.2, "skewed", False),
    ],
)
def test_a_harmful_budget_is_accepted_as_often_as_one_test_errs(losses, alpha, noise, of_text):
    """Neither more often, as by going on after a failure, nor less, as by dividing alpha among the budgets."""
    random, ladder, draw = np.random.default_rng(0), Ladder(len(losses)), DRAWS[noise]
    harmless = sum(loss < TOLERANCE for loss in losses)
    wrong = 0
    for _ in range(SEARCHES):
        judges = [ladder.judge(drawn(random, losses, draw), alpha)]
        if of_text:
            judges.insert(0, ladder.judge(drawn(random, [-0.5] * len(losses), draw), alpha))
        wrong += any(place >= harmless for place in ladder.accepted(*judges))
    expected = alpha if noise == "normal" else errs(random, draw, alpha)
    assert abs(wrong / SEARCHES - expected) < 3 * math.sqrt(expected * (1 - expected) / SEARCHES)


def test_one_test_errs_more_often_where_few_pairs_lose_much():
    assert errs(np.random.default_rng(0), DRAWS["normal"], 0.05) == pytest.approx(0.05, abs=0.005)
    assert errs(np.random.default_rng(0), DRAWS["skewed"], 0.05) == pytest.approx(0.076, abs=0.005)


def test_harmless_budgets_are_accepted_without_a_correction_for_their_number():
    random, ladder = np.random.default_rng(0), Ladder(15)
    losses = [-0.02] * 15
    kept = [len(ladder.accepted(ladder.judge(drawn(random, losses, DRAWS["normal"], 0.05), 0.05))) for _ in range(50)]
    assert np.mean([count == 15 for count in kept]) > 0.9
