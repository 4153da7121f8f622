from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import splaser_plugin
from splaser_plugin import LaserConfig, laser
from splaser_plugin import scan as run_scan
from splaser_plugin.artifacts import recipe
from splaser_plugin.artifacts.recipe import Recipe, Step
from splaser_plugin.config.stages import ApplyConfig
from splaser_plugin.errors import (
    CheckpointError,
    ConfigError,
    EmbedderError,
    ModelError,
    OutputError,
    PairsError,
    RecipeError,
)
from splaser_plugin.files.output import check_output, whole_folder
from splaser_plugin.jobs.apply import apply
from splaser_plugin.weights.loading import load_model
from tests.builders import QUICK, THREE_PAIRS, changed, states, tiny_llama


@pytest.fixture(scope="module")
def lasered(tiny_folder, tmp_path_factory):
    """A finished laser run of the tiny model, saved."""
    result = laser(tiny_folder, THREE_PAIRS, config=LaserConfig(**QUICK))
    return result, result.save(tmp_path_factory.mktemp("out") / "lasered")


@pytest.mark.slow
def test_the_saved_model_is_the_lasered_one_and_loads_with_its_tokenizer(lasered):
    result, out = lasered
    assert result.search.kept, "this run has to keep something to show anything"
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert not changed(loaded.state_dict(), result.model.state_dict())
    assert AutoTokenizer.from_pretrained(out)("Hello")["input_ids"] == result.tokenizer("Hello")["input_ids"]


def test_only_the_recipes_matrices_differ_from_the_base_and_have_its_rank(lasered, tiny_folder):
    result, _ = lasered
    base, reduced = states(AutoModelForCausalLM.from_pretrained(tiny_folder)), states(result.model)
    ranks = {step.name + ".weight": step.rank for step in result.recipe.steps}
    assert changed(base, reduced) == set(ranks)
    for name, rank in ranks.items():
        assert torch.linalg.matrix_rank(reduced[name].double(), rtol=1e-5) == rank


def test_applying_the_recipe_gives_the_same_bits(lasered, tiny_folder):
    result, out = lasered
    rebuilt = apply(out / "recipe.json", tiny_folder, config=ApplyConfig(device="cpu"))
    assert not changed(rebuilt.model.state_dict(), result.model.state_dict())
    assert rebuilt.tokenizer.chat_template == result.tokenizer.chat_template


def test_a_recipe_reaches_what_only_its_patterns_name(lasered):
    result, _ = lasered
    base = tiny_llama()
    step = Step("lm_head", 5, "mp", 1.0, tuple(base.lm_head.weight.shape))
    recipe = replace(result.recipe, steps=(step,), config=replace(result.config, include=("lm_head",)))
    model = apply(recipe, base).model
    assert torch.linalg.matrix_rank(model.lm_head.weight.double(), rtol=1e-5) == 5


def test_results_hold_every_score(lasered):
    result, out = lasered
    stored = json.loads((out / "results.json").read_text())
    assert stored["schema"] == "splaser.results/1"
    assert stored["baseline"]["score"] == pytest.approx(sum(stored["baseline"]["per_pair"]) / 3)
    assert stored["final"]["score"] > stored["baseline"]["score"]
    assert len(stored["candidates"]) == 6
    best = stored["baseline"]["score"]
    for candidate in stored["candidates"]:
        assert candidate["best_before"] == best
        assert (candidate["verdict"] == "kept") == (candidate["score"] > best)
        best = max(best, candidate["score"])
    assert stored["final"]["score"] == best
    assert stored["pairs"] == {"source": "rows", "used": 3, "dropped": {}}
    assert [text["prompt"] for text in stored["texts"]["search"]] == [pair.prompt for pair in result.split.search]
    assert stored["texts"]["search"][0].keys() == {"prompt", "chosen", "rejected"}
    assert len(stored["texts"]["search"]) == len(stored["baseline"]["answers"])


@pytest.mark.parametrize("options", [{"race": False}, {"batch_size": 0}, {"accept": "confident"}])
def test_ways_to_save_work_leave_traces_in_the_results(lasered, tiny_folder, options):
    plain, _ = lasered
    found = laser(tiny_folder, plain.pairs, config=LaserConfig(**QUICK, **options))
    results = found.results()
    assert results["generated_tokens"] > 0
    for candidate in results["candidates"]:
        scored = len(candidate["pairs_scored"])
        assert len(candidate["per_pair"]) == scored == 3
        assert candidate["score"] is not None and candidate["best_before"] is not None
    if "accept" in options:
        assert len(found.search.kept) < len(plain.search.kept)
    else:
        assert found.recipe.steps == plain.recipe.steps


def test_the_same_run_twice_gives_the_same_recipe(lasered, tiny_folder):
    first, _ = lasered
    again = laser(tiny_folder, first.pairs, config=LaserConfig(**QUICK))
    assert again.recipe == first.recipe
    assert again.scan == first.scan


def test_a_loaded_model_is_lasered_in_place(tokenizer, pairs):
    model = tiny_llama()
    result = laser(model, pairs, config=LaserConfig(**QUICK), tokenizer=tokenizer)
    assert result.model is model


