from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from transformers.utils import logging

from splaser_plugin import LaserCallback
from splaser_plugin.integrations.training import undisturbed
from tests.builders import tiny_llama
from tests.integrations.trainings import CONFIG

pytestmark = pytest.mark.slow


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
