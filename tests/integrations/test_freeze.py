from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from splaser_plugin.errors import MatrixError, ModelError
from splaser_plugin.integrations.freeze import FreezeCallback, check_trained, freeze_all_but
from tests.builders import tiny_llama

NAMES = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]


def small_llama():
    return tiny_llama(vocabulary=64)


def test_only_the_named_matrices_are_left_to_train():
    model = small_llama()
    freeze_all_but(model, NAMES)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        f"{n}.weight" for n in NAMES
    ]
    check_trained(model, NAMES)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_with_the_callback_changes_the_named_matrices_alone(checkpointing, tmp_path):
    model = small_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [{"input_ids": torch.arange(8) + n, "labels": torch.arange(8) + n} for n in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=0.01,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[FreezeCallback(NAMES)]).train()
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [f"{name}.weight" for name in NAMES]


def test_a_matrix_that_the_model_lacks_is_refused_before_anything_is_frozen():
    model = small_llama()
    message = r"1 of 2 chosen matrices aren't in this model: model\.layers\.7\.mlp\.up_proj; nearest: model\.layers"
    with pytest.raises(MatrixError, match=message):
        freeze_all_but(model, [NAMES[0], "model.layers.7.mlp.up_proj"])
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("names", [NAMES, ["model.layers.0.mlp.up_proj"]])
@pytest.mark.parametrize("inside", [False, True])
def test_a_model_with_adapters_is_refused_and_goes_on_training_them(inside, names):
    model = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=NAMES))
    with pytest.raises(
        ModelError, match=r"freezing is for full fine-tuning, and this model has adapters\..*lora_config"
    ):
        freeze_all_but(model.get_base_model() if inside else model, names)
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    freeze_all_but(model.merge_and_unload(), names)


def test_adapters_count_as_their_modules():
    model = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=NAMES))
    check_trained(model, NAMES)
    with pytest.raises(ModelError, match=rf"{NAMES[1]} is trained, too, as 1 in all: expected exactly the 1 chosen"):
        check_trained(model, NAMES[:1])


def test_what_is_frozen_or_trained_against_the_choice_is_named():
    model = small_llama()
    with pytest.raises(ModelError, match=r"lm_head is trained, too, as \d+ in all: expected exactly the 2"):
        check_trained(model, NAMES)
    freeze_all_but(model, NAMES[:1])
    with pytest.raises(ModelError, match=rf"{NAMES[1]} isn't trained, as 1 in all"):
        check_trained(model, NAMES)
