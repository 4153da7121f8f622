"""How a run looks in a terminal: facts, one bar a phase, a table of the candidates. Everything goes to stderr."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from textwrap import wrap
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape as without_markup
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from splaser_plugin.cli.trial_table import shortened, trial_line, trial_table
from splaser_plugin.config.tasks import task_of
from splaser_plugin.files.text import printable
from splaser_plugin.progress import Advance, Progress, ignore

if TYPE_CHECKING:
    from splaser_plugin.jobs.compare import Figure
    from splaser_plugin.search.candidates import Candidate
    from splaser_plugin.search.search import Trial

MARGIN = 17
"""Columns of the labels."""
LATEST = 10
"""Candidates in the table while a search runs."""


class Level(IntEnum):
    """How much is printed."""

    QUIET = -1
    """Only what came out."""
    NORMAL = 0
    VERBOSE = 1


class TerminalProgress(Progress):
    """Draws where stderr is a terminal, and prints a plain line for each thing elsewhere.

    On a terminal no line is longer than it is wide, but where a single word is, so that paths can be copied.
    """

    def __init__(self, console: Console, level: Level = Level.NORMAL) -> None:
        self.console = console
        self.level = level
        self._draws = console.is_terminal and level >= Level.NORMAL
        self._bars = Bars(*_columns(), console=console)
        self._phases = 0
        self._trials: list[Trial] = []
        self._trying: Candidate | None = None
        self._live: Live | None = None

    def fact(self, label: str, value: str) -> None:
        if self.level >= Level.NORMAL:
            self._print(label, self._wrapped(value.split(" "), ""))

    def detail(self, label: str, value: str) -> None:
        if self.level >= Level.VERBOSE:
            self._print(label, self._wrapped(value.split(" "), ""))

    def result(self, label: str, value: str) -> None:
        self._print(label, self._wrapped(value.split(" "), ""))

    def command(self, label: str, words: Sequence[str]) -> None:
        self._print(label, self._wrapped([shlex.quote(word) for word in words], " \\"))

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        if not self._draws:
            self.detail(name, f"{total} to do" if total > 1 else "begins")
            yield ignore
            return
        task = self._bars.add_task(name, total=total if total > 1 else None)
        self._phases += 1
        if self._live is None:
            self._live = self._new_display()
        try:
            yield lambda steps: self._bars.advance(task, steps)
        finally:
            self._bars.remove_task(task)
            self._phases -= 1
            if self._phases == 0:
                self._live.stop()
                self._live = None
                self._print_trials()

    def event(self, event: object) -> None:
        # Only a search has events; what it needs, transformers too, is not loaded for the other commands.
        from splaser_plugin.search.budgets import BudgetTrial
        from splaser_plugin.search.candidates import Candidate
        from splaser_plugin.search.search import Trial

        if isinstance(event, Candidate):
            self._trying = event
        elif isinstance(event, Trial):
            self._tried(event)
        elif isinstance(event, BudgetTrial):
            self.result(event.budget.name, event.summary)

    def _tried(self, trial: Trial) -> None:
        self._trials.append(trial)
        self._trying = None
        if self._draws and trial.judgement.reason is not None:
            name = shortened(trial.candidate.matrix.name, self.console.width - MARGIN - 1)
            self.fact(trial.judgement.outcome, f"{name}: {trial.judgement.reason}")
        if self.level >= Level.NORMAL and not self._draws:
            verbose = self.level >= Level.VERBOSE
            self.console.print(trial_line(len(self._trials), trial, verbose=verbose), soft_wrap=True)

    def _print(self, label: str, lines: Sequence[str]) -> None:
        line = Text(f"{printable(label):>{MARGIN - 2}}  ", "dim")
        line.append(f"\n{'':{MARGIN}}".join(lines), "not dim")
        self.console.print(line, soft_wrap=True)

    def _wrapped(self, words: Sequence[str], mark: str) -> list[str]:
        """The words in lines, one where stderr is no terminal. mark: ends every line but the last."""
        words = [printable(word) for word in words]
        room = self.console.width - MARGIN - len(mark) if self.console.is_terminal else sys.maxsize
        lines = [words[0]]
        for word in words[1:]:
            if len(lines[-1]) + 1 + len(word) <= room:
                lines[-1] += " " + word
            else:
                lines.append(word)
        return [line + mark for line in lines[:-1]] + lines[-1:]

    def _new_display(self) -> Live:
        """A new display: one that is started again erases as many lines as it had when it was stopped."""
        live = Live(
            console=self.console,
            get_renderable=self._drawing,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=False,
        )
        live.start()
        return live

    def _drawing(self) -> RenderableType:
        if not self._trials and self._trying is None:
            return self._bars
        # What is drawn has to fit, with a head, the candidate that is tried and the bars: no terminal erases more.
        room = self.console.height - 2 - self._phases
        return Group(self._table(max(1, min(LATEST, room))), self._bars)

    def _table(self, count: int) -> Table:
        """Of the last `count` candidates."""
        shown = self._trials[-count:]
        first = len(self._trials) - len(shown) + 1
        verbose = self.level >= Level.VERBOSE
        return trial_table(shown, self._trying, self.console.width, first=first, verbose=verbose)

    def _print_trials(self) -> None:
        self._trying = None
        if self._trials:
            self.console.print(self._table(len(self._trials)))
            self._trials = []


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn(f"{{task.description:>{MARGIN - 2}}} "),
        BarColumn(bar_width=24),
        _Steps(),
        TimeElapsedColumn(),
        _Left(),
    )


class _Steps(ProgressColumn):
    """Steps done and to do, where they are counted."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        # processes that share what doesn't divide do a few things twice
        return Text(f"{min(task.completed, task.total):.0f}/{task.total:.0f}")


