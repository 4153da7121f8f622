"""The job of `splaser laser`, as the command line and Python callers run it."""

from __future__ import annotations

import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from splaser_plugin.config.stages import LaserConfig
from splaser_plugin.data.pairs import PairSet, PairSource, read_pairs_from
from splaser_plugin.data.split import Split, split_by_prompt, split_by_set
from splaser_plugin.distributed import in_main, meet
from splaser_plugin.errors import ConfigError, ModelError
from splaser_plugin.files.output import check_output, check_space
from splaser_plugin.files.sources import path_of
from splaser_plugin.jobs.cost import Cost, check_room, cost_of, tell_cost, tell_smallest_effect
from splaser_plugin.jobs.engine import engine_of
from splaser_plugin.jobs.result import NO_PAIRS, LaserResult
from splaser_plugin.jobs.stages import (
    Measures,
    Run,
    begin,
    make_recipe,
    measure_all,
    prepare_measures,
    scan_weights,
    search_and_compare,
)
from splaser_plugin.progress import SILENT, Progress, default_progress
from splaser_plugin.scanning.records import Scan
from splaser_plugin.scoring.scorers import check_scorers, limits_of
from splaser_plugin.scoring.semantic import References, SemanticScorer
from splaser_plugin.search.journal import Journal, LaserJournal, RecordedScorer
from splaser_plugin.search.search import SearchResult
from splaser_plugin.search.verdict import Verdicts
from splaser_plugin.weights.adapted import weights_of
from splaser_plugin.weights.devices import pick_device
from splaser_plugin.weights.in_memory import Weights, check_generates, model_name
from splaser_plugin.weights.loading import context_length, load_model, load_tokenizer, stored_context
from splaser_plugin.weights.model_source import find_model
from splaser_plugin.weights.rest import rest_of
from splaser_plugin.weights.wrapped import unwrapped
from splaser_plugin.weights.zero import check_engine, masters_following, whole_where_it_fits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LaserResult", "laser", "laser_weights", "read_pairs"]


def laser(
    model: str | Path | nn.Module,
    pairs: PairSource | None = None,
    *,
    config: LaserConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    write_unchanged: bool = False,
    progress: Progress | None = None,
) -> LaserResult:
    """Reduce the noisiest matrices of a model wherever that makes its answers better.

    Under several processes all have to call this. Whatever is raised once the search has begun leaves the kept changes
    and no undecided one.

    Args:
        model: A folder, .gguf file or hub id, or a loaded causal language model, which is changed in place; DDP,
            DataParallel, a compiler or PEFT may have wrapped it.
        pairs: A file or data set name (see `load_pairs`), a PairSet, or rows in any format that `load_pairs` reads;
            needed by every scorer but perplexity and lm-eval:TASK.
        config: What is measured, and the search.
        tokenizer: Needed only with a loaded model.
        output: Folder to write, as `LaserResult.save` does, but without a model that would be a copy of the base, as it
            is stored. What was found is kept in its journal.jsonl until then, so that after a crash the same call goes
            on where it stopped.
        overwrite: Replace the output of an earlier run, and throw away a journal of other settings.
        write_unchanged: Write that copy of the base.
        progress: What is told of the work: as bars in a notebook and not at all elsewhere, if not given.

    Returns:
        The lasered model with what was tried, kept and found on held-out pairs.

    Raises:
        SplaserError: Something can't be used; before any weight is changed.
    """
    meet("laser()")
    config = config or LaserConfig()
    progress = progress or default_progress()
    check_engine(model)
    path = None if output is None else _checked(output, model, pairs, config, overwrite)
    kept = nullcontext(Journal()) if path is None else closing(LaserJournal(path, anew=overwrite))
    with kept as journal, masters_following(model), whole_where_it_fits(model):
        result = _laser(*_begin(model, pairs, config, tokenizer, journal, path, progress))
        if path is not None:
            result.save_held(path, with_model=write_unchanged or not result.is_copy)
    return result


