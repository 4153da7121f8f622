from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from splaser_plugin import LaserCallback
from splaser_plugin.weights.adapted import MergedWeights
from tests.builders import states, tiny_llama
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
