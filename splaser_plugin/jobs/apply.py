"""The job of `splaser apply`: a lasered model again, from its recipe and the base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from splaser_plugin.artifacts.base_card import base_card
from splaser_plugin.artifacts.card import model_card
from splaser_plugin.artifacts.recipe import Recipe, carry_out
from splaser_plugin.config.stages import ApplyConfig
from splaser_plugin.distributed import meet
from splaser_plugin.errors import ModelError
from splaser_plugin.files.output import check_output, check_space, held, whole_folder
from splaser_plugin.progress import Progress, default_progress
from splaser_plugin.weights.factored_folder import save_model
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import load_model
from splaser_plugin.weights.model_source import find_model
from splaser_plugin.weights.rest import rest_of
from splaser_plugin.weights.wrapped import unwrapped
from splaser_plugin.weights.zero import check_engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_TOKENIZER = "a loaded model has no tokenizer to write. Save both with their save_pretrained."


@dataclass(frozen=True)
class ApplyResult:
    """A lasered model, rebuilt."""

    recipe: Recipe
    weights: Weights
    tokenizer: PreTrainedTokenizerBase | None
    """None where a loaded model was given."""
    base_folder: Path | None = None
    """Where the base model was loaded from; None where a loaded model was given."""

    @property
    def model(self) -> PreTrainedModel:
        """The model, of transformers' own class."""
        return cast("PreTrainedModel", self.weights.model)

    def __repr__(self) -> str:
        return f"ApplyResult({self.recipe.model!r}, {len(self.recipe.steps)} matrices reduced)"

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the model, its tokenizer, recipe and card to a folder, or nothing.

        Raises:
            ModelError: There is no tokenizer, since a loaded model was given.
            OutputError: The folder exists and isn't empty, or can't be written.
        """
        path = check_output(out, overwrite=overwrite, inputs=(self.recipe.model,))
        with held(path):
            self._write(path)
        return path

    def _write(self, path: Path) -> None:
        if self.tokenizer is None:
            raise ModelError(NO_TOKENIZER)
        check_space(path, self.weights.size)
        with whole_folder(path, needed=self.weights.size) as folder:
            save_model(self.weights, folder, None)
            self.tokenizer.save_pretrained(folder)
            self.recipe.save(folder / "recipe.json")
            base = base_card(self.recipe.model, self.model.config, self.base_folder)
            model_card(self.recipe, base=base).save(folder / "README.md")
            if self.weights.rest is not None:
                self.weights.rest.write(folder)


def apply(
    recipe: Recipe | str | Path,
    model: str | Path | nn.Module,
    *,
    config: ApplyConfig | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ApplyResult:
    """Rebuild a lasered model from its recipe and the base model.

    Args:
        recipe: A recipe, or the path of a recipe.json.
        model: Folder or hub id of the base model, or the loaded one, which is changed in place.
        config: Device, and whether pickled weights are loaded.
        output: Folder to write, as `ApplyResult.save` does.
        overwrite: Replace the output of an earlier run.
        progress: What is told of the work: as bars in a notebook and not at all elsewhere, if not given.

    Returns:
        The lasered model.

    Raises:
        RecipeError: The recipe is damaged, or the model isn't the recipe's.
        ModelError: An output is asked for of a loaded model, which has no tokenizer to write, or DeepSpeed keeps its
            weights in other places than ZeRO-1, 2 or 3 does.
        OutputError: The output can't be written.
    """
    config, progress = config or ApplyConfig(), progress or default_progress()
    if output is None:
        return _apply(recipe, model, config, progress)
    if isinstance(model, nn.Module):
        raise ModelError(NO_TOKENIZER)
    inputs = tuple(given for given in (model, recipe) if isinstance(given, (str, Path)))
    path = check_output(output, overwrite=overwrite, inputs=inputs)
    with held(path):
        result = _apply(recipe, model, config, progress)
        result._write(path)
    return result


def _apply(
    recipe: Recipe | str | Path, model: str | Path | nn.Module, config: ApplyConfig, progress: Progress
) -> ApplyResult:
    check_engine(model)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    tokenizer = None
    loaded: Any = model
    source = None
    if isinstance(model, nn.Module):
        meet("apply()")
        loaded = unwrapped(model)
    else:
        source = find_model(model, allow_pickle=config.allow_pickle)
    if source is not None:
        loaded, tokenizer = load_model(
            source,
            **config.place,
            dtype=recipe.dtype,
            adapter=recipe.config.adapter,
            allow_pickle=config.allow_pickle,
        )
    weights = Weights(loaded, rest=rest_of(source, loaded) if source is not None else None)
    if source is not None and source.quantised:
        progress.fact("weights", source.dequantised_note(loaded.dtype))
    carry_out(recipe, weights, progress=progress)
    return ApplyResult(recipe, weights, tokenizer, source.folder if source is not None else None)
