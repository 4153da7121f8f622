"""The recipe: what was done to a model, precise enough to do it again."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from splaser_plugin.artifacts.rank_source import RankSource
from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.errors import ConfigError, RecipeError
from splaser_plugin.files.json import read_json, write_json
from splaser_plugin.files.validation import NO_OTHER_KEYS, InvalidRecordError, Number, Whole, plain, validated
from splaser_plugin.progress import SILENT, Progress
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import by_name
from splaser_plugin.weights.zero import masters_following

SCHEMA = "splaser.recipe/1"
DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def _known_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"one of {', '.join(DTYPES)}")
    return name


@dataclass(frozen=True)
class Step:
    """One matrix that was reduced."""

    __pydantic_config__ = NO_OTHER_KEYS

    name: str
    rank: Annotated[Whole, Field(ge=1)]
    edge: RankSource
    """Where the rank comes from."""
    threshold: Number | None
    """Of the edge; None for a fraction."""
    shape: tuple[Whole, Whole]


@dataclass(frozen=True)
class Recipe:
    """Everything kept by a search, in order, and what it was found with."""

    __pydantic_config__ = NO_OTHER_KEYS

    model: str
    """Folder or hub id of the base model."""
    weights_identity: Annotated[str, Field(alias="weights")]
    """Of the base model's weights; see `Weights.identity`."""
    dtype: Annotated[str, AfterValidator(_known_dtype)]
    steps: tuple[Step, ...]
    scores: Mapping[str, Number]
    """Mean score before (`baseline`) and after (`final`)."""
    config: Annotated[LaserConfig, Field(alias="settings")]
    """The options of the run, seed included."""
    versions: Mapping[str, str]
    unknown_settings: Annotated[Mapping[str, Any], Field(exclude=True)] = field(default_factory=dict)
    """Options in the file that another version of the program had and this one doesn't: none has to do with how the
    steps are carried out, so they are kept for the file alone."""
    absent_settings: Annotated[frozenset[str], Field(exclude=True)] = frozenset()
    """Options of this version that the file doesn't have: their defaults aren't what that run had."""

    def __repr__(self) -> str:
        return f"Recipe({self.model!r}, {len(self.steps)} steps)"

    @property
    def settings(self) -> dict[str, Any]:
        """The options of the run, whatever its version."""
        ours = {name: value for name, value in self.config.to_dict().items() if name not in self.absent_settings}
        return {**ours, **self.unknown_settings}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in recipe.json."""
        return {"schema": SCHEMA, **plain(self), "settings": self.settings}

    def save(self, path: str | Path) -> None:
        """Write recipe.json, whole or not at all.

        Raises:
            OutputError: It can't be written.
        """
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe.json.

        Raises:
            RecipeError: It is missing, damaged or of another version.
        """
        stored = read_json(path, RecipeError)
        if not isinstance(stored, dict) or stored.pop("schema", None) != SCHEMA:
            raise RecipeError(f"{path}: not a recipe of schema '{SCHEMA}'. Give the recipe.json of a laser run.")
        try:
            return validated(cls, {**stored, **_settings(stored.get("settings"))})
        except (InvalidRecordError, ConfigError) as error:
            raise RecipeError(
                f"{path}: not a whole recipe ({str(error).rstrip('.')}). Make it anew with splaser laser."
            ) from error


def carry_out(recipe: Recipe, weights: Weights, *, progress: Progress = SILENT) -> None:
    """Reduce the recipe's matrices in place, to factors if that is how the recipe's model is saved.

    Raises RecipeError, before anything is changed, when the model's weights aren't the recipe's.
    """
    got, dtype, expected = weights.identity(), weights.dtype, recipe.weights_identity
    if dtype != recipe.dtype or (expected != got and expected != weights.identity_of_version_0_1()):
        raise RecipeError(
            f"the recipe was made for weights {expected[:12]} of {recipe.model} in {recipe.dtype}, but this model's "
            f"are {got[:12]} in {dtype}. Give the base model, in the same dtype, before any change."
        )
    config = recipe.config
    if recipe.steps and config.reducer != "svd":
        raise RecipeError(
            f"the recipe was made with --reduce {config.reducer}, which needs what the run measured on its pairs and "
            "text, and a recipe doesn't hold that. Copy the model that the run saved, or run splaser laser again with "
            "the run.yaml beside it."
        )
    matrices = by_name(weights.matrices(config.include, config.exclude, config.towers)[0])
    for step in recipe.steps:
        if step.name not in matrices or matrices[step.name].shape != step.shape:
            raise RecipeError(f"{step.name} of shape {step.shape} is not among this model's matrices.")
        if step.rank > min(step.shape):
            raise RecipeError(
                f"{step.name}: rank {step.rank}, but its shape {step.shape} allows at most {min(step.shape)}."
            )
    if recipe.config.save == "factored":
        weights.keep_factors()
    with masters_following(weights.model), progress.phase("apply", len(recipe.steps)) as advance:
        for step in recipe.steps:
            weights.reduce(matrices[step.name], step.rank)
            advance(1)


def _settings(stored: Any) -> dict[str, Any]:
    """The options that stand in a recipe, those that this version doesn't know, and those that the file doesn't have.

    Raises ConfigError when one has a value that it can't have, InvalidRecordError when it is no object.
    """
    if not isinstance(stored, dict):
        raise InvalidRecordError(f"settings is {stored!r:.80}, expected an object")
    if stored.get("objective") == "compress":
        stored = {"reduce": "svd", **stored}  # recipes from before there was anything else don't say so
    known = {field.name for field in fields(LaserConfig)}
    return {
        "settings": LaserConfig.from_dict({name: value for name, value in stored.items() if name in known}),
        "unknown_settings": {name: value for name, value in stored.items() if name not in known},
        "absent_settings": frozenset(known - stored.keys()),
    }


def versions() -> dict[str, str]:
    """Versions of what the result depends on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in ("splaser_plugin", "torch", "transformers", "sentence-transformers"):
        with suppress(PackageNotFoundError):  # the embedder's, which --embedder self goes without
            found[name] = version(name)
    return found
