"""The whole jobs, as the command line and Python callers run them: laser and apply."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from splaser_plugin.artifacts.recipe import Recipe, Step, carry_out, versions
from splaser_plugin.checkpoints.folder import stored_bytes
from splaser_plugin.config.stages import SCORERS, LaserConfig, parse_ranks
from splaser_plugin.data.pairs import PairSet, PairSource, pairs_sha256, read_pairs_from
from splaser_plugin.data.split import Split, split_by_prompt, split_by_set, split_windows
from splaser_plugin.distributed import in_main, my_part
from splaser_plugin.errors import ConfigError, ModelError
from splaser_plugin.files.output import check_output, check_space, size
from splaser_plugin.jobs.result import NO_PAIRS, LaserResult
from splaser_plugin.progress import SILENT, Progress, counting
from splaser_plugin.scanning.scan import Scan, scan_model
from splaser_plugin.scoring.margin import MarginScorer
from splaser_plugin.scoring.own_scorer import code_of
from splaser_plugin.scoring.scorers import Material, Rulers, check_rulers
from splaser_plugin.scoring.scores import Scorer, Scores
from splaser_plugin.search.acceptance import Acceptance, Confident, Harmless, Improve
from splaser_plugin.search.candidates import Candidate, by_prediction, by_size, choose_candidates
from splaser_plugin.search.guard import Guard
from splaser_plugin.search.journal import BASE, Journal, LaserJournal, RecordedScorer
from splaser_plugin.search.judge import Judge
from splaser_plugin.search.prediction import check_predictable, sensitivities
from splaser_plugin.search.racing import Race
from splaser_plugin.search.search import search
from splaser_plugin.search.verdict import compare
from splaser_plugin.weights.factored import is_layer
from splaser_plugin.weights.in_memory import Weights, model_name
from splaser_plugin.weights.loading import load_model
from splaser_plugin.weights.matrices import Matrix, overview

__all__ = ["LaserResult", "apply_recipe", "laser", "laser_weights", "read_pairs"]

GRADIENT_PAIRS = 32
"""Most pairs that a prediction is made from."""


def laser(
    model: str | Path | Any,
    pairs: PairSource | None = None,
    *,
    config: LaserConfig | None = None,
    tokenizer: Any = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> LaserResult:
    """Reduce the noisiest matrices of a model wherever that makes its answers better.

    model: a folder, .gguf file or hub id, or a loaded causal language model, which is changed in place.
    pairs: a file or data set name (see `load_pairs`), a PairSet, or rows in any format that `load_pairs` reads;
    needed by every scorer but perplexity.
    tokenizer: needed only with a loaded model.
    output: folder to write, as `LaserResult.save` does. What was found is kept in its journal.jsonl until then, so
    that after a crash the same call goes on where it stopped. overwrite: replace the output of an earlier run, and
    throw away a journal of other settings.
    Raises a SplaserError before any weight is changed when something can't be used; whatever is raised later
    leaves the kept changes and no undecided one.
    """
    config = config or LaserConfig()
    if output is None:
        return _laser(model, pairs, config, tokenizer, Journal(), None, progress)
    named = (model, pairs, config.held_out, config.text, config.adapter, config.embedder)
    given = tuple(each for each in named if isinstance(each, (str, Path)) and str(each))
    path = check_output(output, overwrite=overwrite, inputs=given, goes_on=True)
    with closing(LaserJournal(path, anew=overwrite)) as journal:
        result = _laser(model, pairs, config, tokenizer, journal, path, progress)
        result.save_held(path)
    return result


def _laser(
    model: Any,
    pairs: PairSource | None,
    config: LaserConfig,
    tokenizer: Any,
    journal: Journal,
    output: Path | None,
    progress: Progress,
) -> LaserResult:
    split = read_pairs(pairs, config)
    check_rulers(config)
    name = str(model)
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ModelError("a loaded model was given without its tokenizer. Pass tokenizer=...")
        name = model_name(model)
    else:
        if output is not None and config.dtype == "auto":
            in_main(lambda: check_space(output, stored_bytes(Path(name).expanduser())))
        with progress.phase("loading", 1):
            model, tokenizer = load_model(
                model,
                device=config.device,
                dtype=config.dtype,
                adapter=config.adapter,
                allow_pickle=config.allow_pickle,
            )
    weights = Weights(model)
    if output is not None:
        in_main(lambda: check_space(output, weights.size))
    return laser_weights(weights, tokenizer, split, config=config, name=name, journal=journal, progress=progress)


def laser_weights(
    weights: Weights,
    tokenizer: Any,
    split: Split,
    *,
    config: LaserConfig,
    name: str,
    journal: Journal | None = None,
    progress: Progress = SILENT,
) -> LaserResult:
    """The job of `laser` on weights that are loaded already, wherever they live. name: how the model is called."""
    journal = journal or Journal()
    if config.save == "factored":
        weights.keep_factors()
    model: Any = weights.model
    if config.rank_by == "gradient":
        check_predictable(weights)
    device = next(iter(weights.parameters.values())).device
    matrices, _ = weights.matrices(config.include, config.exclude)
    progress.fact("model", f"{name}: {overview(matrices)}, {size(weights.size)} in all")
    progress.fact("device", f"{device}, {_dtype(model)}")
    used = versions()
    for label, values in (("options", config.changes), ("versions", used)):
        progress.detail(label, ", ".join(f"{key} {value}" for key, value in values.items()))
    if config.without_effect:
        progress.fact("has no effect", f"{', '.join(config.without_effect)}, with the other options of this run")
    rulers = Rulers(model, tokenizer, config, weights)
    split, searched, apart = _materials(split, rulers, config)
    if split.pairs.pairs:
        progress.fact("pairs", split.pairs.summary)
    if searched.windows:
        progress.fact("text", f"{config.text}: {len(searched.windows)} windows of {config.window} tokens to search on")
    progress.fact("held out", split.reason)

    def make(name: str, material: Material) -> Scorer:
        return RecordedScorer(rulers.make(name, material), journal)

    scorer = make(config.scorer, searched)
    held_out = make(config.scorer, apart) if apart else None
    screen = make("margin", searched) if config.screen == "margin" else None
    guard = Guard(make(config.guard_scorer, searched), config.guard_limit) if config.guard else None

    run: dict[str, Any] = {
        "weights": weights.identity(),
        "pairs": pairs_sha256(split.search),
        "held_out": pairs_sha256(split.held_out),
        "scorer": code_of(config.scorer) if config.scorer not in SCORERS else "",
        "text": hashlib.sha256(repr([searched.windows, apart and apart.windows]).encode()).hexdigest(),
        "settings": config.to_dict(),
        "versions": used,
    }
    if left := journal.begin(run):
        progress.fact("going on", f"{left} measurements were left by a run that was stopped; none is made again")

    def scanned() -> Scan:
        return scan_model(weights, config=config, name=name, identity=run["weights"], progress=progress)

    scan = journal.once("scan", (), scanned, Scan.to_dict, Scan.from_dict)
    chosen = choose_candidates(scan, matrices, parse_ranks(config.ranks))
    candidates = [replace(each, is_layer=is_layer(model, each.matrix)) for each in chosen]
    if config.rank_by == "gradient":
        some = MarginScorer(model, rulers.prompter, split.search[:GRADIENT_PAIRS], batch_size=rulers.batch_size)
        progress.fact("ranked by", f"predicted margin, from a gradient over {some.size} pairs")

        def predicted() -> list[float]:
            return _predictions(weights, some, matrices, candidates, progress)

        candidates = by_prediction(candidates, journal.once("predictions", (), predicted, list, list))
    if config.objective == "compress":
        candidates = by_size(candidates)
    acceptance = _acceptance(config, min(config.candidates, len(candidates)))
    if isinstance(acceptance, Harmless):
        unseen = acceptance.unseen_share(scorer.size)
        progress.fact(
            "harmless",
            f"a loss on up to {100 * unseen:.0f} % of all {config.unit} can go unseen on {scorer.size} of them",
        )
    judge = Judge(
        scorer,
        acceptance=acceptance,
        race=Race(scorer.size, seed=config.seed) if config.race else None,
        screen=screen,
        guard=guard,
    )
    journal.subject = f"{BASE}, held out"
    base = _measure(held_out, "held-out base", progress)
    journal.subject = BASE
    found = search(weights, candidates, judge, limit=config.candidates, journal=journal, progress=progress)
    journal.subject = "result, held out"
    result = _measure(held_out, "held-out result", progress, like=base) if found.kept else base
    tolerance = config.tolerance if config.acceptance == "harmless" else None
    verdict = None
    if base and result:
        verdict = compare(base, result, seed=config.seed, unit=config.unit, tolerance=tolerance)
    progress.result("kept", f"{len(found.kept)} of {len(found.trials)} candidates")
    score = f"{found.baseline.mean:+.4f} before, {found.final.mean:+.4f} after"
    progress.result("score", f"{score}, on the {config.unit} searched on")
    if verdict is not None:
        progress.result("held out", verdict.summary)
        progress.result("verdict", "; ".join(filter(None, (verdict.verdict, verdict.loss_verdict))))
    recipe = Recipe(
        model=name,
        weights=scan.weights,
        dtype=_dtype(model),
        steps=tuple(
            Step(each.matrix.name, each.rank, each.edge, each.threshold, each.matrix.shape) for each in found.kept
        ),
        scores={"baseline": found.baseline.mean, "final": found.final.mean},
        settings=config.to_dict(),
        versions=used,
    )
    return LaserResult(weights, tokenizer, scan, recipe, found, split, verdict)


def _materials(split: Split, rulers: Rulers, config: LaserConfig) -> tuple[Split, Material, Material | None]:
    """What is searched on and, if anything, held out; the split's reason is that of the windows where they decide."""
    if config.scorer != "perplexity":
        windows = rulers.windows() if config.guard_scorer == "perplexity" else []
        return split, Material(split.search, windows), Material(split.held_out) if split.held_out else None
    parts = split_windows(rulers.windows(), config.held_out_fraction, config.seed)
    apart = Material((), parts.held_out) if parts.held_out else None
    return replace(split, reason=parts.reason), Material(split.search, parts.search), apart


