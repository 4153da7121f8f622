from __future__ import annotations

import copy
import itertools
import types

import pytest
import torch
from transformers import GenerationConfig

from splaser_plugin.data.pairs import pairs_from_rows
from splaser_plugin.errors import ModelError, PairsError
from splaser_plugin.generation.evaluation import evaluating
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.loop import CACHE, BatchSize
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.scoring.margin import MarginScorer
from tests.builders import VOCABULARY, tiny_llama
from tests.tiny_models import build


def one_at_a_time(model, prompt, ends, limit):
    """The slow way: a full forward pass for every token, no cache, no padding."""
    ids, said = list(prompt), []
    while len(said) < limit:
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        said.append(token)
        if token in ends:
            break
    return tuple(said)


def generator(model, tokenizer, **options):
    settings = {"max_new_tokens": 12, "batch_size": 3, **options}
    return Generator(model, Prompter(tokenizer, context=512), **settings)


@pytest.fixture
def prompts(tokenizer):
    texts = ["Hello", "What is the capital of France, and why?", "One two three", "a", "The quick brown fox"]
    return [tokenizer(text)["input_ids"] for text in texts]


@torch.no_grad()
def test_batched_answers_are_those_of_one_prompt_at_a_time(tiny_model, tokenizer, prompts):
    ours = generator(tiny_model, tokenizer)
    slow = [one_at_a_time(tiny_model, prompt, ours.end_tokens, 12) for prompt in prompts]
    assert [answer.tokens for answer in ours.answer(prompts)] == slow
    assert [answer.tokens for answer in ours.answer(prompts, expected=[3, 1, 9, 2, 7])] == slow


@torch.no_grad()
def test_an_answer_stops_at_the_end_token(tiny_model, tokenizer, prompts):
    free = generator(tiny_model, tokenizer).answer(prompts)
    end = free[1].tokens[4]
    tiny_model.generation_config.eos_token_id = [2, end]
    stopped = generator(tiny_model, tokenizer).answer(prompts)
    place = free[1].tokens.index(end)
    assert stopped[1].tokens == free[1].tokens[: place + 1]
    assert stopped[1].text == tokenizer.decode(free[1].tokens[:place]).strip()


@torch.no_grad()
@pytest.mark.parametrize("keeps_cache", [True, False])
def test_the_rows_that_go_on_alone_say_the_same(keeps_cache, tiny_model, tokenizer, prompts, monkeypatch):
    free = generator(tiny_model, tokenizer, max_new_tokens=20).answer(prompts)
    tiny_model.generation_config.eos_token_id = [free[place].tokens[length] for place, length in enumerate((2, 5, 9))]
    ours = generator(tiny_model, tokenizer, max_new_tokens=20, batch_size=5)
    slow = [one_at_a_time(tiny_model, prompt, ours.end_tokens, 20) for prompt in prompts]
    assert len({len(tokens) for tokens in slow}) > 2
    generate, batches = tiny_model.generate, []

    def watched(input_ids, **rest):
        batches.append(len(input_ids))
        found = generate(input_ids=input_ids, **rest)
        if not keeps_cache:
            setattr(found, CACHE, types.SimpleNamespace(layers=[None]))
        return found

    monkeypatch.setattr(tiny_model, "generate", watched)
    assert [answer.tokens for answer in ours.answer(prompts)] == slow
    assert batches[0] == 5
    assert all(2 * later <= earlier for earlier, later in itertools.pairwise(batches))
    assert len(batches) > 1


def test_the_batch_doubles_while_tokens_come_faster():
    size = BatchSize(0)
    for rate, expected in [(100, 16), (180, 32), (190, 16), (900, 16)]:
        size.took(size.now, 1000, 1000 / rate)
        assert size.now == expected


def test_a_batch_that_is_not_full_says_nothing_about_its_size():
    size = BatchSize(0)
    size.took(5, 1000, 1.0)
    assert size.now == 8
    size.took(8, 1000, 1.0)
    size.halve()
    size.took(8, 1000, 0.01)
    assert size.now == 8


def test_a_fixed_batch_stays():
    size = BatchSize(24)
    size.took(24, 1000, 1.0)
    assert size.now == 24


def test_measured_batches_give_the_same_answers(tiny_model, tokenizer, prompts):
    ours = generator(tiny_model, tokenizer, batch_size=0)
    many = prompts * 8
    plain = generator(tiny_model, tokenizer).answer(prompts)
    assert ours.answer(many) == plain * 8
    assert ours.engine.at_once >= 8


def test_the_models_own_sampling_settings_do_not_matter(tiny_model, tokenizer, prompts):
    plain = generator(tiny_model, tokenizer).answer(prompts)
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, min_new_tokens=9, eos_token_id=2)
    tiny_model.generation_config = own
    assert generator(tiny_model, tokenizer).answer(prompts) == plain
    assert tiny_model.generation_config is own


