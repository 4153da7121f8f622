from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from splaser_plugin import LaserConfig, expand, laser, load
from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.artifacts.results import Results
from splaser_plugin.config.stages import ApplyConfig
from splaser_plugin.errors import RecipeError
from splaser_plugin.files.output import JOURNAL, STATISTICS
from splaser_plugin.jobs import stages
from splaser_plugin.jobs.apply import apply
from splaser_plugin.jobs.laser import read_pairs
from splaser_plugin.reduction.moments import measure
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import load_model
from tests.builders import EXAMPLE_PAIRS, PROSE, changed, states
from tests.planted import Facts

SETTINGS = {
    "objective": "compress",
    "budget": 0.1,
    "tolerance": 1.0,
    "samples": 24,
    "window": 16,
    "calibration_tokens": 400,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file with windows enough to hold some out."""
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text(4 * PROSE, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def compressed(tiny_folder, text, tmp_path_factory):
    """A finished run of the tiny model with every budget up to 10 %, its folder and what it told."""
    told, out = Facts(), tmp_path_factory.mktemp("out") / "small"
    config = LaserConfig(**SETTINGS, text=text, save="factored")
    return laser(tiny_folder, EXAMPLE_PAIRS, config=config, output=out, progress=told), out, told.facts


@pytest.mark.slow
def test_a_tenth_of_the_parameters_goes_and_every_budget_is_recorded(compressed):
    result, out, _ = compressed
    stored = Results.load(out / "results.json")
    assert [budget.share for budget in stored.budgets] == [0.02, 0.04, 0.06, 0.08, 0.1]
    assert [budget.outcome for budget in stored.budgets] == ["kept"] * 5
    costs = [budget.predicted_cost for budget in stored.budgets]
    assert costs == sorted(costs) and costs[0] > 0
    assert all(budget.change is not None and budget.text_change is not None for budget in stored.budgets)
    assert stored.candidates == () and stored.scorer == "margin" and stored.compared_with == "base"
    assert 0.1 * 18_432 <= stored.parameters_removed == result.search.parameters_removed < 0.15 * 18_432
    assert stored.held_out.loss_verdict and stored.held_out_text.loss_verdict
    assert result.search.kept_budget == "10 %"
    dense, saved = result.parameters
    assert dense - saved == stored.parameters_removed
    assert not changed(states(result.model), states(expand(load(out))))


@pytest.mark.slow
def test_the_report_and_the_card_have_the_table_and_both_verdicts(compressed):
    _, out, _ = compressed
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert '<table id="budgets">' in page and '<p id="text-verdict">' in page
    assert "| 10 %: " in card and "windows of text held out" in card
    assert "splaser laser --config run.yaml -o again" in card and "splaser apply" not in card


@pytest.mark.slow
def test_only_the_recipes_matrices_differ_from_the_base_and_have_its_rank(compressed, tiny_folder):
    result, _, _ = compressed
    base, reduced = states(AutoModelForCausalLM.from_pretrained(tiny_folder)), states(result.model)
    ranks = {step.name + ".weight": step.rank for step in result.recipe.steps}
    assert changed(base, reduced) == set(ranks) and {str(step.edge) for step in result.recipe.steps} == {"budget 0.1"}
    for name, rank in ranks.items():
        assert torch.linalg.matrix_rank(reduced[name].double(), rtol=1e-5) == rank


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(compressed, tiny_folder, text, tmp_path, monkeypatch):
    result, _, _ = compressed
    out = tmp_path / "again"
    config = LaserConfig(**SETTINGS, text=text, save="factored")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("splaser_plugin.jobs.result.LaserResult.save_held", stop)
        laser(tiny_folder, EXAMPLE_PAIRS, config=config, output=out)
    lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    measured = [json.loads(line)["subject"] for line in lines[1:]]
    cut = measured.index("budget 0.06")
    (out / JOURNAL).write_bytes(b"".join(lines[: cut + 2]))
    lost = out / STATISTICS / "0" / "3.safetensors"
    lost.write_bytes(lost.read_bytes()[:100])
    again_measured = []

    def measured(weights, matrices, *arguments, **options):
        again_measured.extend(matrices)
        return measure(weights, matrices, *arguments, **options)

    monkeypatch.setattr("splaser_plugin.reduction.measured_reducer.measure", measured)
    again = laser(tiny_folder, EXAMPLE_PAIRS, config=config, output=out)
    assert not changed(states(result.model), states(again.model))
    assert [matrix.name for matrix in again_measured] == ["model.layers.0.self_attn.o_proj"]
    assert not (out / STATISTICS).exists() and not (out / JOURNAL).exists()
    assert again.recipe.steps == result.recipe.steps and again.held_out == result.held_out


def test_how_many_matrices_can_not_be_measured_is_told_and_how_to_try_as_many_others(tiny_folder):
    model, tokenizer = load_model(tiny_folder, device="cpu", dtype="auto")
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    told = Facts()
    chosen = {"candidates": 13, "ranks": "0.5", "reduce": "fisher"}
    config = LaserConfig(**{**SETTINGS, **chosen})
    run = stages.begin(Weights(model), tokenizer, name="tiny", config=config, progress=told)
    measures = stages.prepare_measures(run, read_pairs(EXAMPLE_PAIRS, config, tokenizer))
    candidates = stages.order_candidates(run, measures, stages.scan_weights(run, measures))
    count = 13 - len(candidates)
    assert count in (3, 4)
    (said,) = [value for label, value in told.facts if label == "left out"]
    assert said.startswith(f"{count} of 13 matrices, of which nothing can be measured (model.layers.1.self_attn.")
    assert said.endswith(f"; 1 more could be tried. Exclude the {count}, or use --candidates 14.")


@pytest.mark.parametrize(("budget", "tried"), [(0.98, ["92 %", "94 %"]), (0.9, ["88 %", "90 %"])])
def test_budgets_that_no_ranks_reach_are_told(tiny_folder, budget, tried):
    model, tokenizer = load_model(tiny_folder, device="cpu", dtype="auto")
    told = Facts()
    config = LaserConfig(**{**SETTINGS, "budget": budget})
    run = stages.begin(Weights(model), tokenizer, name="tiny", config=config, progress=told)
    budgets = stages.budgets_of(run, stages.prepare_measures(run, read_pairs(EXAMPLE_PAIRS, config, tokenizer)))
    assert [budget.name for budget in budgets[-2:]] == tried
    said = [value for label, value in told.facts if label == "left out"]
    assert len(said) == (budget == 0.98)
    assert all(one.startswith(f"budgets above {tried[-1]}, to which the lowest ranks of the 14 matri") for one in said)


def test_what_is_held_out_is_never_measured_on(tiny_folder, text):
    model, tokenizer = load_model(tiny_folder, device="cpu", dtype="auto")
    config = LaserConfig(**{**SETTINGS, "calibration_tokens": 10**6}, text=text)
    split = read_pairs(EXAMPLE_PAIRS, config, tokenizer)
    run = stages.begin(Weights(model), tokenizer, name="tiny", config=config)
    measures = stages.prepare_measures(run, split)
    rows = {row.tokens for row in measures.calibration}
    assert {tuple(window) for window in measures.searched.windows} <= rows
    assert not {tuple(window) for window in measures.unseen.windows} & rows
    told = [tokenizer.decode(row) for row in rows]
    assert all(any(pair.chosen[:40] in text for text in told) for pair in measures.searched.pairs)
    assert not any(pair.chosen[:40] in text for pair in measures.unseen.pairs for text in told)


def test_a_recipe_that_was_measured_is_refused_with_what_to_do(compressed, tiny_folder):
    _, out, _ = compressed
    with pytest.raises(RecipeError, match=r"made with reduce fisher, .* splaser laser again with the run\.yaml"):
        apply(out / "recipe.json", tiny_folder, config=ApplyConfig(device="cpu"))


def test_a_recipe_from_before_there_were_reducers_is_a_plain_one(compressed, tmp_path):
    _, out, _ = compressed
    stored = json.loads((out / "recipe.json").read_text())
    del stored["settings"]["reduce"]
    (tmp_path / "recipe.json").write_text(json.dumps(stored))
    assert Recipe.load(tmp_path / "recipe.json").config.reducer == "svd"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["svd", "whitened", "fisher"])
def test_every_way_to_reduce_goes_with_ranks_one_matrix_at_a_time(tiny_folder, way):
    config = LaserConfig(**{**SETTINGS, "candidates": 3, "tolerance": 5.0}, ranks="0.6,0.4", reduce=way)
    result = laser(tiny_folder, EXAMPLE_PAIRS, config=config)
    assert len(result.search.trials) == 3 and not result.search.budgets and result.search.kept
    base = states(AutoModelForCausalLM.from_pretrained(tiny_folder))
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    weights = Weights(plain)
    named = {matrix.name: matrix for matrix in weights.matrices()[0]}
    for step in result.recipe.steps:
        weights.reduce(named[step.name], step.rank)
    assert changed(base, states(plain)) == changed(base, states(result.model))
    assert (not changed(states(plain), states(result.model))) == (way == "svd")


@pytest.mark.slow
def test_with_nothing_that_passes_the_model_is_saved_as_it_was(tiny_folder, tmp_path):
    told = Facts()
    config = LaserConfig(**{**SETTINGS, "tolerance": 1e-6})
    result = laser(tiny_folder, EXAMPLE_PAIRS, config=config, output=tmp_path / "out", progress=told)
    assert not changed(states(AutoModelForCausalLM.from_pretrained(tiny_folder)), states(result.model))
    assert result.recipe.steps == () and ("kept", "no budget") in told.facts
    assert "No budget passed its test" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_the_run_is_told_and_can_be_made_again_from_its_file(compressed, splaser, tmp_path):
    _, out, facts = compressed
    labels = [label for label, _ in facts]
    assert labels.count("held-out text") == 1 and "measured on" in labels
    code, _, err = splaser("laser", "--config", out / "run.yaml", "-o", tmp_path / "again", "--budget", "0.04")
    assert code == 0, err
    lines = [line.split() for line in err.splitlines()]
    assert ["2", "%"] in [line[:2] for line in lines] and ["4", "%"] in [line[:2] for line in lines]
    assert "splaser apply" not in err and "--config" in err
    assert Recipe.load(tmp_path / "again" / "recipe.json").config == replace(
        Recipe.load(out / "recipe.json").config, budget=0.04
    )
