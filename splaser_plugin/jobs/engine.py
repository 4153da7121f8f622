"""Which engine writes the answers of a run: the one that was asked for, or the fastest of those that answer alike."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from splaser_plugin.distributed import process_count
from splaser_plugin.errors import ModelError
from splaser_plugin.generation.engines import EXACT, Engine
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.vllm import Vllm
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
    if run.config.engine == "auto" and run.llm is not None:
        try:
            generator.use_vllm(max(map(len, _prompts(measures))), llm=run.llm)
        except ModelError as error:
            run.progress.fact("engine", f"transformers, as the vLLM that is here can't be used: {error}")
    elif run.config.engine == "auto" and may_choose(generator):
        longest = max(map(len, _prompts(measures)))
        tried: dict[str, Tried] = {}

        def fastest() -> str:
            tried.update(try_engines(generator, scorer.prompts[: 2 * generator.engine.at_once], longest))
            listed = ", ".join(f"{name} {found.seconds:.1f} s" for name, found in tried.items())
            run.progress.fact("engines", f"{listed}, for the first tokens of some answers")
            return min(tried, key=lambda name: tried[name].seconds)

        name = run.journal.once("engine", (), fastest, str, str)
        if name in tried:
            generator.engine = tried[name].engine
        elif name != generator.engine.name:
            _use(generator, name, longest)
    if generator.engine.name != "transformers" or run.config.engine != "auto":
        said = f"{generator.engine.name} for every answer of this run"
        run.progress.fact("engine", said + _place(generator) + _doubt(generator))


def _prompts(measures: Measures) -> list[Sequence[int]]:
    """All that may be answered."""
    plain = map(plain_scorer, _scorers(measures))
    return [prompt for found in plain if isinstance(found, SemanticScorer) for prompt in found.prompts]


def engine_of(measures: Measures) -> str | None:
    """The name of the engine that writes the answers; None where there are none."""
    plain = map(plain_scorer, _scorers(measures))
    return next((found.generator.engine.name for found in plain if isinstance(found, SemanticScorer)), None)


def may_choose(generator: Generator) -> bool:
    """Whether there is more than one engine to choose from: not on the CPU, see docs/performance.md."""
    model = generator.model
    return model.device.type != "cpu" and model.dtype in EXACT and process_count() == 1


class Tried(NamedTuple):
    engine: Engine
    seconds: float
    """For the first tokens of some answers."""


def try_engines(generator: Generator, prompts: Sequence[Sequence[int]], longest_prompt: int) -> dict[str, Tried]:
    """Each engine that can take the model, by its name.

    prompts: token ids, more than are answered at once. longest_prompt: tokens, of all that will be asked.
    """
    found = {}
    others = ["continuous"] + ["vllm"] * (importlib.util.find_spec("vllm") is not None)
    for name in (generator.engine.name, *others):
        each = copy.copy(generator)
        try:
            if name != generator.engine.name:
                _use(each, name, longest_prompt)
        except ModelError:
            continue
        answer = partial(each.limited(WARM_UP_TOKENS).answer, prompts)
        found[name] = Tried(each.engine, second_time(answer))
    return found


def _use(generator: Generator, name: str, longest_prompt: int) -> None:
    if name == "continuous":
        generator.use_continuous()
    else:
        generator.use_vllm(longest_prompt)


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


def _place(generator: Generator) -> str:
    return f", {generator.engine.where}" if isinstance(generator.engine, Vllm) else ""


def _doubt(generator: Generator) -> str:
    dtype = str(generator.model.dtype).removeprefix("torch.")
    if generator.engine.name == "transformers" or generator.model.dtype in EXACT:
        return ""
    return f"; in {dtype} another engine may answer otherwise, so that its scores can't be compared with others'"
