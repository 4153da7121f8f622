from __future__ import annotations

import copy
import dataclasses
import json
import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    LlavaProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from splaser_plugin import LaserCallback, LaserConfig
from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.errors import ConfigError, EmbedderError, ModelError, OutputError, PairsError, TextError
from splaser_plugin.integrations.training import undisturbed
from splaser_plugin.weights.adapted import MergedWeights
from splaser_plugin.weights.in_memory import Weights
from tests.builders import ROOT, changed, states, tiny_llama

CONFIG = LaserConfig(embedder="self", max_new_tokens=6, candidates=4, edge="mp")
SENTENCES = ["The cat sat on the mat.", "Rain falls mainly in spring.", "Bread needs flour.", "Stars are far."]


def training_arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "seed": 5,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **changes})


@pytest.fixture
def tokens(tokenizer):
    rows = []
    for sentence in SENTENCES * 2:
        ids = tokenizer(sentence, padding="max_length", max_length=12, truncation=True)["input_ids"]
        rows.append({"input_ids": ids, "labels": ids})
    return Dataset.from_list(rows)


@pytest.fixture
def trainer_of(tmp_path, tokens, tokenizer):
    def make(model, *callbacks, **changes):
        return Trainer(
            model=model,
            args=training_arguments(tmp_path / "run", **changes),
            train_dataset=tokens,
            eval_dataset=tokens,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )

    return make


class Logs(TrainerCallback):
    """A reporter: keeps what the trainer sends to its reporters."""

    def __init__(self):
        self.seen = {}

    def on_log(self, args, state, control, logs=None, **rest):
        self.seen.update(logs)


def steps_of(callback):
    return {step.name + ".weight" for step in callback.result.recipe.steps}


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


class Closing(TrainerCallback):
    """A reporter that closes its run at the end of training, as MLflow's: keeps what came in time."""

    def __init__(self):
        self.seen = {}
        self.is_open = False

    def on_train_begin(self, args, state, control, **rest):
        self.is_open = True

    def on_log(self, args, state, control, logs=None, **rest):
        if self.is_open:
            self.seen.update(logs)

    def on_train_end(self, args, state, control, **rest):
        self.is_open = False


def test_without_the_trainer_metrics_reach_the_log_history_and_trainer_state(trainer_of, pairs, tmp_path, caplog):
    trainer = trainer_of(tiny_llama(), LaserCallback(when="after", pairs=pairs, config=CONFIG), report_to=["none"])
    trainer.train()
    assert "laser/score_after" in trainer.state.log_history[-1]
    stored = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert stored["log_history"] == trainer.state.log_history
    assert "LaserCallback(trainer=trainer, ...)" not in caplog.text


@pytest.mark.parametrize("when", ["before", "init", "after"])
def test_with_the_trainer_metrics_reach_all_its_reporters_while_their_runs_are_open(when, trainer_of, pairs):
    logs = Closing()
    trainer = trainer_of(tiny_llama(), logs)
    callback = LaserCallback(when=when, pairs=pairs, config=CONFIG, trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    found = callback.result.search
    expected = {
        "laser/score_before": found.baseline.mean,
        "laser/score_after": found.final.mean,
        "laser/matrices_tried": 4,
        "laser/matrices_kept": len(found.kept),
        "laser/rank_removed": sum(min(each.matrix.shape) - each.rank for each in found.kept),
    }
    assert expected.items() <= logs.seen.items()
    assert logs.seen["laser/seconds"] > 0
    assert any(expected.items() <= logged.items() for logged in trainer.state.log_history)
    names = [type(each).__name__ for each in trainer.callback_handler.callbacks]
    assert names[-1] == "LaserCallback"
    assert len(names) == len(set(names))


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


def test_the_held_out_difference_is_a_metric(trainer_of):
    held_out = str(ROOT / "examples" / "data" / "held_out.jsonl")
    callback = LaserCallback(when="after", pairs=held_out, config=dataclasses.replace(CONFIG, samples=24))
    trainer = trainer_of(tiny_llama(), callback)
    trainer.train()
    verdict = callback.result.held_out
    assert len(verdict.base.items) == 7
    logged = trainer.state.log_history[-1]
    assert logged["laser/held_out_difference"] == verdict.difference
    assert (logged["laser/held_out_low"], logged["laser/held_out_high"]) == verdict.interval


def test_before_training_the_same_parameters_are_lasered_in_place(trainer_of, pairs):
    model = tiny_llama()
    before, identities = states(model), [id(parameter) for parameter in model.parameters()]
    snapshots = {}

    class AtFirstStep(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **rest):
            snapshots.setdefault("weights", states(model))

    callback = LaserCallback(when="before", pairs=pairs, config=CONFIG)
    trainer_of(model, callback, AtFirstStep()).train()
    assert changed(before, snapshots["weights"]) == steps_of(callback) != set()
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert changed(snapshots["weights"], states(model))


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
    trained = {id(each) for group in trainer.optimizer.param_groups for each in group["params"]}
    assert trained == {id(model.get_parameter(name)) for name in chosen}


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
    assert not changed(taken["adapters"], {name: each for name, each in states(model).items() if "lora_" in name})
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, lasered(ids).logits, rtol=1e-3, atol=1e-3)


