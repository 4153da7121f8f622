from __future__ import annotations

import numpy as np
import pytest
import torch

from splaser_plugin.errors import MatrixError
from splaser_plugin.scanning.scan import scan_source
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.search.acceptance import Confident, Harmless, Improve
from splaser_plugin.search.candidates import Candidate, choose_candidates
from splaser_plugin.search.judge import Judge
from splaser_plugin.search.racing import Race
from splaser_plugin.search.search import search
from splaser_plugin.weights.in_memory import Weights
from tests.builders import tiny_llama
from tests.planted import Planted, outcomes


def test_keeps_exactly_what_makes_the_score_better(tiny_model, candidates):
    names = [candidate.matrix.name for candidate in candidates]
    scorer = Planted(tiny_model, dict(zip(names, [0.2, -0.1, 0.0, 0.3, -0.4], strict=True)))
    found = search(Weights(tiny_model), candidates, Judge(scorer))
    assert [trial.kept for trial in found.trials] == [True, False, False, True, False]
    assert found.baseline.mean == 0.0
    assert found.final.mean == pytest.approx(0.5)
    assert [candidate.matrix.name for candidate in found.kept] == [names[0], names[3]]
    assert [trial.judgement.best_before for trial in found.trials] == pytest.approx([0.0, 0.2, 0.2, 0.2, 0.5])
    for candidate, trial in zip(candidates, found.trials, strict=True):
        parameter = tiny_model.get_parameter(candidate.matrix.parameter)
        assert torch.equal(parameter, scorer.before[candidate.matrix.parameter]) is not trial.kept


def planted_search(candidates, effects, *, acceptance=None, race=None, noise=0.1):
    model = tiny_llama()
    names = [candidate.matrix.name for candidate in candidates]
    scorer = Planted(model, dict(zip(names, effects, strict=True)), size=128, noise=noise)
    judge = Judge(scorer, acceptance=acceptance, race=race)
    return search(Weights(model), candidates, judge), scorer


@pytest.mark.parametrize("seed", range(5))
def test_racing_keeps_what_the_whole_search_keeps_and_scores_less(candidates, seed):
    effects = [-0.08, 0.01, -0.05, -0.1, 0.02]
    exact, all_of_it = planted_search(candidates, effects)
    raced, scored = planted_search(candidates, effects, race=Race(128, seed=seed))
    assert raced.kept == exact.kept == (candidates[1], candidates[4])
    assert raced.final == exact.final
    assert scored.asked < 0.8 * all_of_it.asked


def test_confident_keeps_only_what_is_no_luck(candidates):
    effects = [0.005, 0.08, -0.02, 0.01, 0.0]
    found, _ = planted_search(candidates, effects, acceptance=Confident(0.05, 5))
    assert outcomes(found) == ["restored", "kept", "restored", "restored", "restored"]
    raced, _ = planted_search(candidates, effects, acceptance=Confident(0.05, 5), race=Race(128))
    assert raced.kept == found.kept
    assert "stopped" in outcomes(raced)


def test_racing_in_which_nobody_falls_behind_is_the_whole_search(candidates):
    effects = [0.1, 0.05, 0.0, 0.2, 0.1]
    exact, _ = planted_search(candidates, effects)
    raced, _ = planted_search(candidates, effects, race=Race(128))
    assert [trial.judgement for trial in raced.trials] == [trial.judgement for trial in exact.trials]


def test_a_stopped_candidate_is_compared_on_its_own_items(candidates):
    found, _ = planted_search(candidates, [0.2, -0.3, 0.0, 0.0, 0.0], race=Race(128))
    stopped = found.trials[1].judgement
    assert stopped.outcome == "stopped"
    assert len(stopped.scores.items) == len(stopped.scores.values) == 16
    best = found.trials[0].judgement.scores
    assert stopped.best_before == pytest.approx(sum(best.values[item] for item in stopped.scores.items) / 16)
    assert stopped.scores.mean - stopped.best_before < 0


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_search_leaves_no_undecided_weight(tiny_model, candidates, raised):
    class Breaks(Planted):
        calls = 0

        def score(self, items, like=None):
            self.calls += 1
            if self.calls == 4:
                raise raised
            return super().score(items, like)

    scorer = Breaks(tiny_model, {candidates[0].matrix.name: 1.0})
    with pytest.raises(raised):
        search(Weights(tiny_model), candidates, Judge(scorer))
    changed = [
        name for name, parameter in tiny_model.named_parameters() if not torch.equal(parameter, scorer.before[name])
    ]
    assert changed == [candidates[0].matrix.parameter]


