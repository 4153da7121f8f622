from __future__ import annotations

import pytest
import torch

from splaser_plugin.data.pairs import pairs_from_rows
from splaser_plugin.errors import ModelError, ScoreError
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.scoring.margin import ChosenScorer, MarginScorer
from tests.builders import tiny_llama
from tests.reference import one_token_at_a_time


@pytest.fixture
def usable(pairs):
    more = {"prompt": "Hi", "chosen": "Hello there, and a rather longer answer than the others are.", "rejected": "Ho"}
    return pairs_from_rows([*pairs, more]).pairs


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_margin_is_the_difference_of_mean_log_probabilities(tiny_model, tokenizer, usable, batch_size):
    prompter = Prompter(tokenizer, context=512)
    scores = MarginScorer(tiny_model, prompter, usable, batch_size=batch_size).score(range(5))
    for pair, value in zip(usable, scores.values, strict=True):
        chosen, rejected = (
            one_token_at_a_time(tiny_model, prompter, pair, text) for text in (pair.chosen, pair.rejected)
        )
        assert value == pytest.approx(chosen - rejected, abs=1e-4)
    assert scores.answers == ()
    assert scores.generated_tokens == 0


@torch.no_grad()
def test_without_a_rejected_answer_the_margin_is_the_chosen_ones_alone(tiny_model, tokenizer):
    pairs = pairs_from_rows([{"instruction": "Say hello.", "input": "", "output": "Hello!"}]).pairs
    prompter = Prompter(tokenizer, context=512)
    scores = MarginScorer(tiny_model, prompter, pairs, batch_size=4).score([0])
    assert scores.values[0] == pytest.approx(
        one_token_at_a_time(tiny_model, prompter, pairs[0], pairs[0].chosen), abs=1e-4
    )


@torch.no_grad()
def test_answers_are_scored_up_to_the_end_of_the_context(tokenizer, usable):
    model = tiny_llama(max_position_embeddings=64)
    context = max(len(Prompter(tokenizer).tokens(pair.messages)) for pair in usable) + 4
    prompter = Prompter(tokenizer, context=context)
    scores = MarginScorer(model, prompter, usable, batch_size=4).score(range(5))
    pair = usable[0]
    chosen, rejected = (one_token_at_a_time(model, prompter, pair, text) for text in (pair.chosen, pair.rejected))
    assert scores.values[0] == pytest.approx(chosen - rejected, abs=1e-4)


def test_a_part_of_the_pairs_is_scored_in_the_order_asked_for(tiny_model, tokenizer, usable):
    scorer = MarginScorer(tiny_model, Prompter(tokenizer, context=512), usable, batch_size=2)
    whole = scorer.score(range(5))
    part = scorer.score([4, 1])
    assert part.items == (4, 1)
    assert part.values == pytest.approx((whole.values[4], whole.values[1]), abs=1e-5)


def test_models_that_predict_every_place_are_scored_alike(tiny_model, tokenizer, usable):
    prompter = Prompter(tokenizer, context=512)
    expected = MarginScorer(tiny_model, prompter, usable, batch_size=4).score(range(5)).values

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    assert MarginScorer(Wrapped(), prompter, usable, batch_size=4).score(range(5)).values == pytest.approx(
        expected, abs=1e-6
    )


@torch.no_grad()
def test_the_chosen_answers_alone_score_as_one_token_at_a_time_does(tiny_model, tokenizer, usable):
    prompter = Prompter(tokenizer, context=512)
    scores = ChosenScorer(tiny_model, prompter, usable, batch_size=4).score(range(5))
    expected = [one_token_at_a_time(tiny_model, prompter, pair, pair.chosen) for pair in usable]
    assert scores.values == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("raised", "error", "says"),
    [
        (
            AttributeError("no 'vision_start'"),
            ScoreError,
            "the model fails at given answers: AttributeError: no 'vision",
        ),
        (AssertionError("head"), ScoreError, "the model fails at given answers: AssertionError: head"),
        (torch.OutOfMemoryError("CUDA out of memory."), ModelError, "no room for 4 answers .* Lower batch_size"),
    ],
)
def test_what_the_models_own_code_raises_is_one_line(tiny_model, tokenizer, usable, monkeypatch, raised, error, says):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(tiny_model.model.layers[0], "forward", fail)
    with pytest.raises(error, match=says) as found:
        MarginScorer(tiny_model, Prompter(tokenizer), usable, batch_size=4).score(range(2))
    assert "\n" not in str(found.value)
