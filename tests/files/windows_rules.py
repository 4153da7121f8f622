"""Scan and laser the tiny model under those rules of Windows by which other systems differ for splaser.

    python -X warn_default_encoding -m tests.files.windows_rules MODEL PAIRS FOLDER

No module that only other systems have can be imported by splaser; no folder can be opened, and no file synced that is
open for reading only; no file that is open or mapped can be removed or replaced, and nothing renamed that has one in
it or takes another's name; a file that isn't opened for bytes has its line ends changed, which is refused here; and
text is in another encoding than UTF-8 where none is named, which is an error here.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import importlib
import os
import shutil
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

from splaser_plugin.progress import Advance, Progress

ABSENT = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty"}
O_BINARY = 1 << 30


def refuse(path: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def refuse_if_open(path: Any) -> None:
    """Whether this process has the file open or mapped, or one in the folder."""
    inside = os.path.realpath(path)
    if any(line.rpartition(" ")[2].startswith(inside) for line in Path("/proc/self/maps").read_text().splitlines()):
        refuse(path)
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        try:
            target = descriptor.readlink()
        except FileNotFoundError:
            continue
        if f"{target}/".startswith(f"{inside}/"):
            refuse(path)


def set_rules() -> None:
    open_, fsync, import_ = os.open, os.fsync, builtins.__import__
    rename, replace, unlink = os.rename, os.replace, os.unlink

    def windows_import(name: str, globals: Any = None, *rest: Any, **more: Any) -> Any:
        if name in ABSENT and str((globals or {}).get("__name__")).startswith("splaser_plugin"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return import_(name, globals, *rest, **more)

    def windows_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        ours = sys._getframe(1).f_globals["__name__"].startswith("splaser_plugin")
        if ours and Path(path).is_dir():
            refuse(path)
        if ours and not flags & O_BINARY and flags & os.O_APPEND:
            raise ValueError(f"{path}: not opened for bytes")
        return open_(path, flags & ~O_BINARY, *rest, **more)

    def windows_fsync(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    def windows_rename(source: Any, target: Any) -> None:
        refuse_if_open(source)
        if Path(target).exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(target))
        rename(source, target)

    def windows_replace(source: Any, target: Any) -> None:
        refuse_if_open(source)
        refuse_if_open(target)
        replace(source, target)

    def windows_unlink(path: Any, **more: Any) -> None:
        if not more:
            refuse_if_open(path)
        unlink(path, **more)

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (2, 1)
        assert os.lseek(descriptor, 0, os.SEEK_CUR) > os.fstat(descriptor).st_size
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse(descriptor)

    msvcrt: Any = types.ModuleType("msvcrt")
    msvcrt.locking, msvcrt.LK_NBLCK = locking, 2
    sys.modules["msvcrt"] = msvcrt
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    builtins.__import__ = windows_import
    os.O_BINARY = O_BINARY  # type: ignore[attr-defined]
    os.open, os.fsync, os.unlink = windows_open, windows_fsync, windows_unlink  # type: ignore[assignment]
    os.rename, os.replace = windows_rename, windows_replace  # type: ignore[assignment]


def main(model: str, pairs: str, folder: str) -> None:
    import torch
    import transformers  # noqa: F401

    set_rules()
    warnings.filterwarnings("error", category=EncodingWarning, module="splaser_plugin")
    sys.platform = "win32"
    importlib.import_module("splaser_plugin.files.locked")  # reads it
    sys.platform = "linux"
    for module in ("cli.app", "cli.emit", "integrations.trainer"):
        importlib.import_module(f"splaser_plugin.{module}")
    from splaser_plugin import LaserConfig, laser, scan
    from splaser_plugin.errors import OutputError
    from splaser_plugin.files.output import held, whole_folder
    from tests.builders import TO_RESUME

    torch.set_num_threads(1)
    out = Path(folder) / "out"
    scan(model, output=Path(folder) / "scan.json")
    laser(model, pairs, config=LaserConfig(**TO_RESUME), output=out)
    laser(model, pairs, config=LaserConfig(**TO_RESUME), output=out, overwrite=True)
    with held(out):
        try:
            laser(model, pairs, config=LaserConfig(**TO_RESUME), output=out, overwrite=True)
        except OutputError as error:
            print(error)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    refusing = Path(folder) / "out" / "recipe.json"
    try:
        with held(out), refusing.open("rb"), whole_folder(out) as new:
            (new / "recipe.json").write_text("{}")
    except OutputError as error:
        print(error)
    print({file.name: file.read_bytes() for file in out.iterdir()} == before)
    print(change_offloaded(model))
    print(reduce_by_statistics(model, pairs, Path(folder) / "reduced"))


def reduce_by_statistics(model: str, pairs: str, out: Path) -> list[str]:
    """What a run that is stopped before its search leaves; then it goes on with the statistics that it measured."""
    from splaser_plugin import LaserConfig, laser
    from tests.builders import TO_COMPRESS

    config = LaserConfig(**TO_COMPRESS)
    with contextlib.suppress(KeyboardInterrupt):
        laser(model, pairs, config=config, output=out, progress=StoppedAtSearch())
    left = sorted(path.name for path in out.iterdir())
    laser(model, pairs, config=config, output=out)
    return left


class StoppedAtSearch(Progress):
    """Ctrl-C when all has been measured that a search goes by."""

    def phase(self, name: str, total: int) -> contextlib.AbstractContextManager[Advance]:
        if name == "search":
            raise KeyboardInterrupt
        return super().phase(name, total)


def change_offloaded(model: str) -> list[int]:
    """How many files a matrix on disk has after each of its changes; twice it is read and not yet let go meanwhile."""
    from splaser_plugin.weights.in_memory import Weights
    from splaser_plugin.weights.loading import load_model

    weights = Weights(load_model(model, device_map="auto", max_memory=("cpu=12.64MB",))[0])
    matrix = weights.matrices()[0][-1]
    readers, counts = [], []
    for rank in (5, 4, 3, 2):
        readers = [*readers, weights.read(matrix)] if rank > 3 else []
        weights.reduce(matrix, rank)
        assert int((weights.read(matrix).double().svd().S > 1e-4).sum()) == rank
        counts.append(len(list(Path(tempfile.gettempdir()).glob(f"splaser-*/{matrix.parameter}*"))))
    return counts


if __name__ == "__main__":
    main(*sys.argv[1:])