def test_a_recipe_survives_its_file(lasered, tmp_path):
    result, out = lasered
    assert Recipe.load(out / "recipe.json") == result.recipe
    assert result.recipe.config.candidates == 6
    assert result.recipe.scores["final"] == result.search.final.mean


def test_a_recipe_for_other_weights_is_refused_and_nothing_changes(lasered):
    result, _ = lasered
    other = tiny_llama(seed=1)
    before = states(other)
    with pytest.raises(RecipeError, match=r"the recipe was made for weights .* but this model's are .*base model"):
        apply(result.recipe, other)
    assert not changed(states(other), before)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "not a recipe of schema"), ('{"schema": "splaser.recipe/1"}', r"not a whole recipe \(settings")],
)
def test_a_damaged_recipe_is_refused(tmp_path, content, message):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(tmp_path / "recipe.json")


def test_a_scan_takes_folders_and_loaded_models_alike(tiny_folder):
    from_disk = run_scan(str(tiny_folder))
    loaded = run_scan(load_model(tiny_folder, device="cpu")[0])
    assert {matrix.name: matrix for matrix in from_disk.matrices} == {matrix.name: matrix for matrix in loaded.matrices}


@pytest.mark.slow
def test_bad_input_is_refused_with_the_next_step(tiny_folder, tokenizer, pairs, tmp_path):
    with pytest.raises(CheckpointError, match="there is no such model folder"):
        laser("./nowhere", pairs)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="this folder has no weights"):
        laser(tmp_path, pairs)
    with pytest.raises(PairsError, match="no usable pair"):
        laser(tiny_folder, [{"prompt": "Hi", "chosen": "same", "rejected": "same"}], config=LaserConfig(**QUICK))
    with pytest.raises(EmbedderError, match="there is no such folder"):
        laser(tiny_folder, pairs, config=LaserConfig(**{**QUICK, "embedder": "./nothing"}))
    with pytest.raises(ModelError, match="Pass tokenizer="):
        laser(tiny_llama(), pairs)
    with pytest.raises(ConfigError, match=r"adapter is for a folder's model. Give PeftModel\.from_pretrained"):
        laser(tiny_llama(), pairs, config=LaserConfig(**QUICK, adapter="a"), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="candidates: got 0, expected at least 1"):
        LaserConfig(candidates=0)
    with pytest.raises(ConfigError, match="option 'screen' is not known"):
        LaserConfig(screen="margin")
    with pytest.raises(ConfigError, match="batch_size: got -1, expected at least 0"):
        LaserConfig(batch_size=-1)
    with pytest.raises(ConfigError, match="edge: got 'iqrr', expected one of iqr, mp, gavish-donoho"):
        LaserConfig(edge="iqrr")
    with pytest.raises(ConfigError, match="option 'sample' is not known; nearest: samples"):
        LaserConfig.from_dict({"sample": 3})
    with pytest.raises(ConfigError, match="device cuda:7: not usable here"):
        load_model(tiny_folder, device="cuda:7")


def test_a_config_survives_a_dict():
    config = LaserConfig(include=("mlp",), samples=7)
    assert LaserConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_output_is_whole_or_absent(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError), whole_folder(out) as folder:
        (folder / "half").write_text("x")
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with whole_folder(out) as folder:
        (folder / "recipe.json").write_text("1")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["recipe.json"]
    with whole_folder(out) as folder:
        (folder / "recipe.json").write_text("2")
    assert (out / "recipe.json").read_text() == "2"
    assert list(tmp_path.iterdir()) == [out]


def test_a_failed_replacement_leaves_the_old_output(tmp_path):
    out = tmp_path / "out"
    with whole_folder(out) as folder:
        (folder / "recipe.json").write_text("1")
    with pytest.raises(KeyboardInterrupt), whole_folder(out) as folder:
        raise KeyboardInterrupt
    assert (out / "recipe.json").read_text() == "1"
    assert list(tmp_path.iterdir()) == [out]


def test_output_that_would_cost_somebodys_files_is_refused(tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match=r"exists and isn't empty.*overwrite"):
        check_output(taken, overwrite=False)
    with pytest.raises(OutputError, match=r"no recipe\.json"):
        check_output(taken, overwrite=True)
    with pytest.raises(OutputError, match="is no folder"):
        check_output(taken / "thesis.txt", overwrite=True)
    (tmp_path / "model").mkdir()
    for out in (tmp_path / "model", tmp_path / "model" / "out", tmp_path):
        with pytest.raises(OutputError, match=r"input|empty"):
            check_output(out, overwrite=False, inputs=(tmp_path / "model",))


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, splaser_plugin, splaser_plugin.cli.app\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def test_every_public_name_can_be_imported():
    for name in splaser_plugin.__all__:
        assert getattr(splaser_plugin, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lasre'"):
        _ = splaser_plugin.lasre


def test_versions_go_without_what_is_not_installed(monkeypatch):
    def version(name):
        if name == "sentence-transformers":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(recipe, "version", version)
    assert set(recipe.versions()) == {"python", "splaser_plugin", "torch", "transformers"}
