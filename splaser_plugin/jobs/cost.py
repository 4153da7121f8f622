"""What a laser run will cost, said before it begins, and how small a change its held-out items can show."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from splaser_plugin.config.stages import parse_ranks
from splaser_plugin.distributed import in_main, my_part, process_count
from splaser_plugin.errors import ScoreError
from splaser_plugin.files.output import check_space, is_same_disk, size
from splaser_plugin.generation.kv_cache import roomy_cache
from splaser_plugin.jobs.run import Measures, Run
from splaser_plugin.progress import SILENT, Progress, duration
from splaser_plugin.reduction.measured_reducer import stored_bytes
from splaser_plugin.scoring.own_scorer import CallableScorer
from splaser_plugin.scoring.scores import Scorer, Scores
from splaser_plugin.scoring.semantic import SemanticScorer
from splaser_plugin.search.budgets import shares
from splaser_plugin.search.journal import RecordedScorer
from splaser_plugin.search.racing import Race
from splaser_plugin.statistics import POWER, RISK, pairs_needed, smallest_difference
from splaser_plugin.weights.factored import is_factorable

WARM_UP_TOKENS = 16
"""Of each answer by which engines, and costs, are measured."""
SMALL_CHANGE = 0.01
"""Of the mean score, for which the number of held-out items that would show it is said."""


@dataclass(frozen=True)
class Cost:
    """The most that a laser run does. The race and answers that end early make it less, often much less."""

    candidates: int
    """Or budgets."""
    scored_items: int
    """Pairs, and windows of text, each as often as it is scored."""
    generated_tokens: int
    measuring_s: float | None
    """All of that at the speed of a short warm-up; without the scan, and without what a reduction is measured on.
    None where it can't be told: with a scorer function of the user's own, and where the model can't be scored."""
    memory_bytes: int | None
    """The highest so far: of the accelerator, or of this process. None where the system doesn't tell."""
    cache_bytes: int
    """More than that for keys and values of the longest answers; 0 where nothing is generated."""
    output_bytes: int
    """Of the model, if anything is kept; less as factors."""
    statistics_bytes: int
    """On disk until the end, for what a reduction is measured by; 0 for `svd`."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tell(self, progress: Progress) -> None:
        """Say it to people."""
        parts = [f"{self.candidates} candidates", f"{self.scored_items:,} items scored"]
        if self.generated_tokens:
            parts.append(f"{self.generated_tokens:,} tokens generated")
        if self.measuring_s is not None:
            parts.append(f"{duration(self.measuring_s)} by a short warm-up")
        progress.fact("at most", ", ".join(parts))
        if self.memory_bytes is not None:
            more = f", and {size(self.cache_bytes)} more for the longest answers" if self.cache_bytes else ""
            progress.fact("memory", f"{size(self.memory_bytes)} so far{more}")
        output = f"{size(self.output_bytes)} if anything is kept, else only the results"
        if self.statistics_bytes:
            output += f"; {size(self.statistics_bytes)} more for statistics until the end"
        progress.fact("output", output)


def cost_of(run: Run, measures: Measures) -> Cost:
    """The most that the run will cost, with the time that a short warm-up says."""
    config, candidates, passes = run.config, _candidates(run), _passes(run, measures)
    seconds: float | None = 0.0
    with run.progress.phase("warm-up", 1):
        for scorer, count in passes:
            one_pass = _pass_s(scorer, _parts(run, measures, scorer))
            seconds = None if seconds is None or one_pass is None else seconds + count * one_pass
    answers = sum(count * scorer.size for scorer, count in passes if isinstance(scorer, SemanticScorer))
    return Cost(
        candidates=candidates,
        scored_items=sum(count * scorer.size for scorer, count in passes),
        generated_tokens=answers * config.max_new_tokens,
        measuring_s=seconds,
        memory_bytes=_memory(next(iter(run.weights.parameters.values())).device),
        cache_bytes=max((_cache_bytes(scorer) for scorer, _ in passes), default=0),
        output_bytes=run.weights.size,
        statistics_bytes=statistics_bytes(run),
    )


def answering_s(run: Run, measures: Measures) -> float:
    """The most seconds that this process takes for all answers of the run, by a short warm-up."""
    answering = [found for found in _passes(run, measures) if isinstance(found[0], SemanticScorer)]
    return sum(count * (_pass_s(scorer, _parts(run, measures, scorer)) or 0.0) for scorer, count in answering)


def _candidates(run: Run) -> int:
    """The most candidates, or budgets, that are tried."""
    config = run.config
    if config.tries_budgets:
        return len(shares(config.budget))
    return min(config.candidates, len(run.matrices) * max(1, len(parse_ranks(config.ranks))))


def _passes(run: Run, measures: Measures) -> list[tuple[Scorer, int]]:
    """Each scorer, and how often it scores all it has at most."""
    searched = [measures.scorer, *(guard.scorer for guard in measures.guards), measures.text]
    unseen = [measures.held_out, measures.held_out_text]
    passes = [(plain_scorer(scorer), 1 + _candidates(run)) for scorer in searched if scorer is not None]
    return passes + [(plain_scorer(scorer), 2) for scorer in unseen if scorer is not None]


def _parts(run: Run, measures: Measures, scorer: Scorer) -> Sequence[Sequence[int]]:
    """The items of a scorer as they are scored together."""
    if run.config.race and scorer is plain_scorer(measures.scorer):
        return Race(scorer.size, seed=run.config.seed).parts
    return [range(scorer.size)]


def statistics_bytes(run: Run) -> int:
    """The most that all processes keep on disk, until the run ends, of what its reduction is measured by."""
    config, weights = run.config, run.weights
    if config.reducer == "svd":
        return 0
    sizes = [
        stored_bytes(matrix, weights.parameters[matrix.parameter].dtype)
        for matrix in run.matrices
        if not config.tries_budgets or is_factorable(weights.model, matrix)
    ]
    if not config.tries_budgets and not config.orders_by_gradient:
        sizes = sorted(sizes)[-config.candidates :]
    return process_count() * sum(sizes)


def check_room(run: Run, output: Path | None) -> None:
    """Raise OutputError unless there is room for the model and the statistics, for these alone without an output."""
    needed, kept = statistics_bytes(run), run.journal.statistics
    if output is not None:
        left = sum(file.stat().st_size for file in kept.parent.rglob("*.safetensors")) if kept else 0
        in_main(lambda: check_space(output, run.weights.size + max(0, needed - left)))
    elif needed:
        mend = "Make room there, or set TMPDIR to a folder that has some."
        in_main(lambda: check_space(Path(tempfile.gettempdir()), needed, mend))


def check_rooms(run: Run, folder: Path) -> None:
    """Raise OutputError unless there is room for the statistics, which stay with the temporary files until the end, and
    for the model, which will be saved in the folder.
    """
    check_room(run, None)
    shared = statistics_bytes(run) if is_same_disk(folder, Path(tempfile.gettempdir())) else 0
    in_main(lambda: check_space(folder, run.weights.size + shared))


def tell_cost(run: Run, measures: Measures) -> None:
    """Say what the run will cost, where somebody listens."""
    if run.progress is not SILENT or process_count() > 1:
        cost_of(run, measures).tell(run.progress)


def smallest_effect(base: Scores) -> tuple[float, float]:
    """The smallest change of the mean that these held-out items are likely to show, and the spread it is made from.

    See `statistics.smallest_difference`. The differences between result and base are not known yet. Their standard
    deviation is s sqrt(2 (1 - r)), with s that of the base's scores and r their correlation with the result's, and s
    itself is taken, as for r = 1/2: a result that changes few answers has a smaller one.
    """
    spread = float(np.std(base.values, ddof=1))
    return smallest_difference(spread, len(base.items)), spread


def tell_smallest_effect(base: Scores | None, unit: str, progress: Progress) -> None:
    """Say how small a change of the mean the held-out items can show."""
    if base is None or len(base.items) < 2:
        return
    smallest, spread = smallest_effect(base)
    if not spread:
        return
    needed = pairs_needed(spread, SMALL_CHANGE)
    progress.fact(
        "can show",
        f"a change of the mean by {smallest:.4f} or more, on {len(base.items)} held-out {unit} of standard deviation "
        f"{spread:.4f} (two-sided t test at {RISK:g}, power {POWER:g}, if base and result correlate by 0.5); "
        f"{SMALL_CHANGE:g} would take {needed:,} of them",
    )


def second_time(work: Callable[[], object]) -> float:
    """Seconds that it takes, done again: what is slow only the first time doesn't count."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def plain_scorer(scorer: Scorer) -> Scorer:
    """Without the journal, which a warm-up is not to be written to."""
    return scorer.scorer if isinstance(scorer, RecordedScorer) else scorer


