"""A run that a test starts in one or two processes: `python tests/reduction/shared_runs.py FILE`.

FILE-RANK.pt gets what each process has found: the moments of every matrix of a tiny model, by name. FILE-RANK-gauge.pt
gets the same matrices at half their rank, as they are stored.
"""

from __future__ import annotations

import sys

import torch

from splaser_plugin.distributed import join_processes, process_index
from splaser_plugin.reduction.calibration import window_rows
from splaser_plugin.reduction.measured_reducer import measured_reducer
from splaser_plugin.reduction.moments import Moments, measure
from splaser_plugin.weights.in_memory import Weights
from tests.reduction.models import tiny_fused

join_processes()
weights = Weights(tiny_fused("mixtral"))
rows = window_rows([range(start, start + 20) for start in (3, 140, 77)])
matrices = weights.matrices()[0]
found = measure(weights, matrices, rows)
measured = {matrix.name: (moments.short, moments.gram) for matrix, moments in found if isinstance(moments, Moments)}
torch.save(measured, f"{sys.argv[1]}-{process_index()}.pt")
weights.keep_factors()
reducer = measured_reducer(weights, matrices, rows, way="fisher")
weights.reduce_by(reducer)
for matrix in reducer.costs:
    weights.reduce(matrix, min(matrix.shape) // 2)
stored = {matrix.name: (form.pivots, form.skeleton, form.interpolation) for matrix, form in weights.factors.items()}
torch.save(stored, f"{sys.argv[1]}-{process_index()}-gauge.pt")
