from __future__ import annotations

import io

import pytest
from rich.console import Console

from splaser_plugin.candidates import Candidate
from splaser_plugin.matrices import Matrix
from splaser_plugin.scoring import Scores
from splaser_plugin.search import Judgement, Trial
from splaser_plugin.terminal import TerminalProgress
from splaser_plugin.weights import Weights

SCORES = Scores((0, 4), (0.25, 0.5))


@pytest.mark.parametrize(
    ("judgement", "told"),
    [
        (Judgement("kept", SCORES, 0.25, None), "score +0.3750 (+0.1250)  kept"),
        (Judgement("restored", SCORES, 0.5, None), "score +0.3750 (-0.1250)  restored"),
        (Judgement("stopped", SCORES, 0.5, -0.1), "score +0.3750 (-0.1250)  stopped after 2 items"),
        (Judgement("guarded", SCORES, 0.25, None, 1.0375), "score +0.3750 (+0.1250)  guarded at 1.0375"),
        (Judgement("screened", None, None, -0.125), "screen -0.1250  screened"),
    ],
)
def test_a_line_tells_how_far_a_candidate_came(tiny_model, judgement, told):
    matrix: Matrix = Weights(tiny_model).matrices()[0][0]
    printed = io.StringIO()
    TerminalProgress(Console(file=printed)).trial(Trial(Candidate(matrix, 4, "iqr", 1.0, 0.5), judgement, 1.0))
    assert printed.getvalue().split() == f"1 {matrix.name} rank 4 of {min(matrix.shape)} {told}".split()
