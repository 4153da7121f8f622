"""What the callback takes from a training, and what it refuses before the training starts."""

from __future__ import annotations

import copy
import dataclasses
import shutil

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import (
    CLIPImageProcessorPil,
    LlavaProcessor,
    TrainerCallback,
    default_data_collator,
)

from splaser_plugin import LaserCallback, LaserConfig
from splaser_plugin.errors import (
    ConfigError,
    EmbedderError,
    MatrixError,
    ModelError,
    OutputError,
    PairsError,
    TextError,
)
from splaser_plugin.reduction.measured_reducer import stored_bytes
from splaser_plugin.weights.adapted import MergedWeights
from splaser_plugin.weights.in_memory import Weights
from tests.builders import save_rows, tiny_llama
from tests.integrations.trainings import CONFIG


@pytest.mark.slow
def test_pairs_come_from_the_trainers_evaluation_data_if_it_has_text(trainer_of, pairs):
    trainer = trainer_of(tiny_llama())
    trainer.add_callback(LaserCallback(config=CONFIG, trainer=trainer))
    with pytest.raises(PairsError, match=r"no preference pairs were given.*Pass pairs="):
        trainer.train()
    parts = Dataset.from_list(pairs[:2]), Dataset.from_list(pairs[2:])
    wanted = {row["prompt"] for row in pairs}
    by_name = dict(zip("ab", parts, strict=True))
    rows, with_parts = Dataset.from_list(pairs), DatasetDict(by_name)
    for data, when in ((rows, "after"), (by_name, "after"), (with_parts, "after"), (by_name, "before")):
        trainer = trainer_of(tiny_llama())
        trainer.eval_dataset = data
        callback = LaserCallback(when=when, config=CONFIG, trainer=trainer)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_trainer_without_pairs_can_be_lasered_by_perplexity(trainer_of, tmp_path):
    (tmp_path / "prose.txt").write_text("The cat sat on the mat, and looked out of the window. " * 40)
    options = {**CONFIG.to_dict(), "scorer": "perplexity", "text": str(tmp_path / "prose.txt"), "window": 16}
    callback = LaserCallback(when="after", config=LaserConfig.from_dict(options))
    trainer_of(tiny_llama(), callback).train()
    assert callback.result.held_out.unit == "windows"
    missing = LaserConfig.from_dict({**options, "text": str(tmp_path / "nothing.txt")})
    with pytest.raises(TextError, match="there is no such file"):
        trainer_of(tiny_llama(), LaserCallback(when="after", config=missing)).train()


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_callback_sets_the_templates_variables(trainer_of, pairs, tokenizer):
    trainer = trainer_of(tiny_llama(), LaserCallback(pairs=pairs, config=CONFIG))
    failing = "{% if style != 'plain' %}{{ raise_exception('style') }}{% endif %}"
    picky = copy.deepcopy(tokenizer)
    picky.chat_template = failing + tokenizer.chat_template
    trainer.processing_class = trainer.callback_handler.processing_class = picky
    with pytest.raises(ModelError, match="the chat template fails at the prompt"):
        trainer.train()
    plain = LaserCallback(
        pairs=pairs, config=LaserConfig.from_dict({**CONFIG.to_dict(), "template_kwargs": ["style=plain"]})
    )
    trainer = trainer_of(tiny_llama(), plain)
    trainer.processing_class = trainer.callback_handler.processing_class = picky
    trainer.train()
    assert plain.result.recipe.config.template_kwargs == ("style=plain",)


