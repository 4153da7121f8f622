"""The same search however the model is spread over two real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import ROOT
from tests.sharded_runs import WAYS

SCRIPT = str(ROOT / "tests" / "sharded_runs.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tiny_folder, tmp_path_factory) -> Path:
    """Folder with what each way found, in one process and in two."""
    folder = tmp_path_factory.mktemp("ways")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for launcher in ([sys.executable], TORCHRUN):
        command = [*launcher, SCRIPT, str(folder), str(tiny_folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def named(step: dict) -> tuple:
    return step["name"], step["rank"], step["edge"], step["shape"]


@pytest.mark.parametrize("way", WAYS)
def test_the_recipe_and_what_is_saved_are_those_of_one_process(way, found):
    one = json.loads((found / ("lora-one.json" if way.startswith("lora-") else "one.json")).read_text())
    two = json.loads((found / f"{way}.json").read_text())
    for alone, spread in zip(one, two, strict=True):
        assert alone["steps"], "this run has to keep something to show anything"
        assert [named(step) for step in spread["steps"]] == [named(step) for step in alone["steps"]]
        assert spread["scores"] == pytest.approx(alone["scores"], abs=1e-5)
        assert spread["logits"] == pytest.approx(alone["logits"], abs=1e-4)


def test_fsdp_version_1_is_refused_with_the_key_of_each_tool(found):
    said = (found / "fsdp1.txt").read_text()
    assert said.startswith("ModelError: FSDP version 1 flattens the weights. Use version 2")
    for key in (
        'fsdp_config={"version": 2}',
        "`accelerate launch --fsdp_version 2`",
        "fsdp_version: 2",
        "`splaser laser`",
    ):
        assert key in said


def test_laser_in_the_main_process_alone_is_told_so(found):
    said = (found / "main-alone.txt").read_text()
    assert said.startswith("ConfigError: 1 of 2 processes called laser() within 2 s, and all have to")
    assert "`if is_main_process`" in said
