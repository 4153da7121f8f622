"""How good a model is at its task: one number a pair, higher is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from splaser_plugin.distributed import share
from splaser_plugin.embedding import Embedder
from splaser_plugin.generation import Answer, Generator
from splaser_plugin.pairs import Pair


@dataclass(frozen=True)
class Scores:
    """One measurement of a model."""

    values: tuple[float, ...]
    """One score for each pair, in the pairs' order."""
    answers: tuple[str, ...]
    """What the model said, in the pairs' order; empty for scorers that generate nothing."""
    generated_tokens: int

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


class Scorer(Protocol):
    """A ruler for the model it was made with."""

    name: str

    def score(self) -> Scores:
        """Measure the model as it is now. Under several processes each does its part, and all get the whole."""


class SemanticScorer:
    """cos(answer, chosen) - cos(answer, rejected) of the model's own greedy answers.

    Without a rejected answer only the first term. The reference answers are embedded here, once.
    Raises PairsError when a prompt doesn't fit into the model's context.
    """

    name = "semantic"

    def __init__(self, generator: Generator, embedder: Embedder, pairs: Sequence[Pair]) -> None:
        self.generator = generator
        self.embedder = embedder
        self.prompts = [generator.prompter.tokens(pair.messages) for pair in pairs]
        texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs if pair.rejected is not None]
        vectors = embedder.embed(texts)
        rejected = iter(vectors[len(pairs) :])
        self._direction = torch.stack(
            [
                chosen if pair.rejected is None else chosen - next(rejected)
                for pair, chosen in zip(pairs, vectors, strict=False)
            ]
        )
        self._lengths = [0] * len(pairs)

    def score(self) -> Scores:
        answers = self.answers()
        vectors = self.embedder.embed([answer.text for answer in answers])
        values = (vectors * self._direction).sum(-1)
        tokens = sum(len(answer.tokens) for answer in answers)
        return Scores(tuple(values.tolist()), tuple(answer.text for answer in answers), tokens)

    def answers(self) -> list[Answer]:
        """The model's answers, in the pairs' order."""

        def generate(items: list[int]) -> list[Answer]:
            prompts = [self.prompts[item] for item in items]
            return self.generator.answer(prompts, [self._lengths[item] for item in items])

        answers = share(range(len(self.prompts)), generate)
        self._lengths = [len(answer.tokens) for answer in answers]
        return answers