@pytest.mark.slow
def test_what_would_stop_the_laser_after_training_stops_it_before(trainer_of, pairs, tmp_path, tokenizer):
    class Trains(TrainerCallback):
        def on_step_begin(self, args, state, control, **rest):
            raise AssertionError("training began")

    bad = [
        (LaserCallback(pairs=tmp_path / "none.jsonl", config=CONFIG), PairsError, "no such file"),
        (LaserCallback(pairs=pairs, config=LaserConfig(embedder="./none")), EmbedderError, "no such folder"),
        (
            LaserCallback(pairs=pairs, config=dataclasses.replace(CONFIG, include=("x",))),
            MatrixError,
            "matches no para",
        ),
    ]
    for callback, error, message in bad:
        with pytest.raises(error, match=message):
            trainer_of(tiny_llama(), callback, Trains()).train()
    with pytest.raises(ModelError, match=r"no plain LoRA but Dora.*Merge the adapter"):
        dora = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
        trainer_of(dora, LaserCallback(pairs=pairs, config=CONFIG), Trains()).train()
    with pytest.raises(PairsError, match=r"no usable pair in 4 rows: prompt beyond the model's context 4"):
        short = tiny_llama(max_position_embeddings=8)
        trainer_of(short, LaserCallback(pairs=pairs, config=CONFIG), Trains()).train()
    failing = "{% if messages[-1].content == 'Question 7?' %}{{ raise_exception('no 7') }}{% endif %}"
    rows = [{"prompt": f"Question {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(8)]
    with pytest.raises(ModelError, match=r"the chat template fails at the prompt 'Question 7.*no 7"):
        held_out = LaserConfig.from_dict(
            {**CONFIG.to_dict(), "held_out": str(save_rows(tmp_path / "rows.jsonl", rows))}
        )
        trainer = trainer_of(tiny_llama(), LaserCallback(pairs=pairs, config=held_out), Trains())
        trainer.processing_class = trainer.callback_handler.processing_class = copy.deepcopy(tokenizer)
        trainer.processing_class.chat_template = failing + tokenizer.chat_template
        trainer.train()
    (tmp_path / "run" / "lasered").mkdir(parents=True)
    (tmp_path / "run" / "lasered" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match=r"no recipe\.json"):
        trainer_of(tiny_llama(), LaserCallback(pairs=pairs, config=CONFIG), Trains()).train()


@pytest.mark.real
@pytest.mark.parametrize("when", ["before", "after"])
def test_answers_that_the_embedder_cuts_are_counted_before_training(when, trainer_of, pairs, minilm, capsys):
    class Begins(TrainerCallback):
        def on_step_begin(self, args, state, control, **rest):
            self.said = capsys.readouterr().err
            control.should_training_stop = True

    long = [{**row, "chosen": 300 * "yes " + row["chosen"]} for row in pairs]
    config = dataclasses.replace(CONFIG, embedder=str(minilm), candidates=1, held_out_fraction=0, max_answer_tokens=900)
    begins = Begins()
    trainer_of(
        tiny_llama(max_position_embeddings=1024), LaserCallback(when=when, pairs=long, config=config), begins
    ).train()
    count = len(pairs)
    assert f"laser: warning: {count} of {2 * count} reference answers are longer than the embedder reads" in begins.said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("short_of", "said"),
    [
        ("statistics", "set TMPDIR to a folder that has some"),
        ("both", "lasered: needs .* MB, but .* MB are free there"),
    ],
)
def test_room_for_statistics_and_for_the_model_beside_them_is_looked_for_before_training(
    short_of, said, trainer_of, pairs, monkeypatch
):
    config = dataclasses.replace(CONFIG, scorer="margin", reduce="fisher", candidates=2)
    model = tiny_llama()
    wide = stored_bytes(Weights(model).matrices(("mlp",), (), False)[0][0], torch.float32)
    free = 2 * wide - 1 if short_of == "statistics" else 2 * wide + Weights(model).size - 1
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    trainer = trainer_of(model, LaserCallback(pairs=pairs, config=config))
    with pytest.raises(OutputError, match=said):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"when": "later"}, "when: got 'later', expected one of before, init, after"),
        ({"freeze_to": "bottom"}, "freeze_to: got 'bottom', expected 'top'"),
        ({"freeze_to": "top"}, "needs one of top=N and fraction=F"),
        ({"top": 3}, "go with freeze_to"),
        ({"when": None}, "nothing to do"),
        (
            {"config": LaserConfig(engine="vllm")},
            r"engine: vllm is the trainer's own here\. Use trainer\.add_callback\(",
        ),
        ({"config": LaserConfig(adapter="a")}, "adapter: the trainer's model has its own"),
        ({"config": LaserConfig(scan="scan.json")}, "scan: training changes the weights that it is of"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LaserCallback(**options)


class Packed(torch.nn.Parameter):
    """As a quantiser leaves a weight where it stands: a kind of tensor of its own."""


def test_quantised_and_encoder_decoder_models_are_refused(trainer_of, pairs):
    from transformers import T5Config, T5ForConditionalGeneration

    quantised = tiny_llama()
    quantised.quantization_method = "bitsandbytes"
    with pytest.raises(ModelError, match=r"quantised weights.*bfloat16 or float32.*`splaser laser BASE --adapter DIR`"):
        Weights(quantised)
    with pytest.raises(ModelError, match=r"quantised weights.*`splaser laser BASE --adapter DIR`"):
        trainer_of(quantised, LaserCallback(pairs=pairs))
    packed = tiny_llama()
    packed.model.layers[0].mlp.up_proj.weight = Packed(packed.model.layers[0].mlp.up_proj.weight.data)
    with pytest.raises(ModelError, match=r"quantised weights \(Packed\), which can't be scanned or reduced"):
        trainer_of(packed, LaserCallback(pairs=pairs))
    sizes = {"vocab_size": 64, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8}
    with pytest.raises(ModelError, match="encoder-decoder"):
        trainer_of(T5ForConditionalGeneration(T5Config(**sizes)), LaserCallback(pairs=pairs))


def test_adapters_other_than_plain_lora_are_refused_and_any_where_matrices_are_to_be_trained(trainer_of):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ModelError, match=r"no plain LoRA but Dora.*Merge the adapter"):
        MergedWeights(model)
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"freezing is for full fine-tuning.*lora_config"):
        trainer_of(adapted, LaserCallback(when=None, freeze_to="top", top=1))
