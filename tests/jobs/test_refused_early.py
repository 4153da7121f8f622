"""What can be refused is refused before a model's weights are read, which takes minutes where the model is large."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaForCausalLM

from splaser_plugin import CompareConfig, LaserConfig, apply, compare, laser
from splaser_plugin.errors import (
    CheckpointError,
    ConfigError,
    EmbedderError,
    ModelError,
    OutputError,
    PairsError,
    RecipeError,
    ScorerError,
    TextError,
)
from tests.builders import QUICK, tiny_llama


@pytest.fixture(autouse=True)
def unreached(monkeypatch):
    """The loader of the weights, which isn't to be reached."""
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embedder": "./nothing"}, EmbedderError, "there is no such folder"),
        ({"embedder": "nobody/nothing"}, EmbedderError, "nobody/nothing"),
        ({"embedder": "."}, EmbedderError, "neither a modules.json nor a config.json"),
        ({"guard": "semantic:0.05", "scorer": "margin", "embedder": "./nothing"}, EmbedderError, "no such folder"),
        ({"scan": "absent.json"}, RecipeError, "absent.json"),
        ({"scan": "damaged.json"}, RecipeError, "damaged.json"),
        ({"scorer": "perplexity", "text": "absent.txt"}, TextError, "there is no such file"),
        ({"guard": "perplexity:1.02", "text": "absent.txt"}, TextError, "there is no such file"),
        ({"scorer": "no_such_package.score"}, ScorerError, "no_such_package"),
        ({"held_out": "absent.jsonl"}, PairsError, "absent.jsonl"),
        ({"adapter": "./nothing"}, CheckpointError, "there is no adapter_config.json"),
        ({"device": "cuda:77"}, ConfigError, "not usable here"),
        ({"template_kwargs": ("no_such_name=1",)}, ModelError, "the chat template has no 'no_such_name'"),
    ],
)
def test_laser_refuses_before_the_model_loads(options, error, message, tiny_folder, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.json").write_text(json.dumps({"schema": "splaser.scan/1"}))
    with pytest.raises(error, match=message):
        laser(tiny_folder, pairs, config=LaserConfig(**{**QUICK, **options}))


def test_laser_refuses_bad_pairs_and_outputs_before_the_model_loads(tiny_folder, pairs, tmp_path):
    with pytest.raises(PairsError, match="no usable pair"):
        laser(tiny_folder, [{"prompt": "Hi", "chosen": "same", "rejected": "same"}], config=LaserConfig(**QUICK))
    with pytest.raises(ConfigError, match="none were given"):
        laser(tiny_folder, config=LaserConfig(**QUICK))
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="exists and isn't empty"):
        laser(tiny_folder, pairs, config=LaserConfig(**QUICK), output=tmp_path)


def test_compare_refuses_before_a_model_loads(tiny_folder, pairs, tmp_path):
    with pytest.raises(EmbedderError, match="there is no such folder"):
        compare([tiny_folder], pairs, config=CompareConfig(embedder="./nothing"))
    with pytest.raises(OutputError, match="there is no folder"):
        compare([tiny_folder], pairs, output=tmp_path / "absent" / "comparison.json")


def test_apply_writes_no_folder_of_a_loaded_model_which_has_no_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="a loaded model has no tokenizer to write"):
        apply(tmp_path / "recipe.json", tiny_llama(), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
