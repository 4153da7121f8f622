"""Plain text in windows of equal length: from a file, or from a hub data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from splaser_plugin.errors import TextError
from splaser_plugin.files.sources import looks_like_path, path_of
from splaser_plugin.files.text import first_line_of

BLOCK_CHARS = 2**18
"""How much of a file is read at a time, up to the end of a line: about what a run with the defaults needs."""
COLUMN = "text"


def read_windows(
    source: str, tokenizer: Any, *, window: int, count: int, context: int | None = None
) -> list[list[int]]:
    """The first windows of `window` tokens each, at most `count`, one after the other; a shorter rest is dropped.

    source: a UTF-8 text file, or a hub data set or folder of data files, as NAME or NAME:SUBSET: the column `text`
    of its split `test`, or else of its first split, one row a line. context: the model's longest input in tokens.
    No special tokens are added.
    Raises TextError when it can't be read, has fewer than 2 windows, or they don't fit into the context.
    """
    if context is not None and window > context:
        raise TextError(f"--window {window}: longer than the model's context of {context} tokens. Lower --window.")
    tokens: list[int] = []
    for part in open_text(source):
        tokens += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= count * window:
            break
    whole = min(count, len(tokens) // window)
    if whole < 2:
        raise TextError(
            f"--text {source}: {len(tokens)} tokens make {whole} windows of {window}, expected at least 2. Give a "
            "longer text, or a smaller --window."
        )
    return [tokens[place * window : (place + 1) * window] for place in range(whole)]


def open_text(source: str) -> Iterator[str]:
    """The text in parts: a file in blocks of lines, a data set row by row.

    Raises TextError, at once or while it is read.
    """
    path = path_of(source)
    if path.is_file():
        return _read_file(path)
    if path.suffix == ".txt" or (looks_like_path(source) and not path_of(source.partition(":")[0]).is_dir()):
        raise TextError(f"--text {source}: there is no such file. Give a text file, or the name of a hub data set.")
    return _read_dataset(source)


def _read_file(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as stored, TextIOWrapper(stored, encoding="utf-8-sig") as file:
            try:
                while block := file.read(BLOCK_CHARS) + file.readline(BLOCK_CHARS):
                    yield block
            except UnicodeDecodeError as error:
                place = stored.tell() - len(error.object) + error.start
                raise TextError(f"--text {path}: not UTF-8 (at byte {place:,}). Save it as UTF-8.") from error
    except OSError as error:
        raise TextError(f"--text {path}: can't be read ({error.strerror or error}). Check its rights.") from error


def _read_dataset(source: str) -> Iterator[str]:
    import datasets
    import pyarrow

    name, _, subset = source.partition(":")
    name = str(path_of(name)) if looks_like_path(name) else name
    try:
        splits = datasets.load_dataset(name, subset or None, streaming=True)
        rows: Iterator[Mapping[str, Any]] = iter(splits["test" if "test" in splits else next(iter(splits))])
        for row in rows:
            if not isinstance(row.get(COLUMN), str):
                raise TextError(f"--text {source}: its columns are {', '.join(row)}, expected text in '{COLUMN}'.")
            yield row[COLUMN] + "\n"
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise TextError(
            f"--text {source}: no file of that name, and it can't be read as a data set ({first_line_of(error)}). "
            "Check the path, or the name and the connection."
        ) from error