def test_candidates_are_the_reducible_matrices_of_lowest_snr(tiny_model):
    weights = Weights(tiny_model)
    scan = scan_source(weights)
    chosen = choose_candidates(scan, weights.matrices()[0])[:5]
    rank_of = {matrix.name: (matrix.edges["iqr"].rank, min(matrix.shape)) for matrix in scan.matrices}
    expected = [matrix.name for matrix in scan.ranked() if rank_of[matrix.name][0] < rank_of[matrix.name][1]][:5]
    assert [candidate.matrix.name for candidate in chosen] == expected
    assert all(candidate.rank == max(1, rank_of[candidate.matrix.name][0]) for candidate in chosen)


def test_a_model_without_noise_has_no_candidates():
    model = tiny_llama()
    weights = Weights(model)
    for matrix in weights.matrices()[0]:
        weights.write(matrix, torch.eye(*matrix.shape))
    with pytest.raises(MatrixError, match=r"every singular value of all 14 matrices signal.*another edge"):
        choose_candidates(scan_source(weights), weights.matrices()[0])


class Noise:
    """A scorer by which every measurement is that of a new model: noise around a mean."""

    name = "noise"
    size = 64

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.mean = 0.0

    def score(self, items, like=None):
        return Scores(tuple(items), tuple(self.random.normal(self.mean, 0.1, len(items)).tolist()))


def kept_of_noise(seed, acceptance, *, raced, planted=None):
    """Which of 15 candidates are kept; all are noise, but the planted one is 0.1 better."""
    scorer = Noise(seed)
    judge = Judge(scorer, acceptance=acceptance, race=Race(scorer.size, seed=seed) if raced else None)
    judge.measure_baseline()
    kept = []
    for candidate in range(15):
        scorer.mean = 0.1 if candidate == planted else 0.0
        if judge.judge().outcome == "kept":
            kept.append(candidate)
    return kept


@pytest.mark.parametrize("raced", [False, True])
def test_of_pure_noise_the_confident_rule_keeps_something_in_at_most_5_percent_of_searches(raced):
    assert np.mean([bool(kept_of_noise(seed, Confident(0.05, 15), raced=raced)) for seed in range(400)]) <= 0.05


def test_of_pure_noise_the_published_rule_nearly_always_keeps_something():
    assert np.mean([bool(kept_of_noise(seed, Improve(), raced=False)) for seed in range(400)]) > 0.9


@pytest.mark.parametrize("raced", [False, True])
def test_the_confident_rule_finds_a_planted_improvement(raced):
    found = [kept_of_noise(seed, Confident(0.05, 15), raced=raced, planted=7) for seed in range(100)]
    assert np.mean([7 in kept for kept in found]) > 0.9
    assert np.mean([kept == [7] for kept in found]) > 0.85


def test_under_harmless_candidates_are_compared_with_the_base(candidates):
    """Each loses less than the tolerance, but all of them together lose more."""
    found, _ = planted_search(candidates, [-0.02] * 5, acceptance=Harmless(0.05, 0.05, 5), noise=0.01)
    assert outcomes(found) == ["kept", "kept", "restored", "restored", "restored"]
    assert [trial.judgement.best_before for trial in found.trials] == [0.0] * 5
    assert found.final.mean == pytest.approx(-0.04)
    raced, _ = planted_search(candidates, [-0.02] * 5, acceptance=Harmless(0.05, 0.05, 5), race=Race(128), noise=0.01)
    assert raced.kept == found.kept
    assert raced.final == found.final


def test_parameters_removed_are_those_that_factors_have_fewer(candidates):
    matrix = candidates[0].matrix
    rows, columns = matrix.shape
    for rank in range(1, min(matrix.shape) + 1):
        fewer = rows * columns - rank * (rows + columns - rank)
        assert Candidate(matrix, rank, "iqr", 1.0, 0.5).parameters_removed == fewer
        assert Candidate(matrix, rank, "iqr", 1.0, 0.5, is_factorable=False).parameters_removed == 0
    found, _ = planted_search(candidates, [0.1, -0.1, 0.1, -0.1, -0.1], noise=0.0)
    assert found.parameters_removed == candidates[0].parameters_removed + candidates[2].parameters_removed
