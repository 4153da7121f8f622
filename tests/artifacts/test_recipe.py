"""recipe.json: what is written is read again, and settings of other versions don't get in the way."""

from __future__ import annotations

import json

import pytest

from splaser_plugin.artifacts.rank_source import BudgetShare
from splaser_plugin.artifacts.recipe import Recipe, Step
from splaser_plugin.artifacts.results import Tried
from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.errors import RecipeError
from splaser_plugin.files.validation import InvalidRecordError, plain, validated

RECIPE = Recipe(
    model="somebody/model",
    weights_identity="0123456789abcdef" * 4,
    dtype="float32",
    steps=(Step("model.layers.0.mlp.up_proj", 3, "mp", 1.5, (64, 32)), Step("lm_head", 2, 0.5, None, (9, 8))),
    scores={"baseline": 0.25, "final": 0.5},
    config=LaserConfig(include=("mlp", "lm_head"), ranks="mp,0.5", race=False),
    versions={"python": "3.11.2"},
)


@pytest.fixture
def file(tmp_path):
    RECIPE.save(tmp_path / "recipe.json")
    return tmp_path / "recipe.json"


def test_what_was_written_is_read_again(file, tmp_path):
    stored = json.loads(file.read_text())
    assert list(stored) == ["schema", "model", "weights", "dtype", "steps", "scores", "settings", "versions"]
    assert stored["settings"] == RECIPE.config.to_dict()
    assert Recipe.load(file) == RECIPE
    Recipe.load(file).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


def test_settings_of_another_version_are_kept_and_missing_ones_are_not_made_up(file, tmp_path):
    stored = json.loads(file.read_text())
    stored["settings"] = {"include": ["mlp"], "beam_width": 4}
    file.write_text(json.dumps(stored))
    recipe = Recipe.load(file)
    assert recipe.config == LaserConfig(include=("mlp",))
    assert recipe.unknown_settings == {"beam_width": 4}
    recipe.save(tmp_path / "again.json")
    written = json.loads((tmp_path / "again.json").read_text())["settings"]
    assert written == recipe.settings == {"include": ["mlp"], "beam_width": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"exclude": 7}}, r"not a whole recipe \(exclude: got 7, expected a list of text\)\. Make"),
        ({"settings": {"save": "zip"}}, r"not a whole recipe \(save: got 'zip', expected one of dense, factored\)"),
        ({"settings": None}, r"not a whole recipe \(settings is None, expected an object"),
        ({"dtype": "int8"}, r"not a whole recipe \(dtype is 'int8', expected one of float64, float32"),
        ({"steps": [{"name": "a"}]}, r"not a whole recipe \(steps\.0\.rank is missing\)"),
        ({"scores": {"final": "0.5"}}, r"not a whole recipe \(scores\.final is '0\.5', expected a valid number\)"),
        ({"mood": "good"}, r"not a whole recipe \(mood is not known\)"),
    ],
)
def test_what_can_not_be_is_named(file, changes, message):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(RecipeError, match=message):
        Recipe.load(file)


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_is_at_least_1(file, rank):
    stored = json.loads(file.read_text())
    stored["steps"][0]["rank"] = rank
    file.write_text(json.dumps(stored))
    with pytest.raises(RecipeError, match=rf"steps\.0\.rank is {rank}, expected greater than or equal to 1"):
        Recipe.load(file)


@pytest.mark.parametrize(
    ("text", "source"), [("mp", "mp"), ("0.5", 0.5), ("1e-05", 1e-05), ("budget 0.06", BudgetShare(0.06))]
)
def test_where_a_rank_comes_from_is_a_text_in_files_only(text, source):
    stored = {"name": "lm_head", "rank": 2, "edge": text, "threshold": None, "shape": [9, 8]}
    step = validated(Step, stored)
    assert (step.edge, type(step.edge), plain(step)["edge"]) == (source, type(source), text)


def test_results_of_version_0_1_may_not_say_where_a_rank_comes_from():
    stored = {"name": "lm_head", "rank": 2, "full_rank": 8, "verdict": "kept", "pairs_scored": [], "per_pair": []}
    assert validated(Tried, {**stored, "edge": ""}).edge is validated(Tried, stored).edge is None
    assert validated(Tried, {**stored, "edge": "mp"}).edge == "mp"


@pytest.mark.parametrize("text", ["", "iqrr", "1.5", "budget", "budget mp", 0.5, None])
def test_an_unknown_source_of_a_rank_is_refused(text):
    stored = {"name": "lm_head", "rank": 2, "edge": text, "threshold": None, "shape": [9, 8]}
    with pytest.raises(InvalidRecordError, match=r"edge is .*, expected one of iqr, mp, gavish-donoho, a fraction"):
        validated(Step, stored)
