"""The recipe: what was done to a model, precise enough to do it again."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from splaser_plugin.errors import RecipeError
from splaser_plugin.files.typed import check_types
from splaser_plugin.progress import SILENT, Progress
from splaser_plugin.scanning.records import read_json, write_json
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import by_name

SCHEMA = "splaser.recipe/1"
DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Step:
    """One matrix that was reduced."""

    name: str
    rank: int
    edge: str
    """Where the rank comes from: an edge, or the fraction of components that stayed."""
    threshold: float | None
    """Of the edge; None for a fraction."""
    shape: tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """Everything kept by a search, in order, and what it was found with."""

    model: str
    """Folder or hub id of the base model."""
    weights: str
    """Identity of the base model's weights; see `Weights.identity`."""
    dtype: str
    steps: tuple[Step, ...]
    scores: Mapping[str, float]
    """Mean score before (`baseline`) and after (`final`)."""
    settings: Mapping[str, Any]
    """The configuration of the run, seed included."""
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe.json. Raises RecipeError when it is missing, damaged or of another version."""
        stored = read_json(path)
        if not isinstance(stored, dict) or stored.pop("schema", None) != SCHEMA:
            raise RecipeError(f"{path}: not a recipe of schema '{SCHEMA}'. Give the recipe.json of a laser run.")
        try:
            steps = tuple(Step(**{**step, "shape": tuple(step["shape"])}) for step in stored.pop("steps"))
            recipe = cls(steps=steps, **stored)
            check_types(recipe)
            if recipe.dtype not in DTYPES or not isinstance(recipe.settings.get("adapter", ""), str):
                raise TypeError(f"dtype {recipe.dtype!r:.80}, adapter {recipe.settings.get('adapter')!r:.80}")
        except (KeyError, TypeError) as error:
            raise RecipeError(f"{path}: not a whole recipe ({error}). Make it anew with splaser laser.") from error
        for step in steps:
            if step.rank < 1:
                raise RecipeError(f"{path}: {step.name}: rank {step.rank!r}, expected a whole number of at least 1.")
        return recipe


def carry_out(recipe: Recipe, weights: Weights, *, progress: Progress = SILENT) -> None:
    """Reduce the recipe's matrices in place, to factors if that is how the recipe's model is saved.

    Raises RecipeError, before anything is changed, when the model's weights aren't the recipe's.
    """
    got, dtype = weights.identity(), weights.dtype
    if dtype != recipe.dtype or recipe.weights not in (got, weights.identity(with_dtypes=True)):
        raise RecipeError(
            f"the recipe was made for weights {recipe.weights[:12]} of {recipe.model} in {recipe.dtype}, but this "
            f"model's are {got[:12]} in {dtype}. Give the base model, in the same dtype, before any change."
        )
    include, exclude = _patterns(recipe, "include"), _patterns(recipe, "exclude")
    matrices = by_name(weights.matrices(include, exclude, recipe.settings.get("towers") is True)[0])
    for step in recipe.steps:
        if step.name not in matrices or matrices[step.name].shape != step.shape:
            raise RecipeError(f"{step.name} of shape {step.shape} is not among this model's matrices.")
        if step.rank > min(step.shape):
            raise RecipeError(
                f"{step.name}: rank {step.rank}, but its shape {step.shape} allows at most {min(step.shape)}."
            )
    if recipe.settings.get("save") == "factored":
        weights.keep_factors()
    with progress.phase("apply", len(recipe.steps)) as advance:
        for step in recipe.steps:
            weights.reduce(matrices[step.name], step.rank)
            advance(1)


def _patterns(recipe: Recipe, key: str) -> list[str]:
    """A run could reduce only what its patterns let through, and what is named by them alone (embeddings, heads)."""
    patterns = recipe.settings.get(key, [])
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(each, str) for each in patterns):
        raise RecipeError(f"the recipe's setting '{key}' is {patterns!r}, expected a list of patterns.")
    return list(patterns)


def versions() -> dict[str, str]:
    """Versions of what the result depends on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in ("splaser-plugin", "torch", "transformers", "sentence-transformers"):
        with suppress(PackageNotFoundError):  # the embedder's, which --embedder self goes without
            found[name] = version(name)
    return found