def test_running_out_of_memory_halves_the_batch_and_goes_on(tiny_model, tokenizer, prompts, monkeypatch):
    expected = generator(tiny_model, tokenizer).answer(prompts)
    small = generator(tiny_model, tokenizer, batch_size=5)
    generate = tiny_model.generate

    def at_most_two(input_ids, **rest):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("too large")
        return generate(input_ids=input_ids, **rest)

    monkeypatch.setattr(tiny_model, "generate", at_most_two)
    assert small.answer(prompts) == expected
    assert small.engine.at_once == 2


@pytest.mark.parametrize("said", ["not enough memory: you tried to allocate 9 bytes.", "MPS: out of memory"])
def test_memory_errors_of_every_device_halve_the_batch(said, tiny_model, tokenizer, prompts, monkeypatch):
    small = generator(tiny_model, tokenizer, batch_size=4)

    def none(**rest):
        raise RuntimeError(said)

    monkeypatch.setattr(tiny_model, "generate", none)
    with pytest.raises(ModelError, match=r"no room for 1 answers at once\. Lower max_new_tokens or batch_size"):
        small.answer(prompts)
    assert small.engine.at_once == 1


@torch.no_grad()
def test_models_with_states_beside_keys_and_values_answer_alike_in_batches(tokenizer, prompts):
    from transformers import FalconH1Config, FalconH1ForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    state = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    config = FalconH1Config(vocab_size=VOCABULARY, num_key_value_heads=2, initializer_range=0.3, **sizes, **state)
    model = FalconH1ForCausalLM(config).eval()
    free = generator(model, tokenizer, batch_size=1).answer(prompts)
    model.generation_config.eos_token_id = [answer.tokens[2] for answer in free[:3]]
    alone = generator(model, tokenizer, batch_size=1).answer(prompts)
    assert generator(model, tokenizer, batch_size=5).answer(prompts) == alone
    assert len({len(answer.tokens) for answer in alone}) > 1


def test_a_model_that_generates_nothing_gives_empty_answers(tiny_model, tokenizer, prompts, monkeypatch):
    def says_nothing(input_ids, **rest):
        return types.SimpleNamespace(sequences=input_ids, **{CACHE: None})

    monkeypatch.setattr(tiny_model, "generate", says_nothing)
    assert [answer.text for answer in generator(tiny_model, tokenizer).answer(prompts)] == [""] * 5


def test_generating_leaves_modes_and_random_state_alone(tiny_model, tokenizer, prompts):
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    modes = [module.training for module in tiny_model.modules()]
    state = torch.get_rng_state()
    generator(tiny_model, tokenizer).answer(prompts)
    assert [module.training for module in tiny_model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluating_restores_the_modes_after_an_error(tiny_model):
    tiny_model.train()
    with pytest.raises(ValueError), evaluating(tiny_model):
        assert not any(module.training for module in tiny_model.modules())
        raise ValueError
    assert all(module.training for module in tiny_model.modules())


@torch.no_grad()
def test_an_answer_never_outgrows_the_context(tokenizer, prompts):
    model = tiny_llama(max_position_embeddings=16)
    for batch_size in (1, 3):
        ours = Generator(model, Prompter(tokenizer, context=16), max_new_tokens=99, batch_size=batch_size)
        answers = ours.answer(prompts)
        assert [len(answer.tokens) for answer in answers] == [16 - len(prompt) for prompt in prompts]
        assert [answer.tokens for answer in answers] == [
            one_at_a_time(model, prompt, ours.end_tokens, 16 - len(prompt)) for prompt in prompts
        ]


def test_a_prompt_longer_than_the_context_is_refused(tokenizer):
    prompter = Prompter(tokenizer, context=20)
    message = r"a prompt of \d+ tokens \('Once upon.*context of 20\. Leave it out, or take a model of a longer context"
    with pytest.raises(PairsError, match=message):
        prompter.tokens([{"role": "user", "content": "Once upon a time " * 20}])


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


def test_prompts_follow_the_tokenizers_own_template(tokenizer):
    expected = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert Prompter(tokenizer).text(TURNS) == expected
    assert expected.endswith("<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n")


def test_named_templates_serve_tokenizers_without_one(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ModelError, match="template chatml or template instruct"):
        Prompter(tokenizer)
    chatml = Prompter(tokenizer, "chatml").text(TURNS[1:2])
    assert chatml == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    instruct = Prompter(tokenizer, "instruct").text(TURNS)
    assert instruct == (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.\n\n### Instruction:\nBye\n\n### Response:\n"
    )


def test_a_template_without_system_turns_gets_the_system_text_in_the_first_turn(tokenizer, monkeypatch):
    picky = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", picky)
    assert Prompter(tokenizer).text(TURNS) == "<user>Be brief.\n\nHi<assistant>Hello.<user>Bye<assistant>"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% if %}", r"TemplateSyntaxError: Expected an expression"),
        ("{{ raise_exception('no') }}", r"the prompt 'Bye': TemplateError: no\. Mend the template"),
        ("{{ messages[0].tool_calls[0] }}", r"UndefinedError"),
        ("{{ messages[0].content + 1 }}", r"TypeError"),
        ({"rag": "{{ messages[0].content }}"}, r"ValueError"),
    ],
)
def test_a_template_that_fails_is_one_line(template, says, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ModelError, match=rf"the chat template fails at .*{says}") as raised:
        Prompter(tokenizer).text(TURNS)
    assert "\n" not in str(raised.value)


