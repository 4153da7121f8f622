"""The job of `splaser expand`: a plain model from one with factored layers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from splaser_plugin.artifacts.card import model_card
from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.artifacts.results import Results
from splaser_plugin.checkpoints.folder import INDEX_NAME, read_config, resolve_model
from splaser_plugin.files.output import check_space, whole_folder
from splaser_plugin.weights.factored import expand
from splaser_plugin.weights.factored_folder import load
from splaser_plugin.weights.factored_format import stored_layers
from splaser_plugin.weights.in_memory import Weights


def expand_folder(model: str, out: Path) -> int:
    """Write the dense model of a factored one to the folder `out`, with what else there is: tokenizer, recipe.

    Only for the process that holds `out`. Returns how many layers were factored: 0 for a run that kept nothing.
    Raises CheckpointError as `load` does, RecipeError when the recipe or the results that are copied are damaged, and
    OutputError when there is no room for the dense model.
    """
    source = resolve_model(model)
    layers = stored_layers(read_config(source), source)
    dense = expand(load(source, dtype="auto"))
    needed = Weights(dense).size
    check_space(out, needed)
    with whole_folder(out, needed=needed) as folder:
        dense.save_pretrained(folder)
        for file in source.iterdir():
            is_weights = file.name.endswith((".safetensors", INDEX_NAME))
            if file.is_file() and not is_weights and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
        _rewrite_card(folder)
    return len(layers)


def _rewrite_card(folder: Path) -> None:
    """Make the card of a lasered model say that its weights are dense."""
    if not (folder / "recipe.json").is_file():
        return
    recipe = Recipe.load(folder / "recipe.json")
    results = folder / "results.json"
    run = Results.load(results) if results.is_file() else None
    model_card(replace(recipe, config=replace(recipe.config, save="dense")), run).save(folder / "README.md")
