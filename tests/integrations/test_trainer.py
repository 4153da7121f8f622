from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    TrainerCallback,
)

from splaser_plugin import LaserCallback, LaserConfig, choose, expand, laser, load, load_scan, scan
from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.errors import RecipeError
from splaser_plugin.weights.adapted import MergedWeights
from tests.builders import EXAMPLE_PAIRS, TO_COMPRESS, changed, states, tiny_llama
from tests.integrations.trainings import CONFIG, AtFirstStep, Logs, steps_of

pytestmark = pytest.mark.slow


def test_after_training_the_model_in_memory_on_disk_and_saved_later_are_the_same(trainer_of, pairs, tmp_path):
    model, logs = tiny_llama(), Logs()
    callback = LaserCallback(when="after", pairs=pairs, config=CONFIG)
    trainer = trainer_of(model, callback, logs)
    trainer.train()
    assert steps_of(callback)
    trainer.save_model(str(tmp_path / "saved"))
    lasered = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "lasered")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not changed(states(model), states(lasered))
    assert not changed(states(model), states(saved))
    assert Recipe.load(tmp_path / "run" / "lasered" / "recipe.json") == callback.result.recipe
    for name in ("results.json", "tokenizer.json", "scan.json"):
        assert (tmp_path / "run" / "lasered" / name).is_file()


def test_where_nothing_is_kept_what_was_trained_is_written_all_the_same(trainer_of, pairs, tmp_path):
    model = tiny_llama()
    callback = LaserCallback(when="after", pairs=pairs, config=dataclasses.replace(CONFIG, accept="confident"))
    trainer_of(model, callback).train()
    assert callback.result.is_unchanged
    assert not changed(states(model), states(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "lasered")))


@pytest.mark.parametrize(("scorer", "way"), [("margin", "fisher"), ("semantic", "whitened")])
def test_a_trained_model_is_compressed_and_written_in_factors(trainer_of, tmp_path, scorer, way):
    model = tiny_llama()
    options = {"embedder": "self", "max_new_tokens": 6, "samples": 16, "held_out_fraction": 0.4}
    config = LaserConfig(**TO_COMPRESS, **options, scorer=scorer, reduce=way)
    callback = LaserCallback(when="after", pairs=EXAMPLE_PAIRS, config=config)
    trainer_of(model, callback).train()
    assert callback.result.search.kept_budget == "4 %"
    small = load(tmp_path / "run" / "lasered")
    assert model.num_parameters() - small.num_parameters() == callback.result.search.parameters_removed > 0
    assert not changed(states(model), states(expand(small)))
    assert callback.result.held_out.loss_verdict and len(callback.result.held_out.result.items) >= 6


def test_a_callback_compresses_as_python_does(trainer_of, tokenizer):
    model = tiny_llama()
    options = {"budget": 0.04, "tolerance": 5.0, "samples": 16, "calibration_tokens": 200, "device": "cpu"}
    config = LaserConfig(objective="compress", **options)
    first, callback = AtFirstStep(), LaserCallback(when="before", pairs=EXAMPLE_PAIRS, config=config)
    trainer_of(model, callback, first).train()
    by_python = laser(tiny_llama(), EXAMPLE_PAIRS, config=config, tokenizer=tokenizer)
    assert callback.result.search.kept_budget == by_python.search.kept_budget == "4 %"
    assert not changed(first.weights, states(by_python.model))
    assert callback.result.held_out == by_python.held_out


def test_given_the_trainer_what_belongs_to_its_making_is_done_at_once(trainer_of, pairs):
    model = tiny_llama()
    before = states(model)
    trainer = trainer_of(model)
    callback = LaserCallback(when="init", pairs=pairs, config=CONFIG, freeze_to="top", top=1, trainer=trainer)
    assert changed(before, states(model)) == steps_of(callback) != set()
    lasered = states(model)
    trainer.add_callback(callback)
    trainer.train()
    assert changed(lasered, states(model)) == {name + ".weight" for name in callback.selection.names}


def test_before_training_the_same_parameters_are_lasered_in_place(trainer_of, pairs):
    model = tiny_llama()
    first, before, identities = AtFirstStep(), states(model), [id(parameter) for parameter in model.parameters()]
    callback = LaserCallback(when="before", pairs=pairs, config=CONFIG)
    trainer_of(model, callback, first).train()
    assert changed(before, first.weights) == steps_of(callback) != set()
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert changed(first.weights, states(model))


def test_at_init_the_weights_change_before_there_is_an_optimizer(trainer_of, pairs):
    model = tiny_llama()
    before = states(model)
    callback = LaserCallback(when="init", pairs=pairs, config=CONFIG)
    trainer = trainer_of(model, callback, Logs())
    assert trainer.optimizer is None
    assert changed(before, states(model)) == steps_of(callback) != set()
    trainer.train()
    assert "laser/score_after" in trainer.state.log_history[0]


