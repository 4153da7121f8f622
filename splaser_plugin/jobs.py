"""The whole jobs, as the command line and Python callers run them: scan, laser, apply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from splaser_plugin.acceptance import Confident, Improve
from splaser_plugin.candidates import by_prediction, choose_candidates
from splaser_plugin.config import LaserConfig, parse_ranks
from splaser_plugin.distributed import is_main, wait_for_all
from splaser_plugin.embedding import load_embedder
from splaser_plugin.errors import ModelError
from splaser_plugin.generation import Generator
from splaser_plugin.held_out import HeldOut, Split, compare, split_by_prompt, split_by_set
from splaser_plugin.loading import context_length, load_model
from splaser_plugin.margin import MarginScorer
from splaser_plugin.output import check_output, whole_folder
from splaser_plugin.pairs import Pair, PairSet, load_pairs, pairs_from_rows
from splaser_plugin.prediction import check_predictable, sensitivities
from splaser_plugin.progress import SILENT, Progress
from splaser_plugin.prompts import Prompter
from splaser_plugin.racing import Race
from splaser_plugin.recipe import Recipe, Step, carry_out, versions
from splaser_plugin.scan import Scan, run_scan, scan_model, write_json
from splaser_plugin.scoring import Scorer, Scores, SemanticScorer
from splaser_plugin.search import Judge, SearchResult, Trial, search
from splaser_plugin.weights import Weights

__all__ = ["LaserResult", "apply_recipe", "laser", "laser_weights", "read_pairs", "run_scan"]

RESULTS_SCHEMA = "splaser.results/1"
FORWARD_BATCH = 32
"""Texts in one forward pass where the number of prompts generated for at once is found by measurement."""
GRADIENT_PAIRS = 32
"""Most pairs that a prediction is made from."""


@dataclass(frozen=True)
class LaserResult:
    """What a laser run made and found."""

    weights: Weights
    tokenizer: Any
    scan: Scan
    recipe: Recipe
    search: SearchResult
    split: Split
    held_out: HeldOut | None
    """The verdict; None where no pairs are held out."""

    @property
    def pairs(self) -> PairSet:
        """All pairs that were read, but those of --held-out."""
        return self.split.pairs

    @property
    def model(self) -> Any:
        """The model, lasered in place."""
        return self.weights.model

    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "schema": RESULTS_SCHEMA,
            "model": self.recipe.model,
            "pairs": {
                "source": self.pairs.source,
                "used": len(self.pairs.pairs),
                "dropped": dict(self.pairs.dropped),
            },
            "baseline": _scores(self.search.baseline),
            "final": _scores(self.search.final),
            "generated_tokens": self.search.generated_tokens,
            "candidates": [_trial(trial) for trial in self.search.trials],
            "held_out": _verdict(self.held_out, self.split),
            "texts": {"search": _texts(self.split.search), "held_out": _texts(self.split.held_out)},
        }

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the model, its tokenizer, scan.json, recipe.json and results.json: all of them or nothing.

        Under several processes all have to call it, and the main one writes.
        Raises OutputError when the folder exists and isn't empty.
        """
        path = check_output(out, overwrite=overwrite, inputs=(self.recipe.model,))
        state = self.weights.state_dict()
        if is_main():
            with whole_folder(path) as folder:
                self.model.save_pretrained(folder, state_dict=state)
                self.tokenizer.save_pretrained(folder)
                self.scan.save(folder / "scan.json")
                self.recipe.save(folder / "recipe.json")
                write_json(folder / "results.json", self.results())
        wait_for_all()
        return path


def laser(
    model: str | Path | Any,
    pairs: str | Path | PairSet | Iterable[Mapping[str, Any]],
    *,
    config: LaserConfig | None = None,
    tokenizer: Any = None,
    progress: Progress = SILENT,
) -> LaserResult:
    """Reduce the noisiest matrices of a model wherever that makes its answers better.

    model: a folder, .gguf file or hub id, or a loaded causal language model, which is changed in place.
    pairs: a file or data set name (see `load_pairs`), a PairSet, or rows in any format that `load_pairs` reads.
    tokenizer: needed only with a loaded model.
    Raises a SplaserError before any weight is changed when something can't be used; whatever is raised later
    leaves the kept changes and no undecided one.
    """
    config = config or LaserConfig()
    split = read_pairs(pairs, config)
    name = str(model)
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ModelError("a loaded model was given without its tokenizer. Pass tokenizer=...")
        name = _name_of(model)
    else:
        model, tokenizer = load_model(model, device=config.device, dtype=config.dtype, adapter=config.adapter)
    return laser_weights(Weights(model), tokenizer, split, config=config, name=name, progress=progress)


