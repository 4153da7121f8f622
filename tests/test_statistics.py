from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from splaser_plugin.statistics import t_cumulative, t_quantile, upper_bound


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 15, 31, 126, 501])
def test_students_t_is_that_of_scipy(degrees):
    for t in (-8.0, -1.3, -0.01, 0.0, 0.4, 2.0, 9.0):
        assert t_cumulative(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-12)
    for probability in (0.001, 0.05, 0.4, 0.5, 0.9, 0.975, 0.9999):
        assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9, abs=1e-9)


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
