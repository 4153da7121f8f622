"""Answers and scores of a model with long rope don't depend on what is in the same batch."""

from __future__ import annotations

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.long_rope import batches, side, turning_point
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.generation.teacher_forcing import forced_means, mean_log_probabilities
from splaser_plugin.scoring.embedding import SelfEmbedder
from splaser_plugin.weights.in_memory import Weights
from tests.builders import VOCABULARY, tiny_llama

TURN = 64


@pytest.fixture(scope="module")
def model():
    """Beyond 64 tokens its positions are others."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 2,
        "eos_token_id": 2, "bos_token_id": 1, "max_position_embeddings": 512,
        "original_max_position_embeddings": TURN,
    }  # fmt: skip
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0], "rope_theta": 10000.0}
    return Phi3ForCausalLM(Phi3Config(**sizes, rope_scaling={"rope_type": "longrope", **factors})).eval()


@pytest.fixture(scope="module")
def prompts():
    """Before the turning point, beyond it, and on both sides while the answer grows."""
    torch.manual_seed(1)
    return [torch.randint(5, VOCABULARY, (length,)).tolist() for length in (8, 100, 12, 60, 90, 20, 62)]


def test_the_turning_point_is_read_from_the_configuration(model):
    assert turning_point(model) == TURN
    assert turning_point(tiny_llama()) is None


def test_rows_stand_with_those_on_their_side():
    assert [side(TURN, *ends) for ends in ((8, 20), (60, 64), (60, 65), (64, 70), (65, 70))] == [
        False, False, None, None, True,
    ]  # fmt: skip
    assert side(None, 10, 10_000) is False
    assert batches([70, 5, 64, 90, 6], 2, TURN) == [[1, 4], [2], [0, 3]]
    assert batches([70, 5, 64, 90, 6], 2, None) == [[1, 4], [2, 0], [3]]


def test_answers_are_those_of_each_prompt_alone(model, tokenizer, prompts):
    def answers(batch_size):
        generator = Generator(model, Prompter(tokenizer, context=512), max_new_tokens=12, batch_size=batch_size)
        return [answer.tokens for answer in generator.answer(prompts)]

    assert answers(8) == answers(1)


def test_margins_are_those_of_each_answer_alone(model, prompts):
    answers = [[7, 8, 9]] * len(prompts)
    together = mean_log_probabilities(model, prompts, answers, batch_size=8)
    with torch.no_grad():
        alone = [
            float(forced_means(model, [prompt], [answer])) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        mixed = forced_means(model, prompts, answers).tolist()
    assert together == pytest.approx(alone, abs=1e-5)
    assert mixed != pytest.approx(alone, abs=1e-2)


def test_embeddings_are_those_of_each_text_alone(model, tokenizer):
    texts = ["one two three", "four five " * 50]
    both = SelfEmbedder(Weights(model), tokenizer, 8).embed(texts)
    alone = torch.cat([SelfEmbedder(Weights(model), tokenizer, 8).embed([text]) for text in texts])
    torch.testing.assert_close(both, alone, rtol=1e-5, atol=1e-5)
