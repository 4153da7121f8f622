from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from splaser_plugin.acceptance import Confident, Improve
from splaser_plugin.racing import Race
from splaser_plugin.scoring import Scores
from tests.test_racing import Column, noise, whole


def test_the_published_rule_takes_any_strict_improvement():
    best = Scores((0, 1), (0.5, 0.25))
    assert Improve().accepts(Scores((0, 1), (0.5, 0.2500001)), best)
    assert not Improve().accepts(best, best)
    assert not Improve().accepts(Scores((0, 1), (0.5, 0.2499)), best)


@pytest.mark.parametrize("size", [7, 64])
def test_confident_is_scipys_paired_t_test_at_a_share_of_alpha(size):
    best = whole(noise(size, 0.0, seed=100))
    rule = Confident(0.2, 4)
    for seed in range(20):
        scores = whole(noise(size, 0.1 * seed / size**0.5, seed))
        p_value = stats.ttest_rel(scores.values, best.values, alternative="greater").pvalue
        assert rule.accepts(scores, best) == (p_value < 0.05)


def test_a_few_changed_pairs_among_many_equal_ones_are_never_significant():
    best = Scores(tuple(range(100)), (0.0,) * 100)
    for changed in (4, 5):
        scores = Scores(best.items, (0.1,) * changed + (0.0,) * (100 - changed))
        assert Confident(0.05, 1).accepts(scores, best) is (changed == 5)


def test_one_pair_is_never_significant():
    assert Confident(0.5, 1).bar([0.3], 1) == math.inf
    assert not Confident(0.5, 1).accepts(Scores((0,), (1.0,)), Scores((0,), (0.0,)))


def simulated_search(acceptance, models, *, race=None):
    """Accepted candidates and pairs scored, where the scores of the first model and of 15 candidates are given."""
    best, accepted, scored = whole(models[0].tolist()), [], 0
    for place, values in enumerate(models[1:]):
        column = Column(values.tolist())
        scores = race.run(column, best, acceptance) if race else column.score(range(64))
        scored += len(scores.items)
        if len(scores.items) == 64 and acceptance.accepts(scores, best):
            best = scores
            accepted.append(place)
    return accepted, scored


def pure_noise(seed):
    return np.random.default_rng(seed).normal(0.0, 0.1, (16, 64))


def test_of_pure_noise_confident_accepts_anything_in_at_most_5_percent_of_searches():
    rule = Confident(0.05, 15)
    luck = [bool(simulated_search(rule, pure_noise(seed))[0]) for seed in range(400)]
    assert np.mean(luck) <= 0.05
    published = [bool(simulated_search(Improve(), pure_noise(seed))[0]) for seed in range(100)]
    assert np.mean(published) > 0.85


def test_confident_finds_a_planted_improvement():
    for seed in range(20):
        models = pure_noise(seed)
        models[8] += 0.08
        assert simulated_search(Confident(0.05, 15), models)[0] == [7]


def test_racing_with_confident_saves_half_and_accepts_the_same():
    rule, scored = Confident(0.05, 15), 0
    for seed in range(40):
        models = pure_noise(seed)
        models[4] += 0.15
        accepted, asked = simulated_search(rule, models, race=Race(64, seed=seed))
        assert accepted == simulated_search(rule, models)[0]
        scored += asked
    assert scored < 0.5 * 40 * 15 * 64
