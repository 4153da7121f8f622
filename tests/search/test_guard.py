from __future__ import annotations

import math

import numpy as np
import pytest

from splaser_plugin import LaserConfig, laser
from splaser_plugin.search.guard import Guard
from splaser_plugin.search.judge import Judge
from splaser_plugin.search.search import search
from splaser_plugin.weights.in_memory import Weights
from tests.builders import QUICK, tiny_llama
from tests.planted import Planted, outcomes


@pytest.mark.parametrize(
    ("options", "guards"),
    [
        ({}, {}),
        ({"text": "t", "scorer": "perplexity"}, {}),
        ({"scorer": "margin"}, {"chosen": 0.02}),
        ({"scorer": "margin", "text": "t", "tolerance": 0.1}, {"chosen": 0.1, "perplexity": math.exp(0.1)}),
        ({"objective": "compress"}, {"chosen": 0.02}),
        ({"objective": "compress", "text": "t"}, {"chosen": 0.02}),
        ({"objective": "compress", "text": "t", "ranks": "0.5"}, {"chosen": 0.02, "perplexity": math.exp(0.02)}),
        ({"scorer": "margin", "guard": "none"}, {}),
        (
            {"scorer": "margin", "text": "t", "guard": "semantic:0.1, perplexity:1.5"},
            {"semantic": 0.1, "perplexity": 1.5},
        ),
    ],
)
def test_a_search_by_margin_is_guarded_unless_it_asks_for_something_else(options, guards):
    assert LaserConfig(**options).guards == guards


def guarded_search(candidates, gains, losses, limit, name):
    """A search in which each change has a planted gain of the score and a planted fall of the guard's score."""
    model = tiny_llama()
    names = [candidate.matrix.name for candidate in candidates]
    scorer = Planted(model, dict(zip(names, gains, strict=True)), size=32)
    watched = Planted(model, dict(zip(names, [-loss for loss in losses], strict=True)), size=8)
    watched.name = name
    return search(Weights(model), candidates, Judge(scorer, guards=[Guard(watched, limit)]))


def test_the_guard_refuses_what_loses_more_than_its_limit_against_the_base(candidates):
    found = guarded_search(candidates, [0.1, 0.1, -0.1, 0.1, 0.1], [0.2, 0.15, 0.0, 0.05, 0.04], 0.25, "margin")
    assert outcomes(found) == ["kept", "guarded", "restored", "kept", "guarded"]
    losses = [trial.judgement.guard_loss for trial in found.trials]
    assert losses[2] is None
    assert [loss for loss in losses if loss is not None] == pytest.approx([0.2, 0.35, 0.25, 0.29])
    assert found.final.mean == pytest.approx(0.2)


def test_a_guard_of_perplexity_measures_the_ratio(candidates):
    losses = [np.log(1.01), np.log(1.03), 0.0, 0.0, 0.0]
    found = guarded_search(candidates, [0.1] * 5, losses, 1.02, "perplexity")
    assert outcomes(found) == ["kept", "guarded", "kept", "kept", "kept"]
    assert found.trials[1].judgement.guard_loss == pytest.approx(1.01 * 1.03)


def test_a_guard_refuses_a_ratio_of_perplexities_that_is_too_large_for_a_number(candidates):
    found = guarded_search(candidates, [0.1] * 5, [0.0, 900.0, 0.0, 0.0, 0.0], 1.02, "perplexity")
    assert outcomes(found) == ["kept", "guarded", "kept", "kept", "kept"]
    judgement = found.trials[1].judgement
    assert judgement.guard_loss is None
    assert judgement.reason == "the ratio of perplexities is too large for a number"


def test_each_guard_has_to_agree_and_the_one_that_refuses_is_named(candidates):
    model, guards = tiny_llama(), []
    names = [candidate.matrix.name for candidate in candidates]
    for guard, losses in (("chosen", [0.0, 0.2, 0.0, 0.0, 0.0]), ("perplexity", [0.0, 0.0, 0.2, 0.0, 0.0])):
        watched = Planted(model, dict(zip(names, [-loss for loss in losses], strict=True)), size=8)
        watched.name = guard
        guards.append(Guard(watched, 1.1 if guard == "perplexity" else 0.1))
    scorer = Planted(model, dict.fromkeys(names, 0.1), size=32)
    found = search(Weights(model), candidates, Judge(scorer, guards=guards))
    assert outcomes(found) == ["kept", "guarded", "guarded", "kept", "kept"]
    assert [trial.judgement.guard for trial in found.trials[:3]] == ["perplexity", "chosen", "perplexity"]


@pytest.mark.slow
def test_a_search_by_margin_keeps_nothing_that_costs_the_chosen_answers(whole_folder, pairs, text):
    options = {**QUICK, "candidates": 6, "scorer": "margin", "tolerance": 1e-5, "text": text, "window": 16}
    found = {
        guard: laser(whole_folder, pairs, config=LaserConfig(**options, guard=guard)) for guard in ("none", "auto")
    }
    tried = {guard: result.results()["candidates"] for guard, result in found.items()}
    assert any(trial["verdict"] == "kept" for trial in tried["none"])
    refused = [trial for trial in tried["auto"] if trial["verdict"] == "guarded"]
    assert refused and {trial["guard"] for trial in refused} <= {"chosen", "perplexity"}
    assert all(trial["guard"] == "perplexity" for trial in tried["auto"] if trial["verdict"] == "kept")


def test_many_small_losses_do_not_pass_the_guard_one_by_one(candidates):
    found = guarded_search(candidates, [0.1] * 5, [0.011] * 5, 0.03, "margin")
    assert outcomes(found) == ["kept", "kept", "guarded", "guarded", "guarded"]


@pytest.mark.slow
def test_a_guard_of_perplexity_keeps_fewer_changes_of_the_answers(text, whole_folder, pairs):
    options = {**QUICK, "text": text, "window": 16}
    free = laser(whole_folder, pairs, config=LaserConfig(**options))
    config = LaserConfig(**options, guard="perplexity:1.0001")
    result = laser(whole_folder, pairs, config=config)
    judged = [(trial["verdict"], trial["guard_loss"]) for trial in result.results()["candidates"]]
    assert "guarded" in [outcome for outcome, _ in judged]
    assert all((loss > 1.0001) == (outcome == "guarded") for outcome, loss in judged if loss is not None)
    assert all((loss is None) == (outcome not in ("kept", "guarded")) for outcome, loss in judged)
    assert len(result.search.kept) < len(free.search.kept)
