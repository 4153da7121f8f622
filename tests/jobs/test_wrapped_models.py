"""A loaded model is changed inside whatever was wrapped around it, and all processes have to take part."""

from __future__ import annotations

import os
import random
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

from splaser_plugin import LaserConfig, apply, laser, scan
from splaser_plugin.errors import ModelError
from tests.builders import QUICK, ROOT, changed, states, tiny_llama, torchrun

pytestmark = pytest.mark.slow

CONFIG = LaserConfig(scorer="margin", candidates=2, edge="mp", held_out_fraction=0)
IDS = torch.arange(5, 25)[None]


def wrapped(model, how):
    if how == "compiled":
        return torch.compile(model, backend="eager")
    if how == "data parallel":
        return nn.DataParallel(model)
    return torch.compile(nn.DataParallel(model), backend="eager")


@pytest.mark.parametrize("how", ["compiled", "data parallel", "compiled data parallel"])
def test_the_model_inside_is_scanned_and_changed(how, tokenizer, pairs):
    plain, model = tiny_llama(), tiny_llama()
    outer = wrapped(model, how)
    before = states(model)
    expected = laser(plain, pairs, config=CONFIG, tokenizer=tokenizer)
    found = laser(outer, pairs, config=CONFIG, tokenizer=tokenizer)
    assert found.recipe.steps == expected.recipe.steps != ()
    assert found.recipe.model == "LlamaForCausalLM"
    assert not changed(states(plain), states(model))
    with torch.no_grad():
        torch.testing.assert_close(outer(input_ids=IDS).logits, plain(IDS).logits)
    again = wrapped(tiny_llama(), how)
    assert scan(again).weights_identity == expected.recipe.weights_identity
    applied = apply(expected.recipe, again)
    assert not changed(states(model), states(applied.model))
    assert changed(before, states(applied.model))


class Module(nn.Module):
    """As a Lightning module, or any other that has a model inside."""

    def __init__(self):
        super().__init__()
        self.model = tiny_llama()


@pytest.mark.parametrize("model", [Module(), nn.Linear(3, 3), nn.DataParallel(nn.Linear(3, 3))])
def test_other_modules_are_refused_with_what_to_give(model, tokenizer, pairs):
    with pytest.raises(ModelError, match=r"is no transformers model\. Give the transformers model that is inside it"):
        laser(model, pairs, config=CONFIG, tokenizer=tokenizer)


ALONE = """
import sys
import torch.distributed as dist
from torch import nn
from transformers import AutoTokenizer
import splaser_plugin.distributed
from splaser_plugin import LaserConfig, apply, laser, scan
from splaser_plugin.errors import ConfigError
from tests.builders import THREE_PAIRS, tiny_llama

dist.init_process_group("gloo")
splaser_plugin.distributed.SAID_AFTER_S, splaser_plugin.distributed.PATIENCE_S = 0.5, 2.0
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = LaserConfig(scorer="margin", candidates=1, edge="mp")
result = laser(nn.parallel.DistributedDataParallel(tiny_llama()), THREE_PAIRS, config=config, tokenizer=tokenizer)
if dist.get_rank() == 0:
    for work in (
        lambda: laser(tiny_llama(), THREE_PAIRS, config=config, tokenizer=tokenizer),
        lambda: result.save(sys.argv[2]),
        lambda: scan(tiny_llama()),
        lambda: apply(result.recipe, tiny_llama()),
    ):
        try:
            work()
        except ConfigError as error:
            print(error)
dist.barrier()
"""


@pytest.mark.slow
def test_what_the_main_process_does_alone_is_told_so(tiny_folder, tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    command = [*torchrun(), str(script), str(tiny_folder), str(tmp_path / "out")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.strip().splitlines()
    for line, call in zip(said, ("laser()", "LaserResult.save()", "scan()", "apply()"), strict=True):
        assert line.startswith(f"1 of 2 processes called {call} within 2 s, and all have to")
        assert line.endswith("Take it out of `if is_main_process`.")
        assert f"waiting until all of 2 processes call {call}, and 1 did, for 2 s at most." in done.stderr
    assert done.stderr.count("Where that stands in `if is_main_process`, take it out: all share the work.") == 4
    assert not (tmp_path / "out").exists()


def test_in_the_middle_of_a_loop_random_states_and_training_mode_stay(tokenizer, pairs):
    model = tiny_llama(attention_dropout=0.1).train()
    parameters = [id(parameter) for parameter in model.parameters()]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = laser(model, pairs, config=LaserConfig(**{**QUICK, "candidates": 2}), tokenizer=tokenizer)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert found.search.trials
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert all(module.training for module in model.modules())
    assert [id(parameter) for parameter in model.parameters()] == parameters
