"""Untrusted files, read with a limit on their size, whatever stands in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from splaser_plugin.errors import SplaserError
from splaser_plugin.files.sources import path_of

MAX_JSON_BYTES = 100_000_000


@contextmanager
def open_file(file: Path, error: type[SplaserError]) -> Iterator[BufferedReader]:
    """`file` opened to read its bytes. Raises `error` when it is no regular file or can't be read."""
    try:
        path = path_of(file)
        if path.exists() and not path.is_file():  # a pipe or a device would never end
            raise error(f"{file}: no regular file.")
        with path.open("rb") as opened:
            yield opened
    except OSError as problem:
        raise error(f"{file}: can't be read ({problem.strerror or problem}). Check the path.") from problem
    except ValueError as problem:  # a NUL in the name
        raise error(f"{str(file)!r}: can't be read ({problem}). Check the path.") from problem


def read_bytes(file: Path, error: type[SplaserError], max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of `file`. Raises `error` when it can't be read or has more than `max_bytes`."""
    with open_file(file, error) as opened:
        content = opened.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise error(f"{file}: more than {max_bytes:,} bytes, which no such file needs.")
    return content
