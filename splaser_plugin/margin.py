"""How much likelier the model finds the chosen answer than the rejected one, without generating anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from splaser_plugin.distributed import share
from splaser_plugin.generation import evaluating
from splaser_plugin.pairs import Pair
from splaser_plugin.prompts import Prompter
from splaser_plugin.scoring import Scores
from splaser_plugin.teacher_forcing import LOGITS_ROWS, forced_logits


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
        self.prompts = [prompter.tokens(pair.messages) for pair in pairs]
        self.answers = [
            [_answer_tokens(prompter, prompt, text) for text in (pair.chosen, pair.rejected) if text is not None]
            for pair, prompt in zip(pairs, self.prompts, strict=True)
        ]
        longest = max(1, *(len(answer) for answers in self.answers for answer in answers))
        self.batch_size = max(1, min(batch_size, LOGITS_ROWS // longest))

    def score(self, items: Sequence[int], like: Scores | None = None) -> Scores:
        wanted = [(item, place) for item in items for place in range(len(self.answers[item]))]
        means = dict(zip(wanted, share(wanted, self._means), strict=True))
        values = (means[item, 0] - means.get((item, 1), 0.0) for item in items)
        return Scores(tuple(items), tuple(values))

    def batches(self, wanted: Sequence[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
        """Answers, each given by its item and place (0 chosen, 1 rejected), in batches of similar lengths."""
        in_order = sorted(wanted, key=lambda each: len(self.prompts[each[0]]) + len(self.answers[each[0]][each[1]]))
        return [in_order[first : first + size] for first in range(0, len(in_order), size)]

    def mean_log_probabilities(self, batch: Sequence[tuple[int, int]]) -> Tensor:
        """Of the tokens of each of these answers, in nats: (answers,) float32 or float64, one forward pass.

        Gradients flow wherever they are enabled. The model should be in evaluation mode.
        """
        answers = [self.answers[item][place] for item, place in batch]
        found = forced_logits(self.model, [self.prompts[item] for item, _ in batch], answers)
        return torch.stack(
            [_mean_log_probability(logits, tokens) for logits, tokens in zip(found, answers, strict=True)]
        )

    @torch.no_grad()
    def _means(self, wanted: list[tuple[int, int]]) -> list[float]:
        means: dict[tuple[int, int], float] = {}
        with evaluating(self.model):
            for batch in self.batches(wanted, self.batch_size):
                means.update(zip(batch, self.mean_log_probabilities(batch).tolist(), strict=True))
        return [means[each] for each in wanted]


def _answer_tokens(prompter: Prompter, prompt: list[int], text: str) -> list[int]:
    tokens = prompter.tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens if prompter.context is None else tokens[: prompter.context - len(prompt)]


def _mean_log_probability(logits: Tensor, tokens: list[int]) -> Tensor:
    exact = torch.promote_types(logits.dtype, torch.float32)
    if not tokens:
        return torch.zeros((), dtype=exact, device=logits.device)
    log_probabilities = torch.log_softmax(logits.to(exact), dim=-1)
    return log_probabilities.gather(-1, torch.tensor(tokens, device=logits.device)[:, None]).mean()
