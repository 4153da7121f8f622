"""The job of `splaser apply`: a lasered model again, from its recipe and the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from splaser_plugin.artifacts.recipe import Recipe, carry_out
from splaser_plugin.progress import SILENT, Progress
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import load_model


def apply_recipe(
    recipe: Recipe | str | Path,
    model: str | Path | nn.Module,
    *,
    device: str = "auto",
    allow_pickle: bool = False,
    progress: Progress = SILENT,
) -> tuple[Any, Any]:
    """The lasered model from its recipe and the base model, and the tokenizer (None for a loaded model).

    device, allow_pickle: see `load_model`. Raises RecipeError when the model isn't the recipe's.
    """
    weights, tokenizer = lasered_weights(recipe, model, device=device, allow_pickle=allow_pickle, progress=progress)
    return weights.model, tokenizer


def lasered_weights(
    recipe: Recipe | str | Path,
    model: str | Path | nn.Module,
    *,
    device: str = "auto",
    allow_pickle: bool = False,
    progress: Progress = SILENT,
) -> tuple[Weights, Any]:
    """The same as `apply_recipe`, as weights that `factored.save_model` can write."""
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    tokenizer = None
    loaded: Any = model
    if not isinstance(model, nn.Module):
        adapter = recipe.settings.get("adapter", "")
        loaded, tokenizer = load_model(
            model, device=device, dtype=recipe.dtype, adapter=adapter, allow_pickle=allow_pickle
        )
    weights = Weights(loaded)
    carry_out(recipe, weights, progress=progress)
    return weights, tokenizer
