"""The same search however the model is spread over two real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integrations.ways import HAS_DEEPSPEED, check_way, needs_deepspeed, run_ways
from tests.sharded_runs import REFUSED, RESUMED, WAYS, ZERO_REFUSED, ZERO_WAYS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(whole_folder, tmp_path_factory) -> Path:
    """Folder with what each way found, in one process and in two."""
    folder = tmp_path_factory.mktemp("ways")
    with_deepspeed = (*ZERO_WAYS, *ZERO_REFUSED) if HAS_DEEPSPEED else ()
    # after the last one the processes don't meet again
    run_ways(folder, whole_folder, *WAYS, *with_deepspeed, *REFUSED)
    return folder


@pytest.mark.parametrize("way", [*WAYS, *(pytest.param(way, marks=needs_deepspeed) for way in ZERO_WAYS)])
def test_the_recipe_and_what_is_saved_are_those_of_one_process(way, found):
    check_way(way, found)


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


def test_wrapping_by_size_fails_in_accelerate_alike_without_a_callback(found):
    without, with_callback = (found / "size.txt").read_text().splitlines()
    assert without == with_callback == "TypeError: Invariant encountered: value was None when it should not be"


def test_laser_in_the_main_process_alone_is_told_so(found):
    said = (found / "main-alone.txt").read_text()
    assert said.startswith("ConfigError: 1 of 2 processes called laser() within 2 s, and all have to")
    assert "`if is_main_process`" in said


@needs_deepspeed
@pytest.mark.parametrize("way", RESUMED[1:])
def test_under_lora_the_lasered_base_is_restored_when_training_goes_on(way, found):
    alone, _ = json.loads((found / "lora-one-resumed.json").read_text())
    whole, resumed = json.loads((found / f"{way}-resumed.json").read_text())
    assert whole == pytest.approx(alone, abs=1e-4)
    assert resumed == pytest.approx(whole, abs=1e-5)


@needs_deepspeed
@pytest.mark.parametrize("way", [way for way in ZERO_REFUSED if "offload" in way])
def test_deepspeeds_offloading_is_refused(way, found):
    said = (found / f"{way}.txt").read_text().splitlines()
    assert len(said) == (2 if way.startswith("own-") else 1), "by apply, too"
    for line in said:
        assert line.startswith("ModelError: DeepSpeed's offload_optimizer was never tried with the laser. Leave it out")
        assert "`splaser laser` on the checkpoint" in line


@needs_deepspeed
@pytest.mark.parametrize("way", ["own-zero0", "own-zero0-module"])
def test_deepspeed_without_zero_is_refused(way, found):
    said = (found / f"{way}.txt").read_text().splitlines()
    assert len(said) == 2, "by apply, too"
    for line in said:
        assert line.startswith("ModelError: DeepSpeed without ZeRO can't be lasered in. Set zero_optimization.stage to")


@needs_deepspeed
def test_a_model_without_room_as_a_whole_is_refused_before_there_is_an_engine(found):
    said = (found / "zero3-no-room.txt").read_text()
    assert "more than fits on one device" in said
    assert "Use when='before'." in said
