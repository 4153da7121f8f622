"""--adapter: what is merged says what the adapted model said, with the tokenizer that it was trained with."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from splaser_plugin import LaserConfig, laser
from splaser_plugin.errors import CheckpointError
from splaser_plugin.weights.loading import load_model
from tests.builders import VOCABULARY, tiny_llama

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(5, 25)[None]).logits


@pytest.fixture
def folders(tmp_path, tokenizer):
    """Save a base model and an adapter trained on it: those, and what the adapted model says."""

    def make(*, tie=False, added=0, embeddings="auto", own_tokenizer=None, **changes):
        base = tiny_llama(tie_word_embeddings=tie)
        base.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        if added:
            base.resize_token_embeddings(VOCABULARY + added, mean_resizing=False)
        model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **changes}))
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=embeddings)
        if own_tokenizer is not None:
            own_tokenizer.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter", logits(model.eval())

    return make


KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "whole head": {"modules_to_save": ["lm_head"]},
    "tied": {"tie": True},
    "tied, whole head": {"tie": True, "modules_to_save": ["lm_head"]},
    "trained tokens": {"trainable_token_indices": [5, 6]},
    "added tokens": {"added": 2, "embeddings": True},
    "added tokens, tied": {"added": 2, "tie": True, "embeddings": True},
    "added tokens, whole": {"added": 2, "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_and_saved_says_what_the_adapted_model_said(kind, folders, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("splaser_plugin.search.acceptance.Improve.accepts", lambda rule, scores, best: False)
    base, adapter, said = folders(**KINDS[kind])
    merged, _ = load_model(base, device="cpu", adapter=adapter)
    torch.testing.assert_close(logits(merged), said, rtol=1e-4, atol=1e-4)
    config = LaserConfig(scorer="margin", candidates=1, adapter=str(adapter), device="cpu")
    result = laser(base, pairs, config=config)
    saved, report = AutoModelForCausalLM.from_pretrained(result.save(tmp_path / "out"), output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(logits(saved), said, rtol=1e-4, atol=1e-4)


def test_the_adapters_own_tokenizer_and_template_are_taken(folders, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<first>", "<second>"], special_tokens=True)
    own.chat_template = TEMPLATE
    base, adapter, _ = folders(added=2, embeddings=True, own_tokenizer=own)
    model, loaded = load_model(base, device="cpu", adapter=adapter)
    assert len(loaded) == len(model.get_input_embeddings().weight) == model.config.vocab_size == VOCABULARY + 2
    assert loaded.chat_template == TEMPLATE
    own.chat_template = None
    own.save_pretrained(adapter)
    (adapter / "chat_template.jinja").unlink(missing_ok=True)
    assert load_model(base, device="cpu", adapter=adapter)[1].chat_template == tokenizer.chat_template


def test_a_run_loads_each_tokenizer_once(folders, tokenizer, pairs, monkeypatch):
    base, adapter, _ = folders(own_tokenizer=tokenizer)
    read, load = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *given, **how: read.append(given[0]) or load(*given))
    laser(base, pairs, config=LaserConfig(scorer="margin", candidates=1, adapter=str(adapter), device="cpu"))
    assert read == [base, adapter]


def test_added_tokens_without_their_embeddings_are_refused(folders, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<first>", "<second>"], special_tokens=True)
    base, adapter, _ = folders(added=2, embeddings=False, own_tokenizer=own)
    message = (
        f"trained with a vocabulary of {VOCABULARY + 2}, the base model's is {VOCABULARY}, .*save_embedding_layers=True"
    )
    with pytest.raises(CheckpointError, match=message):
        load_model(base, device="cpu", adapter=adapter)


def test_a_base_whose_tokenizer_has_tokens_without_embeddings_takes_adapters(folders, tokenizer):
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<image_soft_token>"], special_tokens=True)
    base, adapter, said = folders()
    longer.save_pretrained(base)
    merged, loaded = load_model(base, device="cpu", adapter=adapter)
    assert len(loaded) == VOCABULARY + 1
    torch.testing.assert_close(logits(merged), said, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("target", "other"), [("lm_head", "model.embed_tokens"), ("embed_tokens", "lm_head")])
def test_lora_on_one_of_two_tied_weights_is_refused(target, other, folders):
    base, adapter, _ = folders(tie=True, target_modules=["q_proj", target])
    message = rf"{target}\.weight has an adapter and is the same weight as {re.escape(other)}\.weight"
    with pytest.raises(CheckpointError, match=message):
        load_model(base, device="cpu", adapter=adapter)
