"""Trainers with the callback, in bfloat16, on a device."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from splaser_plugin import LaserCallback, LaserConfig
from splaser_plugin.errors import ModelError
from splaser_plugin.weights.in_memory import Weights
from tests.builders import THREE_PAIRS, tiny_llama

pytestmark = pytest.mark.slow

CONFIG = LaserConfig(scorer="margin", candidates=4, edge="mp", batch_size=2)


def arguments(folder, device, **changes):
    """Of a run of two steps that is reported nowhere."""
    common = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "use_cpu": device.type == "cpu",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": True,
    }
    return {**common, **changes}


def rows(tokenizer):
    ids = tokenizer("The cat sat on the mat and looked out.")["input_ids"]
    return Dataset.from_list([{"input_ids": ids, "labels": ids}] * 4)


def lasered(model, callback, folder):
    """Whether what was saved is the model as it is now, after a search that tried something."""
    assert callback.result.search.trials
    stored = AutoModelForCausalLM.from_pretrained(folder / "lasered").state_dict()
    return all(torch.equal(stored[name].to(value.dtype), value.cpu()) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainer_in_bfloat16_is_lasered_at_its_end(dtype, device, tokenizer, tmp_path):
    model, callback = tiny_llama().to(dtype), LaserCallback(pairs=THREE_PAIRS, config=CONFIG)
    Trainer(
        model,
        TrainingArguments(**arguments(tmp_path, device)),
        train_dataset=rows(tokenizer),
        processing_class=tokenizer,
        callbacks=[callback],
    ).train()
    assert next(model.parameters()).device.type == device.type
    assert lasered(model, callback, tmp_path)


def test_dpo_in_bfloat16_is_lasered_at_its_end(device, tiny_folder, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    callback = LaserCallback(pairs=THREE_PAIRS, config=CONFIG)
    trainer = trl.DPOTrainer(
        str(tiny_folder),
        args=trl.DPOConfig(**arguments(tmp_path, device)),
        train_dataset=Dataset.from_list(THREE_PAIRS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"]),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.result.search.trials
    assert (tmp_path / "lasered" / "model.safetensors").is_file()


def test_a_compiled_trainer_is_lasered_at_its_end(cuda, tokenizer, tmp_path):
    model, callback = tiny_llama(), LaserCallback(pairs=THREE_PAIRS, config=CONFIG)
    Trainer(
        model,
        TrainingArguments(**arguments(tmp_path, cuda, torch_compile=True)),
        train_dataset=rows(tokenizer),
        processing_class=tokenizer,
        callbacks=[callback],
    ).train()
    assert lasered(model, callback, tmp_path)


def test_a_base_in_4_bits_is_refused_with_the_way_round(cuda, tiny_folder):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map=str(cuda)
    )
    with pytest.raises(ModelError, match=r"quantised weights.*splaser laser BASE --adapter DIR"):
        Weights(model)
