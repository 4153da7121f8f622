"""Training that goes on after a stopped laser, under DeepSpeed's ZeRO in the real Trainer on two processes.

Searches under ZeRO stand with all other ways to spread a model, in `tests/integrations/test_sharded.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.integrations.ways import run_ways
from tests.sharded_runs import ZERO
from tests.tools.runs import HERE, tensors


@pytest.fixture(scope="module")
def stopped(whole_folder, tmp_path_factory) -> Path:
    """Folder with the model that each way trained after a stopped laser."""
    folder = tmp_path_factory.mktemp("stopped")
    run_ways(folder, whole_folder, script=str(HERE / "stopped_runs.py"))
    return folder


@pytest.mark.parametrize("way", ZERO)
def test_what_a_stopped_laser_has_kept_outlasts_the_next_step_and_other_masters_keep_their_digits(
    way, stopped, whole_folder
):
    alone, trained, base = tensors(stopped / "one"), tensors(stopped / way), tensors(whole_folder)
    assert all(torch.equal(value, trained[name]) for name, value in alone.items())
    moved = {name: float((value.bfloat16() - trained[name]).abs().max()) for name, value in base.items()}
    assert sum(most > 1e-6 for most in moved.values()) == 1
    assert json.loads((stopped / f"{way}.json").read_text()) == 0
