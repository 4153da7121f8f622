from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from splaser_plugin.statistics import (
    SMALLEST_LOG_RISK,
    can_reach,
    far_log_t_tail,
    largest_share,
    least_significant_mean,
    paired_bootstrap,
    pairs_needed,
    smallest_difference,
    t_critical,
    trimmed_mean,
    upper_bound,
)

NUMERICS_OF_OUR_OWN = Path(__file__).parent / "data" / "statistics_before_scipy.json"
"""What the functions gave when they were written out here, by what `made_by` says."""


def test_values_are_those_from_before_scipy():
    before = json.loads(NUMERICS_OF_OUR_OWN.read_text())
    accuracy = 1e-10 if scipy.__version__.startswith("1.15.") else 1e-11  # the oldest that is allowed is less exact
    for log2_risk, degrees, critical in before["t_critical"]:
        assert t_critical(log2_risk * math.log(2), degrees) == pytest.approx(critical, rel=1e-9, abs=1e-11)
    for count, size, risk, share in before["largest_share"]:
        assert largest_share(count, size, risk) == pytest.approx(share, abs=2e-9)
    for size, population, risk, bound in before["upper_bound"]:
        sample = np.random.default_rng(size).normal(0.02, 0.1, size)
        assert upper_bound(sample, population, risk) == pytest.approx(bound, rel=accuracy)
    for size, seed, low, high in before["paired_bootstrap"]:
        differences = np.random.default_rng(size).normal(0.02, 0.1, size)
        differences[::3] = 0
        assert paired_bootstrap(differences, risk=0.05, seed=seed) == pytest.approx((low, high), rel=accuracy)
    for log2_risk, size, mean in before["least_significant_mean"]:
        found = least_significant_mean([0.1, 0.2, 0.05, -0.1], size, log2_risk * math.log(2))
        assert found == pytest.approx(mean, rel=accuracy)


def test_the_tail_that_no_float_holds_goes_on_where_scipys_ends():
    for degrees in (1, 2, 7, 63, 501, 20_000):
        t = stats.t.isf(math.exp(SMALLEST_LOG_RISK), degrees)
        assert far_log_t_tail(t, degrees) == pytest.approx(SMALLEST_LOG_RISK, rel=1e-12)
        log_risk = -2000 * math.log(2)
        if degrees > 20:
            assert far_log_t_tail(t_critical(log_risk, degrees), degrees) == pytest.approx(log_risk, rel=1e-12)
    # two degrees of freedom have a quantile in closed form: t^2 = (1 - 2p)^2 / (2p (1 - p))
    assert t_critical(-400.0, 2) == pytest.approx(math.sqrt(0.5) * math.exp(200), rel=1e-12)
    assert t_critical(-2000 * math.log(2), 1) == math.inf


def test_the_largest_share_is_the_one_at_which_so_few_would_be_as_rare_as_the_risk():
    for risk in (0.025, 1e-6):
        for count, size in ((0, 1), (0, 6), (0, 90), (3, 90), (89, 90), (10, 3000)):
            share = largest_share(count, size, risk)
            assert stats.binom.cdf(count, size, share) == pytest.approx(risk, rel=1e-9)
        assert largest_share(7, 7, risk) == 1.0
    assert largest_share(0, 30, 0.025) == pytest.approx(1 - 0.025 ** (1 / 30), abs=1e-8)


def populations(random):
    yield "normal", random.normal(-0.01, 0.1, 128)
    yield "heavy tails", random.standard_t(4, 128) / 10
    yield "half unchanged", np.where(random.random(128) < 0.5, 0.0, random.normal(0.0, 0.1, 128))
    yield "two values", np.where(random.random(128) < 0.5, 0.1, -0.1)


@pytest.mark.parametrize("sampled", [16, 32, 64, 100])
def test_the_mean_of_the_population_exceeds_the_bound_as_rarely_as_promised(sampled):
    random = np.random.default_rng(sampled)
    for name, values in populations(random):
        below = [
            upper_bound(random.permutation(values)[:sampled], len(values), 0.05) < values.mean() for _ in range(1000)
        ]
        assert np.mean(below) < 0.08, name


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40), st.floats(0.001, 0.5), st.integers(1, 100))
def test_more_risk_and_a_larger_share_of_the_population_make_the_bound_tighter(sample, risk, others):
    mean, population = np.mean(sample), len(sample) + others
    bound = upper_bound(sample, population, risk)
    assert bound >= mean - 1e-12
    assert upper_bound(sample, population, risk / 2) >= bound
    assert upper_bound(sample, population + 1, risk) >= bound - 1e-12
    assert upper_bound(sample, len(sample), risk) == pytest.approx(mean)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40), st.floats(-5, 5), st.floats(0.1, 10))