def laser_weights(
    weights: Weights,
    tokenizer: Any,
    split: Split,
    *,
    config: LaserConfig,
    name: str,
    progress: Progress = SILENT,
) -> LaserResult:
    """The job of `laser` on weights that are loaded already, wherever they live. name: how the model is called."""
    model: Any = weights.model
    if config.rank_by == "gradient":
        check_predictable(weights)
    device = next(iter(weights.parameters.values())).device
    progress.fact("device", f"{device}, {_dtype(model)}")
    progress.fact("pairs", split.pairs.summary)
    progress.fact("held out", split.reason)
    prompter = Prompter(tokenizer, config.template, context_length(model))
    generator = Generator(model, prompter, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size)
    at_once = config.batch_size or FORWARD_BATCH
    embedder = load_embedder(config.embedder, weights, tokenizer, device, at_once)
    scorer = SemanticScorer(generator, embedder, split.search)
    held_out = SemanticScorer(generator, embedder, split.held_out) if split.held_out else None
    judge = Judge(
        scorer,
        acceptance=Confident(config.alpha, config.candidates) if config.accept == "confident" else Improve(),
        race=Race(scorer.size, seed=config.seed) if config.race else None,
        screen=MarginScorer(model, prompter, split.search, batch_size=at_once) if config.screen == "margin" else None,
    )

    scan = scan_model(weights, config=config, name=name, identity=weights.identity(), progress=progress)
    matrices, _ = weights.matrices(config.include, config.exclude)
    candidates = choose_candidates(scan, matrices, parse_ranks(config.ranks))
    if config.rank_by == "gradient":
        some = MarginScorer(model, prompter, split.search[:GRADIENT_PAIRS], batch_size=at_once)
        reducible = {candidate.matrix for candidate in candidates}
        tried = [matrix for matrix in matrices if matrix in reducible]
        candidates = by_prediction(candidates, sensitivities(weights, some, tried, progress=progress))
        progress.fact("ranked by", f"predicted margin, from a gradient over {some.size} pairs")
    base = _measure(held_out, "held-out base", progress)
    found = search(weights, candidates, judge, limit=config.candidates, progress=progress)
    result = _measure(held_out, "held-out result", progress, like=base) if found.kept else base
    verdict = compare(base, result, seed=config.seed) if base and result else None
    if verdict is not None:
        progress.fact("held out", verdict.summary)
        progress.fact("verdict", verdict.verdict)
    recipe = Recipe(
        model=name,
        weights=scan.weights,
        dtype=_dtype(model),
        steps=tuple(
            Step(each.matrix.name, each.rank, each.edge, each.threshold, each.matrix.shape) for each in found.kept
        ),
        scores={"baseline": found.baseline.mean, "final": found.final.mean},
        settings=config.to_dict(),
        versions=versions(),
    )
    return LaserResult(weights, tokenizer, scan, recipe, found, split, verdict)


def _measure(scorer: Scorer | None, name: str, progress: Progress, like: Scores | None = None) -> Scores | None:
    """The model as it is, on everything the scorer has; None where there is no scorer."""
    if scorer is None:
        return None
    with progress.phase(name, 1) as advance:
        scores = scorer.score(range(scorer.size), like=like)
        advance(1)
    return scores


def apply_recipe(
    recipe: Recipe | str | Path,
    model: str | Path | nn.Module,
    *,
    device: str = "auto",
    progress: Progress = SILENT,
) -> tuple[Any, Any]:
    """The lasered model from its recipe and the base model, and the tokenizer (None for a loaded model).

    Raises RecipeError when the model isn't the recipe's.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    tokenizer = None
    loaded: Any = model
    if not isinstance(model, nn.Module):
        adapter = recipe.settings.get("adapter", "")
        loaded, tokenizer = load_model(model, device=device, dtype=recipe.dtype, adapter=adapter)
    carry_out(recipe, Weights(loaded), progress=progress)
    return loaded, tokenizer


def _name_of(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def read_pairs(pairs: str | Path | PairSet | Iterable[Mapping[str, Any]], config: LaserConfig) -> Split:
    """The pairs that a run with this configuration uses, from whatever form they come in: to search on and held out."""
    pair_set = _pair_set(pairs, config)
    if config.held_out:
        return split_by_set(pair_set, _pair_set(config.held_out, config))
    return split_by_prompt(pair_set, config.held_out_fraction, config.seed)


def _pair_set(pairs: str | Path | PairSet | Iterable[Mapping[str, Any]], config: LaserConfig) -> PairSet:
    if isinstance(pairs, PairSet):
        return pairs
    limits: dict[str, Any] = {
        "samples": config.samples,
        "max_prompt_chars": config.max_prompt_chars,
        "max_answer_chars": config.max_answer_chars,
    }
    return load_pairs(pairs, **limits) if isinstance(pairs, (str, Path)) else pairs_from_rows(pairs, **limits)


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _scores(scores: Scores) -> dict[str, Any]:
    return {
        "score": scores.mean,
        "per_pair": list(scores.values),
        "answers": [answer.text for answer in scores.answers],
        "generated_tokens": scores.generated_tokens,
    }


def _texts(pairs: Iterable[Pair]) -> list[dict[str, Any]]:
    """What was asked, in the order of `per_pair` and `answers`: the last turn of each prompt, and its references."""
    return [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]


def _verdict(held_out: HeldOut | None, split: Split) -> dict[str, Any]:
    if held_out is None:
        return {"pairs": 0, "split": split.reason, "verdict": None}
    return {
        "pairs": len(split.held_out),
        "split": split.reason,
        "verdict": held_out.verdict,
        "difference": held_out.difference,
        "interval": list(held_out.interval),
        "better": held_out.better,
        "worse": held_out.worse,
        "equal": held_out.equal,
        "base": _scores(held_out.base),
        "result": _scores(held_out.result),
    }


def _trial(trial: Trial) -> dict[str, Any]:
    candidate, judgement = trial.candidate, trial.judgement
    scores = judgement.scores
    return {
        "name": candidate.matrix.name,
        "rank": candidate.rank,
        "full_rank": min(candidate.matrix.shape),
        "edge": candidate.edge,
        "snr": candidate.snr,
        "predicted": candidate.predicted,
        "verdict": judgement.verdict,
        "score": scores.mean if scores else None,
        "best_before": judgement.best_before,
        "screen_change": judgement.screen_change,
        "pairs_scored": list(scores.items) if scores else [],
        "per_pair": list(scores.values) if scores else [],
        "generated_tokens": scores.generated_tokens if scores else 0,
        "elapsed_s": round(trial.elapsed_s, 3),
    }