def _pass_s(scorer: Scorer, parts: Sequence[Sequence[int]]) -> float | None:
    """Seconds that this process takes at most for all items once. parts: as they are scored together."""
    if isinstance(scorer, CallableScorer):
        return None
    try:
        if isinstance(scorer, SemanticScorer):
            at_once, batch_s = _answering(scorer)
            return sum(math.ceil(len(my_part(part)) / at_once) for part in parts) * batch_s
        items = range(min(scorer.size, getattr(scorer, "batch_size", 1) * process_count()))
        return scorer.size / len(items) * second_time(lambda: scorer.score(items))
    except ScoreError:
        return None


def _answering(scorer: SemanticScorer) -> tuple[int, float]:
    """How many prompts are answered at once, and the seconds which that takes if one answer has the full length."""
    generator = scorer.generator
    at_once = min(generator.engine.at_once, scorer.size)
    prompts = sorted(scorer.prompts, key=len, reverse=True)[:at_once]

    def answered(tokens: int) -> tuple[float, int]:
        warming = generator.limited(tokens)
        lengths: list[int] = []
        seconds = second_time(lambda: lengths.append(max(len(answer.tokens) for answer in warming.answer(prompts))))
        return seconds, lengths[-1]

    first_s, _ = answered(1)
    more_s, length = answered(1 + WARM_UP_TOKENS)
    a_token_s = max(0.0, more_s - first_s) / max(1, length - 1)
    return at_once, first_s + (generator.max_new_tokens - 1) * a_token_s


def _cache_bytes(scorer: Scorer) -> int:
    """Of keys and values of a batch of the longest answers; 0 where the model keeps something else."""
    if not isinstance(scorer, SemanticScorer) or roomy_cache(scorer.generator.model) is None:
        return 0
    config = scorer.generator.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_size
    length = max(map(len, scorer.prompts)) + scorer.generator.max_new_tokens
    at_once = min(scorer.generator.engine.at_once, scorer.size)
    element = next(scorer.generator.model.parameters()).element_size()
    return int(at_once * length * kept * element)


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
