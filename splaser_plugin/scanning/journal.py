"""Matrices of an unfinished scan, kept in a file beside its output: a line of JSON for each, as they come."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from splaser_plugin.errors import OutputError
from splaser_plugin.files.locked_file import open_locked, write_all

_Record = TypeVar("_Record")

SCHEMA = "splaser.scan-journal/1"
SUFFIX = ".journal.jsonl"
SYNC_EVERY_S = 1.0
_START = f'{{"schema": "{SCHEMA}"'.encode()


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
        self._descriptor: int | None = None
        self._resumed = False
        self._synced_s = 0.0

    def resume(self, make: Callable[[dict[str, Any]], _Record | None]) -> list[_Record]:
        """Records that an earlier scan of the same settings left, in the order they were made.

        make: what each is turned into; None is for one that can't be used. Damaged lines, as a crash may leave
        them, are passed over. From here until `close`, `remove` or the
        process's end nobody else can resume.
        Raises OutputError when another scan is at work there, or the file is none of ours or can't be written.
        """
        try:
            self._descriptor = open_locked(self.path)
            self._resumed = True
            records = self._read(self._descriptor, make)
        except OSError as error:
            raise self._cant("be opened", error) from error
        return records

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records down: safe from the process's death at once, from the machine's within a second.

        Does nothing in a process that doesn't see the main one's file, being on another machine.
        Raises OutputError when they can't be written, as on a full disk.
        """
        lines = [
            json.dumps({"schema": SCHEMA, **self.settings, "record": record}, allow_nan=False) for record in records
        ]
        try:
            if self._descriptor is None:
                if not self.path.exists():
                    return
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            write_all(self._descriptor, "".join(line + "\n" for line in lines).encode())
            # A sync takes as long as the spectrum of a small matrix or longer, so that not each gets its own.
            if time.monotonic() - self._synced_s >= SYNC_EVERY_S:
                os.fsync(self._descriptor)
                self._synced_s = time.monotonic()
        except OSError as error:
            raise self._cant("be written", error) from error

    def close(self) -> None:
        """Let go of the file; it stays there unless nothing stands in it."""
        if self._descriptor is None:
            return
        if self._resumed and os.fstat(self._descriptor).st_size == 0:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def remove(self) -> None:
        """Delete the file, for the main process when the scan is complete."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _read(self, descriptor: int, make: Callable[[dict[str, Any]], _Record | None]) -> list[_Record]:
        records: list[_Record] = []
        others: set[str] = set()
        line = b"\n"
        with os.fdopen(os.dup(descriptor), "rb") as file:
            for number, line in enumerate(file):
                if number == 0 and line[: len(_START)] != _START[: len(line)]:
                    raise OutputError(
                        f"{self.path}: is in the journal's place, but none. Move it away, or choose another --output."
                    )
                stored = _parse(line)
                if stored is None:
                    continue
                differing = [key for key, value in self.settings.items() if stored.get(key) != value]
                others.update(differing)
                if not differing and isinstance(stored.get("record"), dict):
                    record = make(stored["record"])
                    if record is not None:
                        records.append(record)
        if not records:
            self.other_settings = tuple(sorted(others))
            os.ftruncate(descriptor, 0)
        elif not line.endswith(b"\n"):
            write_all(descriptor, b"\n")
        return records

    def _cant(self, what: str, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path}: can't {what} ({error.strerror or error}). Make room there, or choose another --output."
        )


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        stored = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return stored if isinstance(stored, dict) and stored.get("schema") == SCHEMA else None
