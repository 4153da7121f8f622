"""Matrices of an unfinished scan, kept in a file beside its output: a line of JSON for each, as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from splaser_plugin.files.journal import JournalFile, parsed

_Record = TypeVar("_Record")

SCHEMA = "splaser.scan-journal/1"
SUFFIX = ".journal.jsonl"
SYNC_EVERY_S = 1.0


class ScanJournal:
    """The journal of the scan that is to be written to `output`. Nothing is touched before `resume`.

    settings: what the records depend on (the weights' identity, the precision, the program's version). They
    stand in every line, and a line with others is never used.
    Several processes share the file: the main one calls `resume`, and then all may append.
    """

    def __init__(self, output: Path, settings: Mapping[str, str]) -> None:
        self.path = output.with_name(output.name + SUFFIX)
        self.settings = dict(settings)
        self.other_settings: tuple[str, ...] = ()
        """After `resume`: in what the lines that were there differed, so that they were thrown away."""
        self._file = JournalFile(self.path, SCHEMA)
        self._resumed = False
        self._synced_s = 0.0

    def resume(self, make: Callable[[dict[str, Any]], _Record | None]) -> list[_Record]:
        """Records that an earlier scan of the same settings left, in the order they were made.

        make: what each is turned into; None is for one that can't be used. Damaged lines, as a crash may leave
        them, are passed over. From here until `close`, `remove` or the process's end nobody else can resume.
        Raises OutputError when another scan is at work there, or the file is none of ours or can't be written.
        """
        self._file.open()
        self._resumed = True
        records: list[_Record] = []
        others: set[str] = set()
        line = b"\n"
        for _, line in self._file.lines():
            stored = parsed(line)
            if stored is None or stored.get("schema") != SCHEMA:
                continue
            differing = [key for key, value in self.settings.items() if stored.get(key) != value]
            others.update(differing)
            if not differing and isinstance(stored.get("record"), dict):
                record = make(stored["record"])
                if record is not None:
                    records.append(record)
        if not records:
            self.other_settings = tuple(sorted(others))
            self._file.cut(0)
        elif not line.endswith(b"\n"):
            self._file.end_line()
        return records

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records down: safe from the process's death at once, from the machine's within a second.

        Does nothing in a process that doesn't see the main one's file, being on another machine.
        Raises OutputError when they can't be written, as on a full disk.
        """
        if self._file.join():
            # A sync takes as long as the spectrum of a small matrix or longer, so that not each gets its own.
            is_due = time.monotonic() - self._synced_s >= SYNC_EVERY_S
            lines = [{"schema": SCHEMA, **self.settings, "record": record} for record in records]
            self._file.append(lines, sync=is_due)
            self._synced_s = time.monotonic() if is_due else self._synced_s

    def close(self) -> None:
        """Let go of the file; it stays there unless nothing stands in it."""
        self._file.close(remove=self._resumed and self._file.is_empty)

    def remove(self) -> None:
        """Delete the file, for the main process when the scan is complete."""
        self._file.close(remove=True)
