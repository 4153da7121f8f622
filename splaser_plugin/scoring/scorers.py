"""What a run measures with: scorers by their names, all for one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from splaser_plugin.config.guards import GUARDS
from splaser_plugin.config.stages import SCORERS, CompareConfig, LaserConfig, MeasureConfig
from splaser_plugin.config.tasks import LM_EVAL, task_of
from splaser_plugin.config.template_kwargs import parse_template_kwargs
from splaser_plugin.data.limits import TokenLimits
from splaser_plugin.data.pairs import Pair
from splaser_plugin.data.windows import open_text, read_windows
from splaser_plugin.distributed import input_device
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.prompts import Prompter, prepared
from splaser_plugin.scoring.embedding import Embedder, SelfEmbedder, SentenceEmbedder, find_embedder
from splaser_plugin.scoring.harness import Harness, TaskScorer
from splaser_plugin.scoring.margin import ChosenScorer, MarginScorer
from splaser_plugin.scoring.own_scorer import CallableScorer, load_function
from splaser_plugin.scoring.perplexity import PerplexityScorer
from splaser_plugin.scoring.scores import Scorer
from splaser_plugin.scoring.semantic import SemanticScorer
from splaser_plugin.scoring.tasks import Documents, load_scored
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import context_length

FORWARD_BATCH = 32
"""Texts in one forward pass where the number of prompts generated for at once is found by measurement."""


@dataclass(frozen=True)
class Material:
    """What scorers measure on; either may be empty."""

    pairs: Sequence[Pair]
    windows: Sequence[Sequence[int]] = ()
    """Token ids of text, equally many in each."""
    tasks: Mapping[str, Documents] = field(default_factory=dict)
    """Documents of tasks, by the task's name."""


class Scorers:
    """Makes scorers of one model; what they have in common is made once, when it is first needed.

    weights: of the model, if it will be changed. pairs: all that it may be asked to answer. llm: a `vllm.LLM` that is
    there, for --engine vllm.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: MeasureConfig,
        weights: Weights | None = None,
        *,
        pairs: Sequence[Pair] = (),
        llm: Any = None,
    ) -> None:
        self.model = model
        self.llm = llm
        self.pairs = pairs
        self.weights = weights
        self.tokenizer = tokenizer
        self.config = config
        self.batch_size = config.batch_size or FORWARD_BATCH

    def make(self, name: str, material: Material) -> Scorer:
        """The scorer of that name: one of `SCORERS` or `GUARDS`, `lm-eval:TASK`, or the dotted path of a function."""
        if name == "semantic":
            return SemanticScorer(self.generator, self.embedder, material.pairs)
        if name == "margin":
            return MarginScorer(self.model, self.prompter, material.pairs, batch_size=self.batch_size)
        if name == "chosen":
            return ChosenScorer(self.model, self.prompter, material.pairs, batch_size=self.batch_size)
        if name == "perplexity":
            return PerplexityScorer(self.model, material.windows, batch_size=self.batch_size)
        if task := task_of(name):
            return TaskScorer(self.harness, material.tasks[task])
        tokenizer = prepared(self.tokenizer, self._variables)
        return CallableScorer(load_function(name), self.model, tokenizer, material.pairs, name)

    def windows(self) -> list[list[int]]:
        """The windows of --text, as many as pairs are read. Raises TextError when it can't be read."""
        config = self.config
        context = context_length(self.model)
        return read_windows(config.text, self.tokenizer, window=config.window, count=config.samples, context=context)

    def tasks(self) -> list[Documents]:
        """The documents of the tasks that a search goes by or is guarded by, as many as pairs are read."""
        return _tasks(self.config)

    @cached_property
    def harness(self) -> Harness:
        return Harness(self.model, self.tokenizer, batch_size=self.batch_size)

    @cached_property
    def prompter(self) -> Prompter:
        return prompter_of(self.config, self.tokenizer, context_length(self.model))

    @property
    def date(self) -> str:
        """What is to be said of the date that prompts have; empty where they have none."""
        date = self.prompter.date
        return date and f"{date} in every prompt, as the chat template writes one and runs of two days must ask alike"

    @property
    def _variables(self) -> dict[str, Any]:
        return parse_template_kwargs(self.config.template_kwargs)

    @cached_property
    def generator(self) -> Generator:
        limit, at_once = self.config.max_new_tokens, self.config.batch_size
        found = Generator(self.model, self.prompter, max_new_tokens=limit, batch_size=at_once)
        if self.config.engine == "continuous":
            found.use_continuous()
        elif self.config.engine == "vllm":
            longest = max((len(self.prompter.tokens(pair.messages)) for pair in self.pairs), default=0)
            found.use_vllm(longest, url=self.config.engine_url, llm=self.llm)
        return found

    @property
    def engine(self) -> str:
        """The name of what writes the answers. Raises ModelError where that can't take the model."""
        return self.generator.engine.name

    @cached_property
    def embedder(self) -> Embedder:
        if self.config.embedder == "self":
            return SelfEmbedder(self.weights or Weights(self.model), self.tokenizer, self.batch_size)
        device = input_device(self.model)
        return SentenceEmbedder(self.config.embedder, device, allow_pickle=self.config.allow_pickle)


def prompter_of(config: MeasureConfig, tokenizer: Any, context: int | None) -> Prompter:
    """What writes prompts as the configuration wants them. context: see `Prompter`, which also says what is raised."""
    return Prompter(tokenizer, config.template, context, parse_template_kwargs(config.template_kwargs))


def limits_of(config: MeasureConfig, tokenizer: Any, context: int | None, *, reads_prompts: bool) -> TokenLimits:
    """How long the pairs may be that a model of this tokenizer and context is measured on.

    reads_prompts: whether it is to read prompts, which then have to leave room for an answer in the context.
    """
    fits = prompter_of(config, tokenizer, context).fits if reads_prompts else None
    return TokenLimits(tokenizer, config.max_prompt_tokens, config.max_answer_tokens, fits)


def check_scorers(config: LaserConfig | CompareConfig, *, pairs: bool = True) -> None:
    """Raise now what a missing text, function or embedder would raise once the model is there.

    pairs: whether a comparison has any.
    """
    used = config.scorers if isinstance(config, LaserConfig) else {"semantic"} if pairs else set()
    for name in used - {*SCORERS, *GUARDS}:
        if not name.startswith(LM_EVAL):
            load_function(name)
    _tasks(config)
    if config.text:
        next(open_text(config.text), None)
    if "semantic" in used and config.embedder != "self":
        find_embedder(config.embedder, allow_pickle=config.allow_pickle)


def _tasks(config: MeasureConfig) -> list[Documents]:
    names = config.tasks_used if isinstance(config, LaserConfig) else ()
    return load_scored(names, config.tasks_path, count=config.samples)
