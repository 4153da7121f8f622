"""The callback in the ways in which trainings begin, go on and end."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, Trainer, TrainerCallback

from splaser_plugin import LaserCallback, LaserConfig
from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.errors import ConfigError, ModelError
from tests.builders import changed, states, tiny_llama
from tests.integrations.trainings import CONFIG, AtFirstStep, steps_of, training_arguments

pytestmark = pytest.mark.slow

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def adapted(**changes):
    torch.manual_seed(1)
    return get_peft_model(tiny_llama(), LoraConfig(**{**LORA, **changes}))


def base_of(model):
    return {name: tensor for name, tensor in states(model).items() if "lora_" not in name}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(5, 25)[None]).logits


@pytest.fixture
def remaking(tmp_path, tokens, tokenizer):
    """A trainer that makes its model as training begins."""

    def make(*callbacks, **changes):
        return Trainer(
            model_init=lambda: tiny_llama(), args=training_arguments(tmp_path / "run", **changes), train_dataset=tokens,
            eval_dataset=tokens, processing_class=tokenizer, callbacks=list(callbacks),
        )  # fmt: skip

    return make


@pytest.mark.parametrize("with_trainer", [False, True])
def test_the_model_that_model_init_makes_is_the_one_that_is_lasered(with_trainer, remaking, pairs):
    callback, first = LaserCallback(when="init", pairs=pairs, config=CONFIG), AtFirstStep()
    trainer = remaking(first) if with_trainer else remaking(callback, first)
    if with_trainer:
        callback = LaserCallback(when="init", pairs=pairs, config=CONFIG, trainer=trainer)
        assert callback.result is None
        trainer.callback_handler.callbacks.insert(0, callback)
    trainer.train()
    assert changed(states(tiny_llama()), first.weights) == steps_of(callback) != set()


def test_what_model_init_makes_is_not_frozen_so_that_is_refused_before_training(remaking):
    trainer = remaking(LaserCallback(when=None, freeze_to="top", top=1))
    with pytest.raises(ModelError, match=r"isn't the one.*model_init.*freeze_all_but\(model, names\)"):
        trainer.train()
    with pytest.raises(ModelError, match=r"model_init makes a new model.*freeze_all_but\(model, names\)"):
        LaserCallback(when=None, freeze_to="top", top=1, trainer=remaking())


def test_added_later_it_lasers_as_training_begins_and_freezes_nothing(trainer_of, pairs):
    model, first = tiny_llama(), AtFirstStep()
    trainer = trainer_of(model)
    callback = LaserCallback(when="init", pairs=pairs, config=CONFIG)
    trainer.add_callback(callback)
    trainer.add_callback(first)
    trainer.train()
    assert changed(states(tiny_llama()), first.weights) == steps_of(callback) != set()
    trainer = trainer_of(tiny_llama())
    trainer.add_callback(LaserCallback(when=None, freeze_to="top", top=1))
    with pytest.raises(ModelError, match=r"added later.*LaserCallback\(trainer=trainer"):
        trainer.train()


@pytest.mark.parametrize("init", [True, False], ids=["zero", "random"])
@pytest.mark.parametrize("when", ["before", "init"])
def test_under_lora_the_lasered_base_is_saved_and_restored_when_training_goes_on(
    when, init, trainer_of, pairs, tmp_path
):
    def run(steps, **resume):
        model = adapted(init_lora_weights=init)
        callback = LaserCallback(when=when, pairs=pairs, config=CONFIG)
        trainer = trainer_of(model, callback, max_steps=steps, save_strategy="steps", save_steps=1)
        trainer.train(**resume)
        return model, callback, [log["loss"] for log in trainer.state.log_history if "loss" in log]

    model, callback, losses = run(2)
    assert callback.result.search.kept
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "lasered_base")
    adapter = PeftModel.from_pretrained(base, str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(logits(adapter), logits(model), rtol=1e-4, atol=1e-4)
    again, _, resumed = run(2, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert resumed == losses
    assert not changed(base_of(model), base_of(again))


def test_without_the_lasered_base_an_adapter_is_not_trained_on(trainer_of, pairs, tmp_path):
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    trainer_of(adapted(), max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer = trainer_of(adapted(), LaserCallback(when="before", pairs=pairs, config=CONFIG))
    with pytest.raises(ModelError, match=r"was trained on a lasered base, and .*lasered_base isn't there"):
        trainer.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("with_trainer", [False, True])
@pytest.mark.parametrize("when", ["before", "init"])
def test_a_smaller_batch_after_too_little_memory_is_no_second_laser(
    when, with_trainer, tmp_path, tokens, tokenizer, pairs, monkeypatch
):
    class Cramped(Trainer):
        def training_step(self, model, inputs, *rest, **named):
            if len(inputs["input_ids"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(model, inputs, *rest, **named)

    monkeypatch.setattr("splaser_plugin.search.acceptance.Improve.accepts", lambda rule, scores, best: True)
    model, first = tiny_llama(), AtFirstStep()
    callback = None if with_trainer else LaserCallback(when=when, pairs=pairs, config=CONFIG)
    arguments = training_arguments(tmp_path / "run", auto_find_batch_size=True, per_device_train_batch_size=4)
    callbacks = [callback, first] if callback else [first]
    trainer = Cramped(model, arguments, train_dataset=tokens, processing_class=tokenizer, callbacks=callbacks)
    if callback is None:
        callback = LaserCallback(when=when, pairs=pairs, config=CONFIG, trainer=trainer)
        trainer.callback_handler.callbacks.insert(0, callback)
    trainer.train()
    assert changed(states(tiny_llama()), first.weights) == steps_of(callback)
    assert len(steps_of(callback)) == 4
    assert "laser/score_after" in trainer.state.log_history[0]


@pytest.mark.parametrize("with_trainer", [False, True])
@pytest.mark.parametrize(
    ("kinds", "then"), [(("after",) * 2, "after"), (("before",) * 2, "before"), (("before", "init"), "before")]
)
def test_two_callbacks_that_laser_the_same_model_at_the_same_end_of_training_are_refused_before_either_does(
    kinds, then, with_trainer, trainer_of, pairs
):
    model = tiny_llama()
    message = f"two LaserCallbacks would laser this model {then} training. Leave one out.$"
    if with_trainer:
        trainer = trainer_of(model)
        first = LaserCallback(when=kinds[0], pairs=pairs, config=CONFIG, trainer=trainer)
        trainer.add_callback(first)
        with pytest.raises(ConfigError, match=message):
            LaserCallback(when=kinds[1], pairs=pairs, config=CONFIG, trainer=trainer)
    else:
        first, second = (LaserCallback(when=when, pairs=pairs, config=CONFIG) for when in kinds)
        with pytest.raises(ConfigError, match=message):
            trainer_of(model, first, second)
        assert second.result is None
    assert first.result is None
    assert not changed(states(tiny_llama()), states(model))
    again = LaserCallback(when=kinds[0], pairs=pairs, config=CONFIG)
    trainer_of(model, again).train()
    assert again.result is not None, "what was refused doesn't keep the model from another training"


@pytest.mark.parametrize("kind", ["init", "before"])
def test_a_second_callback_is_refused_as_the_trainer_is_made_with_the_news_that_the_first_has_lasered(
    kind, trainer_of, pairs
):
    first, second = (LaserCallback(when=when, pairs=pairs, config=CONFIG) for when in ("init", kind))
    with pytest.raises(ConfigError, match=r"Leave one out\. The first has changed the model: load it anew\.$"):
        trainer_of(tiny_llama(), first, second)
    assert second.result is None and steps_of(first)


def test_two_callbacks_that_were_made_before_either_was_added_are_refused_before_either_lasers(trainer_of, pairs):
    model = tiny_llama()
    trainer = trainer_of(model)
    both = [LaserCallback(when="before", pairs=pairs, config=CONFIG, trainer=trainer) for _ in range(2)]
    for callback in both:
        trainer.add_callback(callback)
    with pytest.raises(ConfigError, match="two LaserCallbacks would laser this model before training"):
        trainer.train()
    assert [callback.result for callback in both] == [None, None]
    assert not changed(states(tiny_llama()), states(model))


@pytest.mark.parametrize(("when", "has_changed"), [("after", False), ("before", True)])
def test_of_two_callbacks_added_later_the_second_is_refused_as_training_begins(when, has_changed, trainer_of, pairs):
    model, first_step = tiny_llama(), AtFirstStep()
    trainer = trainer_of(model, first_step)
    first, second = (LaserCallback(when=when, pairs=pairs, config=CONFIG) for _ in range(2))
    for callback in (first, second):
        trainer.add_callback(callback)
    said = "The first has changed the model: load it anew" if has_changed else "Leave one out"
    with pytest.raises(ConfigError, match=rf"two LaserCallbacks would laser this model {when} training\..*{said}\.$"):
        trainer.train()
    assert second.result is None and not hasattr(first_step, "weights")
    assert bool(changed(states(tiny_llama()), states(model))) is has_changed


def test_a_laser_at_each_end_of_training_is_two_lasers(trainer_of, pairs):
    both = [LaserCallback(when=when, pairs=pairs, config=CONFIG) for when in ("before", "after")]
    trainer_of(tiny_llama(), *both).train()
    first, second = (callback.result.recipe for callback in both)
    assert first.steps
    assert first.weights_identity != second.weights_identity


@pytest.mark.parametrize("with_trainer", [False, True])
def test_each_trial_of_a_search_is_lasered_into_its_own_folder_and_pruned_ones_are_not(
    with_trainer, remaking, pairs, tmp_path
):
    optuna = pytest.importorskip("optuna")
    callback = None if with_trainer else LaserCallback(pairs=pairs, config=CONFIG)
    trainer = remaking(*[callback] * (not with_trainer), eval_strategy="steps", eval_steps=1)
    if callback is None:
        callback = LaserCallback(pairs=pairs, config=CONFIG, trainer=trainer)
        trainer.add_callback(callback)
    pruned = []

    class PruneThird(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            pruned.append(trial.number)
            return trial.number == 2

    tried, recipes = [], {}

    def space(trial):
        tried.append(trial.suggest_float("learning_rate", 1e-3, 1e-1))
        return {"learning_rate": tried[-1]}

    class Ends(TrainerCallback):
        def on_train_end(self, args, state, control, **rest):
            recipes[tried[-1]] = callback.result.recipe

    trainer.add_callback(Ends())
    best = trainer.hyperparameter_search(
        space, compute_objective=lambda metrics: metrics["eval_loss"], n_trials=3, backend="optuna",
        pruner=PruneThird(), sampler=optuna.samplers.RandomSampler(seed=0),
    )  # fmt: skip
    assert 2 in pruned
    found = {str(path.parent.relative_to(tmp_path / "run")) for path in (tmp_path / "run").glob("*/lasered")}
    assert found == {f"learning_rate={rate}" for rate in tried[:2]}
    rate = best.hyperparameters["learning_rate"]
    assert Recipe.load(tmp_path / "run" / f"learning_rate={rate}" / "lasered" / "recipe.json") == recipes[rate]
    assert len({recipe.weights_identity for recipe in recipes.values()}) > 1


@pytest.mark.parametrize("when", ["init", "before"])
def test_in_a_search_each_trial_trains_a_lasered_model(when, remaking, pairs):
    pytest.importorskip("optuna")
    callback, found = LaserCallback(when=when, pairs=pairs, config=CONFIG), []

    class Begins(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **rest):
            found.append((changed(states(tiny_llama()), states(model)), steps_of(callback), callback.result))

    remaking(callback, Begins(), max_steps=1, eval_strategy="steps", eval_steps=1).hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1)},
        compute_objective=lambda metrics: metrics["eval_loss"], n_trials=2, backend="optuna",
    )  # fmt: skip
    (lasered, steps, first), (lasered_again, steps_again, second) = found
    assert lasered == steps == lasered_again == steps_again != set()
    assert first is not second


def test_models_that_write_no_text_are_refused_at_once_but_may_be_frozen(trainer_of, pairs):
    config = tiny_llama().config
    for when in ("init", "before", "after"):
        with pytest.raises(ModelError, match=r"LlamaForSequenceClassification writes no text.*freeze_to='top'"):
            trainer_of(LlamaForSequenceClassification(config), LaserCallback(when=when, pairs=pairs, config=CONFIG))
    model = LlamaForSequenceClassification(config)
    trainer_of(model, LaserCallback(when=None, freeze_to="top", top=1))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "score.weight" in trained
    assert len(trained) == 8


def test_trained_prompts_are_refused_at_once(trainer_of, pairs):
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ModelError, match=r"has a trained prompt \(PromptTuningConfig\).*Only LoRA"):
        trainer_of(model, LaserCallback(pairs=pairs, config=CONFIG))


def test_settings_of_generation_that_cannot_be_saved_are_refused_before_training(trainer_of, pairs):
    model = tiny_llama()
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    trainer = trainer_of(model, LaserCallback(pairs=pairs, config=CONFIG))
    with pytest.raises(ModelError, match=r"can't be saved \(GenerationConfig is invalid: - `temp.*Mend model"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_normal_script_sees_what_the_laser_did(trainer_of, pairs, capsys):
    trainer_of(adapted(), LaserCallback(pairs=pairs, config=LaserConfig(scorer="margin", candidates=1))).train()
    said = capsys.readouterr().err
    for line in ("laser: kept: ", "laser: score: ", "laser: lasered model: ", "laser: adapter: save_model()"):
        assert line in said
