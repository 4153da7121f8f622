from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from splaser_plugin import LaserCallback
from splaser_plugin.weights.adapted import MergedWeights
from tests.builders import THREE_PAIRS, states, tiny_llama
from tests.integrations.trainings import CONFIG, SHORT

pytestmark = pytest.mark.slow

trl = pytest.importorskip("trl")

QUIET = {**SHORT, "bf16": False}


def same_on_disk(model, folder):
    stored = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return all(torch.allclose(stored[name], value, rtol=0, atol=1e-6) for name, value in model.items())


def test_sft_trainer(pairs, tokenizer, tmp_path):
    rows = Dataset.from_list([{"text": f"{row['prompt']} {row['chosen']}"} for row in pairs])
    callback = LaserCallback(when="after", pairs=pairs, config=CONFIG)
    model = tiny_llama()
    trl.SFTTrainer(
        model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **QUIET),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[callback],
    ).train()
    assert callback.result.search.kept
    assert same_on_disk(states(model), tmp_path / "lasered")


LORA = LoraConfig(r=4, target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("options", "adapter", "is_lasered"),
    [({}, None, False), ({"precompute_ref_log_probs": True}, None, True), ({}, LORA, True)],
    ids=["a copy", "computed before", "the base under an adapter"],
)
def test_a_lasered_reference_is_said(options, adapter, is_lasered, pairs, tiny_folder, tokenizer, tmp_path, caplog):
    """when="init": the reference is a copy made before, or it is computed with the lasered weights."""
    callback = LaserCallback(when="init", pairs=pairs, config=CONFIG)
    trl.DPOTrainer(
        str(tiny_folder), args=trl.DPOConfig(output_dir=str(tmp_path), **QUIET, **options), processing_class=tokenizer,
        train_dataset=Dataset.from_list(pairs), peft_config=adapter, callbacks=[callback],
    )  # fmt: skip
    assert callback.result is not None
    assert ("the reference of this training is the lasered model" in caplog.text) == is_lasered


@pytest.mark.parametrize("with_trainer", [False, True])
@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, target_modules=["q_proj", "up_proj"])], ids=["full", "lora"])
def test_dpo_trainer_with_pairs_given_or_from_its_own_data(
    adapter, with_trainer, pairs, tiny_folder, tokenizer, tmp_path
):
    callback = LaserCallback(pairs=None if with_trainer else pairs, config=CONFIG)
    trainer = trl.DPOTrainer(
        str(tiny_folder),
        args=trl.DPOConfig(output_dir=str(tmp_path), **QUIET),
        train_dataset=Dataset.from_list(pairs),
        eval_dataset=Dataset.from_list(pairs[::-1]),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[] if with_trainer else [callback],
    )
    if with_trainer:
        callback = LaserCallback(config=CONFIG, trainer=trainer)
        trainer.add_callback(callback)
    trainer.train()
    expected = pairs[::-1] if with_trainer else pairs
    assert [pair.prompt for pair in callback.result.pairs] == [row["prompt"] for row in expected]
    assert [pair.chosen for pair in callback.result.pairs] == [row["chosen"] for row in expected]
    assert callback.result.search.kept
    assert trainer.state.log_history[-1]["laser/matrices_kept"] == len(callback.result.search.kept)
    model = trainer.model
    now = states(model) if adapter is None else MergedWeights(model).state_dict()
    assert same_on_disk(now, tmp_path / "lasered")


RATED = [
    {"prompt": row["prompt"], "completion": row[answer], "label": answer == "chosen"}
    for row in THREE_PAIRS
    for answer in ("chosen", "rejected")
]
PROMPTS = [{"prompt": row["prompt"]} for row in 2 * THREE_PAIRS]
SAMPLING = {"num_generations": 2, "max_completion_length": 6}


def lengths(completions, **columns):
    """A reward."""
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize(
    ("name", "rows", "options", "arguments"),
    [
        ("trl.KTO", RATED, {}, {}),
        ("trl.GRPO", PROMPTS, SAMPLING, {"reward_funcs": lengths}),
        ("trl.RLOO", PROMPTS, SAMPLING, {"reward_funcs": lengths}),
        ("trl.experimental.orpo.ORPO", 2 * THREE_PAIRS, {}, {}),
        ("trl.experimental.cpo.CPO", 2 * THREE_PAIRS, {}, {}),
    ],
)
def test_other_trainers_end_with_a_lasered_model(name, rows, options, arguments, tiny_folder, tokenizer, tmp_path):
    place, _, kind = name.rpartition(".")
    module = pytest.importorskip(place)
    callback = LaserCallback(when="after", pairs=THREE_PAIRS, config=CONFIG)
    trainer = getattr(module, f"{kind}Trainer")(
        str(tiny_folder),
        args=getattr(module, f"{kind}Config")(output_dir=str(tmp_path), **QUIET, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[callback],
        **arguments,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert callback.result.search.kept
    assert same_on_disk(states(trainer.model), tmp_path / "lasered")
