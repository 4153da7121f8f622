"""What a run says that it will cost, and what its held-out pairs can show, against what it does."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from scipy import stats

from splaser_plugin import LaserConfig, laser
from splaser_plugin.data.pairs import pairs_from_rows
from splaser_plugin.errors import OutputError
from splaser_plugin.files.output import size
from splaser_plugin.jobs import cost as costs
from splaser_plugin.jobs.cost import Cost, smallest_effect
from splaser_plugin.jobs.laser import _begin, plan
from splaser_plugin.progress import Progress, duration
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.search.journal import Journal
from tests.builders import EXAMPLE_PAIRS, FLAGS, QUICK, tiny_llama

pytestmark = pytest.mark.slow

ROWS = [json.loads(line) for line in EXAMPLE_PAIRS.read_text().splitlines()[:20]]


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.facts: dict[str, str] = {}

    def fact(self, label: str, value: str) -> None:
        self.facts[label] = value


def test_a_plan_says_the_cost_and_what_can_be_shown_and_writes_nothing(splaser, tiny_folder, tmp_path):
    run = ["laser", tiny_folder, "--pairs", EXAMPLE_PAIRS, "--samples", 20, "-o", tmp_path / "out", *FLAGS]
    code, printed, stderr = splaser(*run, "--plan", "--json")
    assert code == 0, stderr
    planned = json.loads(printed)
    assert (planned["candidates"], planned["scored_items"]) == (4, 14 * 5 + 6 * 2)
    assert f"at most  4 candidates, 82 items scored, {82 * 6} tokens generated, " in stderr
    assert "by a short warm-up" in stderr and "so far, and" in stderr
    assert "can show  a change of the mean by 0." in stderr and "on 6 held-out pairs" in stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert splaser(*run, "--plan")[0] == 1


def test_the_time_of_answers_counts_each_pass_of_what_generates_alone(tokenizer, monkeypatch):
    monkeypatch.setattr(costs, "_pass_s", lambda scorer, parts: float(scorer.size))
    config = LaserConfig(**{**QUICK, "candidates": 4, "guard": "margin:5.0"})
    run, measures = _begin(tiny_llama(), pairs_from_rows(ROWS), config, tokenizer, Journal(), None, Progress())
    assert costs.answering_s(run, measures) == 14 * 5 + 6 * 2
    assert costs.cost_of(run, measures).measuring_s == 2 * 14 * 5 + 6 * 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scorer": "margin", "guard": "semantic:5.0"},
        {"objective": "compress", "budget": 0.04, "tolerance": 5.0, "save": "factored"},
    ],
)
def test_a_run_does_no_more_than_its_plan_says(options, tiny_folder, monkeypatch):
    pairs, config = pairs_from_rows(ROWS), LaserConfig(**{**QUICK, "candidates": 3, "race": False, **options})
    cost = plan(tiny_folder, pairs, config=config)
    told = Told()
    found = laser(tiny_folder, pairs, config=config, progress=told).search
    tried = found.budgets or found.trials
    assert 0 < len(tried) <= cost.candidates
    assert found.generated_tokens <= cost.generated_tokens
    assert sum(len(trial.judgement.scores.items) for trial in tried) + 14 < cost.scored_items
    assert cost.measuring_s > 0 and cost.output_bytes > 0
    assert told.facts["at most"].startswith(f"{cost.candidates} candidates, {cost.scored_items} items scored")


@pytest.mark.parametrize(
    "option", [("--report-to", "tensorboard"), ("--push-to-hub", "me/model"), ("--write-unchanged",)]
)
def test_a_plan_refuses_options_of_what_it_would_not_write(splaser, tiny_folder, tmp_path, option):
    run = ["laser", tiny_folder, "--pairs", EXAMPLE_PAIRS, "-o", tmp_path / "out", *FLAGS, "--plan", *option]
    code, _, stderr = splaser(*run)
    assert code == 2 and f"{option[0]} with --plan: a plan writes nothing. Leave one of the two out." in stderr


def test_the_warm_up_changes_nothing(tiny_folder):
    quiet = laser(tiny_folder, ROWS, config=LaserConfig(**QUICK, batch_size=0))
    told = laser(tiny_folder, ROWS, config=LaserConfig(**QUICK, batch_size=0), progress=Told())
    assert quiet.recipe == told.recipe and quiet.search.baseline == told.search.baseline


def test_the_keys_and_values_are_counted(tokenizer):
    model = tiny_llama()
    cost = plan(model, ROWS, config=LaserConfig(**{**QUICK, "batch_size": 2}), tokenizer=tokenizer)
    one_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, bytes
    assert cost.cache_bytes % (2 * one_token) == 0
    assert 20 < cost.cache_bytes / (2 * one_token) - 6 < 200  # the longest prompt


def test_how_long_a_function_of_the_users_own_takes_is_not_guessed(tiny_folder, monkeypatch, tmp_path):
    (tmp_path / "own_scorer_of_cost.py").write_text(
        "def score(model, tokenizer, pairs):\n    return [float(len(pair.chosen)) for pair in pairs]\n"
    )
    monkeypatch.chdir(tmp_path)
    told = Told()
    cost = plan(tiny_folder, ROWS, config=LaserConfig(**QUICK, scorer="own_scorer_of_cost.score"), progress=told)
    assert cost.measuring_s is None and cost.generated_tokens == 0
    assert "warm-up" not in told.facts["at most"]


@pytest.mark.parametrize(
    "options", [{"objective": "compress"}, {"reduce": "fisher"}, {"reduce": "fisher", "rank_by": "gradient"}]
)
def test_statistics_have_their_place_in_the_plan_and_in_the_check_of_the_disk(
    options, tiny_folder, tmp_path, monkeypatch
):
    config = LaserConfig(**{**QUICK, "candidates": 3, **options})
    told = Told()
    cost = plan(tiny_folder, ROWS, config=config, progress=told)
    wide, narrow = (2 * short**2 * 4 + 8 * (short + 1) for short in (32, 16))
    measures_all = config.tries_budgets or config.orders_by_gradient
    assert cost.statistics_bytes == (2 * (5 * wide + 2 * narrow) if measures_all else 3 * wide)
    assert f"; {size(cost.statistics_bytes)} more for statistics until the end" in told.facts["output"]
    usage = shutil.disk_usage(tmp_path)
    for free, output, mend in (
        (
            cost.output_bytes + cost.statistics_bytes - 1,
            tmp_path / "out",
            "Make room there, or choose another output",
        ),
        (cost.statistics_bytes - 1, None, "Make room there, or set TMPDIR to a folder that has some"),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        with pytest.raises(OutputError, match=f"needs .* MB, but .* MB are free there\\. {mend}"):
            laser(tiny_folder, ROWS, config=config, output=output)


def test_the_smallest_effect_is_that_of_a_two_sided_t_test():
    values = tuple(np.random.default_rng(0).normal(0.1, 0.3, 38).tolist())
    smallest, spread = smallest_effect(Scores(tuple(range(38)), values))
    assert spread == pytest.approx(np.std(values, ddof=1))
    assert smallest == pytest.approx((stats.t.ppf(0.975, 37) + stats.t.ppf(0.8, 37)) * spread / np.sqrt(38))


def test_before_the_first_candidate_a_run_says_how_many_pairs_a_change_of_a_hundredth_takes(tiny_folder):
    class Ordered(Told):
        def event(self, event):
            assert "can show" in self.facts

    told = Ordered()
    result = laser(tiny_folder, ROWS, config=LaserConfig(**QUICK), progress=told)
    spread = np.std(result.held_out.base.values, ddof=1)
    needed = int(re.search(r"; 0.01 would take ([\d,]+) of them$", told.facts["can show"])[1].replace(",", ""))
    t = [stats.t.ppf(0.975, count - 1) + stats.t.ppf(0.8, count - 1) for count in (needed - 1, needed)]
    assert t[1] * spread / np.sqrt(needed) <= 0.01 < t[0] * spread / np.sqrt(needed - 1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (89, "89 s"),
        (600, "10 min"),
        (7199, "2 h 0 min"),
        (5 * 3600 + 1200, "5 h 20 min"),
        (100 * 3600, "4 days 4 h"),
    ],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_a_cost_without_generation_names_no_tokens():
    told = Told()
    Cost(3, 60, 0, 4000.0, None, 0, 500_000_000, 0).tell(told)
    assert told.facts == {
        "at most": "3 candidates, 60 items scored, 67 min by a short warm-up",
        "output": "500.0 MB if anything is kept, else only the results",
    }
