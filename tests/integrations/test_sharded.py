"""The same search however the model is spread over two real processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.integrations.ways import check_way, run_ways
from tests.sharded_runs import WAYS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tiny_folder, tmp_path_factory) -> Path:
    """Folder with what each way found, in one process and in two."""
    folder = tmp_path_factory.mktemp("ways")
    run_ways(sys.executable, folder, tiny_folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
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


def test_laser_in_the_main_process_alone_is_told_so(found):
    said = (found / "main-alone.txt").read_text()
    assert said.startswith("ConfigError: 1 of 2 processes called laser() within 2 s, and all have to")
    assert "`if is_main_process`" in said
