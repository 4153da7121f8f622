"""Flags of the command line, made from the configuration classes.

typer draws the help and the completion. Its own way to a flag is a parameter of the command's function; here each field
of a configuration class becomes such a parameter. HfArgumentParser would do that, too, but importing it loads
transformers, seconds before a `--help`; cyclopts reads dataclasses, but prints its own errors for wrong values, and has
no place for a configuration file that a flag names.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from splaser_plugin.config.options import Options, choices, flag, plain_type
from splaser_plugin.config.placement import DeviceConfig, PlaceConfig
from splaser_plugin.config.stages import LaserConfig, MeasureConfig, ScanConfig, SelectConfig, TrainingConfig
from splaser_plugin.files.sources import path_of

PANELS: dict[type, str] = {
    DeviceConfig: "Where it runs",
    PlaceConfig: "Where it runs",
    ScanConfig: "Which matrices, and their noise",
    MeasureConfig: "What is measured",
    LaserConfig: "The search",
    SelectConfig: "Which matrices to train",
    TrainingConfig: "The training run",
}
"""Headings of the help."""


def options(**configs: type[Options]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each field of these classes, and pass it one of each, by the names given here.

    And --config: a file in which any of the command's arguments and options may stand, where no flag is given.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(command, eval_str=True).parameters
        own = [parameter for name, parameter in parameters.items() if name not in configs]

        def with_configs(config_file: Path | None, **arguments: Any) -> None:
            for argument, config in configs.items():
                values = {name: arguments.pop(name) for name in config.fields()}
                arguments[argument] = config.from_dict(values)
            command(**arguments)

        fields = [
            _flag(name, field, _panel(config, name))
            for config in configs.values()
            for name, field in config.fields().items()
        ]
        flags = [*own, _config_file(list(configs.values()), own), *fields]
        with_configs.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
        with_configs.__annotations__ = {parameter.name: parameter.annotation for parameter in flags}
        with_configs.__name__, with_configs.__doc__ = command.__name__, command.__doc__
        return with_configs

    return decorate


def _config_file(configs: list[type[Options]], own: list[inspect.Parameter]) -> inspect.Parameter:
    """--config: a file whose values stand in for flags that aren't given. own: the command's own arguments."""
    types = {_key(parameter): _plain_type(parameter.annotation) for parameter in own}
    names = {_key(parameter): parameter.name for parameter in own}

    def read(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            from splaser_plugin.config.run_file import read_run_file

            values = read_run_file(path_of(path), configs, types)
            context.default_map = {names.get(key, key): value for key, value in values.items()}
        return path

    text = "YAML file in which any of these arguments and options may stand, as in a run's run.yaml; flags win."
    option = typer.Option("--config", help=text, is_eager=True, callback=read)
    return inspect.Parameter(
        "config_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, option]
    )


def _key(argument: inspect.Parameter) -> str:
    """How a command's own argument is called in a file: as its flag, with underscores."""
    return argument.name.removeprefix("as_")


def _plain_type(annotation: Any) -> type:
    annotated = typing.get_args(annotation)[0]
    kind = typing.get_origin(annotated) or annotated
    return kind if kind in (bool, int, list) else str


def _panel(config: type[Options], name: str) -> str:
    """Under which heading of the help an option stands: that of the class which has it."""
    owner = next(owner for owner in reversed(config.__mro__) if name in vars(owner).get("__annotations__", {}))
    return PANELS.get(owner, "Options")


def _flag(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    kind: Any = plain_type(field)
    default: Any = list(field.default) if kind is list else field.default
    text = " ".join((field.description or "").split())
    texts = choices(field)
    if texts:
        text += f" One of: {', '.join(texts)}."
    spelled = f"{flag(name)}/{flag('no_' + name)}" if kind is bool else flag(name)
    annotation: Any = list[str] if kind is list else kind if default is not None else typing.Optional[kind]  # noqa: UP045
    option = typer.Option(spelled, help=text, rich_help_panel=panel, autocompletion=(lambda: texts) if texts else None)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
    )
