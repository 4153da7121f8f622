"""Output folders that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from splaser_plugin.errors import OutputError
from splaser_plugin.files.locked import WINDOWS, is_still_there, open_locked, remove_held
from splaser_plugin.files.sources import path_of

MARK = "recipe.json"
"""The file by which an earlier output is known."""
JOURNAL = "journal.jsonl"
"""The file that an unfinished run leaves in its output folder."""
STATISTICS = ".splaser-statistics"
"""The folder that it leaves there, too, where it measured what a reduction goes by: nobody else's name for one."""
UNFINISHED = ".unfinished-"
REPLACED = ".replaced"
PATIENCE_S = 3.0
"""How long others may keep what is renamed open, on Windows."""
MAKE_ROOM = "Make room there, or choose another --output."


def check_output(
    out: str | Path, *, overwrite: bool, inputs: tuple[str | Path, ...] = (), goes_on: bool = False
) -> Path:
    """The output folder's path, if it may be written. Touches nothing.

    goes_on: whether the journal of an unfinished run is welcome there.
    Raises OutputError when it exists and isn't empty (unless `overwrite`), is no folder, or is one of the
    inputs or inside one, or when it has a journal that would be lost.
    """
    path = Path(out).expanduser().resolve()
    for given in inputs:
        source = path_of(given)
        if source.exists():
            source = source.resolve()
            if path == source or source in path.parents or path in source.parents:
                raise OutputError(f"{out}: would overwrite or lie inside the input {given}. Choose another --output.")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{out}: exists and is no folder. Choose another --output.")
    content = {entry.name for entry in path.iterdir()} - {JOURNAL, STATISTICS} if path.is_dir() else set()
    if not goes_on and _has_content(path / JOURNAL):
        raise OutputError(
            f"{out}: has the {JOURNAL} of an unfinished laser run, which would be lost. Finish that run, or choose "
            "another --output."
        )
    if content and not overwrite:
        raise OutputError(f"{out}: exists and isn't empty. Choose another --output, or pass --overwrite.")
    if content and MARK not in content:
        raise OutputError(
            f"{out}: isn't the output of an earlier run (it has no {MARK}), so it is not overwritten. "
            "Choose another --output."
        )
    return path


def check_file(out: str | Path, *, replaceable: str) -> None:
    """Raises OutputError when the file exists and isn't JSON of our schema `replaceable`, or can't be written."""
    path = writable(out)
    if not path.exists():
        return
    with path.open("rb") as file:
        begins = file.read(1000)
    if replaceable.encode() not in begins:
        raise OutputError(f"{out}: exists and was not written by splaser. Choose another --output.")


def writable(out: str | Path) -> Path:
    """The path of a file that may be written. Raises OutputError when it is a folder, or has none to stand in."""
    path = Path(out).expanduser()
    if not path.parent.is_dir():
        raise OutputError(f"{out}: there is no folder {path.parent}. Make it first.")
    if path.is_dir():
        raise OutputError(f"{out}: is a folder, expected a file name.")
    return path


def check_space(out: Path, needed: int, mend: str = MAKE_ROOM) -> None:
    """Raises OutputError, with that mend, when fewer than `needed` bytes are free where the folder `out` will be."""
    free = _free_bytes(out)
    if free < needed:
        raise OutputError(f"{out}: needs {size(needed)}, but {size(free)} are free there. {mend}")


