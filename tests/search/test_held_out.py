from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

from splaser_plugin import LaserConfig, laser
from splaser_plugin.data.limits import TokenLimits
from splaser_plugin.data.pairs import Pair, PairSet, pairs_from_rows
from splaser_plugin.data.split import LEAST, split_by_prompt, split_by_set, split_documents
from splaser_plugin.errors import ConfigError, PairsError
from splaser_plugin.jobs.laser import read_pairs
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.search.verdict import compare
from tests.builders import EXAMPLE_HELD_OUT, EXAMPLE_PAIRS, QUICK, states, tiny_llama
from tests.planted import Facts


def pair_set(*prompts: str) -> PairSet:
    return pairs_from_rows([{"prompt": prompt, "chosen": "Yes.", "rejected": "No."} for prompt in prompts])


MANY = pair_set(*(f"Question {number}?" for number in range(1000)))


def prompts(pairs: tuple[Pair, ...]) -> set[str]:
    return {pair.prompt for pair in pairs}


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.9])
def test_the_split_loses_no_pair_and_has_its_fraction(fraction):
    split = split_by_prompt(MANY, fraction)
    assert len(split.held_out) == 1000 * fraction
    assert sorted(prompts(split.search) | prompts(split.held_out)) == sorted(prompts(MANY.pairs))
    assert len(split.search) + len(split.held_out) == 1000


def test_the_split_depends_on_the_seed_and_not_on_the_order():
    split = split_by_prompt(MANY, 0.3, seed=1)
    shuffled = list(MANY.pairs)
    random.Random(0).shuffle(shuffled)
    again = split_by_prompt(PairSet(tuple(shuffled), "rows", {}, 1000), 0.3, seed=1)
    assert prompts(again.held_out) == prompts(split.held_out)
    assert prompts(split_by_prompt(MANY, 0.3, seed=2).held_out) != prompts(split.held_out)


