from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import numpy as np
import pyte
import pytest
from rich.cells import cell_len
from rich.console import Console

from splaser_plugin.checkpoints.naming import type_in_block
from splaser_plugin.cli.summaries import show_scan
from splaser_plugin.cli.terminal import Level, TerminalProgress
from splaser_plugin.cli.trial_table import shortened
from splaser_plugin.scanning.records import Scan, matrix_scan
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.search.candidates import Candidate
from splaser_plugin.search.judge import Judgement
from splaser_plugin.search.search import Trial
from splaser_plugin.weights.matrices import Matrix

SCORES = Scores((0, 4), (0.25, 0.5))
LONG = "model.language_model.layers.117.block_sparse_moe.experts.down_proj_with_a_very_long_name[127]"


def trial(judgement, name="model.layers.0.mlp.up_proj"):
    matrix = Matrix(name, name + ".weight", "mlp.up_proj", 0, (16384, 4096))
    return Trial(Candidate(matrix, 1024, "iqr", 1.0, 0.5), judgement, 1.25)


def plain(level=Level.NORMAL):
    """A progress that writes into a file, and that file."""
    printed = io.StringIO()
    return TerminalProgress(Console(file=printed), level), printed


def drawn(width, level=Level.NORMAL):
    """A progress on a terminal of that width, and what a screen reader of it would see."""
    printed = io.StringIO()
    console = Console(file=printed, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    return TerminalProgress(console, level), printed


@pytest.mark.parametrize(
    ("judgement", "line"),
    [
        (Judgement("kept", SCORES, 0.25), "score +0.3750 (+0.1250)  kept"),
        (Judgement("restored", SCORES, 0.5), "score +0.3750 (-0.1250)  restored"),
        (Judgement("stopped", SCORES, 0.5), "score +0.3750 (-0.1250)  stopped after 2 items"),
        (
            Judgement("guarded", SCORES, 0.25, 1.0375, guard="perplexity"),
            "score +0.3750 (+0.1250)  guarded at perplexity 1.0375",
        ),
        (Judgement("failed", None, None, reason="answers \x1b are empty"), "failed: answers \\x1b are empty"),
    ],
)
def test_a_line_shows_how_far_a_candidate_came(judgement, line):
    progress, printed = plain()
    progress.event(trial(judgement))
    assert printed.getvalue().split() == f"1 model.layers.0.mlp.up_proj rank 1024 of 4096 {line}".split()


def everything(progress):
    """A run with names as long as they get."""
    progress.fact("model", f"a-model: {'and many words about it, ' * 12}")
    progress.detail("options", "one, " * 40)
    with progress.phase("search", 500) as advance:
        for index in range(120):
            progress.event(trial(None, LONG).candidate)
            outcome = ("kept", "restored", "stopped", "guarded")[index % 4]
            failed = Judgement("failed", None, None, reason="its answers say nothing, " * 9)
            progress.event(trial(Judgement(outcome, SCORES, -12.5, 1.0375) if index else failed, LONG))
            advance(1)
    progress.result("verdict", "no difference that 24 pairs can show")
    progress.command("rebuild", ["splaser", "apply", "a folder/recipe.json", *["a-model"] * 12])


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("level", list(Level))
def test_no_line_is_longer_than_the_terminal(width, level):
    progress, printed = drawn(width, level)
    everything(progress)
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed.getvalue()))
    assert max(map(cell_len, lines)) <= width
    assert ("stopped at 2" in printed.getvalue()) == (level > Level.QUIET)
    if level > Level.QUIET:
        assert all("[127]" in line for line in lines if "stopped at" in line)


@pytest.mark.parametrize("steps", [[8], [8, 4]])
def test_the_time_left_is_shown_from_the_first_step_on(steps):
    progress, printed = drawn(80)
    with progress.phase("baseline", 24) as advance:
        for step in steps:
            advance(step)
        progress.fact("drawn", "with what was shown so far")
    assert re.search(rf"{sum(steps)}/24 .*0:00:0\d left", printed.getvalue())


@pytest.mark.parametrize("count", [1, 7, 12])
def test_a_scan_shows_both_ends_with_whole_names(count):
    kind = "block_sparse_moe.shared_experts.down_proj"
    names = [f"model.layers.{number}.{kind}" for number in range(count)]
    values = np.linspace(1.0, 2.0, 32) ** 2
    matrices = [
        matrix_scan(Matrix(name, name + ".weight", kind, number, (32, 64)), values) for number, name in enumerate(names)
    ]
    found = Scan("a-model", "0", "mp", tuple(matrices), ())
    progress, printed = drawn(80)
    show_scan(found, Path("scan.json"), progress)
    lines = printed.getvalue().splitlines()
    ranked = [matrix.name for matrix in found.ranked("snr")]
    shown = {label: [line.split()[1] for line in lines if line.split()[0] == label] for label in ("noisiest", "best")}
    assert shown == {"noisiest": ranked[:5], "best": ranked[5:][::-1][:5]}
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("kind", ["shared_experts.down_proj", "mlp.experts.down_proj[127]", "mlp.experts.127.up_proj"])
def test_of_a_name_that_80_columns_have_no_room_for_block_and_type_are_shown_whole(kind):
    name = f"model.vision_tower.vision_model.transformer.encoder.layers.23.{kind}"
    matrix = Matrix(name, name + ".weight", type_in_block(name), 23, (32, 64))
    found = Scan("m", "0", "mp", (matrix_scan(matrix, np.linspace(1.0, 2.0, 32) ** 2),), ())
    progress, printed = drawn(80)
    show_scan(found, Path("scan.json"), progress)
    assert f"noisiest  block 23, {kind}" in printed.getvalue()
    assert max(map(len, printed.getvalue().splitlines())) <= 80


