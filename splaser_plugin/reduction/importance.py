"""How much each matrix counts, in one number, from the moments of what it reads and of its gradients."""

from __future__ import annotations

import math

from splaser_plugin.reduction.moments import Moments
from splaser_plugin.weights.matrices import Matrix


def fisher_cost(moments: Moments) -> float:
    """What a reduction predicts that the matrix's removal costs: 1/2 tr(W' G W C), in nats a prediction.

    It is the cost of rank 0 in `splaser_plugin.reduction.truncation`, before anything is shrunk.
    """
    return 0.5 * float((moments.gram.double() * moments.short.double()).sum())


def gradient_size(moments: Moments, matrix: Matrix) -> float:
    """Root mean square of the inputs' norm times that of the output gradients': sqrt(tr C tr G)."""
    of_short = float(moments.short.double().diagonal().sum())
    return math.sqrt(of_short * moments.long_mean * max(matrix.shape))
