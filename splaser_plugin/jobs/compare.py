"""Models side by side on the same pairs, text and tasks, each against the first."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from splaser_plugin.config.stages import CompareConfig
from splaser_plugin.config.tasks import LM_EVAL, parse_tasks
from splaser_plugin.data.limits import TokenLimits
from splaser_plugin.data.pairs import Message, PairSet, PairSource, read_pairs_from
from splaser_plugin.data.split import LEAST
from splaser_plugin.errors import ConfigError, ModelError, PairsError, TaskError
from splaser_plugin.files.json import write_json
from splaser_plugin.files.output import check_file
from splaser_plugin.progress import Progress, counting, default_progress
from splaser_plugin.scoring.margin import MarginScorer
from splaser_plugin.scoring.perplexity import exp, perplexity
from splaser_plugin.scoring.scorers import Material, Scorers, check_scorers, limits_of
from splaser_plugin.scoring.scores import Scores
from splaser_plugin.scoring.semantic import SemanticScorer
from splaser_plugin.scoring.tasks import Documents, Values, load_tasks
from splaser_plugin.statistics import RISK, can_reach, paired_bootstrap
from splaser_plugin.tables import Table
from splaser_plugin.weights.devices import pick_device
from splaser_plugin.weights.in_memory import check_generates
from splaser_plugin.weights.loading import load_model, load_tokenizer, stored_context
from splaser_plugin.weights.model_source import ModelSource, find_model

SCHEMA = "splaser.comparison/1"
OTHER_TOKENS = "its tokenizer cuts texts otherwise than the first model's, so figures a token can't be compared"

FEW = f"expected at least {LEAST} for an interval"
UNBOUNDED = "too large for a number: the model gives the text no probability to speak of"
UNDEFINED = "the task gives no finite number"
WHOLE = "of all documents together, so there are no differences of single ones"
NO_PAIRS = PairSet((), "none", {}, 0)


@dataclass(frozen=True)
class ComparedModel:
    """What one model was measured to be."""

    model: str
    semantic: Scores | None
    """None, as is the margin, without pairs."""
    margin: Scores | None
    likelier: Scores
    """1 for each pair whose chosen answer is likelier a token than its rejected one, else 0; pairs without a rejected
    one are left out."""
    text: Scores | None
    """Mean log-probability of each window; None without a text."""
    parameters: int
    file_bytes: int
    """Of the files that hold the weights."""
    generation_s: float
    """Time that the answers took."""
    tokens: tuple[Any, ...]
    """Token ids of all reference answers and windows: equal for models that can be compared token by token."""
    tasks: Mapping[str, list[Values]] = field(default_factory=dict)
    """Task to what its metrics give for each of its documents."""

    @property
    def generated_tokens(self) -> int:
        return self.semantic.generated_tokens if self.semantic else 0

    @property
    def tokens_per_s(self) -> float:
        return self.generated_tokens / self.generation_s


@dataclass(frozen=True)
class Figure:
    """One metric of one model."""

    value: float | int | None
    """None where it is too large for a number."""
    change: float | None = None
    """Against the first model; see RATIOS."""
    interval: tuple[float, float] | None = None
    """95 % interval of the change, by paired bootstrap over pairs, windows or documents; None where nothing is sampled
    or too few differ."""
    reason: str | None = None
    """Why there is no value, no change, or no interval."""


RATIOS = ("perplexity", "tokens_per_s")
"""Metrics whose change is a ratio; that of the others is a difference."""


@dataclass(frozen=True)
class Comparison(Table):
    """Models measured on the same items."""

    models: tuple[ComparedModel, ...]
    pairs: PairSet
    config: CompareConfig
    tasks: tuple[Documents, ...] = ()

    def figures(self) -> list[dict[str, Figure]]:
        """Of each model, metric to figure: of what was measured. A task's metric is `lm-eval:TASK:METRIC`."""
        return [self._figures(model) for model in self.models]

    def __repr__(self) -> str:
        names = ", ".join(repr(model.model) for model in self.models)
        return f"Comparison({names}; {len(self.pairs)} pairs)"

    def rows(self) -> list[dict[str, Any]]:
        """One of each model: its figures, and the change of each against the first."""
        rows = []
        for model, figures in zip(self.models, self.figures(), strict=True):
            row: dict[str, Any] = {"model": model.model}
            for name, figure in figures.items():
                row |= {name: figure.value, f"{name} change": figure.change, f"{name} interval": figure.interval}
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in the file."""
        return {
            "schema": SCHEMA,
            "pairs": {"source": self.pairs.source, "used": len(self.pairs), "dropped": dict(self.pairs.dropped)},
            "windows": len(self.models[0].text.items) if self.models[0].text else 0,
            "tasks": {task.name: {"used": len(task), "available": task.available} for task in self.tasks},
            "settings": self.config.to_dict(),
            "models": [
                {
                    "model": model.model,
                    "figures": {name: _plain(name, figure) for name, figure in figures.items()},
                    "per_pair": {"semantic": _values(model.semantic), "margin": _values(model.margin)},
                    "per_window": _values(model.text),
                    "per_document": {task.name: task.by_mean(model.tasks[task.name]) for task in self.tasks},
                    "answers": [answer.text for answer in model.semantic.answers] if model.semantic else [],
                    "generated_tokens": model.generated_tokens,
                    "half_read_answers": model.semantic.half_read_answers if model.semantic else 0,
                }
                for model, figures in zip(self.models, self.figures(), strict=True)
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write the comparison as JSON, whole or not at all.

        Raises:
            OutputError: It can't be written.
        """
        write_json(path, self.to_dict())

    def _figures(self, model: ComparedModel) -> dict[str, Figure]:
        first = self.models[0]
        is_first, same_tokens = model is first, model.tokens == first.tokens
        found = {}
        if model.semantic and first.semantic:
            found["semantic"] = self._mean(model.semantic, first.semantic, is_first)
        if model.margin and first.margin:
            found["margin"] = self._mean(model.margin, first.margin, is_first, same_tokens)
        if model.likelier.items:
            found["likelier"] = self._mean(model.likelier, first.likelier, is_first)
        if model.text and first.text:
            found["perplexity"] = self._perplexity(model.text, first.text, is_first, same_tokens)
        for task in self.tasks:
            found |= self._of_task(task, model, first)
        for name in ("parameters", "file_bytes"):
            value = getattr(model, name)
            change = None if is_first else value - getattr(first, name)
            found[name] = Figure(value, change, reason=None if is_first else "counted, not sampled")
        if model.semantic:
            ratio = None if is_first or not first.generated_tokens else model.tokens_per_s / first.tokens_per_s
            found["tokens_per_s"] = Figure(model.tokens_per_s, ratio, reason="one timing, in this run")
        return found

    def _of_task(self, task: Documents, model: ComparedModel, first: ComparedModel) -> dict[str, Figure]:
        is_first, values, base = model is first, model.tasks[task.name], first.tasks[task.name]
        means, base_means = task.by_mean(values), task.by_mean(base)
        found = {name: self._mean(_scores(means[name]), _scores(base_means[name]), is_first) for name in means}
        for name in values[0].keys() - means.keys():
            value, other = task.overall(name, values), task.overall(name, base)
            change = None if is_first or value is None or other is None else value - other
            found[name] = Figure(value, change, reason=UNDEFINED if value is None else WHOLE)
        return {f"{LM_EVAL}{task.name}:{name}": found[name] for name in values[0]}

    def _mean(self, scores: Scores, first: Scores, is_first: bool, comparable: bool = True) -> Figure:
        if is_first or not comparable:
            return Figure(scores.mean, reason=None if comparable else OTHER_TOKENS)
        differences = scores.differences(first)
        change = float(np.mean(differences))
        if not can_reach(differences, RISK / 2):
            differing = int(np.count_nonzero(differences))
            return Figure(scores.mean, change, reason=f"{differing} of {len(differences)} differ, {FEW}")
        return Figure(scores.mean, change, paired_bootstrap(differences, risk=RISK, seed=self.config.seed))

    def _perplexity(self, scores: Scores, first: Scores, is_first: bool, comparable: bool) -> Figure:
        """The ratio of two perplexities is exp of a mean difference, and so are the ends of its interval."""
        mean = self._mean(scores, first, is_first, comparable)
        if mean.change is None:
            return Figure(perplexity(scores), reason=_why(perplexity(scores)) or mean.reason)
        change, interval = exp(-mean.change), None
        if mean.interval is not None:
            low, high = exp(-mean.interval[1]), exp(-mean.interval[0])
            interval = (low, high) if low is not None and high is not None else None
        reason = _why(perplexity(scores), change) or mean.reason
        return Figure(perplexity(scores), change, interval, reason or (None if interval else UNBOUNDED))