@contextmanager
def whole_folder(out: Path, *, needed: int = 0) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end, unless the block raises.

    Only for the process that holds `out`. needed: bytes that it will have, for the error of a full disk.
    Raises OutputError when it can't be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}{UNFINISHED}", dir=out.parent))
    replaced = temporary.with_name(temporary.name + REPLACED)
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        _sync(temporary)
        _take_place(temporary, out, replaced)
        _sync_one(out.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not out.exists():
            _rename(replaced, out)
        if _is_about_writing(error):
            raise OutputError(
                f"{out}: can't be written ({error}): it needs {size(needed)}, and {size(_free_bytes(out))} are free "
                f"there. {MAKE_ROOM}"
            ) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _take_place(temporary: Path, out: Path, replaced: Path) -> None:
    """Have `temporary` be `out`, and `replaced` what `out` was."""
    if not WINDOWS or not out.exists():
        if out.exists():
            _rename(out, replaced)
        _rename(temporary, out)
        return
    # The journal in it is held. The mark goes first and comes last, so that no half of a folder has it.
    replaced.mkdir()
    old = [entry for entry in out.iterdir() if entry.name != JOURNAL]
    moves = [(entry, replaced / entry.name) for entry in sorted(old, key=lambda entry: entry.name != MARK)]
    new = sorted(temporary.iterdir(), key=lambda entry: entry.name == MARK)
    moves += [(entry, out / entry.name) for entry in new]
    done = []
    try:
        for source, target in moves:
            _rename(source, target)
            done.append((source, target))
        if (out / JOURNAL).exists():
            os.truncate(out / JOURNAL, 0)  # it is removed when it is let go
    except BaseException:
        for source, target in reversed(done):
            _rename(target, source)
        replaced.rmdir()
        raise
    temporary.rmdir()


def cached_folder(out: Path, fill: Callable[[Path], None]) -> Path:
    """The folder `out`, filled by `fill` unless it is there: whole or not at all.

    Of several processes that fill it at once the first one's stays, so that nobody's files are taken away.
    Raises OutputError when it can't be written.
    """
    if out.is_dir():
        return out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}{UNFINISHED}", dir=out.parent))
        try:
            fill(temporary)
            temporary.chmod(0o777 & ~_umask())
            _sync(temporary)
            _rename(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if not out.is_dir():
            raise OutputError(f"{out}: can't be written ({error.strerror or error}). {MAKE_ROOM}") from error
    return out


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Inside, no other run can write the output folder. Raises OutputError when another run is at work there."""
    descriptor = hold(out)
    try:
        yield
    finally:
        let_go(out, descriptor)


def hold(out: Path) -> int:
    """The folder's journal, locked until `let_go` or the process's end; both are made if need be.

    What earlier processes left beside it that were killed while they wrote it is cleared away.
    Raises OutputError when another run is at work there, or it can't be written.
    """
    try:
        _put_back(out)
        out.mkdir(parents=True, exist_ok=True)
        descriptor = open_locked(out / JOURNAL)
        _clear_unfinished(out)
    except OSError as error:
        raise OutputError(f"{out}: can't be written ({error.strerror or error}). {MAKE_ROOM}") from error
    return descriptor


def let_go(out: Path, descriptor: int) -> None:
    """Leave neither an empty journal nor an empty folder."""
    journal = out / JOURNAL
    if os.fstat(descriptor).st_size > 0 or not is_still_there(descriptor, journal):
        os.close(descriptor)
        return
    remove_held(descriptor, journal)
    shutil.rmtree(out / STATISTICS, ignore_errors=True)
    if not any(out.iterdir()):
        out.rmdir()


def _put_back(out: Path) -> None:
    """Make good what a process left that was killed just while its output took the place of what was there."""
    for replaced in _left_beside(out, REPLACED):
        if not out.exists():
            os.close(open_locked(replaced / JOURNAL))  # raises where that process is still alive
            _rename(replaced, out)


def _clear_unfinished(out: Path) -> None:
    for left in _left_beside(out):
        if not left.name.endswith(REPLACED) or (out / MARK).is_file():
            shutil.rmtree(left, ignore_errors=True)


def _left_beside(out: Path, end: str = "") -> list[Path]:
    return list(out.parent.glob(f".{glob.escape(out.name)}{UNFINISHED}*{end}"))


def _has_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def size(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


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
        raise OutputError(f"{out}: can't be written ({error.strerror or error}). {MAKE_ROOM}") from error


def is_same_disk(first: Path, second: Path) -> bool:
    """Whether folders that are there, or will be, take their room from each other."""
    return _existing(first).stat().st_dev == _existing(second).stat().st_dev


def _free_bytes(out: Path) -> int:
    return shutil.disk_usage(_existing(out)).free


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(above for above in (folder, *folder.absolute().parents) if above.exists())


def _is_about_writing(error: BaseException) -> bool:
    from safetensors import SafetensorError

    return isinstance(error, (OSError, SafetensorError))


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # a file has to be writable there
    except OSError:
        if path.is_dir():  # Windows opens none
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    """On Windows again and again for a while: a virus scanner or an indexer may have a new file open."""
    until = time.monotonic() + (PATIENCE_S if WINDOWS else 0)
    while True:
        try:
            source.rename(target)
            return
        except PermissionError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.1)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
