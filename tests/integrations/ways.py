"""Runs of `tests/sharded_runs.py`, in one process and in two, and what each way has to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.builders import ROOT

SCRIPT = str(ROOT / "tests" / "sharded_runs.py")
BUILT = Path(os.environ.get("SPLASER_INTEGRATIONS", "")) / "deepspeed" / "bin" / "python"
HAS_DEEPSPEED = BUILT.is_file() or find_spec("deepspeed") is not None
PYTHON = str(BUILT) if BUILT.is_file() else sys.executable
"""That of DeepSpeed's environment, where `make test-integrations` has built it: there every way can be run."""
needs_deepspeed = pytest.mark.skipif(
    not HAS_DEEPSPEED, reason="DeepSpeed isn't installed here: `make test-integrations` builds it and runs this"
)


def run_ways(folder: Path, model: Path, *ways: str, script: str = SCRIPT) -> None:
    """Run the script alone, and in two processes with these ways."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    two = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    for launcher, names in (((), ()), (two, ways)):
        command = [PYTHON, *launcher, script, str(folder), str(model), *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]


def check_way(way: str, found: Path) -> None:
    """What was found in two processes is what one finds."""
    one = json.loads((found / ("lora-one.json" if way.startswith("lora-") else "one.json")).read_text())
    two = json.loads((found / f"{way}.json").read_text())
    assert {"after", "before"} <= two.keys()
    for when, spread in two.items():
        alone = one[when]
        assert alone["steps"], "this run has to keep something to show anything"
        assert [named(step) for step in spread["steps"]] == [named(step) for step in alone["steps"]]
        assert spread["scores"] == pytest.approx(alone["scores"], abs=1e-5)
        assert spread["logits"] == pytest.approx(alone["logits"], abs=1e-4)


def named(step: dict) -> tuple:
    return step["name"], step["rank"], step["edge"], step["shape"]
