from __future__ import annotations

import pytest
import torch

from splaser_plugin.errors import MatrixError
from splaser_plugin.scan import scan_model
from splaser_plugin.scoring import Scores
from splaser_plugin.search import Candidate, choose_candidates, search
from splaser_plugin.weights import Weights
from tests.conftest import tiny_llama


class Planted:
    """A ruler that knows how much each matrix, once changed, adds to the score."""

    name = "planted"

    def __init__(self, model, effects):
        self.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.model = model
        self.effects = effects

    def score(self):
        changed = [name for name, each in self.model.named_parameters() if not torch.equal(each, self.before[name])]
        total = sum(self.effects.get(name.removesuffix(".weight"), 0.0) for name in changed)
        return Scores((total, total), (), 0)


@pytest.fixture
def candidates(tiny_model):
    return [Candidate(matrix, 4, "iqr", 1.0, 0.5) for matrix in Weights(tiny_model).matrices()[0][:5]]


def test_keeps_exactly_what_makes_the_score_better(tiny_model, candidates):
    names = [candidate.matrix.name for candidate in candidates]
    scorer = Planted(tiny_model, dict(zip(names, [0.2, -0.1, 0.0, 0.3, -0.4], strict=True)))
    found = search(Weights(tiny_model), candidates, scorer)
    assert [trial.kept for trial in found.trials] == [True, False, False, True, False]
    assert found.baseline.mean == 0.0
    assert found.final.mean == pytest.approx(0.5)
    assert [candidate.matrix.name for candidate in found.kept] == [names[0], names[3]]
    for candidate, trial in zip(candidates, found.trials, strict=True):
        parameter = tiny_model.get_parameter(candidate.matrix.parameter)
        assert torch.equal(parameter, scorer.before[candidate.matrix.parameter]) is not trial.kept


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_search_leaves_no_undecided_weight(tiny_model, candidates, raised):
    class Breaks(Planted):
        calls = 0

        def score(self):
            self.calls += 1
            if self.calls == 4:
                raise raised
            return super().score()

    scorer = Breaks(tiny_model, {candidates[0].matrix.name: 1.0})
    with pytest.raises(raised):
        search(Weights(tiny_model), candidates, scorer)
    changed = [name for name, each in tiny_model.named_parameters() if not torch.equal(each, scorer.before[name])]
    assert changed == [candidates[0].matrix.parameter]


def test_candidates_are_the_reducible_matrices_of_lowest_snr(tiny_model):
    weights = Weights(tiny_model)
    scan = scan_model(weights)
    chosen = choose_candidates(scan, weights.matrices()[0], 5)
    rank_of = {matrix.name: (matrix.edges["iqr"].rank, min(matrix.shape)) for matrix in scan.matrices}
    expected = [matrix.name for matrix in scan.ranked() if rank_of[matrix.name][0] < rank_of[matrix.name][1]][:5]
    assert [candidate.matrix.name for candidate in chosen] == expected
    assert all(candidate.rank == max(1, rank_of[candidate.matrix.name][0]) for candidate in chosen)


def test_a_model_without_noise_has_no_candidates():
    model = tiny_llama()
    weights = Weights(model)
    for matrix in weights.matrices()[0]:
        weights.write(matrix, torch.eye(*matrix.shape))
    with pytest.raises(MatrixError, match=r"every singular value of all 14 matrices signal.*another --edge"):
        choose_candidates(scan_model(weights), weights.matrices()[0], 5)
