"""Which engine writes the answers of a run: the one that was asked for, or the fastest of those that answer alike."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

from splaser_plugin.distributed import process_count
from splaser_plugin.errors import ModelError
from splaser_plugin.generation.engines import EXACT
from splaser_plugin.generation.generator import Generator
from splaser_plugin.jobs.run import Measures, Run
from splaser_plugin.scoring.scores import Scorer
from splaser_plugin.scoring.semantic import SemanticScorer
from splaser_plugin.search.journal import RecordedScorer

WARM_UP_TOKENS = 16
"""Of each answer by which engines, and costs, are measured."""


def settle_engine(run: Run, measures: Measures) -> None:
    """Have one engine write all answers of the run, and say which. A run that goes on keeps the one it began with."""
    scorer = next((found for found in map(plain_scorer, _scorers(measures)) if isinstance(found, SemanticScorer)), None)
    if scorer is None:
        return
    generator = scorer.generator
    if run.config.engine == "auto" and may_choose(generator):
        prompts = scorer.prompts[: 2 * generator.engine.at_once]
        name = run.journal.once("engine", (), lambda: fastest(generator, prompts), str, str)
        if name != generator.engine.name:
            generator.use_continuous()
    if generator.engine.name != "transformers" or run.config.engine != "auto":
        said = f"{generator.engine.name} for every answer of this run"
        run.progress.fact("engine", said + _copy(generator) + _doubt(generator))


def engine_of(measures: Measures) -> str | None:
    """The name of the engine that writes the answers; None where there are none."""
    plain = map(plain_scorer, _scorers(measures))
    return next((found.generator.engine.name for found in plain if isinstance(found, SemanticScorer)), None)


def may_choose(generator: Generator) -> bool:
    """Whether there is more than one engine to choose from. On the CPU the loop was faster: see docs/performance.md."""
    model = generator.model
    return model.device.type != "cpu" and model.dtype in EXACT and process_count() == 1


def fastest(generator: Generator, prompts: Sequence[Sequence[int]]) -> str:
    """The name of the engine that writes the first tokens of answers in the shortest time, used by nobody yet.

    prompts: token ids, more than are answered at once.
    """
    loop, other = generator.limited(WARM_UP_TOKENS), copy.copy(generator)
    try:
        other.use_continuous()
    except ModelError:
        return loop.engine.name
    other = other.limited(WARM_UP_TOKENS)
    loop_s, other_s = second_time(lambda: loop.answer(prompts)), second_time(lambda: other.answer(prompts))
    return (loop if loop_s <= other_s else other).engine.name


def second_time(work: Callable[[], object]) -> float:
    """Seconds that it takes, done again: what is slow only the first time doesn't count."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def plain_scorer(scorer: Scorer) -> Scorer:
    """Without the journal, which a warm-up is not to be written to."""
    return scorer.scorer if isinstance(scorer, RecordedScorer) else scorer


def _scorers(measures: Measures) -> list[Scorer]:
    scorers = [measures.scorer, measures.held_out, *(guard.scorer for guard in measures.guards)]
    return [scorer for scorer in scorers if scorer is not None]


def _copy(generator: Generator) -> str:
    return ", with a second copy of the weights in memory" if generator.engine.name == "vllm" else ""


def _doubt(generator: Generator) -> str:
    dtype = str(generator.model.dtype).removeprefix("torch.")
    if generator.engine.name == "transformers" or generator.model.dtype in EXACT:
        return ""
    return f"; in {dtype} another engine may answer otherwise, so that its scores can't be compared with others'"