def plan(
    model: str | Path | nn.Module,
    pairs: PairSource | None = None,
    *,
    config: LaserConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Cost:
    """What `laser` with the same arguments will cost at most; nothing is searched, changed or written.

    The held-out pairs are measured, to say on `progress` how small a change of the mean they can show.
    Raises what `laser` raises before it begins.
    """
    config, progress = config or LaserConfig(), progress or default_progress()
    check_engine(model)
    path = None if output is None else _checked(output, model, pairs, config, overwrite)
    run, measures = _begin(model, pairs, config, tokenizer, Journal(), path, progress)
    cost = cost_of(run, measures)
    cost.tell(progress)
    tell_smallest_effect(measure_all(measures.held_out, "held-out base", progress), config.unit, progress)
    return cost


def _checked(output: str | Path, model: Any, pairs: PairSource | None, config: LaserConfig, overwrite: bool) -> Path:
    named = (model, pairs, config.held_out, config.text, config.adapter, config.embedder)
    given = tuple(place for place in named if isinstance(place, (str, Path)) and str(place))
    return check_output(output, overwrite=overwrite, inputs=given, goes_on=True)


def _begin(
    model: Any,
    pairs: PairSource | None,
    config: LaserConfig,
    tokenizer: Any,
    journal: Journal,
    output: Path | None,
    progress: Progress,
) -> tuple[Run, Measures]:
    """The run on a model that is loaded now, if it wasn't, once all that can be refused before was looked at."""
    if pairs is None or isinstance(pairs, (str, Path)):
        read_pairs(pairs, config)  # what is wrong with a file is said before a model is downloaded
    name, source, context = str(model), None, None
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ModelError("a loaded model was given without its tokenizer. Pass tokenizer=...")
        if config.adapter:
            raise ConfigError(
                "--adapter is for a folder's model. Give PeftModel.from_pretrained(model, adapter) instead."
            )
        model = unwrapped(model)
        check_generates(model)
        name, context = model_name(model), context_length(model)
    else:
        source = find_model(model, allow_pickle=config.allow_pickle)
        pick_device(config.device)
    check_scorers(config)
    if config.scan:
        Scan.load(path_of(config.scan))
    if source is not None and pairs is not None:
        tokenizer, context = load_tokenizer(source, config.adapter), stored_context(source)
    split = read_pairs(pairs, config, tokenizer, context)
    if source is not None:
        stored = source.weight_bytes
        if output is not None and config.dtype == "auto":
            in_main(lambda: check_space(output, stored))
        with progress.phase("loading", 1):
            model, tokenizer = load_model(
                source,
                **config.place,
                dtype=config.dtype,
                adapter=config.adapter,
                allow_pickle=config.allow_pickle,
            )
            check_generates(model)
    weights = weights_of(model, rest=rest_of(source, model) if source is not None else None)
    if source is not None:
        if source.quantised:
            progress.fact("weights", source.dequantised_note(model.dtype))
        if weights.rest is not None and weights.rest.note:
            progress.fact("kept as they are", weights.rest.note)
    run = begin(weights, tokenizer, name=name, config=config, journal=journal, progress=progress)
    check_room(run, output)
    return run, prepare_measures(run, split)


def laser_weights(
    weights: Weights,
    tokenizer: Any,
    split: Split,
    *,
    config: LaserConfig,
    name: str,
    journal: Journal | None = None,
    progress: Progress = SILENT,
    llm: Any = None,
) -> LaserResult:
    """The job of `laser` on weights that are loaded already, wherever they live.

    name: how the model is called. llm: a `vllm.LLM` of this process, which may be given any weights.
    """
    with masters_following(weights.model), whole_where_it_fits(weights.model):
        run = begin(weights, tokenizer, name=name, config=config, journal=journal, progress=progress, llm=llm)
        check_room(run, None)
        return _laser(run, prepare_measures(run, split))


def _laser(run: Run, measures: Measures) -> LaserResult:
    progress = run.progress
    references = _references(measures)
    if references is not None and references.warning:
        progress.result("warning", references.warning)
    tell_cost(run, measures)
    scan = scan_weights(run, measures)
    found, verdicts = search_and_compare(run, measures, scan)
    _tell(run, found, verdicts)
    recipe = make_recipe(run, scan, found)
    return LaserResult(
        run.weights,
        run.tokenizer,
        scan,
        recipe,
        found,
        measures.split,
        verdicts.scored,
        verdicts.text,
        references,
        time.monotonic() - run.began,
        engine_of(measures),
    )


def _tell(run: Run, found: SearchResult, verdicts: Verdicts) -> None:
    progress = run.progress
    if found.budgets:
        removed = f"{found.kept_budget}: {found.parameters_removed:,} parameters removed"
        progress.result("kept", removed if found.kept_budget else "no budget")
    else:
        progress.result("kept", f"{len(found.kept)} of {len(found.trials)} candidates")
    score = f"{found.baseline.mean:+.4f} before, {found.final.mean:+.4f} after"
    progress.result("score", f"{score}, on the {run.config.unit} searched on")
    for label, verdict in (("held out", verdicts.scored), ("held-out text", verdicts.text)):
        if verdict is not None:
            progress.result(label, verdict.summary)
            progress.result("verdict", "; ".join(filter(None, (verdict.verdict, verdict.loss_verdict))))


def _references(measures: Measures) -> References | None:
    """What the embedder sees of all reference answers; None where none are embedded."""
    scorers = [measures.scorer, measures.held_out]
    scorers += [guard.scorer for guard in measures.guards if guard.name != measures.scorer.name]
    plain = [scorer.scorer for scorer in scorers if isinstance(scorer, RecordedScorer)]
    seen = [scorer.references for scorer in plain if isinstance(scorer, SemanticScorer)]
    return sum(seen[1:], seen[0]) if seen else None


def read_pairs(
    pairs: PairSource | None, config: LaserConfig, tokenizer: Any = None, context: int | None = None
) -> Split:
    """The pairs that a run with this configuration uses, from whatever form they come in: to search on and held out.

    tokenizer: of the model, which says how long they are; None takes them at any length. context: the model's longest
    input in tokens; None where it has no limit.
    Raises ConfigError when there are none and something needs them.
    """
    if pairs is None or pairs == "":
        if config.needs_pairs:
            raise ConfigError(
                "--pairs: none were given; only --scorer perplexity and lm-eval:TASK go without, and not with "
                "--rank-by gradient, a guard on pairs, or a --reduce that has no --text. Give --pairs FILE."
            )
        return Split(PairSet((), NO_PAIRS, {}, 0), (), (), "no pairs")
    limits = None
    if tokenizer is not None:
        reads_prompts = config.reads_prompts or config.reducer != "svd"
        limits = limits_of(config, tokenizer, context, reads_prompts=reads_prompts)
    pair_set = read_pairs_from(pairs, config, limits)
    if config.held_out:
        return split_by_set(pair_set, read_pairs_from(config.held_out, config, limits))
    return split_by_prompt(pair_set, config.held_out_fraction, config.seed)
