"""A file that one process holds and appends to: a line of JSON for each result, so that a stopped run can go on.

The lock is on the journal itself, by flock, and goes with the process. The package filelock gives no such thing: in
many of its versions (all those of 3.x) it empties the file that it locks, so that a second file would have to stand
beside the user's output, and it goes by the name of a file, which here may have been removed or replaced by the run
that held it. On a file system without locks, and on Windows, there is none, and two runs are not kept apart.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from splaser_plugin.errors import OutputError


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
                self.descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
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
                self.path.unlink(missing_ok=True)
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


def open_locked(path: Path) -> int:
    """The file, made if need be, opened for reading and appending, and locked; the lock goes with the process.

    Raises OutputError when another process holds it, OSError when the file can't be opened.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _lock(descriptor, path)
            if is_still_there(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the run that held it has just finished and removed it


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            f"{path}: another run is at work there. Wait for its end, or choose another --output."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system without locks
            raise


def is_still_there(descriptor: int, path: Path) -> bool:
    """Whether that name is still the open file's."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