def test_duplicates_never_straddle():
    rows: list[dict[str, object]] = []
    for number in range(200):
        for form in (f"What is {number}?", f"  what  is {number}?\n", f"WHAT IS {number}?"):
            rows.append({"prompt": form, "chosen": f"Yes, {form}", "rejected": "No."})
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {number}?"}]
        rows.append({"prompt": turns, "chosen": "Yes.", "rejected": "No."})
    split = split_by_prompt(pairs_from_rows(rows), 0.3)
    sides = [
        {" ".join(prompt.casefold().split()) for prompt in prompts(part)} for part in (split.search, split.held_out)
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert len(split.held_out) == 240


@pytest.mark.parametrize("seed", range(5))
def test_documents_of_one_question_are_on_one_side(seed):
    questions = [f"Which {'COLOUR' if place % 2 else 'colour'}   is box {place // 3}?" for place in range(60)]
    parts = split_documents(range(60), questions, 0.3, seed)
    assert sorted(parts.search + parts.held_out) == list(range(60))
    assert not {place // 3 for place in parts.search} & {place // 3 for place in parts.held_out}
    assert 18 <= len(parts.held_out) <= 20
    few = split_documents(range(8), questions[:8], 0.3, seed)
    assert (few.held_out, len(few.search)) == ((), 8)
    assert "8 documents would be split into" in few.reason


def test_without_enough_pairs_or_a_fraction_all_are_searched_on_and_the_reason_is_given():
    few = pair_set(*(f"Question {number}?" for number in range(10)))
    split = split_by_prompt(few, 0.3)
    assert split.search == few.pairs
    assert split.held_out == ()
    assert split.reason.startswith("none, so no verdict: 10 pairs would be split into 7 to search on and 3 held out")
    assert f"each part needs {LEAST}. Raise --samples, or give --held-out FILE" in split.reason
    split = split_by_prompt(MANY, 0.0)
    assert (split.search, split.held_out) == (MANY.pairs, ())
    assert "none, as asked for" in split.reason


def with_long_answers(tokenizer: Any, pairs: int, dropped: int) -> PairSet:
    rows = [{"prompt": f"Question {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(pairs + dropped)]
    rows = [{**row, "chosen": "yes " * 1100} if n >= pairs else row for n, row in enumerate(rows)]
    return pairs_from_rows(rows, limits=TokenLimits(tokenizer))


def test_a_verdict_that_dropped_rows_cost_is_a_warning(tokenizer):
    lost = "rows: 4 of 21 rows were dropped (over-long answer 4). Raise --max-answer-tokens."
    few, fewer = with_long_answers(tokenizer, 17, 4), with_long_answers(tokenizer, 9, 4)
    assert split_by_prompt(few, 0.3).warning == f"too few pairs are left for a verdict. {lost}"
    assert split_by_prompt(few, 0.4).warning == ""
    assert split_by_prompt(with_long_answers(tokenizer, 17, 0), 0.3).warning == ""
    assert split_by_prompt(fewer, 0.3).warning.startswith("rows: 4 of 13 rows were dropped")


def test_rows_dropped_from_the_held_out_file_are_a_warning(tokenizer):
    split = split_by_set(pair_set("Same?"), with_long_answers(tokenizer, 7, 4))
    assert split.warning.startswith("rows: 4 of 11 rows were dropped")


def test_a_held_out_file_loses_the_prompts_that_are_searched_on():
    searched = pair_set("Same?", "Other?")
    held_out = pair_set(" same? ", *(f"Question {number}?" for number in range(9)))
    split = split_by_set(searched, held_out)
    assert split.search == searched.pairs
    assert split.held_out == held_out.pairs[1:]
    assert split.reason == "9 pairs of rows; 1 left out, whose prompts are searched on"
    with pytest.raises(PairsError, match=r"rows: 0 pairs to hold out \(10 have a prompt .*expected at least 6"):
        split_by_set(held_out, held_out)


def test_the_configuration_says_how_pairs_are_split():
    split = read_pairs(EXAMPLE_PAIRS, LaserConfig(samples=100), None)
    assert len(split.search) + len(split.held_out) == 100 == len(split.pairs)
    assert len(split.held_out) == 30
    assert read_pairs(EXAMPLE_PAIRS, LaserConfig(samples=100, seed=1), None).held_out != split.held_out
    assert read_pairs(EXAMPLE_PAIRS, LaserConfig(samples=100, held_out_fraction=0), None).search == split.pairs.pairs
    split = read_pairs(EXAMPLE_PAIRS, LaserConfig(samples=50, held_out=str(EXAMPLE_HELD_OUT)), None)
    assert (len(split.search), len(split.held_out)) == (50, 50)
    with pytest.raises(PairsError, match=r"nothing\.jsonl"):
        read_pairs(EXAMPLE_PAIRS, LaserConfig(held_out="nothing.jsonl"), None)


def test_a_tolerance_beyond_all_perplexities_guards_nothing():
    guards = LaserConfig(scorer="margin", text="notes.txt", tolerance=1000.0).guards
    assert guards["chosen"] == 1000 and guards["perplexity"] > 1e300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out_fraction": 1.0}, "held_out_fraction: got 1.0, expected at most 0.9"),
        ({"held_out_fraction": -0.1}, "held_out_fraction: got -0.1, expected at least 0"),
        ({"held_out_fraction": float("nan")}, "held_out_fraction: got nan"),
        ({"budget": 1}, "budget: got 1, expected less than 1"),
        ({"held_out_fraction": True}, "held_out_fraction: got True, expected float"),
        ({"alpha": 0.0}, "alpha: got 0.0, expected at least 1e-06"),
        ({"accept": "all"}, "accept: got 'all', expected one of auto, improve, confident, harmless"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LaserConfig(**options)


def scores(values):
    return Scores(tuple(range(len(values))), tuple(values))


def test_a_verdict_counts_pairs_and_holds_the_difference_in_its_interval():
    base, result = scores([0.0] * 20), scores([0.1] * 9 + [0.0] * 8 + [-0.1] * 3)
    verdict = compare(base, result, seed=1)
    assert (verdict.better, verdict.worse, verdict.equal) == (9, 3, 8)
    assert verdict.difference == pytest.approx(0.03)
    assert verdict.interval[0] < verdict.difference < verdict.interval[1]
    assert verdict == compare(base, result, seed=1)
    assert "on 20 pairs: 9 better, 3 worse, 8 equal" in verdict.summary


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.1, 0.2, 0.15] * 5, "better"),
        ([-0.1, -0.2, -0.15] * 5, "worse"),
        ([-0.1, 0.2, -0.15, 0.06] * 5, "no difference that 20 pairs can show"),
        ([0.1] * 5 + [0.0] * 25, "no difference that 30 pairs can show"),
        ([0.1] * 6 + [0.0] * 14, "better"),
        ([0.0] * 10, "no difference that 10 pairs can show"),
    ],
)
def test_the_verdict_in_words(differences, verdict):
    base = scores([0.5] * len(differences))
    assert compare(base, scores([0.5 + difference for difference in differences])).verdict == verdict


def test_nothing_kept_is_no_difference_at_all():
    base = scores([0.1, 0.2, 0.3])
    verdict = compare(base, base)
    assert verdict.verdict == "no difference: nothing was kept"
    assert (verdict.difference, verdict.interval, verdict.equal) == (0.0, (0.0, 0.0), 3)


CONFIG = LaserConfig(**QUICK, samples=30)


@pytest.mark.slow
def test_base_and_result_are_scored_on_pairs_the_search_never_saw(tokenizer):
    model, progress = tiny_llama(), Facts()
    base = tiny_llama()
    result = laser(model, EXAMPLE_PAIRS, config=CONFIG, tokenizer=tokenizer, progress=progress)
    found = result.held_out
    assert result.search.kept, "this run has to keep something to show anything"
    assert len(found.base.items) == len(result.split.held_out) >= LEAST
    assert len(result.search.baseline.items) == 30 - len(result.split.held_out)
    assert not prompts(result.split.search) & prompts(result.split.held_out)
    expected = held_out_scores(base, tokenizer, result.split.held_out)
    assert found.base.values == pytest.approx(expected, abs=1e-5)
    stored = json.loads(json.dumps(result.results()))["held_out"]
    assert stored["pairs"] == len(stored["base"]["per_pair"]) == len(stored["result"]["answers"])
    mean = sum(stored["result"]["per_pair"]) / stored["pairs"] - sum(stored["base"]["per_pair"]) / stored["pairs"]
    assert stored["difference"] == pytest.approx(mean)
    assert stored["interval"][0] <= stored["difference"] <= stored["interval"][1]
    assert stored["better"] + stored["worse"] + stored["equal"] == stored["pairs"]
    assert stored["verdict"] == found.verdict
    assert ("held out", found.summary) in progress.facts
    assert ("verdict", found.verdict) in progress.facts


def held_out_scores(model, tokenizer, pairs):
    """Scores of the base, by a run that searches on them."""
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    config = LaserConfig(**{**QUICK, "candidates": 1}, held_out_fraction=0)
    return laser(model, rows, config=config, tokenizer=tokenizer).search.baseline.values


@pytest.mark.slow
def test_where_nothing_is_kept_no_answer_is_generated_for_the_verdict(tokenizer, monkeypatch):
    monkeypatch.setattr("splaser_plugin.search.acceptance.Improve.accepts", lambda rule, scores, best: False)
    model = tiny_llama()
    before = states(model)
    result = laser(model, EXAMPLE_PAIRS, config=CONFIG, tokenizer=tokenizer)
    assert all(torch.equal(before[name], value) for name, value in states(model).items())
    assert result.held_out.result is result.held_out.base
    assert result.results()["held_out"]["verdict"] == "no difference: nothing was kept"
    assert result.results()["held_out"]["interval"] == [0.0, 0.0]


def test_without_held_out_pairs_there_is_no_verdict_but_the_reason(tokenizer, pairs):
    progress = Facts()
    result = laser(tiny_llama(), pairs, config=LaserConfig(**QUICK), tokenizer=tokenizer, progress=progress)
    assert result.held_out is None
    stored = result.results()["held_out"]
    assert (stored["pairs"], stored["verdict"]) == (0, None)
    assert stored["split"].startswith("none, so no verdict: 4 pairs would be split")
    assert ("held out", stored["split"]) in progress.facts
    assert "warning" not in dict(progress.facts)


def test_a_run_warns_of_the_rows_it_lost(tokenizer):
    progress = Facts()
    few = with_long_answers(tokenizer, 4, 20)
    laser(tiny_llama(), few, config=LaserConfig(**QUICK), tokenizer=tokenizer, progress=progress)
    assert dict(progress.facts)["warning"] == (
        "too few pairs are left for a verdict. rows: 20 of 24 rows were dropped (over-long answer 20). "
        "Raise --max-answer-tokens."
    )


def test_the_confident_rule_keeps_a_part_of_what_has_a_higher_mean(tokenizer):
    rule = {"accept": "confident", "alpha": 0.5}
    result = laser(tiny_llama(), EXAMPLE_PAIRS, config=LaserConfig(**QUICK, samples=30, **rule), tokenizer=tokenizer)
    best = result.search.baseline
    for trial in result.search.trials:
        if trial.kept:
            differences = trial.judgement.scores.differences(best)
            assert sum(differences) > 0
            assert sum(difference != 0 for difference in differences) >= 4  # 2 ** -4 <= 0.5 / 6
            best = trial.judgement.scores
    assert result.recipe.config.accept == "confident"


def test_with_a_tolerance_the_verdict_says_whether_it_may_be_lost():
    base = scores([0.5] * 20)
    slightly = scores([0.49, 0.48, 0.51, 0.485] * 5)
    assert compare(base, slightly, tolerance=0.05).loss_verdict == "loses less than the tolerance of 0.05 (97.5 % sure)"
    assert "tolerance of 0.01 can't be ruled out" in compare(base, slightly, tolerance=0.01).loss_verdict
    assert compare(base, slightly).loss_verdict == ""


def test_where_few_pairs_differ_no_loss_seen_is_not_called_a_small_one():
    def verdict(differences):
        return compare(scores([0.5] * len(differences)), scores([0.5 + d for d in differences]), tolerance=0.02)

    equal = "no loss seen on 6 pairs; one on up to 46 % of all can't be ruled out (97.5 % sure)"
    assert verdict([0.0] * 6).loss_verdict == equal
    assert verdict([0.0] * 33 + [0.1] * 5).loss_verdict.startswith("no loss seen on 38 pairs; one on up to 9 % of all")
    assert verdict([0.0] * 88 + [-0.01] * 2).loss_verdict.startswith("a loss seen on 2 of 90 pairs; one on up to 8 %")
    base = scores([0.5] * 6)
    assert compare(base, base, tolerance=0.02).loss_verdict == ""


def test_pairs_of_which_few_lose_much_are_not_said_to_lose_less_than_the_tolerance():
    """A loss of 0.5 on 8 % of all is twice the tolerance; as few held-out pairs can hold none of it, or one."""
    draws = random.Random(0)
    for size in (6, 12, 38):
        base, wrong = scores([0.0] * size), 0
        for _ in range(100):
            result = scores([-0.5 if draws.random() < 0.08 else 0.0 for _ in range(size)])
            wrong += compare(base, result, tolerance=0.02).loss_verdict.startswith("loses less")
        assert wrong <= 3


@pytest.mark.slow
def test_compressing_by_ranks_keeps_what_is_harmless_and_counts_the_parameters(tokenizer):
    progress = Facts()
    settings = LaserConfig(**QUICK, samples=30, objective="compress", ranks="mp", reduce="svd", tolerance=10.0)
    result = laser(tiny_llama(), EXAMPLE_PAIRS, config=settings, tokenizer=tokenizer, progress=progress)
    assert len(result.search.kept) == 6
    stored = result.results()
    assert (
        stored["parameters_removed"] == sum(candidate["parameters_removed"] for candidate in stored["candidates"]) > 0
    )
    assert stored["held_out"]["loss_verdict"] == "loses less than the tolerance of 10 (97.5 % sure)"
    unseen = 100 * (1 - (0.05 / 2**6) ** (1 / len(result.split.search)))
    found = f"a loss on up to {unseen:.0f} % of all pairs can go unseen on {len(result.split.search)} of them"
    assert ("harmless", found) in progress.facts
    assert progress.facts[-1][1].endswith("; loses less than the tolerance of 10 (97.5 % sure)")
