"""What a run tells while it works. The library is silent; the command line draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splaser_plugin.search import Trial


class Progress:
    """Silent base class: override what should be seen."""

    def fact(self, label: str, value: str) -> None:
        """Something learned, to show once: `device`, `cpu`."""

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A stretch of work of `total` steps; the value yielded is called with the number of steps done."""
        yield lambda steps: None

    def trial(self, trial: Trial) -> None:
        """A candidate was tried."""


SILENT = Progress()
