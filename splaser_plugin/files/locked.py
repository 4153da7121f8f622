"""A file that one process holds, on every system.

The lock is on the file itself and goes with the process: by flock, and on Windows by a byte that no file reaches. The
package filelock gives no such thing: in many of its versions (all those of 3.x) it empties the file that it locks, so
that a second file would have to stand beside the user's output, and it goes by the name of a file, which here may have
been removed or replaced by the run that held it. On a file system without locks there is none, and two runs are not
kept apart.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

from splaser_plugin.errors import OutputError

WINDOWS = sys.platform == "win32"
"""There a file that is open can't be removed, nor a folder renamed that has one in it."""
BYTES = getattr(os, "O_BINARY", 0)
"""Has Windows leave line ends as they are written."""
LOCKED_BYTE = 2**31 - 2
"""Windows keeps others from what is locked, so that it may be nothing that is read."""


def open_locked(path: Path) -> int:
    """The file, made if need be, opened for reading and appending, and locked; the lock goes with the process.

    Raises OutputError when another process holds it, OSError when the file can't be opened.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | BYTES, 0o666)
        try:
            if not _lock(descriptor):
                raise OutputError(
                    f"{path}: another run is at work there. Wait for its end, or choose another --output."
                )
            if is_still_there(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the run that held it has just finished and removed it


def remove_held(descriptor: int, path: Path) -> None:
    """Remove the file that is held under that name, and let go of it."""
    if not WINDOWS:  # while it is held, so that it is nobody else's
        try:
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
        return
    os.close(descriptor)
    with suppress(PermissionError):  # another run holds it now
        path.unlink(missing_ok=True)


def is_still_there(descriptor: int, path: Path) -> bool:
    """Whether that name is still the open file's."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    """Whether nobody else holds the file."""
    try:
        import fcntl
    except ImportError:
        return _lock_byte(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system without locks
            raise
    return True


def _lock_byte(descriptor: int) -> bool:
    import msvcrt

    os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    except PermissionError:
        return False
    os.lseek(descriptor, 0, os.SEEK_SET)
    return True
