"""YAML that the tools read as it was meant: new, or merged into a user's own file."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from splaser_plugin.errors import ConfigError, MissingExtraError, OutputError
from splaser_plugin.files.reading import read_bytes
from splaser_plugin.files.text import printable

MARK = "# splaser: "
"""Begins each comment line at the top, by which the lines of an earlier merge are known."""
MAX_BASE_BYTES = 1_000_000


def new_yaml(values: Mapping[str, Any], header: Iterable[str]) -> str:
    """A YAML document of these values, in this order, under comment lines."""
    return comment(header) + _dump(values)


def merged_yaml(base: Path, values: Mapping[str, Any], header: Iterable[str], *, without: Collection[str] = ()) -> str:
    """The user's file `base` with these values set and the keys `without` taken out.

    Its comments, its order and all else stay; keys it doesn't have come at the end, in the order given.
    Raises OutputError when it can't be read, ConfigError when it is no YAML mapping, MissingExtraError
    without ruamel.yaml.
    """
    try:
        from ruamel.yaml import YAML, YAMLError
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "--base needs ruamel.yaml, to keep the file's comments: pip install 'splaser_plugin[emit]'"
        ) from error

    text = _without_mark(read_base(base))
    keeper = YAML()
    keeper.preserve_quotes = True
    keeper.width = sys.maxsize
    mapping, offset = _indents(text)
    keeper.indent(mapping=mapping, sequence=offset + 2, offset=offset)
    try:
        document = keeper.load(text)
    except (YAMLError, RecursionError) as error:
        raise _not_yaml(base, error) from error
    for key in without:
        document.pop(key, None)
    # What PyYAML wrote, PyYAML reads back: the tools read YAML 1.1, where no, on and 1e-5 aren't what they are in 1.2.
    for key, value in keeper.load(_dump(values)).items():
        document[key] = value
    stream = StringIO()
    keeper.dump(document, stream)
    return comment(header) + stream.getvalue()


def base_values(base: Path) -> dict[str, Any]:
    """The user's file as plain values, as the tools read it. Raises as `merged_yaml` does."""
    try:
        values = yaml.safe_load(read_base(base))
    except (yaml.YAMLError, RecursionError) as error:
        raise _not_yaml(base, error) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"--base {base}: holds {type(values).__name__}, expected keys and values.")
    return values


def read_base(base: Path) -> str:
    """Its text. Raises OutputError when it can't be read, or is larger than anyone's configuration."""
    try:
        return read_bytes(base, OutputError, MAX_BASE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise OutputError(f"--base {base}: can't be read ({error}). Save it as UTF-8.") from error


def _indents(text: str) -> tuple[int, int]:
    """How far the file indents what stands under a key: (keys, dashes of a list), each as it does first."""
    found: dict[bool, int] = {}
    for line, following in pairwise(text.splitlines()):
        key = re.fullmatch(r"( *)[^\s#-][^#]*:\s*(#.*)?", line)
        inside = re.match(r"( *)(- )?[^\s#]", following)
        if key and inside and len(inside[1]) >= len(key[1]):
            found.setdefault(inside[2] is not None, len(inside[1]) - len(key[1]))
    return found.get(False) or 2, found.get(True, 0)


def _not_yaml(base: Path, error: Exception) -> ConfigError:
    return ConfigError(f"--base {base}: not valid YAML ({' '.join(str(error).split())}). Mend it first.")


def comment(lines: Iterable[str]) -> str:
    """Comment lines. A line's own control characters are escaped, so that it can't end the comment."""
    return "".join(f"{MARK}{printable(line, sys.maxsize)}\n" for line in lines)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _dump(values: Mapping[str, Any]) -> str:
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, width=sys.maxsize, allow_unicode=True)


def _without_mark(text: str) -> str:
    lines = text.splitlines(keepends=True)
    while lines and lines[0].startswith(MARK):
        del lines[0]
    return "".join(lines)
