"""Compressing by each scorer and each way to reduce, from the search to the folder and its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from splaser_plugin import LaserConfig, LaserResult, expand, laser, load
from splaser_plugin.artifacts.results import Results
from splaser_plugin.data.windows import read_windows
from splaser_plugin.scoring.scorers import Material, Scorers
from tests.builders import EXAMPLE_PAIRS, PROSE, TO_COMPRESS, changed, states

pytestmark = pytest.mark.slow

WAYS = [("semantic", "svd"), ("semantic", "fisher"), ("perplexity", "whitened"), ("perplexity", "fisher")]
WINDOW = 16


@dataclass
class Run:
    scorer: str
    config: LaserConfig
    result: LaserResult
    out: Path


def compressed(folder, where, scorer, **options):
    """A run of the tiny model: by the pairs' answers, or by a text without any pairs."""
    measured = {"embedder": "self", "max_new_tokens": 6}
    if scorer == "perplexity":
        text = where / "notes.txt"
        text.write_text(4 * PROSE, encoding="utf-8")
        measured = {"text": str(text), "window": WINDOW}
    options = {**TO_COMPRESS, "samples": 20, "held_out_fraction": 0.4, "device": "cpu", **measured, **options}
    config = LaserConfig(scorer=scorer, **options)
    out = where / "small"
    return Run(
        scorer, config, laser(folder, EXAMPLE_PAIRS if scorer == "semantic" else None, config=config, output=out), out
    )


@pytest.fixture(scope="module", params=WAYS, ids=" ".join)
def run(request, tiny_folder, tmp_path_factory):
    scorer, way = request.param
    return compressed(tiny_folder, tmp_path_factory.mktemp("run"), scorer, reduce=way)


def test_the_folder_has_the_model_that_was_kept_and_as_many_parameters_as_the_table_says(run, tiny_folder):
    kept, saved = Results.load(run.out / "results.json").kept_budget, load(run.out)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert kept.share == 0.04 and kept.parameters_removed >= 0.04 * 18_432
    assert base.num_parameters() - saved.num_parameters() == kept.parameters_removed
    ranks = {f"{step.name}.weight": step.rank for step in run.result.recipe.steps}
    dense = states(expand(saved))
    assert not changed(dense, states(run.result.model)) and changed(dense, states(base)) == set(ranks)
    for name, rank in ranks.items():
        assert torch.linalg.matrix_rank(dense[name].double(), rtol=1e-5) == rank


def test_each_budget_takes_matrices_to_the_same_or_lower_ranks(run):
    tried = [trial.budget for trial in run.result.search.budgets]
    assert [budget.share for budget in tried] == [0.02, 0.04]
    for gentler, harder in pairwise(tried):
        assert all(harder.ranks[matrix] <= rank for matrix, rank in gentler.ranks.items())
        assert harder.ranks != gentler.ranks and harder.parameters_removed > gentler.parameters_removed
    costs = [budget.predicted_cost for budget in tried]
    assert (costs == [None, None]) == (run.config.reduce != "fisher")


def test_the_verdict_is_of_the_saved_model_and_of_what_was_held_out_alone(run, tokenizer):
    result, model, verdict = run.result, expand(load(run.out)), run.result.held_out
    assert verdict.loss_verdict and Results.load(run.out / "results.json").held_out.verdict == verdict.verdict
    assert min(len(verdict.result.items), len(result.search.final.items)) >= 6
    if run.scorer == "perplexity":
        windows = torch.tensor(read_windows(run.config.text, tokenizer, window=WINDOW, count=20, context=None))
        with torch.no_grad():
            chances = model(windows).logits[:, :-1].log_softmax(2).gather(2, windows[:, 1:, None])
        measured = sorted(result.search.final.values + verdict.result.values)
        assert verdict.unit == "windows"
        assert measured == pytest.approx(sorted(chances.mean((1, 2)).tolist()), abs=1e-5)
    else:
        asked = {pair.prompt for pair in result.split.search}
        assert not asked & {pair.prompt for pair in result.split.held_out} and verdict.unit == "pairs"
        scorer = Scorers(model, tokenizer, run.config).make("semantic", Material(result.split.held_out))
        again = scorer.score(range(len(result.split.held_out)))
        assert [answer.text for answer in again.answers] == [answer.text for answer in verdict.result.answers]


def test_the_ladder_tests_each_budget_at_alpha_and_ends_at_the_first_that_fails(tiny_folder, tmp_path):
    """Of two values of alpha on both sides of a budget's own p-value, one keeps it."""

    def tried(name, **options):
        (tmp_path / name).mkdir()
        options = {"save": "dense", "reduce": "svd", "budget": 0.1, "race": False, **options}
        search = compressed(tiny_folder, tmp_path / name, "perplexity", **options).result.search
        return [(trial.outcome, trial.judgement.scores.differences(search.baseline)) for trial in search.budgets]

    every = tried("every", tolerance=5.0)
    assert [outcome for outcome, _ in every] == ["kept"] * 5
    losses = every[2][1]
    tolerance = 2 * stats.sem(losses) - sum(losses) / len(losses)
    p_values = [stats.ttest_1samp(loss, -tolerance, alternative="greater").pvalue for _, loss in every]
    assert 0.01 < p_values[2] < 0.1
    for name, alpha in (("above", 1.1 * p_values[2]), ("below", 0.9 * p_values[2])):
        passed = [p_value < alpha for p_value in p_values]
        expected = ["kept" if one else "restored" for one in passed[: [*passed, False].index(False) + 1]]
        assert [outcome for outcome, _ in tried(name, tolerance=tolerance, alpha=alpha)] == expected
