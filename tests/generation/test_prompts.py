"""What a chat template says beside the turns: where an answer ends, and which day it is."""

from __future__ import annotations

import copy
import datetime

import pytest
import transformers.utils.chat_template_utils

from splaser_plugin import LaserConfig, laser
from splaser_plugin.data.pairs import pairs_from_rows
from splaser_plugin.errors import ModelError, PairsError
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.scoring.scorers import Material, Scorers
from splaser_plugin.weights.loading import context_length
from tests.builders import VOCABULARY, tiny_llama
from tests.planted import Facts

HELLO = [{"role": "user", "content": "Hi"}]
TURNS = (
    "{{% for m in messages %}}[{{{{ m.role }}}}] {{{{ m.content }}}}{tail}{{% endfor %}}"
    "{{% if add_generation_prompt %}}[assistant] {{% endif %}}"
)
TODAY = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}"


def with_template(tokenizer, template):
    found = copy.deepcopy(tokenizer)
    found.chat_template = template
    return found


@pytest.mark.parametrize(
    ("template", "end"),
    [
        # After every answer, as ChatML does.
        (TURNS.format(tail="<|im_end|>"), "<|im_end|>"),
        (TURNS.format(tail=" <file_sep>"), "<file_sep>"),
        # After the last answer another than after those before it: a model that ends there is done.
        (
            TURNS.format(tail="{{ '<gh_stars>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}"),
            "<gh_stars>",
        ),
        # Only what begins the next turn.
        (
            "{% for m in messages %}{{ '<filename>' if m.role == 'user' else '<reponame>' }}{{ m.content }}"
            "{% endfor %}{% if add_generation_prompt %}<reponame>{% endif %}",
            "<filename>",
        ),
        (TURNS.format(tail="\n"), None),
        ("{{ raise_exception('one turn only') }}", None),
    ],
)
def test_an_answer_ends_where_the_template_ends_a_turn(template, end, tokenizer):
    found = with_template(tokenizer, template)
    prompter = Prompter(found)
    assert prompter.end_token == (None if end is None else found.convert_tokens_to_ids(end))
    model = tiny_llama(eos_token_id=0)
    generator = Generator(model, prompter, max_new_tokens=4, batch_size=1)
    assert set(generator.end_tokens) == {0, found.eos_token_id, prompter.end_token} - {None}


@pytest.fixture
def on_day(monkeypatch):
    """Set the day on which templates are rendered."""

    def set_day(day):
        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime(2030, 1, day)

        monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Day)

    return set_day


@pytest.mark.parametrize("templates", [str, lambda template: {"default": template, "rag": "{{ documents }}"}])
def test_the_date_is_the_same_on_every_day(templates, tokenizer, on_day):
    dated = with_template(tokenizer, templates(TODAY + tokenizer.chat_template))
    on_day(1)
    assert dated.apply_chat_template(HELLO, tokenize=False).startswith("Today: 01 Jan 2030\n")
    first = Prompter(dated).text(HELLO)
    on_day(2)
    assert Prompter(dated).text(HELLO) == first
    assert first.startswith("Today: 26 Jul 2024\n")
    assert Prompter(dated).date == "26 Jul 2024"
    assert Prompter(tokenizer).date == Prompter(dated, "chatml").date == ""
    assert dated.chat_template == templates(TODAY + tokenizer.chat_template)


def test_a_date_in_a_format_of_its_own_is_refused(tokenizer):
    with pytest.raises(ModelError, match=r"writes today's date in a format that it makes itself.*Write the date"):
        Prompter(with_template(tokenizer, "{{ strftime_now('%d' + ' %b') }}" + tokenizer.chat_template))


def test_a_run_says_which_date_prompts_have(tokenizer, pairs):
    facts = Facts()
    dated = with_template(tokenizer, TODAY + tokenizer.chat_template)
    laser(tiny_llama(), pairs, config=LaserConfig(scorer="margin", candidates=1), tokenizer=dated, progress=facts)
    assert dict(facts.facts)["date"].startswith("26 Jul 2024 in every prompt")


def as_the_template_says(model, tokenizer, pairs):
    """A scorer of one's own, which writes its prompts itself."""
    SEEN.extend(tokenizer.apply_chat_template([*pair.messages], tokenize=False) for pair in pairs)
    return [0.0] * len(pairs)


SEEN: list[str] = []


def test_a_scorer_of_ones_own_gets_the_variables_and_the_date(tokenizer, pairs):
    template = "{{ 'kind ' if kind is defined else '' }}" + TODAY + tokenizer.chat_template
    found = with_template(tokenizer, template)
    config = LaserConfig(scorer=f"{__name__}.as_the_template_says", template_kwargs=["kind=true"])
    usable = pairs_from_rows(pairs).pairs
    Scorers(tiny_llama(), found, config).make(config.scored_by, Material(usable)).score(range(len(usable)))
    assert len(SEEN) == len(usable)
    assert all(text.startswith("kind Today: 26 Jul 2024\n") for text in SEEN)
    assert found.apply_chat_template(HELLO, tokenize=False).startswith("Today: ")


def test_the_context_of_a_composite_model_is_that_of_its_language_model(tokenizer):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=49151)
    model = Gemma3ForConditionalGeneration(config)
    assert context_length(model) == 64
    with pytest.raises(PairsError, match=r"leaves no room for an answer in the model's context of 64"):
        Prompter(tokenizer, context=context_length(model)).tokens([{"role": "user", "content": "apples " * 80}])
