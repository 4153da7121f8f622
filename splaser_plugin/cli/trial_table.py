"""The candidates of a search, for people: a line each, or a table that fits the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from splaser_plugin.files.text import printable

if TYPE_CHECKING:
    from splaser_plugin.search.candidates import Candidate
    from splaser_plugin.search.judge import Judgement
    from splaser_plugin.search.search import Trial

HEAD = ("", "matrix", "rank", "score", "change", "")
LEAST_NAME = 16
"""Characters of a matrix's name for which a table gives up other things."""


def trial_line(number: int, trial: Trial, *, verbose: bool = False) -> Text:
    """All about a candidate in one line. verbose: with the time it took and the tokens generated."""
    line = Text(f"{number:>15}  {trial.summary}")
    if verbose and trial.judgement.reason is None:
        line.append(f"  {trial.elapsed_s:.1f} s, {_tokens(trial)} tokens")
    return line


def trial_table(
    trials: Sequence[Trial], trying: Candidate | None, width: int, *, first: int = 1, verbose: bool = False
) -> Table:
    """A row a candidate, no wider than `width`: the names of matrices are shortened in the middle.

    trying: the one that is tried now, if any. first: number of the first. verbose: time and tokens, too, if they fit.
    """
    head: list[str | Text] = [*HEAD, "time", "tokens"] if verbose else [*HEAD]
    rows: list[list[str | Text]] = [_row(number, trial, verbose) for number, trial in enumerate(trials, first)]
    if trying is not None:
        now: list[str | Text] = [
            str(first + len(trials)),
            printable(trying.matrix.name),
            _rank(trying),
            "",
            "",
            "trying",
        ]
        rows.append([*now, *[""] * (len(head) - len(now))])
    others = [max(len(cells[i]) for cells in (head, *rows)) for i in range(len(head)) if i != 1]
    room, gap = width - sum(others) - 2 * (len(head) - 1), 2
    if room < LEAST_NAME and verbose:
        return trial_table(trials, trying, width, first=first)
    if room < LEAST_NAME:
        room, gap = max(1, room + len(head) - 1), 1
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    for place, title in enumerate(head):
        table.add_column(title, no_wrap=True, justify="left" if place in (1, 5) else "right")
    for number, name, *rest in rows:
        table.add_row(number, Text(shortened(str(name), room)), *rest)
    return table


def shortened(name: str, room: int) -> str:
    """`name` in `room` characters. The end tells more than the beginning, so more of it stays."""
    if len(name) <= room:
        return name
    head = max(0, room - 3) // 3
    return name[:head] + "..." + name[len(name) - (room - 3 - head) :]


def _row(number: int, trial: Trial, verbose: bool) -> list[str | Text]:
    judgement = trial.judgement
    score = f"{judgement.scores.mean:+.4f}" if judgement.scores else ""
    name = printable(trial.candidate.matrix.name)
    row: list[str | Text] = [str(number), name, _rank(trial.candidate), score, judgement.change]
    row.append(_outcome(judgement))
    return [*row, f"{trial.elapsed_s:.1f} s", _tokens(trial)] if verbose else row


def _rank(candidate: Candidate) -> str:
    return f"{candidate.rank}/{min(candidate.matrix.shape)}"


def _outcome(judgement: Judgement) -> Text:
    short = judgement.summary.replace(" after ", " at ").removesuffix(" items")
    return Text(short, "green" if judgement.outcome == "kept" else "")


def _tokens(trial: Trial) -> str:
    return f"{trial.judgement.scores.generated_tokens:,}" if trial.judgement.scores else "0"