def _scores(values: Sequence[float]) -> Scores:
    return Scores(tuple(range(len(values))), tuple(values))


def _values(scores: Scores | None) -> list[float]:
    return list(scores.values) if scores else []


def _why(*values: float | None) -> str | None:
    """Why one of these isn't there."""
    return UNBOUNDED if None in values else None


def compare(
    models: Sequence[str | Path],
    pairs: PairSource | None = None,
    *,
    config: CompareConfig | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure models on the same pairs and, if the configuration names them, the same text and tasks.

    Args:
        models: Folders, .gguf files or hub ids, the first the base; loaded one after the other, never two at once.
        pairs: See `laser`; at least 2, limited in the first model's tokens and by every model's context. None where a
            text or tasks are enough.
        config: What is measured.
        output: JSON file to write, as `Comparison.save` does.
        progress: What is told of the work: as bars in a notebook and not at all elsewhere, if not given.

    Returns:
        What was measured of each model, item by item.

    Raises:
        SplaserError: Before the first model is loaded, when any of it isn't there; later when one can't be measured.
    """
    config, progress = config or CompareConfig(), progress or default_progress()
    if output is not None:
        check_file(output, replaceable=SCHEMA)
    if not models:
        raise ConfigError("no model was given. Name at least one, the one to compare the others with first.")
    sources = [find_model(model, allow_pickle=config.allow_pickle) for model in models]
    pair_set = _read_pairs(pairs, config, sources)
    pick_device(config.device)
    check_scorers(config, pairs=bool(pair_set.pairs))
    tasks = tuple(load_tasks(parse_tasks(config.tasks), config.tasks_path, count=config.samples))
    if pair_set.pairs:
        progress.fact("pairs", pair_set.summary)
    if pair_set.warning:
        progress.result("warning", pair_set.warning)
    for task in tasks:
        progress.fact("task", task.summary)
    measured: list[ComparedModel] = []
    for source in sources:
        measured.append(_measure(source, pair_set, tasks, config, measured[0] if measured else None, progress))
        gc.collect()
    found = Comparison(tuple(measured), pair_set, config, tasks)
    if output is not None:
        found.save(output)
    return found


def _read_pairs(pairs: PairSource | None, config: CompareConfig, sources: Sequence[ModelSource]) -> PairSet:
    if pairs is None or pairs == "":
        if not config.text and not parse_tasks(config.tasks):
            raise ConfigError("nothing to measure the models with. Give --pairs FILE, --text FILE or --tasks NAME.")
        return NO_PAIRS
    pair_set = read_pairs_from(pairs, config, _limits(config, sources))
    if len(pair_set) < 2:
        raise PairsError(f"{pair_set.source}: 1 pair, expected at least 2 for an interval. Give --pairs more of them.")
    return pair_set


def _limits(config: CompareConfig, sources: Sequence[ModelSource]) -> TokenLimits:
    """How long the pairs may be: in the first model's tokens, and as every model's context has room for them."""
    limits = []
    for source in sources:
        with _named(source):
            limits.append(limits_of(config, load_tokenizer(source), stored_context(source), reads_prompts=True))

    def fits(turns: Sequence[Message]) -> bool:
        for source, its_limits in zip(sources, limits, strict=True):
            with _named(source):
                if its_limits.is_beyond_context(turns):
                    return False
        return True

    return replace(limits[0], fits=fits)


@contextmanager
def _named(source: ModelSource) -> Iterator[None]:
    """Inside, what is wrong with a chat template is told with the model whose it is."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{source.name}: {error}") from error


