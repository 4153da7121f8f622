from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splaser_plugin.errors import RankError
from splaser_plugin.reduction.allocation import allocate, curve, gauge_storage, plain_storage


def random_curves(seed, count=4, short=6, storage=gauge_storage):
    random = np.random.default_rng(seed)
    curves = []
    for _ in range(count):
        shape = (int(random.integers(short, 2 * short)), short)
        squares = np.sort(random.exponential(size=short) ** 3)[::-1]
        curves.append(curve(shape, np.append(np.cumsum(squares[::-1])[::-1], 0.0), storage))
    return curves


def best_of_all(curves, parameters):
    """The least cost of every choice there is."""
    return min(
        sum(cost_curve.costs[place] for cost_curve, place in zip(curves, places, strict=True))
        for places in itertools.product(*(range(len(curve.ranks)) for curve in curves))
        if sum(cost_curve.sizes[place] for cost_curve, place in zip(curves, places, strict=True)) <= parameters
    )


def best_by_dynamic_programming(curves, parameters):
    """Least cost for each number of parameters up to that, one matrix after the other."""
    best = np.zeros(parameters + 1)
    for one_curve in curves:
        after = np.full(parameters + 1, np.inf)
        for cost, size in zip(one_curve.costs, one_curve.sizes, strict=True):
            if size > parameters:
                continue
            after[size:] = np.minimum(after[size:], best[: parameters + 1 - size] + cost)
        best = after
    return best[parameters]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 1.0), st.sampled_from([plain_storage, gauge_storage]))
def test_no_choice_of_ranks_of_that_size_costs_less(seed, share, storage):
    curves = random_curves(seed, storage=storage)
    dense = sum(int(curve.sizes[-1]) for curve in curves)
    least = sum(int(curve.sizes.min()) for curve in curves)
    found = allocate(curves, max(least, int(share * dense)))
    assert found.parameters <= max(least, int(share * dense))
    assert found.cost == pytest.approx(best_of_all(curves, found.parameters), rel=1e-9, abs=1e-12)
    assert found.cost == pytest.approx(best_by_dynamic_programming(curves, found.parameters), rel=1e-9, abs=1e-12)


def test_the_price_of_a_parameter_bounds_what_the_rest_of_the_budget_could_save():
    curves = random_curves(3, count=12, short=20)
    budget = int(0.8 * sum(int(curve.sizes[-1]) for curve in curves))
    found = allocate(curves, budget)
    optimum = best_by_dynamic_programming(curves, budget)
    assert found.cost - optimum <= found.price * (budget - found.parameters) + 1e-9


def test_a_matrix_whose_loss_is_dear_keeps_its_full_rank():
    cheap = np.array([10, 6, 1.5, 0.5, 0.0])
    found = allocate([curve((4, 4), costs, gauge_storage) for costs in (cheap, 100 * cheap)], 28)
    assert found.ranks == [2, 4]
    assert found.parameters == 12 + 16


def test_nothing_is_cut_where_everything_fits():
    curves = random_curves(1)
    dense = sum(int(curve.sizes[-1]) for curve in curves)
    found = allocate(curves, dense)
    assert found.ranks == [int(curve.ranks[-1]) for curve in curves]
    assert (found.cost, found.price, found.parameters) == (0.0, 0.0, dense)


def test_ranks_without_a_cost_are_cut_for_free():
    found = allocate([curve((5, 4), np.array([9.0, 2.0, 0.0, 0.0, 0.0]), gauge_storage)], 20)
    assert found.ranks == [2] and found.cost == 0


def test_smaller_budgets_are_nested_in_larger_ones():
    curves = random_curves(5, count=20, short=16)
    dense = sum(int(curve.sizes[-1]) for curve in curves)
    ranks = [allocate(curves, int(share * dense)).ranks for share in (0.95, 0.9, 0.8, 0.6, 0.5)]
    for larger, smaller in itertools.pairwise(ranks):
        assert all(less <= more for less, more in zip(smaller, larger, strict=True))


def test_two_factors_are_a_choice_only_below_break_even():
    costs = np.arange(11.0)[::-1]
    assert curve((10, 10), costs, plain_storage).ranks.tolist() == [1, 2, 3, 4, 10]
    assert curve((10, 10), costs, gauge_storage).ranks.tolist() == list(range(1, 11))
    assert curve((10, 10), costs, gauge_storage, least_rank=7).ranks.tolist() == [7, 8, 9, 10]
    assert gauge_storage(10, 10, 10) == 100


def test_a_budget_below_the_lowest_ranks_is_refused():
    curves = random_curves(2)
    least = sum(int(curve.sizes.min()) for curve in curves)
    with pytest.raises(RankError, match=f"{least - 1:,} parameters, but the lowest ranks of 4 matrices take {least:,}"):
        allocate(curves, least - 1)


def test_two_hundred_matrices_take_less_than_a_second():
    squares = np.random.default_rng(0).exponential(size=(210, 576))
    curves = [curve((1536, 576), np.append(np.cumsum(square[::-1])[::-1], 0.0), gauge_storage) for square in squares]
    started = time.perf_counter()
    allocate(curves, int(0.9 * 210 * 1536 * 576))
    assert time.perf_counter() - started < 5, "a second on an idle machine, with room for a busy one"
