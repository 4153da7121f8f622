"""The job of `splaser expand`: a plain model from one with factored layers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from splaser_plugin.artifacts.base_card import base_card
from splaser_plugin.artifacts.card import model_card
from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.artifacts.results import Results
from splaser_plugin.checkpoints.folder import INDEX_NAME, ModelFolder, inspect, resolve_model
from splaser_plugin.checkpoints.trust import check_model_folder
from splaser_plugin.errors import ModelError
from splaser_plugin.files.output import check_output, check_space, held, whole_folder
from splaser_plugin.jobs.apply import NO_TOKENIZER
from splaser_plugin.progress import SILENT, Progress
from splaser_plugin.weights.factored import expand as expand_layers
from splaser_plugin.weights.factored_folder import load_factored
from splaser_plugin.weights.factored_format import stored_layers
from splaser_plugin.weights.in_memory import Weights

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_Model = TypeVar("_Model", bound="nn.Module")


@overload
def expand(
    model: str | Path, *, output: str | Path | None = ..., overwrite: bool = ..., progress: Progress = ...
) -> PreTrainedModel: ...


@overload
def expand(
    model: _Model, *, output: str | Path | None = ..., overwrite: bool = ..., progress: Progress = ...
) -> _Model: ...


def expand(
    model: Any, *, output: str | Path | None = None, overwrite: bool = False, progress: Progress = SILENT
) -> Any:
    """Turn every factored layer of a model into a plain one. It has no options, so that it takes no `config=`.

    Args:
        model: A folder or hub id, or a loaded model, which is changed in place, under PEFT too. Experts that have
            adapters are put back into their stacks only once those are merged: call it again then.
        output: Folder to write the plain model to, with the tokenizer and what else the model's folder has.
        overwrite: Replace the output of an earlier run.
        progress: What is told of the work on a model in a folder.

    Returns:
        The plain model.

    Raises:
        ModelError: An output is asked for of a loaded model, which has no tokenizer to write.
        CheckpointError: The model is missing, damaged or at odds; the message has the file and the tensor.
        RecipeError: The recipe or the results in the folder are damaged.
        OutputError: The output exists and isn't empty, or can't be written.
    """
    if not isinstance(model, (str, Path)):
        if output is not None:
            raise ModelError(NO_TOKENIZER)
        return expand_layers(model)
    if output is None:
        return _expanded(inspect(resolve_model(str(model))), progress)
    path = check_output(output, overwrite=overwrite, inputs=(model,))
    with held(path):
        source = inspect(resolve_model(str(model)))
        dense = _expanded(source, progress)
        _write(dense, source, path)
    return dense


def _expanded(source: ModelFolder, progress: Progress) -> PreTrainedModel:
    with progress.phase("loading", 1):
        checkpoint = check_model_folder(source)
        model = load_factored(checkpoint, dtype="auto")
    progress.result("expanded", f"{len(stored_layers(checkpoint.config, source.path))} layers")
    return expand_layers(model)


def _write(dense: PreTrainedModel, source: ModelFolder, out: Path) -> None:
    """Write the plain model to the folder `out`, which is held, with what else the factored one's has."""
    needed = Weights(dense).size
    check_space(out, needed)
    with whole_folder(out, needed=needed) as folder:
        dense.save_pretrained(folder)
        for name in source.sizes:
            is_weights = name.endswith((".safetensors", INDEX_NAME))
            if not is_weights and not (folder / name).exists():
                shutil.copyfile(source.path / name, folder / name)
        _rewrite_card(folder, dense.config)


def _rewrite_card(folder: Path, config: Any) -> None:
    """Make the card of a lasered model say that its weights are dense; of the base it knows what that card did."""
    if not (folder / "recipe.json").is_file():
        return
    recipe = Recipe.load(folder / "recipe.json")
    results = folder / "results.json"
    run = Results.load(results) if results.is_file() else None
    dense = replace(recipe, config=replace(recipe.config, save="dense"))
    model_card(dense, run, base_card(recipe.model, config, folder)).save(folder / "README.md")
