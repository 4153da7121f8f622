"""What a run tells while it works. The library is silent but in notebooks; the command line draws."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

Advance = Callable[[float], None]
"""Called with a number of steps, or of parts of one, that are done."""


def ignore(steps: float) -> None:
    """The `Advance` of work that nobody follows."""


def duration(seconds: float) -> str:
    """A length of time for people, in its two largest units."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} days {hours % 24} h"


class Progress:
    """Silent base class: override what should be seen."""

    def fact(self, label: str, value: str) -> None:
        """Something learned, to show once: `device`, `cpu`."""

    def detail(self, label: str, value: str) -> None:
        """A fact that only who looks for the cause of something wants to know."""

    def result(self, label: str, value: str) -> None:
        """What came out of the run; a fact, unless overridden."""
        self.fact(label, value)

    def command(self, label: str, words: Sequence[str]) -> None:
        """A shell command to go on with, as its words; a result, unless overridden."""
        self.result(label, shlex.join(words))

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        """A stretch of work of `total` steps; the value yielded is called with the number of steps done."""
        yield ignore

    def event(self, event: object) -> None:
        """Something in a stage's own terms: a search's `Candidate` about to be tried, its `Trial` when it was."""


SILENT = Progress()


class Bars(Progress):
    """A bar of tqdm's for each phase, and a line for each fact, candidate and result, on stderr.

    What notebooks show unless another `progress=` is given.
    """

    def fact(self, label: str, value: str) -> None:
        self._write(f"{label}: {value}")

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=name, leave=False) as bar:
            yield bar.update

    def event(self, event: object) -> None:
        summary = getattr(event, "summary", "")  # a trial's; a candidate that is about to be tried has none
        if summary:
            self._write(summary)

    def _write(self, line: str) -> None:
        from tqdm.auto import tqdm

        tqdm.write(line, file=sys.stderr)


def default_progress() -> Progress:
    """What Python callers get who give none: bars in a notebook, and silence elsewhere."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return Bars() if hasattr(shell, "kernel") else SILENT


_count: ContextVar[Advance] = ContextVar("count", default=ignore)


@contextmanager
def counting(advance: Advance) -> Iterator[None]:
    """Hand on what `count_items` tells inside, in items of a scorer."""
    before = _count.set(advance)
    try:
        yield
    finally:
        _count.reset(before)


def count_items(items: float) -> None:
    """Called by whatever measures a model, as soon as this process is done with some of the items."""
    _count.get()(items)
