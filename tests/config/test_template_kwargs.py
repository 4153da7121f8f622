"""Variables of the chat template: from options and files to the prompt, and into the records."""

from __future__ import annotations

import copy
import json

import pytest
import yaml

from splaser_plugin.config.stages import CompareConfig, LaserConfig
from splaser_plugin.config.template_kwargs import parse_template_kwargs
from splaser_plugin.errors import ConfigError
from tests.builders import FLAGS, tiny_llama


@pytest.fixture
def model(tokenizer, tmp_path):
    """Folder of a model whose chat template fails unless its variable `style` is plain."""
    picky = copy.deepcopy(tokenizer)
    picky.chat_template = "{% if style != 'plain' %}{{ raise_exception('style') }}{% endif %}" + tokenizer.chat_template
    tiny_llama().save_pretrained(tmp_path / "model")
    picky.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_values_are_truth_values_numbers_or_text():
    given = ["a=false", "b=True", "c=None", "d=3", "e=0.5", "f=low", "g=", "h=x=y", "i=[1]", "j=FALSE"]
    assert parse_template_kwargs(given) == {
        "a": False, "b": True, "c": None, "d": 3, "e": 0.5, "f": "low", "g": "", "h": "x=y", "i": "[1]", "j": False,
    }  # fmt: skip


def test_a_value_that_is_nested_too_deeply_is_text():
    assert parse_template_kwargs(["a=" + "[" * 100_000]) == {"a": "[" * 100_000}


@pytest.mark.parametrize("config", [LaserConfig, CompareConfig])
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["enable_thinking"], "got 'enable_thinking', expected KEY=VALUE"),
        (["enable-thinking=false"], "got 'enable-thinking=false', expected KEY=VALUE"),
        (["tokenize=true"], "'tokenize' is set by splaser"),
        (["a=1", "a=2"], "'a' stands there twice"),
    ],
)
def test_what_sets_no_variable_is_refused(config, texts, message):
    with pytest.raises(ConfigError, match=message):
        config(template_kwargs=texts)


@pytest.mark.slow
def test_they_reach_the_prompts_of_a_laser_run_and_its_records(splaser, model, pairs_file, tmp_path):
    given = ["--template-kwargs", "style=plain"]
    code, _, stderr = splaser("laser", model, "--pairs", pairs_file, "-o", tmp_path / "out", *FLAGS)
    assert (code, "the chat template fails at the prompt" in " ".join(stderr.split())) == (1, True)
    code, _, stderr = splaser("laser", model, "--pairs", pairs_file, "-o", tmp_path / "out", *FLAGS, *given)
    assert code == 0, stderr
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["settings"]["template_kwargs"] == ["style=plain"]
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["template_kwargs"] == ["style=plain"]
    code, _, stderr = splaser("laser", "--config", tmp_path / "out" / "run.yaml", "-o", tmp_path / "again")
    assert code == 0, stderr
    misspelt = ["--template-kwargs", "styl=plain"]
    code, _, stderr = splaser("laser", model, "--pairs", pairs_file, "-o", tmp_path / "b", *FLAGS, *misspelt)
    assert (code, "the chat template has no 'styl'" in " ".join(stderr.split())) == (1, True)


@pytest.mark.real
def test_they_reach_the_prompts_of_compare(splaser, model, pairs_file, minilm, tmp_path):
    flags = ["--pairs", pairs_file, "--embedder", minilm, "--max-new-tokens", 4, "-o", tmp_path / "c.json"]
    code, _, stderr = splaser("compare", model, *flags)
    assert (code, "the chat template fails at the prompt" in " ".join(stderr.split())) == (1, True)
    code, _, stderr = splaser("compare", model, *flags, "--template-kwargs", "style=plain")
    assert code == 0, stderr
    assert json.loads((tmp_path / "c.json").read_text())["settings"]["template_kwargs"] == ["style=plain"]
