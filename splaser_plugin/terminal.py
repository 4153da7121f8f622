"""How a run looks in a terminal: facts, one bar a phase, one line a candidate. Everything goes to stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.markup import escape as without_markup
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from splaser_plugin.errors import printable
from splaser_plugin.progress import Progress

if TYPE_CHECKING:
    from splaser_plugin.comparison import Figure
    from splaser_plugin.search import Judgement, Trial


class TerminalProgress(Progress):
    """Draws bars where stderr is a terminal and prints plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._trials = 0

    def fact(self, label: str, value: str) -> None:
        self.console.print(f"[dim]{escape(label):>15}[/dim]  {escape(value)}", highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        if not self.console.is_terminal:
            yield lambda steps: None
            return
        columns = (
            TextColumn("{task.description:>15}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(name, total=total)
            yield lambda steps: bars.advance(task, steps)

    def trial(self, trial: Trial) -> None:
        self._trials += 1
        candidate = trial.candidate
        self.console.print(
            f"{self._trials:>15}  {escape(candidate.matrix.name)}  rank {candidate.rank} of "
            f"{min(candidate.matrix.shape)}  {_outcome(trial.judgement)}",
            highlight=False,
            soft_wrap=True,
        )


def escape(text: str) -> str:
    """Names and texts from strangers, as they may be printed: without rich's markup or control characters."""
    return without_markup(printable(text))


def comparison_tables(names: Sequence[str], figures: Sequence[Mapping[str, Figure]]) -> list[Table]:
    """The first model beside two others at a time, so that a table fits into 80 columns."""
    groups = [range(start, min(start + 2, len(names))) for start in range(1, len(names), 2)] or [range(0)]
    return [_comparison_table(names, figures, [0, *group]) for group in groups]


def _comparison_table(names: Sequence[str], figures: Sequence[Mapping[str, Figure]], shown: Sequence[int]) -> Table:
    table = Table(width=80)
    table.add_column("", no_wrap=True)
    for place in shown:
        table.add_column(escape(names[place]), justify="right", overflow="fold", ratio=1)
    for name, form in _FORMS.items():
        if name in figures[0]:
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
        lines = [self.value.format(figure.value)]
        if figure.change is not None:
            lines.append(self.sign + self.change.format(figure.change))
        if figure.interval is not None:
            lines.append(" to ".join(self.change.format(each) for each in figure.interval))
        return "\n".join(lines)


_FORMS = {
    "semantic": _Form("semantic score", "{:+.4f}", "{:+.4f}"),
    "margin": _Form("preference margin", "{:+.4f}", "{:+.4f}"),
    "likelier": _Form("chosen likelier", "{:.1%}", "{:+.1%}"),
    "perplexity": _Form("perplexity", "{:,.3f}", "{:.4f}", "x"),
    "parameters": _Form("parameters", "{:,}", "{:+,}"),
    "file_bytes": _Form("bytes on disk", "{:,}", "{:+,}"),
    "tokens_per_s": _Form("tokens a second", "{:,.1f}", "{:.2f}", "x"),
}


def _outcome(judgement: Judgement) -> str:
    if judgement.scores is None or judgement.best_before is None:
        return f"screen {judgement.screen_change:+.4f}  screened"
    change = judgement.scores.mean - judgement.best_before
    verdict = {
        "kept": "[green]kept[/green]",
        "stopped": f"stopped after {len(judgement.scores.items)} items",
        "guarded": f"guarded at {judgement.guard_loss:.4f}" if judgement.guard_loss is not None else "guarded",
    }.get(judgement.verdict, judgement.verdict)
    return f"score {judgement.scores.mean:+.4f} ({change:+.4f})  {verdict}"
