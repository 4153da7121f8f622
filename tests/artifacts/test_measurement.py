"""What a report says about how its run measured."""

from __future__ import annotations

import json

from splaser_plugin.artifacts.measurement import measurement
from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.artifacts.report import render
from splaser_plugin.artifacts.results import Results
from splaser_plugin.config.stages import LaserConfig
from tests.artifacts.page import Page, squeezed
from tests.report_data import made_up_results, made_up_scan

SCAN = made_up_scan(4)
CONFIG = LaserConfig(embedder="mini", max_prompt_tokens=1000, max_answer_tokens=2000, max_new_tokens=64)


def test_a_report_says_what_the_score_is_and_how_many_answers_were_cut():
    stored = made_up_results(SCAN)
    stored |= {"scorer": "semantic", "elapsed_s": 137.2, "generated_tokens": 7074}
    stored["pairs"]["dropped"] = {"too long an answer": 3}
    stored["references"] = {"texts": 56, "half_read": 2, "pairs": 28, "alike": 1}
    stored["baseline"] |= {"cut_answers": 19, "empty_answers": 1, "half_read_answers": 5}
    text = squeezed(Page(render(SCAN, Results.from_dict(stored), settings=CONFIG.to_dict())).text)
    for sentence in (
        "score semantic: cos(answer, chosen) - cos(answer, rejected) of the model's own greedy answers",
        "greedy answers, embedded by mini",
        "pairs Intel/orca_dpo_pairs: 20 searched on, 8 held out; dropped: 3 too long an answer",
        "prompts of up to 1,000 tokens, answers of up to 2,000; the model's own answers end after 64 tokens",
        "2 of 56 chosen and rejected answers are longer than the embedder reads; 1 of 28 pairs score 0 whatever",
        "generated 7,074 tokens by the search",
        "duration 2 min from the loaded model to the verdict",
        "base, searched on 20 19 1 5 result, searched on 20 0 0 0 base, held out 8 0 0 0 result, held out 8 0 0 0",
    ):
        assert sentence in text
    on_text = {**stored, "unit": "windows", "scorer": "perplexity", "references": None}
    config = LaserConfig(scorer="perplexity", text="notes.txt", window=99)
    text = squeezed(Page(render(SCAN, Results.from_dict(on_text), settings=config.to_dict())).text)
    assert "score perplexity: mean log-probability of a window of text, in nats a token" in text
    assert "windows notes.txt, 99 tokens each: 20 searched on, 8 held out" in text
    own = squeezed(Page(render(SCAN, Results.from_dict({**stored, "scorer": "my.own"}))).text)
    assert "score my.own: what this function of the user's own gives" in own


def test_a_report_made_anew_of_an_older_run_names_that_runs_limits_or_none():
    run = Results.from_dict({**made_up_results(SCAN), "scorer": "semantic"})
    older = CONFIG.to_dict() | {"max_prompt_chars": 512, "max_answer_chars": 2048}
    del older["max_prompt_tokens"], older["max_answer_tokens"]
    facts = dict(measurement(run, older))
    assert facts["limits"] == (
        "prompts of up to 512 characters, answers of up to 2,048; the model's own answers end after 64 tokens"
    )
    for unknown in ({}, {"max_prompt_chars": "512", "max_answer_chars": [2048]}):
        facts = dict(measurement(run, unknown))
        assert "limits" not in facts
    assert "embedded by" not in facts["score"]


def test_the_report_of_a_folder_takes_what_stands_in_its_recipe(splaser, tmp_path):
    SCAN.save(tmp_path / "scan.json")
    Results.from_dict({**made_up_results(SCAN), "scorer": "semantic"}).save(tmp_path / "results.json")
    recipe = Recipe("somebody/model", "0" * 64, "float32", (), {}, CONFIG, {}).to_dict()
    recipe["settings"] = {"max_prompt_chars": 512, "max_answer_chars": 2048, "embedder": "mini"}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert splaser("report", tmp_path, "-o", tmp_path / "report.html")[0] == 0
    text = squeezed(Page((tmp_path / "report.html").read_text()).text)
    assert "limits prompts of up to 512 characters, answers of up to 2,048 " in text
    assert "embedded by mini" in text and "tokens, answers" not in text
