"""How good a model is at its task: one number an item (a pair, as a rule), higher is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from splaser_plugin.data.pairs import Pair
from splaser_plugin.distributed import from_main, share
from splaser_plugin.errors import ScoreError
from splaser_plugin.generation.generator import Answer, Generator
from splaser_plugin.scoring.embedding import Embedder


@dataclass(frozen=True)
class Scores:
    """One measurement of a model."""

    items: tuple[int, ...]
    """What was scored: places in the scorer's items, ascending."""
    values: tuple[float, ...]
    """One score for each of them."""
    answers: tuple[Answer, ...] = ()
    """What the model said to each; empty for scorers that generate nothing."""

    def __post_init__(self) -> None:
        for item, value in zip(self.items, self.values, strict=True):
            if not math.isfinite(value):
                raise ScoreError(f"the score of item {item} is {value}: the model computes numbers that aren't finite.")

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def generated_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def empty_answers(self) -> int:
        return sum(not answer.text for answer in self.answers)

    @property
    def cut_answers(self) -> int:
        """Of the answers those that the longest length cut off."""
        return sum(answer.is_cut for answer in self.answers)

    def on(self, items: Sequence[int]) -> Scores:
        """The same measurement, of these items only."""
        place = {item: index for index, item in enumerate(self.items)}
        places = [place[item] for item in sorted(items)]
        answers = tuple(self.answers[index] for index in places) if self.answers else ()
        return Scores(tuple(sorted(items)), tuple(self.values[index] for index in places), answers)

    def joined(self, other: Scores) -> Scores:
        """Two measurements of the same model, of different items, as one."""
        both = Scores(self.items + other.items, self.values + other.values, self.answers + other.answers)
        return both.on(both.items)

    def differences(self, best: Scores) -> list[float]:
        """This model's score minus that of `best`, for each of this measurement's items."""
        return [mine - theirs for mine, theirs in zip(self.values, best.on(self.items).values, strict=True)]


class Scorer(Protocol):
    """A ruler for the model it was made with."""

    name: str
    size: int
    """How many items it has."""

    def score(self, items: Sequence[int], like: Scores | None = None) -> Scores:
        """Measure the model as it is now on some of the items, given by their places.

        like: a measurement of all items, of a model that is probably much the same; what is equal need not be
        computed again, and nothing else follows from it.
        Under several processes each does its part, and all get the whole.
        """


class SemanticScorer:
    """cos(answer, chosen) - cos(answer, rejected) of the model's own greedy answers.

    Without a rejected answer only the first term. The reference answers are embedded here, once.
    Raises PairsError when a prompt doesn't fit into the model's context.
    """

    name = "semantic"

    def __init__(self, generator: Generator, embedder: Embedder, pairs: Sequence[Pair]) -> None:
        self.generator = generator
        self.embedder = embedder
        self.size = len(pairs)
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

    def score(self, items: Sequence[int], like: Scores | None = None) -> Scores:
        return self.scored(items, self.answers(items, like), like)

    def scored(self, items: Sequence[int], answers: Sequence[Answer], like: Scores | None = None) -> Scores:
        """The measurement that these answers make, one to each of the items."""
        values = _known_values(items, answers, like)
        new = [place for place in range(len(items)) if place not in values]
        if new:
            vectors = self.embedder.embed([answers[place].text for place in new])
            products = (vectors * self._direction[[items[place] for place in new]]).sum(-1)
            values.update(zip(new, from_main(products.tolist()), strict=True))
        return Scores(tuple(items), tuple(values[place] for place in range(len(items))), tuple(answers))

    def answers(self, items: Sequence[int], like: Scores | None = None) -> list[Answer]:
        """The model's answers to some of the prompts, in the order asked for."""
        expected = (
            {item: len(answer.tokens) for item, answer in zip(like.items, like.answers, strict=True)} if like else {}
        )

        def generate(part: list[int]) -> list[Answer]:
            lengths = [expected.get(item, 0) for item in part]
            return self.generator.answer([self.prompts[item] for item in part], lengths)

        return share(items, generate)


def _known_values(items: Sequence[int], answers: Sequence[Answer], like: Scores | None) -> dict[int, float]:
    """Place to value, for each answer that is the same text as in `like`.

    This saves embeddings, and keeps equal answers equal: in another batch a vector differs in its last bits.
    """
    if like is None:
        return {}
    known = {
        (item, answer.text): value for item, answer, value in zip(like.items, like.answers, like.values, strict=True)
    }
    said = [(item, answer.text) for item, answer in zip(items, answers, strict=True)]
    return {place: known[each] for place, each in enumerate(said) if each in known}
