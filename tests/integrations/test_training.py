from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from transformers.utils import logging

from splaser_plugin import LaserCallback
from splaser_plugin.errors import ModelError
from splaser_plugin.integrations.training import check_deepspeed, undisturbed
from tests.builders import tiny_llama
from tests.integrations.trainings import CONFIG

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": 0}, "DeepSpeed without ZeRO"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "offload_param was never tried"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, "offload_optimizer was never tried"),
        ({"stage": 2, "cpu_offload": True}, "cpu_offload was never tried"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, "zero_hpz_partition_size was never tried"),
    ],
)
def test_only_plain_zero_of_deepspeed_is_taken(zero, said):
    with pytest.raises(ModelError, match=rf"{said}.*splaser laser.*--adapter DIR"):
        check_deepspeed({"zero_optimization": zero})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_plain_zero_of_deepspeed_is_taken(stage):
    check_deepspeed({"zero_optimization": {"stage": stage, "offload_param": {"device": "none"}, "mics_shard_size": -1}})


@pytest.mark.parametrize("raised", [None, ValueError])
def test_undisturbed_random_numbers_go_on_as_if_nothing_had_been_drawn(raised):
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw(), draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = draw()
    with suppress(ValueError), undisturbed():
        draw()
        if raised:
            raise raised
    assert (first, draw()) == expected


@pytest.mark.parametrize(
    ("disable_tqdm", "verbosity", "shown"),
    [
        (False, logging.WARNING, {"bars", "candidates"}),
        (True, logging.WARNING, set()),
        (True, logging.INFO, {"candidates", "facts"}),
    ],
)
def test_a_trainer_shows_the_laser_as_its_own_steps(disable_tqdm, verbosity, shown, trainer_of, pairs, capsys, caplog):
    trainer = trainer_of(tiny_llama(), LaserCallback(pairs=pairs, config=CONFIG), disable_tqdm=disable_tqdm)
    before = logging.get_verbosity()
    logging.set_verbosity(verbosity)
    try:
        trainer.train()
    finally:
        logging.set_verbosity(before)
    lines = [*capsys.readouterr().err.replace("\r", "\n").splitlines(), *caplog.messages]
    assert any("laser: search:" in line and "%|" in line for line in lines) == ("bars" in shown)
    assert sum("  rank " in line for line in lines) == (4 if "candidates" in shown else 0)
    assert any("laser: model: " in line for line in lines) == ("facts" in shown)
    assert any("laser: score: " in line for line in lines)
