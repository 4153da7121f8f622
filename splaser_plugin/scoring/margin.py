"""How much likelier the model finds the chosen answer than the rejected one, without generating anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from splaser_plugin.data.pairs import Pair
from splaser_plugin.distributed import share
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.generation.teacher_forcing import fitting_batch, mean_log_probabilities
from splaser_plugin.progress import count_items
from splaser_plugin.scoring.scores import Scores


class MarginScorer:
    """Mean log-probability of the chosen answer's tokens minus that of the rejected one's, in nats a token.

    The tokens are those of the answer's text alone, without an end token, up to the end of the model's context.
    Without a rejected answer only the first term counts.
    batch_size: most answers in one forward pass. Raises PairsError when a prompt doesn't fit into the context.
    """

    name = "margin"

    def __init__(self, model: Any, prompter: Prompter, pairs: Sequence[Pair], *, batch_size: int) -> None:
        self.model = model
        self.size = len(pairs)
        self.prompts = [prompter.tokens(pair.messages, before_answer=True) for pair in pairs]
        self.answers = [
            [_answer_tokens(prompter, prompt, text) for text in (pair.chosen, pair.rejected) if text is not None]
            for pair, prompt in zip(pairs, self.prompts, strict=True)
        ]
        self.batch_size = fitting_batch(batch_size, max(len(answer) for answers in self.answers for answer in answers))

    def score(self, items: Sequence[int], like: Scores | None = None) -> Scores:
        wanted = [(item, place) for item in items for place in range(len(self.answers[item]))]
        means = dict(zip(wanted, share(wanted, self._means, self.model), strict=True))
        values = (means[item, 0] - means.get((item, 1), 0.0) for item in items)
        return Scores(tuple(items), tuple(values))

    def _means(self, wanted: list[tuple[int, int]]) -> list[float]:
        """Mean log-probability of each of these answers, given by item and place."""
        prompts = [self.prompts[item] for item, _ in wanted]
        answers = [self.answers[item][place] for item, place in wanted]
        an_answer = len({item for item, _ in wanted}) / len(wanted)
        return mean_log_probabilities(
            self.model, prompts, answers, batch_size=self.batch_size, done=lambda count: count_items(count * an_answer)
        )


class ChosenScorer(MarginScorer):
    """Mean log-probability of the chosen answer's tokens alone, in nats a token."""

    name = "chosen"

    def __init__(self, model: Any, prompter: Prompter, pairs: Sequence[Pair], *, batch_size: int) -> None:
        super().__init__(model, prompter, [replace(pair, rejected=None) for pair in pairs], batch_size=batch_size)


def _answer_tokens(prompter: Prompter, prompt: list[int], text: str) -> list[int]:
    tokens = prompter.tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens if prompter.context is None else tokens[: prompter.context - len(prompt)]
