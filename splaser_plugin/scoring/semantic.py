"""The semantic scorer: whether the model's own answers mean what the chosen ones do, or the rejected ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from splaser_plugin.data.pairs import Pair
from splaser_plugin.distributed import from_main, share
from splaser_plugin.generation.generator import Answer, Generator
from splaser_plugin.scoring.embedding import Embedder
from splaser_plugin.scoring.scores import Scores

ALIKE = 1e-5
"""Largest distance of two unit vectors that rounding makes of equal texts."""


@dataclass(frozen=True)
class References:
    """What the embedder sees of the answers that the model's own are compared with."""

    texts: int
    """Chosen and rejected answers."""
    half_read: int
    """How many are longer than what the embedder reads."""
    pairs: int
    alike: int
    """Pairs whose two answers have the same vector: they score 0 whatever the model says."""

    def __add__(self, other: References) -> References:
        return References(
            self.texts + other.texts,
            self.half_read + other.half_read,
            self.pairs + other.pairs,
            self.alike + other.alike,
        )

    @property
    def warning(self) -> str:
        """One line for people; empty when everything is seen."""
        half_read = f"{self.half_read} of {self.texts} reference answers are longer than the embedder reads"
        alike = f"{self.alike} of {self.pairs} pairs score 0 whatever the model says, as their answers embed the same"
        found = [text for text, count in ((half_read, self.half_read), (alike, self.alike)) if count]
        return f"{'; '.join(found)}. Give --embedder a model that reads more, or use --scorer margin." if found else ""


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
        self._direction, self.references = directions(embedder, pairs)

    def score(self, items: Sequence[int], like: Scores | None = None) -> Scores:
        return self.scored(items, self.answers(items, like), like)

    def scored(self, items: Sequence[int], answers: Sequence[Answer], like: Scores | None = None) -> Scores:
        """The measurement that these answers make, one to each of the items."""
        found = _known(items, answers, like)
        new = [place for place in range(len(items)) if place not in found]
        if new:
            texts = [answers[place].text for place in new]
            products = (self.embedder.embed(texts) * self._direction[[items[place] for place in new]]).sum(-1)
            seen = zip(from_main(products.tolist()), self.embedder.cut(texts), strict=True)
            found.update(zip(new, seen, strict=True))
        values, half_read = zip(*(found[place] for place in range(len(items))), strict=True) if items else ((), ())
        read = (replace(answer, is_half_read=half) for answer, half in zip(answers, half_read, strict=True))
        return Scores(tuple(items), values, tuple(read))

    def answers(self, items: Sequence[int], like: Scores | None = None) -> list[Answer]:
        """The model's answers to some of the prompts, in the order asked for."""
        expected = (
            {item: len(answer.tokens) for item, answer in zip(like.items, like.answers, strict=True)} if like else {}
        )

        def generate(part: list[int]) -> list[Answer]:
            lengths = [expected.get(item, 0) for item in part]
            return self.generator.answer([self.prompts[item] for item in part], lengths)

        return share(items, generate, self.generator.model)


def directions(embedder: Embedder, pairs: Sequence[Pair]) -> tuple[torch.Tensor, References]:
    """The vector of each chosen answer less that of the rejected one, and what the embedder sees of both."""
    texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs if pair.rejected is not None]
    vectors = embedder.embed(texts)
    rejected = iter(vectors[len(pairs) :])
    found = torch.stack(
        [
            chosen if pair.rejected is None else chosen - next(rejected)
            for pair, chosen in zip(pairs, vectors, strict=False)
        ]
    )
    alike = sum(distance <= ALIKE for distance in from_main(found.norm(dim=-1).tolist()))
    return found, References(len(texts), sum(embedder.cut(texts)), len(pairs), alike)


def _known(items: Sequence[int], answers: Sequence[Answer], like: Scores | None) -> dict[int, tuple[float, bool]]:
    """Place to (value, is half read), for each answer that is the same text as in `like`.

    This saves embeddings, and keeps equal answers equal: in another batch a vector differs in its last bits.
    """
    if like is None:
        return {}
    known = {
        (item, answer.text): (value, answer.is_half_read)
        for item, answer, value in zip(like.items, like.answers, like.values, strict=True)
    }
    given = [(item, answer.text) for item, answer in zip(items, answers, strict=True)]
    return {place: known[answer] for place, answer in enumerate(given) if answer in known}