@pytest.mark.parametrize("when", ["before", "init", "after"])
def test_training_with_nothing_kept_is_bit_for_bit_plain_training(when, trainer_of, pairs, monkeypatch):
    def run(*callbacks):
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        model = tiny_llama(attention_dropout=0.1)
        model.config.use_cache = False
        trainer = trainer_of(model, *callbacks, gradient_checkpointing=True)
        trainer.train()
        settings = (
            model.config.use_cache,
            model.is_gradient_checkpointing,
            model.dtype,
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
        )
        draws = (random.random(), np.random.rand(), torch.rand(3).tolist())
        return states(model), settings, draws, [log["loss"] for log in trainer.state.log_history if "loss" in log]

    plain = run()
    monkeypatch.setattr("splaser_plugin.search.acceptance.Improve.accepts", lambda rule, scores, best: False)
    callback = LaserCallback(when=when, pairs=pairs, config=CONFIG)
    with_callback = run(callback)
    assert len(callback.result.search.trials) == 4
    assert not changed(plain[0], with_callback[0])
    assert plain[1:] == with_callback[1:]


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_the_callback_leaves_the_weights_as_they_were(raised, trainer_of, pairs, monkeypatch):
    model = tiny_llama()
    taken = {}

    def breaks(rule, scores, best):
        raise raised

    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **rest):
            taken["weights"] = states(model)

    monkeypatch.setattr("splaser_plugin.search.acceptance.Improve.accepts", breaks)
    trainer = trainer_of(model, AtTheEnd(), LaserCallback(when="after", pairs=pairs, config=CONFIG))
    with pytest.raises(raised):
        trainer.train()
    assert not changed(taken["weights"], states(model))


def test_a_resumed_run_is_not_lasered_again(trainer_of, pairs, tmp_path, caplog):
    first = LaserCallback(when="before", pairs=pairs, config=CONFIG)
    trainer_of(tiny_llama(), first, save_strategy="steps", save_steps=1).train()
    again = LaserCallback(when="before", pairs=pairs, config=CONFIG)
    trainer = trainer_of(tiny_llama(), again, max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert first.result is not None
    assert again.result is None
    assert "resumed at step 1: the laser before training is not repeated" in caplog.text


def test_after_training_it_is_the_best_model_that_is_lasered(trainer_of, pairs):
    taken = {}

    class LastStep(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, metrics=None, **rest):
            taken[state.global_step] = states(model)
            metrics["eval_rank"] = state.global_step  # the first checkpoint is the best

    callback = LaserCallback(when="after", pairs=pairs, config=CONFIG)
    model = tiny_llama()
    trainer = trainer_of(
        model, LastStep(), callback,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="rank", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    assert changed(taken[1], states(model)) == steps_of(callback) != set()


def test_freezing_trains_exactly_the_matrices_of_highest_snr(trainer_of):
    model = tiny_llama()
    before = states(model)
    callback = LaserCallback(when=None, freeze_to="top", top=1)
    trainer = trainer_of(model, callback, gradient_checkpointing=True)
    trainer.train()
    chosen = {name + ".weight" for name in callback.selection.names}
    assert len(chosen) == 7
    assert changed(before, states(model)) == chosen
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(model.get_parameter(name)) for name in chosen}


def test_freezing_goes_by_the_given_scan_of_the_same_weights_and_refuses_another(trainer_of, tmp_path, monkeypatch):
    model = tiny_llama()
    scan(model, output=tmp_path / "scan.json")
    scan(tiny_llama(seed=5), output=tmp_path / "other.json")
    monkeypatch.setattr("splaser_plugin.integrations.trainer.scan_source", None)
    callback = LaserCallback(when=None, freeze_to="top", top=1, config=LaserConfig(scan=str(tmp_path / "scan.json")))
    trainer_of(model, callback)
    assert callback.selection.names == choose(load_scan(tmp_path / "scan.json"), top=1).names
    other = LaserCallback(when=None, freeze_to="top", top=1, config=LaserConfig(scan=str(tmp_path / "other.json")))
    with pytest.raises(RecipeError, match=r"scan .*other\.json: of the weights \w{12} of .*, and these are \w{12}"):
        trainer_of(model, other)


def test_under_lora_the_merged_weights_are_lasered_and_saved_whole(trainer_of, pairs, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    taken = {}

    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **rest):
            taken["merged"] = MergedWeights(model).state_dict()
            taken["adapters"] = {name: value.clone() for name, value in states(model).items() if "lora_" in name}

    callback = LaserCallback(when="after", pairs=pairs, config=CONFIG)
    trainer = trainer_of(model, AtTheEnd(), callback, learning_rate=0.05)
    trainer.train()
    lasered = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "lasered")
    now = MergedWeights(model)
    for name, value in lasered.state_dict().items():
        torch.testing.assert_close(value, now.state_dict()[name], rtol=0, atol=1e-6)
    assert changed(taken["merged"], now.state_dict()) == steps_of(callback) != set()
    for step in callback.result.recipe.steps:
        weight = lasered.get_parameter(step.name + ".weight")
        assert torch.linalg.matrix_rank(weight.double(), rtol=1e-4) == step.rank
    assert not changed(taken["adapters"], {name: tensor for name, tensor in states(model).items() if "lora_" in name})
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, lasered(ids).logits, rtol=1e-3, atol=1e-3)
