"""Models under adapters: what was saved is what was scored, for each kind of adapter, or the kind is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from splaser_plugin import LaserCallback, LaserConfig, laser
from splaser_plugin.errors import ModelError
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.scoring.margin import MarginScorer
from splaser_plugin.weights.adapted import BaseWeights, restore_base
from tests.builders import VOCABULARY, changed, states, tiny_llama
from tests.tiny_models import llava

pytestmark = pytest.mark.slow

CONFIG = LaserConfig(scorer="margin", candidates=3, edge="mp", held_out_fraction=0, batch_size=4, race=False, guard="")
TARGETS = ["q_proj", "v_proj", "down_proj"]


def mixtral():
    """Its experts are two parameters a block."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**sizes)).eval()


def resized():
    """With two tokens more than the base model."""
    model = tiny_llama()
    model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    return model


tied = partial(tiny_llama, tie_word_embeddings=True)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "lora": (tiny_llama, {}),
    "rslora": (tiny_llama, {"use_rslora": True}),
    "pissa": (tiny_llama, {"init_lora_weights": "pissa"}),
    "ranks of its own": (tiny_llama, {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 32}}),
    "adalora": (tiny_llama, {"kind": peft.AdaLoraConfig, "init_r": 4, "target_r": 2, "total_step": 10}),
    "biases": (tiny_llama, {"bias": "all"}),
    "one block": (tiny_llama, {"layers_to_transform": [1]}),
    "embeddings and head": (tiny_llama, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "whole embeddings and head": (tiny_llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "whole norm and mlp": (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm", "mlp"]}),
    "added tokens": (resized, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied": (tied, {}),
    "tied, whole head": (tied, {"modules_to_save": ["lm_head"]}),
    "tied, whole embeddings": (tied, {"modules_to_save": ["embed_tokens"]}),
    "tied, both whole": (tied, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "fused experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "whole router": (mixtral, {"target_modules": ["q_proj"], "modules_to_save": ["mlp.gate"]}),
}


def trained(model):
    """As if what trains had been trained."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def adapted(make, kind=LoraConfig, **changes):
    config = kind(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes})
    return trained(get_peft_model(make(), config))


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(5, 25)[None]).logits


@pytest.fixture
def keeping_all(monkeypatch):
    monkeypatch.setattr("splaser_plugin.search.acceptance.Improve.accepts", lambda rule, scores, best: True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_what_was_scored(kind, tokenizer, pairs, tmp_path, keeping_all):
    make, changes = KINDS[kind]
    model = adapted(make, **changes)
    before = logits(model)
    include = ("experts",) if "experts" in kind else ("down_proj", "q_proj")
    result = laser(model, pairs, config=LaserConfig(**{**vars(CONFIG), "include": include}), tokenizer=tokenizer)
    assert len(result.kept) == 3
    result.save(tmp_path / "out")
    saved, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    scored = logits(model)
    assert (scored - before).abs().max() > 1e-2, "this run has to change something to show anything"
    torch.testing.assert_close(logits(saved), scored, rtol=1e-4, atol=1e-4)
    again = MarginScorer(saved, Prompter(tokenizer, context=512), result.split.search, batch_size=4)
    assert again.score(range(again.size)).mean == pytest.approx(result.score_after, abs=1e-4)


def test_of_several_adapters_the_active_ones_count(tokenizer, pairs, tmp_path, keeping_all):
    model = adapted(tiny_llama)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    for active in (["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        found = laser(model, pairs, config=CONFIG, tokenizer=tokenizer)
        saved = AutoModelForCausalLM.from_pretrained(found.save(tmp_path / str(len(active))))
        torch.testing.assert_close(logits(saved), logits(model), rtol=1e-4, atol=1e-4)


REFUSED = {
    "Dora": LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "ALora": LoraConfig(r=2, target_modules=TARGETS, alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
    "lora_bias": LoraConfig(r=2, target_modules=TARGETS, lora_bias=True),
    "trainable_tokens": LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices=[5, 6]),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(target_modules=TARGETS),
    "lokr": peft.LoKrConfig(target_modules=TARGETS),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0),
    "boft": peft.BOFTConfig(target_modules=["q_proj"]),
    "vera": peft.VeraConfig(target_modules=["q_proj"]),
    "hra": peft.HRAConfig(target_modules=["q_proj"]),
    "ln_tuning": peft.LNTuningConfig(target_modules=["norm"]),
    "fourierft": peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=8),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_kind_is_refused_by_its_name_before_training(kind, tokenizer, pairs):
    message = rf"has an adapter that is no plain LoRA but {kind}, .*Merge the adapter, save the model"
    model = get_peft_model(tiny_llama(), REFUSED[kind])
    with pytest.raises(ModelError, match=message):
        laser(model, pairs, config=CONFIG, tokenizer=tokenizer)
    trainer = Trainer(model, TrainingArguments(use_cpu=True, report_to=[]), processing_class=tokenizer)
    with pytest.raises(ModelError, match=message):
        LaserCallback(pairs=pairs, config=CONFIG, trainer=trainer)


PROMPTS = {
    "PromptTuningConfig": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PromptEncoderConfig": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PrefixTuningConfig": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_trained_prompts_are_refused_by_name(kind, tokenizer, pairs):
    with pytest.raises(ModelError, match=rf"has a trained prompt \({kind}\), which no weight holds"):
        laser(get_peft_model(tiny_llama(), PROMPTS[kind]), pairs, config=CONFIG, tokenizer=tokenizer)


@pytest.mark.parametrize(("target", "other"), [("lm_head", "model.embed_tokens"), ("embed_tokens", "lm_head")])
def test_lora_on_one_of_two_tied_weights_is_refused(target, other, tokenizer, pairs):
    message = rf"{target}.weight has an adapter and is the same weight as {re.escape(other)}"
    with pytest.raises(ModelError, match=message):
        laser(adapted(tied, target_modules=["q_proj", target]), pairs, config=CONFIG, tokenizer=tokenizer)


def test_an_adapter_of_transformers_own_is_refused_with_what_makes_it_whole(tokenizer, pairs, monkeypatch):
    # Lets transformers 5.24 add adapters with the PEFT that there is; it asks for one that isn't out yet.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **versions: None)
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"got its adapter by add_adapter.*peft\.get_peft_model"):
        laser(model, pairs, config=CONFIG, tokenizer=tokenizer)


def test_a_lasered_base_is_restored_with_its_towers(tokenizer, pairs, tmp_path, keeping_all):
    make = partial(llava, vocab_size=VOCABULARY)
    lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", task_type="CAUSAL_LM")
    model, again = get_peft_model(make(), lora), get_peft_model(make(), lora)
    config = LaserConfig(**{**vars(CONFIG), "towers": True, "include": ("fc1", "down_proj")})
    result = laser(model, pairs, config=config, tokenizer=tokenizer)
    replace(result, weights=BaseWeights(model)).save(tmp_path / "base")
    towers = {"vision_tower" in step.name for step in result.recipe.steps}
    assert towers == {True, False}
    restore_base(again, tmp_path / "base")
    assert not changed(states(model), states(again))


@pytest.mark.parametrize(
    "stored", ["[" * 100_000, "{", "3", "{}", '{"settings": 1, "steps": []}', '{"settings": {}, "steps": [1]}']
)
def test_a_damaged_recipe_of_the_lasered_base_is_told_in_one_line(stored, tmp_path):
    (tmp_path / "recipe.json").write_text(stored)
    with pytest.raises(ModelError, match=r"recipe\.json: n.*(make it anew|Make it anew|begin anew)\.$"):
        restore_base(None, tmp_path)