class _Left(ProgressColumn):
    """Time left, where it can be estimated."""

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        if left is None and task.total and task.completed and task.elapsed:  # after a single step
            left = task.elapsed / task.completed * (task.total - task.completed)
        return Text("" if left is None else f"{timedelta(seconds=int(left))} left")


def escape(text: str) -> str:
    """Untrusted names and texts, as they may be printed: without rich's markup or control characters."""
    return without_markup(printable(text))


WIDEST = len("-0.0000 to +0.0000")
"""Of what stands in a table, but for names."""


def comparison_tables(names: Sequence[str], figures: Sequence[Mapping[str, Figure]]) -> list[Table]:
    """The first model beside two others at a time, so that a table fits into 80 columns."""
    groups = [range(start, min(start + 2, len(names))) for start in range(1, len(names), 2)] or [range(0)]
    return [_comparison_table(names, figures, [0, *group]) for group in groups]


def _comparison_table(names: Sequence[str], figures: Sequence[Mapping[str, Figure]], shown: Sequence[int]) -> Table:
    table = Table(width=80)
    table.add_column("", no_wrap=True)
    for place in shown:
        table.add_column(escape(names[place]), justify="right", overflow="fold", width=WIDEST if place else None)
    for name in figures[0]:
        form = _FORMS.get(name) or _of_task(name)
        table.add_row(form.called, *(form.cell(figures[place][name]) for place in shown))
    return table


class _Form(NamedTuple):
    """How a metric looks in a table."""

    called: str
    value: str
    change: str
    sign: str = ""
    """Before the change."""

    def cell(self, figure: Figure) -> str:
        """Value, change and interval, each on its line."""
        lines = ["-" if figure.value is None else self.value.format(figure.value)]
        if figure.change is not None:
            lines.append(self.sign + self.change.format(figure.change))
        if figure.interval is not None:
            lines.append(" to ".join(self.change.format(end) for end in figure.interval))
        return "\n".join(lines)


_FORMS = {
    "semantic": _Form("semantic score", "{:+.4f}", "{:+.4f}"),
    "margin": _Form("preference margin", "{:+.4f}", "{:+.4f}"),
    "likelier": _Form("chosen likelier\nby mean log-prob.\na token", "{:.1%}", "{:+.1%}"),
    "perplexity": _Form("perplexity", "{:,.3f}", "{:.4f}", "x"),
    "parameters": _Form("parameters", "{:,}", "{:+,}"),
    "file_bytes": _Form("bytes on disk", "{:,}", "{:+,}"),
    "tokens_per_s": _Form("tokens a second", "{:,.1f}", "{:.2f}", "x"),
}


def _of_task(name: str) -> _Form:
    called = escape(task_of(name)).replace(":", " ")
    return _Form("\n".join(wrap(called, WIDEST)), "{:.4f}", "{:+.4f}")
