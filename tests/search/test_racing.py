from __future__ import annotations

import numpy as np
import pytest

from splaser_plugin.data.pairs import Pair
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.scoring.margin import MarginScorer
from splaser_plugin.search.acceptance import Improve
from splaser_plugin.search.judge import Judge
from splaser_plugin.search.racing import Race
from tests.planted import Column, noise, whole


@pytest.mark.slow
def test_the_same_weights_have_the_same_scores(tiny_model, tokenizer):
    texts = [" ".join(["word"] * length) for length in range(1, 41)]
    pairs = [Pair(({"role": "user", "content": text},), f"{text} yes", f"no {text}") for text in texts]
    scorer = MarginScorer(tiny_model.bfloat16(), Prompter(tokenizer), pairs, batch_size=16)
    judge = Judge(scorer, race=Race(len(pairs)))
    judge.measure_baseline()
    judgement = judge.judge()
    assert judgement.outcome == "restored"
    assert judgement.scores == judge.best


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 33, 128, 300])
def test_a_candidate_that_may_win_is_scored_once_on_every_item(size):
    best, column = whole([0.0] * size), Column(noise(size, 0.2))
    scores = Race(size).run(column, best, Improve())
    assert scores == whole(column.values)
    assert sorted(column.asked) == list(range(size))


@pytest.mark.parametrize("size", [17, 33, 128])
def test_a_candidate_that_is_clearly_worse_stops_after_the_first_items(size):
    column = Column(noise(size, -0.3))
    scores = Race(size).run(column, whole([0.0] * size), Improve())
    assert len(scores.items) == 16
    assert scores.values == tuple(column.values[item] for item in scores.items)


def test_an_equal_candidate_is_not_stopped():
    values = noise(64, 0.0)
    assert Race(64).run(Column(values), whole(values), Improve()) == whole(values)


def test_all_candidates_meet_the_items_in_one_random_order():
    first, second = Column(noise(128, 1.0, seed=1)), Column(noise(128, 2.0, seed=2))
    best = whole([0.0] * 128)
    Race(128, seed=3).run(first, best, Improve())
    Race(128, seed=3).run(second, best, Improve())
    assert first.asked == second.asked
    other = Column(first.values)
    Race(128, seed=4).run(other, best, Improve())
    assert set(other.asked[:16]) != set(first.asked[:16])


def test_few_candidates_are_stopped_that_would_have_won():
    """Planted: 400 candidates whose mean over all items is just above the best model's."""
    stopped = 0
    for seed in range(400):
        values = np.array(noise(128, 0.0, seed))
        values += 1e-6 - values.mean()
        stopped += len(Race(128, seed=seed).run(Column(values.tolist()), whole([0.0] * 128), Improve()).items) < 128
    assert stopped / 400 < 0.1


def test_most_items_are_saved_on_candidates_that_are_worse():
    asked = 0
    for seed in range(50):
        column = Column(noise(128, -0.05, seed))
        Race(128, seed=seed).run(column, whole([0.0] * 128), Improve())
        asked += len(column.asked)
    assert asked < 0.5 * 50 * 128
