"""How a run looks in a terminal: facts, one bar a phase, one line a candidate. Everything goes to stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape as without_markup
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from splaser_plugin.errors import printable
from splaser_plugin.progress import Progress

if TYPE_CHECKING:
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
