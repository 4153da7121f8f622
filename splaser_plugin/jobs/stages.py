"""The stages of a laser run on weights that are loaded, in the order in which `laser_weights` goes through them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from splaser_plugin.artifacts.rank_source import BudgetShare
from splaser_plugin.artifacts.recipe import Recipe, Step, versions
from splaser_plugin.config.stages import DOTTED_PATH, LaserConfig, parse_ranks
from splaser_plugin.data.pairs import pairs_sha256
from splaser_plugin.data.split import Split
from splaser_plugin.distributed import my_part
from splaser_plugin.errors import MatrixError, ModelError, RecipeError
from splaser_plugin.files.output import size
from splaser_plugin.files.sources import path_of
from splaser_plugin.jobs.cost import tell_smallest_effect
from splaser_plugin.jobs.engine import settle_engine
from splaser_plugin.jobs.materials import materials
from splaser_plugin.jobs.run import Measures, Run
from splaser_plugin.progress import SILENT, Progress, counting
from splaser_plugin.reduction.calibration import Row, answer_rows, mixed, token_count, window_rows
from splaser_plugin.reduction.measured_reducer import MeasuredReducer, measured_reducer
from splaser_plugin.reduction.moments import check_measurable
from splaser_plugin.scanning.scan import Scan, scan_source
from splaser_plugin.scoring.margin import MarginScorer
from splaser_plugin.scoring.own_scorer import code_of
from splaser_plugin.scoring.scorers import Material, Scorers
from splaser_plugin.scoring.scores import Scorer, Scores
from splaser_plugin.search.acceptance import Acceptance, Confident, Harmless, Improve
from splaser_plugin.search.budget_search import search_budgets
from splaser_plugin.search.budgets import Budget, least_removed, packed, plan_budgets, unpacked
from splaser_plugin.search.candidates import Candidate, by_prediction, by_size, choose_candidates
from splaser_plugin.search.guard import Guard
from splaser_plugin.search.journal import BASE, Journal, RecordedScorer
from splaser_plugin.search.judge import Judge
from splaser_plugin.search.prediction import check_predictable, sensitivities
from splaser_plugin.search.racing import Race
from splaser_plugin.search.search import SearchResult, search
from splaser_plugin.search.verdict import HeldOut, Verdicts, compare
from splaser_plugin.weights.factored import is_factorable
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.matrices import Matrix, overview

GRADIENT_PAIRS = 32
"""Most pairs that a prediction is made from."""


def begin(
    weights: Weights,
    tokenizer: Any,
    *,
    name: str,
    config: LaserConfig,
    journal: Journal | None = None,
    progress: Progress = SILENT,
    llm: Any = None,
) -> Run:
    """A run on these weights, wherever they live, and the facts about it. Raises ModelError when they can't be used.

    llm: a `vllm.LLM` of this process, which may be given any weights.
    """
    if config.save == "factored":
        weights.keep_factors()
    if config.orders_by_gradient:
        check_predictable(weights)
    if config.reducer != "svd":
        check_measurable(weights)
    matrices, _ = weights.matrices(config.include, config.exclude, config.towers)
    run = Run(weights, tokenizer, name, config, tuple(matrices), journal or Journal(), progress, llm)
    progress.fact("model", f"{name}: {overview(matrices)}, {size(weights.size)} in all")
    progress.fact("device", f"{weights.place}, {run.dtype}")
    for label, values in (("options", config.changes), ("versions", versions())):
        progress.detail(label, ", ".join(f"{key} {value}" for key, value in values.items()))
    if config.without_effect:
        progress.fact("has no effect", f"{', '.join(config.without_effect)}, with the other options of this run")
    return run


def prepare_measures(run: Run, split: Split) -> Measures:
    """The scorers of the run, which have tokenized and embedded what they measure on."""
    config, journal, progress = run.config, run.journal, run.progress
    everything = (*split.search, *split.held_out)
    scorers = Scorers(run.weights.model, run.tokenizer, config, run.weights, pairs=everything, llm=run.llm)
    split, searched, unseen = materials(split, scorers, config)
    if split.pairs.pairs:
        progress.fact("pairs", split.pairs.summary)
    if split.warning:
        progress.result("warning", split.warning)
    if config.reads_prompts and scorers.date:
        progress.fact("date", scorers.date)
    if searched.windows:
        progress.fact("text", f"{config.text}: {len(searched.windows)} windows of {config.window} tokens to search on")
    for name, task in searched.tasks.items():
        progress.fact("task", f"{name}: {len(task)} documents to search on, by its {task.metric}")
    progress.fact("held out", split.reason)
    kept = unseen and {"pairs": unseen.pairs, "windows": unseen.windows, "documents": unseen.tasks}[config.unit]

    def make(name: str, material: Material) -> Scorer:
        return RecordedScorer(scorers.make(name, material), journal)

    return Measures(
        split=split,
        searched=searched,
        unseen=unseen,
        scorer=make(config.scored_by, searched),
        held_out=make(config.scored_by, unseen) if unseen and kept else None,
        guards=tuple(Guard(make(name, searched), limit) for name, limit in config.guards.items()),
        predictor=_predictor(run, scorers, split) if config.orders_by_gradient else None,
        text=make("perplexity", searched) if config.judges_text else None,
        held_out_text=make("perplexity", unseen) if config.judges_text and unseen and unseen.windows else None,
        calibration=tuple(_calibration(run, scorers, searched)) if config.reducer != "svd" else (),
    )


def scan_weights(run: Run, measures: Measures) -> Scan:
    """The scan of the weights. From here on the journal holds what the results depend on."""
    config, split = run.config, measures.split
    identity = run.weights.identity()
    given = scan_of_these_weights(config, run.matrices, identity) if config.scan else None
    windows = [measures.searched.windows, measures.unseen and measures.unseen.windows]
    tasks = [part.tasks for part in (measures.searched, measures.unseen) if part and part.tasks]
    identities = [[task.identity for task in part.values()] for part in tasks]
    left = run.journal.begin(
        {
            "weights": identity,
            "pairs": pairs_sha256(split.search),
            "held_out": pairs_sha256(split.held_out),
            "scorer": code_of(config.scored_by) if DOTTED_PATH.fullmatch(config.scored_by) else "",
            "text": hashlib.sha256(repr(windows).encode()).hexdigest(),
            "settings": config.to_dict(),
            "versions": versions(),
            **({"tasks": identities} if identities else {}),
        }
    )
    settle_engine(run, measures)
    if left:
        run.progress.fact("going on", f"{left} measurements were left by a run that was stopped; none is made again")

    if given is not None:
        run.progress.fact("scan", f"{config.scan}, of these weights")
        return given

    def scanned() -> Scan:
        return scan_source(run.weights, config=config, name=run.name, identity=identity, progress=run.progress)

    return run.journal.once("scan", (), scanned, Scan.to_dict, Scan.from_dict)


def scan_of_these_weights(config: LaserConfig, matrices: Sequence[Matrix], identity: str) -> Scan:
    """The scan that `config.scan` names, of `matrices` alone and at the configuration's edge.

    Raises RecipeError when it is damaged, was made of other weights, or lacks a matrix.
    """
    stored = Scan.load(path_of(config.scan))
    if stored.weights_identity != identity:
        raise RecipeError(
            f"--scan {config.scan}: of the weights {stored.weights_identity[:12]} of {stored.model}, and these are "
            f"{identity[:12]}. Scan this model anew with splaser scan, or leave --scan out."
        )
    found = {matrix.name: matrix for matrix in stored.matrices}
    for matrix in matrices:
        if matrix.name not in found or found[matrix.name].shape != matrix.shape:
            raise RecipeError(
                f"--scan {config.scan}: it has no {matrix.name} of shape {matrix.shape}. Scan with the same --include "
                "and --exclude, or leave --scan out."
            )
    return replace(stored, edge=config.edge, matrices=tuple(found[matrix.name] for matrix in matrices))


def order_candidates(run: Run, measures: Measures, scan: Scan) -> list[Candidate]:
    """The candidates, in the order in which they are tried.

    Matrices are reduced from here on by what is measured of them, unless that is nothing (`svd`), and candidates of
    which nothing can be measured are left out. Measured are the matrices that may be tried: those of the first
    `candidates`, or all where the order is predicted from what is measured.
    Raises MatrixError when no candidate is left.
    """
    config, predictor = run.config, measures.predictor
    chosen = choose_candidates(scan, run.matrices, parse_ranks(config.ranks))
    candidates = [
        replace(candidate, is_factorable=is_factorable(run.weights.model, candidate.matrix)) for candidate in chosen
    ]
    if predictor is not None:
        run.progress.fact("ranked by", f"predicted margin, from a gradient over {predictor.size} pairs")
        candidates, reducer = _measured(run, measures, candidates, len(run.matrices))

        def predicted() -> list[float]:
            return _predictions(run, predictor, candidates, reducer)

        candidates = by_prediction(candidates, run.journal.once("predictions", (), predicted, list, list))
    if config.objective == "compress":
        candidates = by_size(candidates)
    return candidates if predictor is not None else _measured(run, measures, candidates, config.candidates)[0]


def _measured(
    run: Run, measures: Measures, candidates: Sequence[Candidate], most: int
) -> tuple[list[Candidate], MeasuredReducer | None]:
    """The candidates of which something can be measured, and what that is; the first `most` matrices are measured."""
    if run.config.reducer == "svd":
        return list(candidates), None
    in_order = list(dict.fromkeys(candidate.matrix for candidate in candidates))
    tried = set(in_order[:most])
    reducer = _reducer(run, measures, [matrix for matrix in run.matrices if matrix in tried])
    untried = len(in_order) - most
    if reducer.left_out and untried > 0:
        count, first = len(reducer.left_out), reducer.left_out[0]
        run.progress.fact(
            "left out",
            f"{count} of {most} matrices, of which nothing can be measured ({first.name}: {first.reason}); {untried} "
            f"more could be tried. Exclude the {count}, or use --candidates {most + min(count, untried)}.",
        )
    return [candidate for candidate in candidates if candidate.matrix in reducer.costs], reducer


def budgets_of(run: Run, measures: Measures) -> list[Budget]:
    """The budgets to try, from gentle to hard.

    Raises RankError when not even the gentlest can be reached, MatrixError when nothing can be measured.
    """
    config = run.config
    stored_smaller = [matrix for matrix in run.matrices if is_factorable(run.weights.model, matrix)]
    reducer = _reducer(run, measures, stored_smaller)
    entries = sum(math.prod(matrix.shape) for matrix in run.matrices)

    def planned() -> list[Budget]:
        return plan_budgets(reducer.costs, entries, config.budget, in_nats=reducer.is_in_nats)

    budgets = run.journal.once("budgets", (), planned, packed, lambda stored: unpacked(stored, run.matrices))
    if budgets[-1].parameters_removed < least_removed(config.budget, entries):
        run.progress.fact(
            "left out",
            f"budgets above {budgets[-1].name}, to which the lowest ranks of the {len(reducer.costs)} matrices that "
            "can be measured and stored as factors don't reach.",
        )
    return budgets


def _reducer(run: Run, measures: Measures, matrices: Sequence[Matrix]) -> MeasuredReducer:
    """What is known of these matrices, which from now on are reduced by it."""
    config, rows = run.config, measures.calibration
    if rows:
        run.progress.fact("measured on", f"{token_count(rows):,} tokens in {len(rows)} answers and windows")
    how: dict[str, Any] = {"way": config.reducer, "seed": config.seed, "folder": run.journal.statistics}
    reducer = measured_reducer(run.weights, matrices, rows, **how, progress=run.progress)
    for left_out in reducer.left_out:
        run.progress.detail("left out", f"{left_out.name}: {left_out.reason}")
    if matrices and not reducer.costs:
        raise MatrixError(f"none of {len(matrices)} matrices can be measured: {reducer.left_out[0].reason}.")
    run.weights.reduce_by(reducer)
    return reducer


def search_and_compare(run: Run, measures: Measures, scan: Scan) -> tuple[SearchResult, Verdicts]:
    """The search, and what its result and the base model say on what is held out."""
    config, journal, progress = run.config, run.journal, run.progress
    budgets = budgets_of(run, measures) if config.tries_budgets else []
    candidates = [] if config.tries_budgets else order_candidates(run, measures, scan)
    judge = _judge(run, measures, 0 if budgets else min(config.candidates, len(candidates)))
    with journal.measuring(f"{BASE}, held out"):
        base = measure_all(measures.held_out, "held-out base", progress)
        base_text = measure_all(measures.held_out_text, "held-out text, base", progress)
    tell_smallest_effect(base, config.unit, progress)
    if budgets:
        text = Judge(measures.text, acceptance=_acceptance(config, 0)) if measures.text else None
        found = search_budgets(run.weights, budgets, judge, text, journal=journal, progress=progress)
    else:
        found = search(run.weights, candidates, judge, limit=config.candidates, journal=journal, progress=progress)
    result, result_text = base, base_text
    if found.ranks:
        with journal.measuring("result, held out"):
            result = measure_all(measures.held_out, "held-out result", progress, like=base)
            result_text = measure_all(measures.held_out_text, "held-out text, result", progress, like=base_text)
    verdicts = Verdicts(
        _verdict(config, base, result, config.unit) if base and result else None,
        _verdict(config, base_text, result_text, "windows") if base_text and result_text else None,
    )
    return found, verdicts


def _verdict(config: LaserConfig, base: Scores, result: Scores, unit: str) -> HeldOut:
    tolerance = config.tolerance if config.acceptance == "harmless" else None
    return compare(base, result, seed=config.seed, unit=unit, tolerance=tolerance)


def make_recipe(run: Run, scan: Scan, found: SearchResult) -> Recipe:
    """How to get from the base model to the result again."""
    return Recipe(
        model=run.name,
        weights_identity=scan.weights_identity,
        dtype=run.dtype,
        steps=_steps(found),
        scores={"baseline": found.baseline.mean, "final": found.final.mean},
        config=run.config,
        versions=versions(),
    )


def _steps(found: SearchResult) -> tuple[Step, ...]:
    budget = next((trial.budget for trial in reversed(found.budgets) if trial.kept), None)
    if budget is not None:
        edge = BudgetShare(budget.share)
        return tuple(Step(matrix.name, rank, edge, None, matrix.shape) for matrix, rank in budget.ranks.items())
    return tuple(Step(kept.matrix.name, kept.rank, kept.edge, kept.threshold, kept.matrix.shape) for kept in found.kept)


def _calibration(run: Run, scorers: Scorers, searched: Material) -> list[Row]:
    """What is searched on, and never what is held out: prompts with their chosen answers, and windows of text."""
    answers: list[Row] = []
    if searched.pairs:
        asked = MarginScorer(run.weights.model, scorers.prompter, searched.pairs, batch_size=scorers.batch_size)
        answers = answer_rows(asked.prompts, [answer[0] for answer in asked.answers])
    return mixed(answers, window_rows(searched.windows), run.config.calibration_tokens)


def _predictor(run: Run, scorers: Scorers, split: Split) -> MarginScorer:
    return MarginScorer(
        run.weights.model, scorers.prompter, split.search[:GRADIENT_PAIRS], batch_size=scorers.batch_size
    )


def _predictions(
    run: Run, scorer: MarginScorer, candidates: Sequence[Candidate], reducer: MeasuredReducer | None
) -> list[float]:
    """What each candidate is predicted to do to the margin. Raises ModelError when the gradient isn't finite."""
    reducible = {candidate.matrix for candidate in candidates}
    tried = [matrix for matrix in run.matrices if matrix in reducible]
    found = sensitivities(run.weights, scorer, tried, reducer=reducer, progress=run.progress)
    values = [found[candidate.matrix].predicted(candidate.rank) for candidate in candidates]
    for candidate, value in zip(candidates, values, strict=True):
        if not math.isfinite(value):
            raise ModelError(
                f"{candidate.matrix.name}: its predicted change of the margin is {value}, so the model's gradient "
                "isn't finite. Load it with --dtype float32 or bfloat16, or use --rank-by snr."
            )
    return values


def _judge(run: Run, measures: Measures, candidates: int) -> Judge:
    """candidates: how many are tried at most."""
    config, size = run.config, measures.scorer.size
    acceptance = _acceptance(config, candidates)
    if isinstance(acceptance, Harmless):
        unseen = 100 * acceptance.unseen_share(size)
        run.progress.fact(
            "harmless", f"a loss on up to {unseen:.0f} % of all {config.unit} can go unseen on {size} of them"
        )
    return Judge(
        measures.scorer,
        acceptance=acceptance,
        race=Race(size, seed=config.seed) if config.race else None,
        guards=measures.guards,
    )


def _acceptance(config: LaserConfig, candidates: int) -> Acceptance:
    if config.acceptance == "improve":
        return Improve()
    if config.acceptance == "confident":
        return Confident(config.alpha, candidates)
    return Harmless(config.tolerance, config.alpha, candidates)


def measure_all(scorer: Scorer | None, name: str, progress: Progress, like: Scores | None = None) -> Scores | None:
    """The model as it is, on everything the scorer has; None where there is no scorer."""
    if scorer is None:
        return None
    everything = range(scorer.size)
    with progress.phase(name, len(my_part(everything))) as advance, counting(advance):
        return scorer.score(everything, like=like)
