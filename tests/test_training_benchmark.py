"""The table of tests/benchmarks/training.py: what differs is paired by seed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
from scipy import stats

from tests.benchmarks.training import Row, interval, main, merit, table, tuned


def row(arm, seed, loss, part="held-out"):
    return Row("sft", "lora", arm, seed, 1e-3, part, 2048, loss, 0.5, 3.0)


def test_the_interval_is_that_of_a_paired_t_test():
    first, second = [1.0, 2.5, 2.0], [0.5, 1.0, 1.75]
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    found = interval([one - other for one, other in zip(first, second, strict=True)])
    assert found == pytest.approx((expected.low, expected.high))


def test_measurements_of_other_options_are_refused(tmp_path):
    measured = tmp_path / "measured.jsonl"
    measured.write_text(json.dumps(asdict(replace(row("all", 0, 2.0), settings="--steps 16"))) + "\n")
    with pytest.raises(SystemExit, match=r"measured with --steps 16\. Give these options, or another file"):
        main(["--pairs", "pairs.jsonl", "--text", "notes.txt", "--measured", str(measured)])


def test_an_arm_is_compared_with_the_random_half_of_its_own_seed():
    rows = [row("random", seed, 2.0 + seed) for seed in range(3)]
    rows += [row("snr_ratio", seed, 1.9 + seed) for seed in reversed(range(3))]
    rows += [row("random", 1000, 9.0, "validation")]
    text = table(rows)
    assert "| random | 2,048 | 0.001 | 3.0000 | 0.5000 | 3.0000 |" in text
    assert "| snr_ratio | 2,048 | 0.001 | 2.9000, -0.1000 (-0.1000 to -0.1000) |" in text


@pytest.mark.parametrize(("best", "tried"), [(3e-4, {1e-4, 3e-4, 1e-3}), (1e-2, {1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2})])
def test_a_grid_grows_while_its_best_rate_is_at_an_end(best, tried):
    runs = []

    def merit_of(rate):
        runs.append(rate)
        return -abs(math.log(rate / best))

    assert tuned(merit_of, (1e-3, 1e-4, 3e-4)) == best
    assert sorted(runs) == sorted(tried)


def test_a_rate_of_dpo_that_ruins_the_model_has_no_merit_whatever_its_margin():
    gentle = replace(row("all", 1000, 2.0), task="dpo", margin=1.0, text_loss=3.09)
    ruinous = replace(gentle, margin=9.0, text_loss=3.11)
    assert merit(gentle, 3.0) == 1.0
    assert merit(ruinous, 3.0) == -math.inf
    assert merit(row("all", 1000, 2.0), 0.0) == -2.0