def test_the_bound_moves_and_scales_with_the_values(sample, shift, scale):
    moved = [scale * value + shift for value in sample]
    expected = scale * upper_bound(sample, 50, 0.05) + shift
    assert upper_bound(moved, 50, 0.05) == pytest.approx(expected, abs=1e-9)


def planted(random, kind):
    """(60 differences, the true mean)"""
    if kind == "normal":
        return random.normal(0.02, 0.1, 60), 0.02
    return np.where(random.random(60) < 0.5, 0.0, random.normal(0.02, 0.1, 60)), 0.01


@pytest.mark.parametrize("kind", ["normal", "half unchanged"])
@pytest.mark.slow
def test_the_bootstrap_interval_covers_the_truth_as_often_as_promised(kind):
    random = np.random.default_rng(1)
    covered = 0
    for seed in range(1000):
        differences, truth = planted(random, kind)
        low, high = paired_bootstrap(differences.tolist(), risk=0.05, seed=seed, resamples=1000)
        covered += low <= truth <= high
    assert 930 <= covered <= 970


def test_the_bootstrap_interval_of_normal_values_is_as_wide_as_students():
    for size in (8, 20, 60):
        values = np.array(stats.norm.ppf((np.arange(size) + 0.5) / size))
        low, high = paired_bootstrap(values.tolist(), risk=0.05, seed=0, resamples=50_000)
        reach = stats.t.ppf(0.975, size - 1) * values.std(ddof=1) / np.sqrt(size)
        assert (low, high) == pytest.approx((-reach, reach), rel=0.06)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40), st.floats(-5, 5), st.floats(0.1, 10))
def test_the_interval_moves_and_scales_with_the_values_and_holds_their_mean(values, shift, scale):
    def interval(of):
        return paired_bootstrap(of, risk=0.05, seed=3, resamples=200)

    low, high = interval(values)
    assert interval(values) == (low, high)
    assert low - 1e-12 <= np.mean(values) <= high + 1e-12
    moved = interval([scale * value + shift for value in values])
    assert moved == pytest.approx((scale * low + shift, scale * high + shift), abs=1e-9)


def test_many_resamples_are_drawn_a_part_at_a_time_with_the_same_result(monkeypatch):
    values = np.random.default_rng(0).normal(size=30).tolist()
    whole = paired_bootstrap(values, risk=0.05, seed=0, resamples=500)
    monkeypatch.setattr("splaser_plugin.statistics.NUMBERS_AT_ONCE", 1000)
    assert paired_bootstrap(values, risk=0.05, seed=0, resamples=500) == whole


@pytest.mark.parametrize(("risk", "fewest"), [(0.05, 5), (0.025, 6), (0.05 / 15, 9)])
def test_a_few_changed_pairs_among_many_equal_ones_show_nothing(risk, fewest):
    for changed in (fewest - 1, fewest):
        differences = [0.1] * changed + [0.0] * (100 - changed)
        assert can_reach(differences, risk) is (changed == fewest)


def test_a_few_pairs_far_out_do_not_move_the_trimmed_mean():
    values = [0.1] * 18 + [50.0, -3.0]
    assert trimmed_mean(values) == pytest.approx(0.1)
    assert trimmed_mean(list(range(10))) == pytest.approx(np.mean(range(1, 9)))


@pytest.mark.parametrize("size", [12, 40, 400])
@pytest.mark.parametrize(("power", "risk"), [(0.8, 0.05), (0.9, 0.01)])
def test_the_smallest_difference_is_shown_as_often_as_it_says(size, power, risk):
    difference = smallest_difference(0.3, size, power=power, risk=risk)
    noncentrality = difference * math.sqrt(size) / 0.3
    critical = stats.t.isf(risk / 2, size - 1)
    exact = stats.nct.sf(critical, size - 1, noncentrality) + stats.nct.cdf(-critical, size - 1, noncentrality)
    assert exact == pytest.approx(power, abs=0.3 / size)


def test_planted_differences_of_that_size_are_found_by_a_t_test_four_times_in_five():
    rng, size = np.random.default_rng(0), 30
    samples = rng.normal(smallest_difference(0.2, size), 0.2, (4000, size))
    found = stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.02)


@given(st.floats(1e-3, 10), st.floats(1e-3, 10))
def test_one_pair_fewer_than_needed_is_too_few(spread, difference):
    needed = pairs_needed(spread, difference)
    assert smallest_difference(spread, needed) <= difference
    assert needed == 2 or smallest_difference(spread, needed - 1) > difference
