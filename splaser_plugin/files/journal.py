"""A file that one process holds and appends to: a line of JSON for each result, so that a stopped run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from splaser_plugin.errors import OutputError
from splaser_plugin.files.locked import BYTES, open_locked, remove_held


class JournalFile:
    """Lines of JSON objects, the first of which begins with the schema. Nothing is opened when it is made."""

    def __init__(self, path: Path, schema: str) -> None:
        self.path = path
        self.descriptor: int | None = None
        self._schema = schema

    def open(self) -> None:
        """Open the file for this process alone, made if need be.

        Raises OutputError when another process holds it, or it can't be opened.
        """
        try:
            self.descriptor = open_locked(self.path)
        except OSError as error:
            raise self._cant("be opened", error) from error

    def join(self) -> bool:
        """Open the file that another process of this run holds, to append to it; whether it is seen from here."""
        if self.descriptor is None and self.path.exists():
            try:
                self.descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | BYTES)
            except OSError as error:
                raise self._cant("be written", error) from error
        return self.descriptor is not None

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Number from 1 and bytes of each line that is there, its end included.

        Raises OutputError when the first one isn't the beginning of a journal of this schema.
        """
        if self.descriptor is None:
            raise OutputError(f"{self.path}: is closed. Open it anew.")
        start = f'{{"schema": "{self._schema}"'.encode()
        try:
            with os.fdopen(os.dup(self.descriptor), "rb") as file:
                file.seek(0)
                for number, line in enumerate(file, 1):
                    if number == 1 and line[: len(start)] != start[: len(line)]:
                        raise OutputError(
                            f"{self.path}: is in the journal's place, but none. Move it away, or choose another "
                            "--output."
                        )
                    yield number, line
        except OSError as error:
            raise self._cant("be read", error) from error

    def append(self, records: Sequence[Mapping[str, Any]], *, sync: bool) -> None:
        """Write records down after what is there: safe from the process's death, and if `sync` from the machine's.

        Raises OutputError when they can't be written, as on a full disk, ValueError for nan and infinity.
        """
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        self._write("".join(lines).encode())
        if sync and self.descriptor is not None:
            try:
                os.fsync(self.descriptor)
            except OSError as error:
                raise self._cant("be written", error) from error

    def end_line(self) -> None:
        """Have what comes next begin on a line of its own."""
        self._write(b"\n")

    def cut(self, size: int) -> None:
        """Leave the first `size` bytes alone."""
        try:
            if self.descriptor is not None:
                os.ftruncate(self.descriptor, size)
        except OSError as error:
            raise self._cant("be written", error) from error

    @property
    def is_empty(self) -> bool:
        return self.descriptor is None or os.fstat(self.descriptor).st_size == 0

    def close(self, *, remove: bool = False) -> None:
        """Let go of the file, and delete it if asked to."""
        if self.descriptor is not None:
            if remove:
                remove_held(self.descriptor, self.path)
            else:
                os.close(self.descriptor)
            self.descriptor = None

    def _write(self, content: bytes) -> None:
        """In one piece, so that lines of several processes don't mix."""
        if self.descriptor is None:
            return
        try:
            written = os.write(self.descriptor, content)
            while written < len(content):
                written += os.write(self.descriptor, content[written:])
        except OSError as error:
            raise self._cant("be written", error) from error

    def _cant(self, what: str, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path}: can't {what} ({error.strerror or error}). Make room there, or choose another --output."
        )


def parsed(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line; None where it is none, as after a crash."""
    try:
        stored = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return stored if isinstance(stored, dict) else None