def _measure(
    source: ModelSource,
    pairs: PairSet,
    tasks: Sequence[Documents],
    config: CompareConfig,
    first: ComparedModel | None,
    progress: Progress,
) -> ComparedModel:
    progress.fact("model", source.name)
    semantic = margin = text = None
    scorer, margins, generation_s = None, None, 0.0
    with progress.phase("loading", 1):
        model, tokenizer = load_model(source, **config.place, dtype=config.dtype)
        scorers = Scorers(model, tokenizer, config, pairs=pairs.pairs)
        windows = scorers.windows() if config.text else []
        if pairs.pairs:
            check_generates(model)
            margins = MarginScorer(model, scorers.prompter, pairs.pairs, batch_size=scorers.batch_size)
            scorer = SemanticScorer(scorers.generator, scorers.embedder, pairs.pairs)
            scorer.answers([0])  # what is slow only the first time isn't timed
    if first is None and scorer:
        if scorers.date:
            progress.fact("date", scorers.date)
        if scorer.references.warning:
            progress.result("warning", scorer.references.warning)
    items = range(len(pairs))
    count = 2 * len(pairs) + len(windows) + sum(map(len, tasks))
    with progress.phase("measuring", count) as advance, counting(advance):
        if scorer and margins:
            started = time.perf_counter()
            answers = scorer.answers(items)
            generation_s = time.perf_counter() - started
            semantic = scorer.scored(items, answers, first.semantic if first else None)
            margin = margins.score(items)
        if windows:
            text = scorers.make("perplexity", Material((), windows)).score(range(len(windows)))
        of_tasks = {task.name: scorers.harness.measure(task, range(len(task))) for task in tasks}
    for task in tasks:
        _check(task, of_tasks[task.name], first.tasks[task.name] if first else of_tasks[task.name])
    if semantic and semantic.half_read_answers:
        progress.result("warning", semantic.half_read_warning)
    both = [item for item, pair in enumerate(pairs) if margin and pair.rejected is not None]
    return ComparedModel(
        model=source.name,
        semantic=semantic,
        margin=margin,
        likelier=Scores(tuple(both), tuple(float(margin.values[item] > 0) for item in both if margin)),
        text=text,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        file_bytes=source.weight_bytes,
        generation_s=generation_s,
        tokens=(margins.answers if margins else [], windows),
        tasks=of_tasks,
    )


def _check(task: Documents, values: Sequence[Values], first: Sequence[Values]) -> None:
    """Raise now, before other models are measured, the TaskError that the task's figures would raise."""
    if values[0].keys() != first[0].keys():
        raise TaskError(
            f"task '{task.name}': its metrics are {list(values[0])}, and the first model's {list(first[0])}. Mend the "
            "task's file."
        )
    for name in values[0]:
        task.overall(name, values)


def _plain(name: str, figure: Figure) -> dict[str, Any]:
    plain = {"value": figure.value, "ratio" if name in RATIOS else "difference": figure.change}
    return {**plain, "interval": list(figure.interval) if figure.interval else None, "reason": figure.reason}