def test_pairs_come_from_the_trainers_evaluation_data_if_it_has_text(trainer_of, pairs):
    trainer = trainer_of(tiny_llama())
    trainer.add_callback(LaserCallback(config=CONFIG, trainer=trainer))
    with pytest.raises(PairsError, match=r"no preference pairs were given.*Pass pairs="):
        trainer.train()
    parts = Dataset.from_list(pairs[:2]), Dataset.from_list(pairs[2:])
    wanted = {row["prompt"] for row in pairs}
    for data in (Dataset.from_list(pairs), dict(zip("ab", parts, strict=True))):
        trainer = trainer_of(tiny_llama())
        trainer.eval_dataset = data
        callback = LaserCallback(config=CONFIG, trainer=trainer)
        trainer.add_callback(callback)
        trainer.train()
        assert {pair.prompt for pair in callback.result.pairs} == wanted


def test_without_the_trainer_pairs_come_from_the_data_that_is_trained_on(trainer_of, pairs, tokens):
    rows = [{**row, **pairs[place % 4]} for place, row in enumerate(tokens)]
    callback = LaserCallback(config=CONFIG)
    trainer = trainer_of(tiny_llama(), callback, remove_unused_columns=False)
    trainer.train_dataset = Dataset.from_list(rows)
    trainer.data_collator = lambda batch: default_data_collator(
        [{key: row[key] for key in ("input_ids", "labels")} for row in batch]
    )
    trainer.train()
    assert {pair.prompt for pair in callback.result.pairs} == {row["prompt"] for row in pairs}


@pytest.mark.parametrize("when", ["init", "before", "after"])
def test_without_the_trainer_and_without_pairs_what_to_give_is_said_before_training(when, trainer_of):
    with pytest.raises(
        PairsError, match=r"Pass pairs=\.\.\., or trainer\.add_callback\(LaserCallback\(trainer=trainer"
    ):
        trainer_of(tiny_llama(), LaserCallback(when=when, config=CONFIG)).train()


def test_the_trainer_needs_a_tokenizer_or_a_processor_with_one(trainer_of, pairs, tokenizer):
    trainer = trainer_of(tiny_llama(), LaserCallback(pairs=pairs, config=CONFIG))
    for processing_class, message in (
        (None, r"has no tokenizer\. Give it processing_class=tokenizer"),
        (CLIPImageProcessorPil(), "is a CLIPImageProcessorPil, which reads no text"),
    ):
        trainer.processing_class = trainer.callback_handler.processing_class = processing_class
        with pytest.raises(ModelError, match=message):
            trainer.train()
    processor = LlavaProcessor(image_processor=CLIPImageProcessorPil(), tokenizer=tokenizer, patch_size=16)
    trainer.processing_class = trainer.callback_handler.processing_class = processor
    trainer.train()
    assert trainer.state.log_history[-1]["laser/matrices_tried"] == 4


def test_a_trainer_without_pairs_can_be_lasered_by_perplexity(trainer_of, tmp_path):
    (tmp_path / "prose.txt").write_text("The cat sat on the mat, and looked out of the window. " * 40)
    options = {**CONFIG.to_dict(), "scorer": "perplexity", "text": str(tmp_path / "prose.txt"), "window": 16}
    callback = LaserCallback(when="after", config=LaserConfig.from_dict(options))
    trainer_of(tiny_llama(), callback).train()
    assert callback.result.held_out.unit == "windows"
    missing = LaserConfig.from_dict({**options, "text": str(tmp_path / "nothing.txt")})
    with pytest.raises(TextError, match="there is no such file"):
        trainer_of(tiny_llama(), LaserCallback(when="after", config=missing)).train()


