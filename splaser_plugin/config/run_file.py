"""run.yaml: the arguments and options of a command in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splaser_plugin.config.options import Options, instead_of
from splaser_plugin.errors import ConfigError

MOST_BYTES = 2**16
PLAIN = (str, bool, int, float)


def read_run_file(path: Path, options: Sequence[type[Options]], arguments: Mapping[str, type]) -> dict[str, Any]:
    """The keys and values of a YAML file, each checked by itself.

    options: the configurations whose fields may stand there. arguments: what else may, to the type of its value.
    Raises ConfigError when it can't be read, is no mapping, or has a key or a value that the command doesn't take.
    """
    known = {name: config for config in options for name in config.fields()}
    values = _mapping(path)
    for key, value in values.items():
        if key not in known and key not in arguments:
            raise ConfigError(f"--config {path}: '{key}' is not known; {instead_of(str(key), [*known, *arguments])}.")
        if not isinstance(value, PLAIN) and not (isinstance(value, list) and all(type(x) in PLAIN for x in value)):
            raise ConfigError(f"--config {path}: {key}: got {type(value).__name__}, expected a plain value.")
        if key in arguments and type(value) is not arguments[key]:
            expected = arguments[key].__name__
            raise ConfigError(f"--config {path}: {key}: got {value!r}, expected {expected}.")
        if key in known:
            try:
                known[key].check_option(key, value)
            except ConfigError as error:
                raise ConfigError(f"--config {path}: {error}") from error
    return values


def run_file(arguments: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """YAML that `read_run_file` reads: the arguments that are known, then all settings."""
    import yaml

    given = {name: value for name, value in arguments.items() if value}
    text: str = yaml.safe_dump({**given, **settings}, sort_keys=False, allow_unicode=True)
    return "# This run again: splaser laser --config run.yaml -o ANOTHER_FOLDER\n" + text


def _mapping(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--config {path}: can't be read ({error.strerror}). Check the path.") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"--config {path}: has more than {MOST_BYTES:,} bytes, so it is no configuration.")
    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"--config {path}: holds a {node.id}, expected keys and values, as in 'candidates: 15'.")
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"--config {path}: '{name}' stands there twice. Leave one out.")
        values: dict[Any, Any] = yaml.safe_load(content)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"--config {path}: not valid YAML ({reason}). Mend it first.") from error
    return values
