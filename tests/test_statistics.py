from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from splaser_plugin.statistics import (
    can_reach,
    largest_share,
    log_t_tail,
    paired_bootstrap,
    t_critical,
    t_quantile,
    upper_bound,
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 15, 31, 126, 501])
def test_students_t_is_that_of_scipy(degrees):
    for t in (0.0, 0.01, 0.4, 1.7, 1.8, 2.0, 9.0, 30.0):
        assert log_t_tail(t, degrees) == pytest.approx(stats.t.logsf(t, degrees), rel=1e-9)
    for probability in (0.001, 0.05, 0.4, 0.5, 0.9, 0.975, 0.9999):
        assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9, abs=1e-9)
    for risk in (0.5, 0.05, 1e-6, 1e-15, 1e-30, 1e-60):
        assert t_critical(math.log(risk), degrees) == pytest.approx(stats.t.isf(risk, degrees), rel=1e-9, abs=1e-9)


def test_students_t_has_quantiles_at_risks_that_no_float_holds():
    log_risk = -2000 * math.log(2)
    assert log_t_tail(t_critical(log_risk, 63), 63) == pytest.approx(log_risk, rel=1e-12)
    assert t_critical(log_risk, 1) == math.inf


@pytest.mark.parametrize("risk", [0.025, 1e-6])
def test_the_largest_share_is_that_of_clopper_and_pearson(risk):
    for count, size in ((0, 1), (0, 6), (0, 90), (3, 90), (89, 90), (10, 3000)):
        assert largest_share(count, size, risk) == pytest.approx(
            stats.beta.isf(risk, count + 1, size - count), rel=1e-5
        )
    assert largest_share(0, 30, 0.025) == pytest.approx(1 - 0.025 ** (1 / 30), abs=1e-8)
    assert largest_share(7, 7, risk) == 1.0


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