def test_a_template_that_never_begins_the_assistants_turn_is_refused(tokenizer, monkeypatch):
    header = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", header)
    with pytest.raises(ModelError, match=r"ignores add_generation_prompt, .* would write '<assistant>' itself"):
        Prompter(tokenizer)
    assert Prompter(tokenizer, "instruct").text(TURNS[1:2]).endswith("### Response:\n")
    no_header = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", no_header)
    assert Prompter(tokenizer).text(TURNS[1:2]) == "[INST] Hi [/INST]"


@pytest.mark.parametrize("kind", ["rwkv", "openai-gpt", "mamba"])
def test_models_of_every_kind_answer_a_batch_as_each_prompt_alone(kind, tokenizer, prompts):
    """RWKV's state takes padding in, so it answers one prompt at a time; the first GPT takes no cache."""
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings = {
        "rwkv": {**sizes, "context_length": 512},
        "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512},
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    }[kind]
    model = build(kind, {"vocab_size": VOCABULARY, "eos_token_id": 2, "bos_token_id": 1, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    together = generator(model, tokenizer, max_new_tokens=6, batch_size=8)
    assert (together.engine.at_once == 1) == (kind == "rwkv")
    alone = generator(model, tokenizer, max_new_tokens=6, batch_size=1)
    said = together.answer(prompts)
    assert said == [alone.answer([prompt])[0] for prompt in prompts]
    assert any(answer.tokens for answer in said)


HEADER = "{{ '<|im_start|>assistant\n' }}"
OPENS = "{% if enable_thinking is not defined or enable_thinking %}{{ '<think>\n' }}{% endif %}"


@pytest.fixture
def thinking(tokenizer, monkeypatch):
    """The tokenizer with a template that opens a thought unless it is told otherwise."""
    template = tokenizer.chat_template.replace(HEADER, HEADER + OPENS)
    assert template != tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return tokenizer


def test_variables_of_the_template_are_set(thinking):
    hello = [{"role": "user", "content": "Hi"}]
    assert Prompter(thinking).text(hello).endswith("assistant\n<think>\n")
    assert Prompter(thinking, variables={"enable_thinking": True}).text(hello).endswith("<think>\n")
    assert Prompter(thinking, variables={"enable_thinking": False}).text(hello).endswith("assistant\n")
    for template, name in (("auto", "enable_thinkng"), ("auto", "enable"), ("chatml", "enable_thinking")):
        with pytest.raises(ModelError, match=rf"the chat template has no '{name}', so that it would change nothing"):
            Prompter(thinking, template, variables={name: False})


def test_a_given_answer_stands_after_a_closed_thought(thinking, tiny_model, pairs):
    hello = [{"role": "user", "content": "Hi"}]
    closed = thinking.decode(Prompter(thinking).tokens(hello, before_answer=True))
    assert closed.endswith("assistant\n<think>\n\n</think>\n\n")
    plain = Prompter(thinking, variables={"enable_thinking": False})
    assert plain.tokens(hello, before_answer=True) == plain.tokens(hello)
    usable = pairs_from_rows(pairs).pairs
    scorer = MarginScorer(tiny_model, Prompter(thinking), usable, batch_size=4)
    assert all(thinking.decode(prompt).endswith("</think>\n\n") for prompt in scorer.prompts)


@pytest.mark.parametrize(
    ("opened", "said", "text"),
    [
        (True, "I must be polite.\n</think>\n\nHello!", "Hello!"),
        (True, "I must be polite, and", ""),
        (False, "<think>\nI must be polite.\n</think>\n\nHello!", "Hello!"),
        (False, "<think>\nI must be polite, and", ""),
        (False, "The tags are <think> and </think>.", "The tags are <think> and </think>."),
        (False, "Hello!", "Hello!"),
    ],
)
@pytest.mark.parametrize("are_special", [False, True])
def test_the_thought_is_no_part_of_an_answer(are_special, opened, said, text, thinking, tiny_model, monkeypatch):
    if are_special:
        thinking = copy.deepcopy(thinking)
        thinking.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    prompter = Prompter(thinking, variables={"enable_thinking": opened})
    generator = Generator(tiny_model, prompter, max_new_tokens=64, batch_size=1)
    tokens = thinking(said)["input_ids"]
    monkeypatch.setattr(generator.engine, "_continue", lambda ids, mask, steps: [[*tokens, thinking.eos_token_id]])
    (answer,) = generator.answer([prompter.tokens([{"role": "user", "content": "Hi"}])])
    assert (answer.text, len(answer.tokens)) == (text, len(tokens) + 1)
