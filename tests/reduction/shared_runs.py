"""A run that a test starts in one or two processes: `python tests/reduction/shared_runs.py FILE`.

FILE-RANK.pt gets what each process has found: the moments of every matrix of a tiny model, by name.
"""

from __future__ import annotations

import sys

import torch

from splaser_plugin.distributed import join_processes, process_index
from splaser_plugin.reduction.calibration import window_rows
from splaser_plugin.reduction.moments import Moments, measure
from splaser_plugin.weights.in_memory import Weights
from tests.reduction.models import tiny_fused

join_processes()
weights = Weights(tiny_fused("mixtral"))
rows = window_rows([range(start, start + 20) for start in (3, 140, 77)])
found = measure(weights, weights.matrices()[0], rows)
measured = {matrix.name: (moments.short, moments.gram) for matrix, moments in found if isinstance(moments, Moments)}
torch.save(measured, f"{sys.argv[1]}-{process_index()}.pt")
