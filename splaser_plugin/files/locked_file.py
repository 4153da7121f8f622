"""A file that one process holds and appends to, as a journal does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from splaser_plugin.errors import OutputError


def write_all(descriptor: int, content: bytes) -> None:
    """All of it, after what is there; in one piece, so that lines of several processes don't mix."""
    written = os.write(descriptor, content)
    while written < len(content):
        written += os.write(descriptor, content[written:])


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
