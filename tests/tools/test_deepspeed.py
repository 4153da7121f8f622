"""The same search under DeepSpeed's ZeRO, in the real Trainer on two processes, as in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integrations.ways import check_way, run_ways
from tests.sharded_runs import ZERO_REFUSED, ZERO_WAYS
from tests.tools.runs import ENVIRONMENTS


@pytest.fixture(scope="module")
def found(tiny_folder, tmp_path_factory) -> Path:
    """Folder with what each way found."""
    folder = tmp_path_factory.mktemp("zero")
    run_ways(Path(str(ENVIRONMENTS)) / "deepspeed/bin/python", folder, tiny_folder, *ZERO_WAYS, *ZERO_REFUSED)
    return folder


@pytest.mark.parametrize("way", ZERO_WAYS)
def test_the_recipe_and_what_is_saved_are_those_of_one_process(way, found):
    check_way(way, found)


def test_offloading_is_refused(found):
    said = (found / "zero2-offload.txt").read_text()
    assert said.startswith("ModelError: DeepSpeed's offload_optimizer was never tried with the laser. Leave it out of")
    assert "`splaser laser` on the checkpoint" in said


def test_a_model_without_room_as_a_whole_is_refused_before_there_is_an_engine(found):
    said = (found / "zero3-no-room.txt").read_text()
    assert "more than fits on one device" in said
    assert "Use when='before'." in said
