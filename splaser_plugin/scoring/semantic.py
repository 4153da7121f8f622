"""The semantic scorer: whether the model's own answers mean what the chosen ones do, or the rejected ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from splaser_plugin.data.pairs import Pair
from splaser_plugin.distributed import from_main, share
from splaser_plugin.generation.generator import Answer, Generator
from splaser_plugin.scoring.embedding import Embedder
from splaser_plugin.scoring.scores import Scores


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

        return share(items, generate, self.generator.model)


def _known_values(items: Sequence[int], answers: Sequence[Answer], like: Scores | None) -> dict[int, float]:
    """Place to value, for each answer that is the same text as in `like`.

    This saves embeddings, and keeps equal answers equal: in another batch a vector differs in its last bits.
    """
    if like is None:
        return {}
    known = {
        (item, answer.text): value for item, answer, value in zip(like.items, like.answers, like.values, strict=True)
    }
    given = [(item, answer.text) for item, answer in zip(items, answers, strict=True)]
    return {place: known[answer] for place, answer in enumerate(given) if answer in known}
