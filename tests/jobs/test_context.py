"""Prompts longer than a model's context are dropped and counted, whatever measures them."""

from __future__ import annotations

import re

import pytest
import transformers
from transformers import AutoTokenizer

from splaser_plugin import CompareConfig, LaserConfig, compare, laser
from splaser_plugin.data.pairs import BEYOND
from splaser_plugin.errors import ModelError, PairsError
from tests.builders import QUICK, tiny_llama

WORDS = "apples " * 80
SHORT = [{"prompt": f"Name fruit {number}.", "chosen": "An apple.", "rejected": "No."} for number in range(12)]
LONG = [{"prompt": f"{WORDS}{number}", "chosen": "An apple.", "rejected": "No."} for number in range(4)]
BOTH = [SHORT[0], *LONG, *SHORT[1:]]


@pytest.fixture
def small(tmp_path, tokenizer):
    """A model that reads 64 tokens."""
    tiny_llama(max_position_embeddings=64).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize(
    "options", [{}, {"scorer": "margin"}, {"scorer": "tests.planted.shorter_is_better", "reduce": "fisher"}]
)
def test_laser_drops_and_counts_prompts_beyond_the_context(small, options):
    split = laser(small, BOTH, config=LaserConfig(**{**QUICK, "candidates": 1, **options})).split
    assert split.pairs.dropped == {BEYOND: 4}
    assert len(split.pairs) == 12
    assert split.warning == (
        "rows: 4 of 16 rows were dropped (prompt beyond the model's context 4). "
        "Give shorter prompts, or a model of a longer context."
    )


def test_a_loaded_model_drops_them_too(tokenizer):
    model = tiny_llama(max_position_embeddings=64)
    result = laser(model, BOTH, tokenizer=tokenizer, config=LaserConfig(**{**QUICK, "candidates": 1}))
    assert result.split.pairs.dropped == {BEYOND: 4}


def test_none_left_is_refused_before_the_model_loads(small, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(PairsError, match=r"no usable pair in 4 rows: prompt beyond .* 4\. Give shorter prompts, or a"):
        laser(small, LONG, config=LaserConfig(**QUICK))


def test_pairs_are_compared_that_every_model_has_room_for(tiny_folder, small, minilm):
    found = compare([tiny_folder, small], BOTH, config=CompareConfig(embedder=str(minilm), max_new_tokens=4))
    assert found.pairs.dropped == {BEYOND: 4}


@pytest.mark.parametrize(
    ("template", "said"),
    [("", "the tokenizer has no chat template"), ("{{ raise_exception('no') }}", "the chat temp")],
)
def test_a_comparison_names_the_model_whose_chat_template_cannot_be_used(tiny_folder, small, minilm, template, said):
    (small / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(small)
    with pytest.raises(ModelError, match=f"^{re.escape(str(small))}: {said}"):
        compare([tiny_folder, small], SHORT, config=CompareConfig(embedder=str(minilm), max_new_tokens=4))


def test_what_reads_no_prompt_drops_none(small, text):
    config = LaserConfig(**{**QUICK, "candidates": 1, "scorer": "perplexity", "text": text, "window": 32})
    assert laser(small, BOTH, config=config).split.pairs.dropped == {}
