"""The same search under DeepSpeed's ZeRO, in the real Trainer on two processes, as in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.integrations.ways import check_way, run_ways
from tests.sharded_runs import RESUMED, ZERO, ZERO_REFUSED, ZERO_WAYS
from tests.tools.runs import ENVIRONMENTS, HERE, tensors

PYTHON = Path(str(ENVIRONMENTS)) / "deepspeed/bin/python"


@pytest.fixture(scope="module")
def found(tiny_folder, tmp_path_factory) -> Path:
    """Folder with what each way found."""
    folder = tmp_path_factory.mktemp("zero")
    run_ways(PYTHON, folder, tiny_folder, *ZERO_WAYS, *ZERO_REFUSED)
    return folder


@pytest.fixture(scope="module")
def stopped(tiny_folder, tmp_path_factory) -> Path:
    """Folder with the model that each way trained after a stopped laser."""
    folder = tmp_path_factory.mktemp("stopped")
    run_ways(PYTHON, folder, tiny_folder, script=str(HERE / "stopped_runs.py"))
    return folder


@pytest.mark.parametrize("way", ZERO_WAYS)
def test_the_recipe_and_what_is_saved_are_those_of_one_process(way, found):
    check_way(way, found)


@pytest.mark.parametrize("way", RESUMED[1:])
def test_under_lora_the_lasered_base_is_restored_when_training_goes_on(way, found):
    alone, _ = json.loads((found / "lora-one-resumed.json").read_text())
    whole, resumed = json.loads((found / f"{way}-resumed.json").read_text())
    assert whole == pytest.approx(alone, abs=1e-4)
    assert resumed == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("way", ["zero2-offload", "own-zero2-offload"])
def test_offloading_is_refused(way, found):
    said = (found / f"{way}.txt").read_text()
    assert said.startswith("ModelError: DeepSpeed's offload_optimizer was never tried with the laser. Leave it out of")
    assert "`splaser laser` on the checkpoint" in said


def test_a_model_without_room_as_a_whole_is_refused_before_there_is_an_engine(found):
    said = (found / "zero3-no-room.txt").read_text()
    assert "more than fits on one device" in said
    assert "Use when='before'." in said


@pytest.mark.parametrize("way", ZERO)
def test_what_a_stopped_laser_has_kept_outlasts_the_next_step_and_other_masters_keep_their_digits(
    way, stopped, tiny_folder
):
    alone, trained, base = tensors(stopped / "one"), tensors(stopped / way), tensors(tiny_folder)
    assert all(torch.equal(value, trained[name]) for name, value in alone.items())
    moved = {name: float((value.bfloat16() - trained[name]).abs().max()) for name, value in base.items()}
    assert sum(most > 1e-6 for most in moved.values()) == 1
    assert json.loads((stopped / f"{way}.json").read_text()) == 0
