from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from splaser_plugin.scoring.scores import Scores
from splaser_plugin.search.acceptance import Confident, Harmless, Improve
from splaser_plugin.search.racing import Race
from tests.planted import Column, noise, whole


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


def test_racing_with_confident_saves_half_and_accepts_the_same():
    rule, scored = Confident(0.05, 15), 0
    for seed in range(40):
        models = pure_noise(seed)
        models[4] += 0.15
        accepted, asked = simulated_search(rule, models, race=Race(64, seed=seed))
        assert accepted == simulated_search(rule, models)[0]
        scored += asked
    assert scored < 0.5 * 40 * 15 * 64


@pytest.mark.parametrize("size", [7, 64])
def test_harmless_is_scipys_paired_t_test_against_minus_the_tolerance(size):
    base, agreed = whole(noise(size, 0.0, seed=100)), set()
    rule = Harmless(0.1, 0.2, 2)  # 0.2 / 2^2
    for seed in range(40):
        scores = whole(noise(size, 0.2 * seed / 40 - 0.1, seed))
        differences = np.subtract(scores.values, base.values)
        p_value = stats.ttest_1samp(differences, -0.1, alternative="greater").pvalue
        agreed.add(rule.accepts(scores, base))
        assert rule.accepts(scores, base) == (p_value < 0.05)
    assert agreed == {True, False}
    assert rule.bar([0.3], 1) == math.inf


def harmless_search(seed, costs, *, tolerance=0.02, noise=0.03, race=None):
    """True loss of what a search accepts, at its worst; each candidate costs something, and pairs differ."""
    random = np.random.default_rng(seed)
    rule, base = Harmless(tolerance, 0.05, len(costs)), whole([0.0] * 64)
    now, loss, worst, accepted = np.zeros(64), 0.0, 0.0, 0
    for cost in costs:
        values = now + random.normal(-cost, noise, 64)
        column = Column(values.tolist())
        scores = race.run(column, base, rule) if race else column.score(range(64))
        if len(scores.items) == 64 and rule.accepts(scores, base):
            now, loss, accepted = values, loss + cost, accepted + 1
            worst = max(worst, loss)
    return worst, accepted


def searches(count, candidates, cost, noise, *, size=64, tolerance=0.02):
    """True loss of what each search accepts at its worst, and how many: as `harmless_search`, all searches at once."""
    random = np.random.default_rng(candidates)
    rule = Harmless(tolerance, 0.05, candidates)
    widths = rule.bar([0.0, 1.0] * (size // 2), size) + tolerance  # the bar is linear in the spread
    unit = np.std([0.0, 1.0] * (size // 2), ddof=1)
    now, accepted = np.zeros((count, size)), np.zeros(count)
    for _ in range(candidates):
        values = now + random.normal(-cost, noise, now.shape)
        taken = values.mean(1) > widths * values.std(1, ddof=1) / unit - tolerance
        now[taken] = values[taken]
        accepted += taken
    return accepted * cost, accepted


@pytest.mark.parametrize("candidates", [15, 50, 100])
@pytest.mark.parametrize("cost", [0.0005, 0.001, 0.002, 0.005])
@pytest.mark.parametrize("noise", [0.003, 0.005, 0.01])
def test_the_luck_of_many_small_losses_does_not_add_up(candidates, cost, noise):
    losses, _ = searches(100, candidates, cost, noise)
    assert np.mean(losses >= 0.02 - 1e-12) <= 0.05


def test_the_fewer_candidates_a_search_has_the_more_harmless_ones_it_keeps():
    kept = {candidates: searches(100, candidates, 0.0, 0.005)[1].mean() for candidates in (15, 30, 50, 100)}
    assert kept[15] > 14
    assert kept[15] < kept[30] > kept[50] > kept[100] > 3


def test_a_heavy_loss_on_few_pairs_goes_unseen_only_up_to_the_share_that_is_stated():
    rule, size = Harmless(0.02, 0.05, 8), 90
    share = rule.unseen_share(size)
    assert share == pytest.approx(stats.beta.isf(0.05 / 2**8, 1, size), rel=1e-6)
    random = np.random.default_rng(0)
    for ruined, most in ((0.04, 1.0), (share, 0.05)):
        found = []
        for _ in range(200):
            losses = [np.where(random.random(size) < ruined, -0.5, 0.0) for _ in range(8)]
            found.append(any(rule.accepts(whole(loss.tolist()), whole([0.0] * size)) for loss in losses))
        assert np.mean(found) <= most
        assert ruined == share or np.mean(found) > 0.1, "if this is caught now, unseen_share says too much"


@pytest.mark.parametrize("cost", [0.02, 0.01, 0.005, 0.002])
@pytest.mark.parametrize("noise", [0.01, 0.03, 0.1])
def test_small_losses_do_not_add_up_to_the_tolerance_in_more_than_5_percent_of_searches(cost, noise):
    """The worst case is a loss of the tolerance by one candidate, or by many that each lose a part of it."""
    found = [harmless_search(seed, [cost] * 20, noise=noise)[0] for seed in range(100)]
    assert np.mean([loss >= 0.02 - 1e-12 for loss in found]) <= 0.05


def test_a_candidate_that_loses_the_tolerance_is_accepted_in_at_most_alpha_of_searches():
    found = [harmless_search(seed, [0.02])[1] for seed in range(1000)]
    assert 0.01 < np.mean(found) < 0.05


@pytest.mark.parametrize("raced", [False, True])
def test_harmless_candidates_are_accepted(raced):
    found = [
        harmless_search(seed, [0.0] * 8, noise=0.01, race=Race(64, seed=seed) if raced else None) for seed in range(100)
    ]
    assert np.mean([accepted for _, accepted in found]) > 7
