"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from splaser_plugin.errors import OutputError

MARK = "recipe.json"
"""The file by which an earlier output is known."""


def check_output(out: str | Path, *, overwrite: bool, inputs: tuple[str | Path, ...] = ()) -> Path:
    """The output folder's path, if it may be written. Touches nothing.

    Raises OutputError when it exists and isn't empty (unless `overwrite`), is no folder, or is one of the
    inputs or inside one.
    """
    path = Path(out).expanduser().resolve()
    for given in inputs:
        source = Path(given).expanduser()
        if source.exists():
            source = source.resolve()
            if path == source or source in path.parents or path in source.parents:
                raise OutputError(f"{out}: would overwrite or lie inside the input {given}. Choose another --output.")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{out}: exists and is no folder. Choose another --output.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(f"{out}: exists and isn't empty. Choose another --output, or pass --overwrite.")
    if path.is_dir() and any(path.iterdir()) and not (path / MARK).is_file():
        raise OutputError(
            f"{out}: isn't the output of an earlier run (it has no {MARK}), so it is not overwritten. "
            "Choose another --output."
        )
    return path


def check_file(out: str | Path, *, replaceable: str) -> None:
    """Raises OutputError when the file exists and isn't JSON of our schema `replaceable`, or can't be written."""
    path = Path(out).expanduser()
    if not path.parent.is_dir():
        raise OutputError(f"{out}: there is no folder {path.parent}. Make it first.")
    if path.is_dir():
        raise OutputError(f"{out}: is a folder, expected a file name.")
    if path.exists() and replaceable.encode() not in path.read_bytes()[:1000]:
        raise OutputError(f"{out}: exists and was not written by splaser. Choose another --output.")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end, unless the block raises."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    replaced = temporary.with_name(temporary.name + ".replaced")
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        _sync(temporary)
        if out.exists():
            out.rename(replaced)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)


@contextmanager
def whole_file(out: str | Path) -> Iterator[TextIO]:
    """A temporary file beside `out`, for UTF-8 text, that takes its place at the end, unless the block raises.

    Raises OutputError when it can't be written.
    """
    path = Path(out).expanduser().resolve()
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o666 & ~_umask())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(
            f"{out}: can't be written ({error.strerror or error}). Make room there, or choose another --output."
        ) from error


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
