"""JSON files, read whatever stands in them, and written whole or not at all.

Two readers of JSON are not here: that of a checkpoint's header refuses a key that is there twice
(`checkpoints.header`), and that of pairs goes by lines and takes numbers of any length (`data.sources`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from splaser_plugin.errors import OutputError, SplaserError
from splaser_plugin.files.output import whole_file, writable
from splaser_plugin.files.reading import MAX_JSON_BYTES, read_bytes


def read_json(
    file: str | Path,
    error: type[SplaserError],
    *,
    max_bytes: int = MAX_JSON_BYTES,
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
) -> Any:
    """The content of a JSON file; object_hook as in `json.loads`.

    Raises `error` when it can't be read, has more than `max_bytes`, or isn't JSON in UTF-8.
    """
    content = read_bytes(Path(file), error, max_bytes)
    try:
        return json.loads(content.decode("utf-8"), object_hook=object_hook)
    except RecursionError as problem:
        raise error(f"{file}: not JSON (nested too deeply). Make it anew.") from problem
    except ValueError as problem:
        raise error(f"{file}: not JSON ({problem}). It may be half written; make it anew.") from problem


def write_json(path: str | Path, content: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write JSON with a final newline, whole or not at all; refuses nan and infinity.

    default: turns what JSON doesn't know into what it does, one at a time as it is written.
    Raises OutputError when the file can't be written.
    """
    with whole_file(path) as file:
        json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False, default=default)
        file.write("\n")


def check_names_file(out: str | Path) -> None:
    """Raises OutputError when the file exists and isn't JSON of names by module type, or can't be written."""
    path = writable(out)
    if path.exists() and not _is_names(path):
        raise OutputError(f"{out}: exists and was not written by splaser. Choose another --top-json.")


def _is_names(path: Path) -> bool:
    try:
        stored = read_json(path, OutputError)
    except OutputError:
        return False
    groups = stored.values() if isinstance(stored, dict) else [None]
    return all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in groups)
