"""Which engine writes the answers of a run: the one that was asked for, or the fastest of those that answer alike."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from splaser_plugin.distributed import process_count
from splaser_plugin.errors import ModelError, SplaserError
from splaser_plugin.generation import continuous
from splaser_plugin.generation.engines import EXACT, Engine
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.vllm import Vllm
from splaser_plugin.jobs.cost import WARM_UP_TOKENS, answering_s, plain_scorer, second_time
from splaser_plugin.jobs.run import Measures, Run
from splaser_plugin.progress import SILENT, Progress, duration
from splaser_plugin.scoring.scores import Scorer
from splaser_plugin.scoring.semantic import SemanticScorer

WORTH_TRYING_S = 600
"""Other engines are tried where a run's answers may take the loop that long: vLLM's start takes half a minute."""


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
    elif run.config.engine == "auto" and may_choose(generator) and _are_tried(run, measures):
        longest = max(map(len, _prompts(measures)))
        tried: dict[str, Tried] = {}

        def fastest() -> str:
            started = time.perf_counter()
            prompts = scorer.prompts[: 2 * generator.engine.at_once]
            tried.update(try_engines(generator, prompts, longest, run.progress))
            listed = ", ".join(f"{name} {found.seconds:.1f} s" for name, found in tried.items())
            took = duration(time.perf_counter() - started)
            run.progress.fact("engines", f"{listed}, for the first tokens of some answers; trying them took {took}")
            return min(tried, key=lambda name: tried[name].seconds)

        name = run.journal.once("engine", (), fastest, str, str)
        if name in tried:
            generator.use(tried.pop(name).engine)
        elif name != generator.engine.name:
            _use(generator, name, longest)
        for left in tried.values():
            _stop(left.engine)
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
    """Whether there is more than one engine to choose from."""
    return bool(installed()) and generator.model.dtype in EXACT and process_count() == 1


def installed() -> list[str]:
    """The engines beside the loop that are here."""
    here = {"continuous": continuous.is_installed(), "vllm": importlib.util.find_spec("vllm") is not None}
    return [name for name in here if here[name]]


def _are_tried(run: Run, measures: Measures) -> bool:
    """Whether engines are tried, or were by the run that goes on."""
    left = run.journal.next_left()
    return is_worth_trying(run, measures) if left is None else left == "engine"


def is_worth_trying(run: Run, measures: Measures) -> bool:
    """Whether the answers may take the loop so long that other engines are tried."""
    at_most_s = answering_s(run, measures)
    said = f"all answers may take the loop {duration(at_most_s)}"
    if at_most_s < WORTH_TRYING_S:
        run.progress.detail("engine", f"transformers, as {said}: others are tried from {duration(WORTH_TRYING_S)} on")
        return False
    run.progress.fact("engines", f"trying {' and '.join(installed())}, as {said}")
    return True


class Tried(NamedTuple):
    engine: Engine
    seconds: float
    """For the first tokens of some answers."""


def try_engines(
    generator: Generator, prompts: Sequence[Sequence[int]], longest_prompt: int, progress: Progress = SILENT
) -> dict[str, Tried]:
    """Each engine that can take the model, by its name; why another can't is told.

    prompts: token ids, more than are answered at once. longest_prompt: tokens, of all that will be asked.
    """

    def measured(each: Generator) -> Tried:
        return Tried(each.engine, second_time(partial(each.limited(WARM_UP_TOKENS).answer, prompts)))

    found = {generator.engine.name: measured(generator)}  # first: vLLM leaves traces in a process
    for name in installed():
        each = copy.copy(generator)
        try:
            _use(each, name, longest_prompt)
            found[name] = measured(each)
        except SplaserError as error:
            progress.fact("engines", f"without {name}: {error}")
            _stop(each.engine)
    return found


def _use(generator: Generator, name: str, longest_prompt: int) -> None:
    if name == "continuous":
        generator.use_continuous()
    else:
        generator.use_vllm(longest_prompt)


def _stop(engine: Engine) -> None:
    """Have an engine that isn't used give its memory back."""
    if isinstance(engine, Vllm):
        engine.stop()


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
