"""The rows of the sources of pairs: local json, jsonl, csv and parquet files, and hub data sets. All but a json
array are streamed: one line or one small batch is in memory at a time.

A damaged line is an error that names file and line, since a silent loss would be worse. What a row holds is
not looked at here.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from splaser_plugin.data.formats import OPTIONAL_COLUMNS, recognise
from splaser_plugin.errors import PairsError
from splaser_plugin.files.sources import is_hub_id, path_of
from splaser_plugin.files.text import first_line_of

MAX_LINE_BYTES = 64 * 2**20
MAX_ARRAY_BYTES = 256 * 2**20
PARQUET_BATCH_ROWS = 64  # A batch is small, so that one of very long texts fits into memory.


Rows = Generator[object, None, None]


class HubDataset(NamedTuple):
    id: str
    split: str


PUBLISHED = {
    "orca_dpo": HubDataset("Intel/orca_dpo_pairs", "train"),
    "ultrafeedback": HubDataset("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"),
    "openhermes": HubDataset("teknium/openhermes", "train"),
}


def open_source(source: str | Path, split: str | None = None) -> tuple[str, Rows]:
    """(name for the records, rows) of a file, a folder of data files, a published name or a hub id.

    split: of a data set; None is the published one for the three published sets, else "train".
    Raises PairsError, at once or while the rows are read.
    """
    published = PUBLISHED.get(str(source)) or next((p for p in PUBLISHED.values() if p.id == str(source)), None)
    if published is not None:
        return published.id, _read_dataset(published.id, split or published.split)
    path = path_of(source)
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        return str(path), _read_dataset(str(path), split or "train")
    if path.is_file():
        if reader is None:
            raise PairsError(
                f"{path}: its name ends in {path.suffix!r}, expected one of {', '.join(_READERS)}. Convert it to jsonl."
            )
        return str(path), reader(path)
    if reader is not None or not is_hub_id(source):
        raise PairsError(
            f"{source}: no such file. Give a {', '.join(_READERS)} file, one of {', '.join(PUBLISHED)}, "
            "or the id of a data set on the hub."
        )
    return str(source), _read_dataset(str(source), split or "train")


def _read_lines(path: Path) -> Rows:
    for number, line in _text_lines(path):
        if row := line.rstrip():
            yield _parse_json(row, path, number)


def _read_json(path: Path) -> Rows:
    with path.open("rb") as file:
        is_array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return _read_array(path) if is_array else _read_lines(path)


def _read_array(path: Path) -> Rows:
    size = path.stat().st_size
    if size > MAX_ARRAY_BYTES:
        raise PairsError(
            f"{path}: a json array of {size:,} bytes, at most {MAX_ARRAY_BYTES:,} are read whole. "
            "Convert it to jsonl (one object per line), which is streamed."
        )
    content = path.read_bytes()
    yield from _parse_json(_decode(content, path, 1), path, 1)


def _read_csv(path: Path) -> Rows:
    reader = csv.reader((line for _, line in _text_lines(path)), strict=True)
    header: list[str] | None = None
    while True:
        first_line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise PairsError(
                f"{path}, line {first_line}: not valid csv ({error}). Fix the line, or convert the file to jsonl."
            ) from error
        if fields is None:
            return
        if header is None:
            header = fields
        elif fields:
            if len(fields) != len(header):
                raise PairsError(
                    f"{path}, line {first_line}: {len(fields)} fields, but the header has {len(header)}. "
                    "Fix the quotes of that line, or convert the file to jsonl."
                )
            yield dict(zip(header, fields, strict=True))


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    first_row = 1
    try:
        # Buffered and not read ahead: otherwise a whole row group, which may be the whole file, is in memory.
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            columns = _columns_to_read(file.schema_arrow.names)
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=columns, use_threads=False):
                yield from batch.to_pylist()
                first_row += batch.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise PairsError(
            f"{path}, row {first_row} or soon after: not valid parquet ({first_line_of(error)}). Write the file again."
        ) from error


def _columns_to_read(names: list[str]) -> list[str] | None:
    """None (all) unless the prompt's column is known: others, images say, can be large."""
    form = recognise(names)
    if form is None or form.prompt is None:
        return None
    return [name for name in names if name in form.columns | OPTIONAL_COLUMNS]


def _read_dataset(name: str, split: str) -> Rows:
    import datasets
    import pyarrow

    try:
        yield from datasets.load_dataset(name, split=split, streaming=True)
    except (
        OSError,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
    ) as error:
        raise PairsError(
            f"{name}, split {split}: can't be read as a data set ({first_line_of(error)}). "
            "Check the id, the split and the connection, or give a local jsonl file."
        ) from error


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end)."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise PairsError(
                    f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes. Remove that line, or "
                    "check that the file has one row per line."
                )
            yield number, _decode(line, path, number)


def _decode(content: bytes, path: Path, first_line: int) -> str:
    """Text of bytes that begin on `first_line` of the file; a byte order mark at its start is left out."""
    try:
        return content.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)
        raise PairsError(
            f"{path}, line {line}: not valid UTF-8 (byte 0x{error.object[error.start]:02x}). "
            "Save the file as UTF-8, or remove that line."
        ) from error


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        # No number of a row is ever used; float, unlike int, takes one of any length.
        return json.loads(text, parse_int=float)
    except RecursionError as error:
        raise PairsError(f"{path}, line {first_line}: nested too deeply. Remove that row.") from error
    except json.JSONDecodeError as error:
        raise PairsError(
            f"{path}, line {first_line + error.lineno - 1}: not valid JSON ({error.msg}, "
            f"column {error.colno}). Fix or remove that line; a json file holds one array of objects, or one "
            "object per line."
        ) from error


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