def test_a_command_that_is_wrapped_can_still_be_copied():
    words = ["splaser", "apply", "a folder/recipe.json", *["a-model"] * 12, "it's"]
    progress, printed = drawn(80)
    progress.command("rebuild", words)
    assert shlex.split(printed.getvalue().replace("rebuild", "", 1).replace("\\\n", "\n")) == words
    assert printed.getvalue().count("\\\n") == printed.getvalue().count("\n") - 1 > 0


def test_a_path_is_never_broken():
    path = "/a/very/long/path" * 20
    progress, printed = drawn(80)
    progress.result("model", f"is at {path}")
    assert path in printed.getvalue()


def test_elsewhere_each_thing_is_one_plain_line():
    progress, printed = plain(Level.VERBOSE)
    everything(progress)
    lines = printed.getvalue().splitlines()
    assert len(lines) == 5 + 120
    assert all("\x1b" not in line for line in lines)
    assert lines[4].endswith("restored  1.2 s, 0 tokens")


def test_quiet_prints_what_came_out_and_nothing_else():
    progress, printed = plain(Level.QUIET)
    everything(progress)
    labels = [line.split()[0] for line in printed.getvalue().splitlines()]
    assert labels == ["verdict", "rebuild"]


def test_untrusted_names_are_shown_as_they_are_and_escaped():
    progress, printed = plain()
    progress.fact("model", "[red]a[/red] :smile: \x1b[2J")
    progress.event(trial(Judgement("kept", SCORES, 0.25), "[bold]\x1b]0;x"))
    assert "[red]a[/red] :smile: \\x1b[2J" in printed.getvalue()
    assert "[bold]\\x1b]0;x" in printed.getvalue()
    progress, printed = drawn(80)
    with progress.phase("search", 2):
        progress.event(trial(Judgement("kept", SCORES, 0.25), "[bold]\x1b]0;x"))
    assert "[bold]\\x1b]0;x" in printed.getvalue()


def test_a_name_is_shortened_in_its_middle():
    assert shortened("model.layers.0.mlp", 18) == "model.layers.0.mlp"
    assert shortened("model.layers.0.mlp", 12) == "mod....0.mlp"
    assert [len(shortened(LONG, room)) for room in (16, 40, 80)] == [16, 40, 80]


def test_what_was_tried_stays_on_screen_when_the_search_is_stopped():
    progress, printed = drawn(80)
    with pytest.raises(KeyboardInterrupt), progress.phase("search", 9):
        progress.event(trial(Judgement("kept", SCORES, 0.25)))
        raise KeyboardInterrupt
    assert "model.layers.0.mlp.up_proj" in printed.getvalue().splitlines()[-1]


def screen_of(width, height, run):
    """The lines that a terminal of that size shows in the end, those scrolled out first."""
    printed = io.StringIO()
    console = Console(
        file=printed, force_terminal=True, width=width, height=height, color_system=None, legacy_windows=False
    )
    run(TerminalProgress(console))
    screen = pyte.HistoryScreen(width, height, history=1000)
    pyte.Stream(screen).feed(printed.getvalue().replace("\n", "\r\n"))
    gone = ["".join(line[column].data for column in range(width)) for line in screen.history.top]
    return [line.rstrip() for line in (*gone, *screen.display)]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (80, 8)])
@pytest.mark.parametrize("candidates", [1, 6, 40])
def test_the_candidates_stay_on_screen_through_later_phases(width, height, candidates):
    def run(progress):
        for name in ("starting", "loading", "baseline"):
            with progress.phase(name, 1):
                pass
        progress.fact("held out", "12 pairs")
        with progress.phase("search", candidates) as advance:
            for _ in range(candidates):
                progress.event(trial(None).candidate)
                with progress.phase("answers", 1):
                    progress._live.refresh()
                progress.event(trial(Judgement("kept", SCORES, 0.25)))
                advance(1)
                progress._live.refresh()
        for name in ("held-out result", "saving"):
            with progress.phase(name, 2) as advance:
                progress._live.refresh()
                advance(2)
        progress.result("verdict", "better")

    lines = [line for line in screen_of(width, height, run) if line]
    assert [line.split()[:2] for line in lines] == [
        ["held", "out"],
        ["matrix", "rank"],
        *([str(number), "model.layers.0.mlp.up_proj"] for number in range(1, candidates + 1)),
        ["verdict", "better"],
    ]
