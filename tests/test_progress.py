"""What a run tells of its progress: every phase whose steps are counted ends where it said it would."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest

from splaser_plugin import LaserConfig, laser
from splaser_plugin.config.stages import CompareConfig
from splaser_plugin.jobs.compare import compare
from splaser_plugin.progress import SILENT, Bars, Progress, default_progress
from tests.builders import EXAMPLE_PAIRS, QUICK

PAIRS = [json.loads(line) for line in EXAMPLE_PAIRS.read_text().splitlines()[:24]]


class Phases(Progress):
    """Remembers each phase's total and steps."""

    def __init__(self):
        self.totals = {}
        self.steps = defaultdict(list)

    @contextmanager
    def phase(self, name, total):
        self.totals[name] = total
        yield self.steps[name].append


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "baseline"),
    [
        ({"batch_size": 4}, 17),
        ({"batch_size": 4, "race": False}, 17),
        ({"batch_size": 4, "guard": "perplexity:1.5"}, 17 + 24),
        ({"batch_size": 4, "scorer": "margin"}, 17 + 17 + 24),
        ({"batch_size": 4, "scorer": "perplexity"}, 17),
        ({"scorer": "tests.planted.shorter_is_better"}, 17),
    ],
)
def test_a_measurement_counts_its_items_as_they_are_done(text, tiny_folder, options, baseline):
    phases = Phases()
    config = LaserConfig(**{**QUICK, "text": text, "window": 16, "samples": 24, **options})
    result = laser(
        tiny_folder, None if options.get("scorer") == "perplexity" else PAIRS, config=config, progress=phases
    )
    assert result.held_out is not None
    assert (phases.totals["baseline"], phases.totals["held-out base"]) == (baseline, 7)
    for name in ("baseline", "held-out base", "held-out result"):
        if name in phases.totals:
            assert sum(phases.steps[name]) == pytest.approx(phases.totals[name]), name
    assert len(phases.steps["baseline"]) > 1
    assert sum(phases.steps["search"]) == len(result.search.trials)


@pytest.mark.slow
def test_what_a_stopped_run_has_measured_is_counted_at_once(tiny_folder, tmp_path):
    class Stopped(Phases):
        def event(self, event):
            raise KeyboardInterrupt

    for phases in (Stopped(), Phases()):
        with suppress(KeyboardInterrupt):
            laser(tiny_folder, PAIRS, config=LaserConfig(**QUICK), output=tmp_path / "lasered", progress=phases)
        assert phases.totals["baseline"] == sum(phases.steps["baseline"]) == 17
    assert phases.totals["search"] == sum(phases.steps["search"])


@pytest.mark.slow
def test_a_comparison_counts_pairs_twice_and_windows(text, tiny_folder, minilm):
    phases = Phases()
    config = CompareConfig(max_new_tokens=5, window=16, samples=9, device="cpu", embedder=str(minilm), text=text)
    compare([tiny_folder], PAIRS, config=config, progress=phases)
    assert phases.totals["measuring"] == pytest.approx(sum(phases.steps["measuring"])) == 3 * 9


def test_bars_show_phases_facts_and_candidates(tiny_folder, capsys):
    laser(tiny_folder, PAIRS, config=LaserConfig(**{**QUICK, "candidates": 2}), progress=Bars())
    shown = capsys.readouterr().err
    for phase in ("scan", "baseline", "search"):
        assert f"{phase}:" in shown
    assert "model: " in shown and "at most: 2 candidates" in shown
    assert len([line for line in shown.replace("\r", "\n").splitlines() if "rank " in line and "score" in line]) == 2


def test_bars_are_what_a_notebook_gets_and_nothing_else(monkeypatch):
    assert default_progress() is SILENT
    for shell, expected in ((SimpleNamespace(kernel=None), Bars), (SimpleNamespace(), Progress)):
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        assert type(default_progress()) is expected