def _predictions(
    weights: Weights,
    scorer: MarginScorer,
    matrices: Sequence[Matrix],
    candidates: Sequence[Candidate],
    progress: Progress,
) -> list[float]:
    """What each candidate is predicted to do to the margin. matrices: the model's, in its order.

    Raises ModelError when the gradient isn't finite.
    """
    reducible = {each.matrix for each in candidates}
    tried = [matrix for matrix in matrices if matrix in reducible]
    found = sensitivities(weights, scorer, tried, progress=progress)
    values = [found[each.matrix].predicted(each.rank) for each in candidates]
    for each, value in zip(candidates, values, strict=True):
        if not math.isfinite(value):
            raise ModelError(
                f"{each.matrix.name}: its predicted change of the margin is {value}, so the model's gradient isn't "
                "finite. Load it with --dtype float32 or bfloat16, or use --rank-by snr."
            )
    return values


def _acceptance(config: LaserConfig, candidates: int) -> Acceptance:
    if config.acceptance == "improve":
        return Improve()
    if config.acceptance == "confident":
        return Confident(config.alpha, candidates)
    return Harmless(config.tolerance, config.alpha, candidates)


def _measure(scorer: Scorer | None, name: str, progress: Progress, like: Scores | None = None) -> Scores | None:
    """The model as it is, on everything the scorer has; None where there is no scorer."""
    if scorer is None:
        return None
    everything = range(scorer.size)
    with progress.phase(name, len(my_part(everything))) as advance, counting(advance):
        return scorer.score(everything, like=like)


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


def read_pairs(pairs: PairSource | None, config: LaserConfig) -> Split:
    """The pairs that a run with this configuration uses, from whatever form they come in: to search on and held out.

    Raises ConfigError when there are none and something needs them.
    """
    if pairs is None or pairs == "":
        if config.needs_pairs:
            raise ConfigError(
                "--pairs: none were given; only --scorer perplexity goes without, and --rank-by gradient doesn't. "
                "Give --pairs FILE."
            )
        return Split(PairSet((), NO_PAIRS, {}, 0), (), (), "no pairs")
    pair_set = read_pairs_from(pairs, **config.pair_limits)
    if config.held_out:
        return split_by_set(pair_set, read_pairs_from(config.held_out, **config.pair_limits))
    return split_by_prompt(pair_set, config.held_out_fraction, config.seed)


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")