def test_before_training_nothing_is_asked_for_that_the_scorers_do_not_use(trainer_of, tmp_path, tokenizer):
    (tmp_path / "prose.txt").write_text("The cat sat on the mat, and looked out of the window. " * 40)
    options = {**CONFIG.to_dict(), "scorer": "perplexity", "text": str(tmp_path / "prose.txt"), "window": 16}
    callback = LaserCallback(config=LaserConfig.from_dict({**options, "embedder": "./none"}))
    trainer = trainer_of(tiny_llama(), callback)
    trainer.processing_class = copy.deepcopy(tokenizer)
    trainer.processing_class.chat_template = None
    trainer.train()
    assert callback.result.search.trials
    for wrong, message in (
        ({"window": 600}, "longer than the model's context"),
        ({"window": 500}, "expected at least 2"),
    ):
        trainer = trainer_of(tiny_llama(), LaserCallback(config=LaserConfig.from_dict({**options, **wrong})))
        with pytest.raises(TextError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0


def test_what_would_stop_the_laser_after_training_stops_it_before(trainer_of, pairs, tmp_path):
    class Trains(TrainerCallback):
        def on_step_begin(self, args, state, control, **rest):
            raise AssertionError("training began")

    bad = [
        (LaserCallback(pairs=tmp_path / "none.jsonl", config=CONFIG), PairsError, "no such file"),
        (LaserCallback(pairs=pairs, config=LaserConfig(embedder="./none")), EmbedderError, "no such folder"),
    ]
    for callback, error, message in bad:
        with pytest.raises(error, match=message):
            trainer_of(tiny_llama(), callback, Trains()).train()
    with pytest.raises(ModelError, match=r"no plain LoRA.*Merge the adapter"):
        dora = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
        trainer_of(dora, LaserCallback(pairs=pairs, config=CONFIG), Trains()).train()
    with pytest.raises(PairsError, match=r"leaves no room for an answer in the model's context of 8"):
        short = tiny_llama(max_position_embeddings=8)
        trainer_of(short, LaserCallback(pairs=pairs, config=CONFIG), Trains()).train()
    (tmp_path / "run" / "lasered").mkdir(parents=True)
    (tmp_path / "run" / "lasered" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match=r"no recipe\.json"):
        trainer_of(tiny_llama(), LaserCallback(pairs=pairs, config=CONFIG), Trains()).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"when": "later"}, "when: got 'later', expected one of before, init, after"),
        ({"freeze_to": "bottom"}, "freeze_to: got 'bottom', expected 'top'"),
        ({"freeze_to": "top"}, "needs one of top=N and fraction=F"),
        ({"top": 3}, "go with freeze_to"),
        ({"when": None}, "nothing to do"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LaserCallback(**options)


def test_quantised_offloaded_and_encoder_decoder_models_are_refused(trainer_of, pairs):
    from transformers import T5Config, T5ForConditionalGeneration

    quantised = tiny_llama()
    quantised.quantization_method = "bitsandbytes"
    with pytest.raises(ModelError, match=r"quantised weights.*bfloat16 or float32"):
        Weights(quantised)
    offloaded = tiny_llama()
    offloaded.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ModelError, match=r"offloaded or on the meta device.*whole model"):
        trainer_of(offloaded, LaserCallback(pairs=pairs))
    sizes = {"vocab_size": 64, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8}
    with pytest.raises(ModelError, match="encoder-decoder"):
        trainer_of(T5ForConditionalGeneration(T5Config(**sizes)), LaserCallback(pairs=pairs))


def test_adapters_other_than_plain_lora_are_refused():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ModelError, match=r"no plain LoRA.*Merge the adapter"):
        MergedWeights(model)
    with pytest.raises(ModelError, match=r"freeze_to is for full fine-tuning.*lora_config"):
        LaserCallback(when=None, freeze_to="top", top=1)._freeze(None, model)


def test_adapters_on_sharded_weights_are_refused():
    class Sharded(MergedWeights):
        is_sharded = True

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"has adapters and is sharded.*splaser laser with `--adapter DIR`"):
        Sharded(model)
