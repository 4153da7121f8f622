"""What the statistics of a reduction are measured on: prompts with their answers, and stretches of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One stretch of token ids."""

    tokens: tuple[int, ...]
    first: int = 0
    """Place of the first token after which the model's prediction counts; it and what follows it do."""

    @property
    def predictions(self) -> int:
        return len(self.tokens) - self.first


def answer_rows(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Row]:
    """Each prompt with its answer; what the model expects within the prompt doesn't count.

    Args:
        prompts: Token ids, at least one each.
        answers: Token ids; they may be empty.
    """
    return [Row((*prompt, *answer), len(prompt) - 1) for prompt, answer in zip(prompts, answers, strict=True) if prompt]


def window_rows(windows: Iterable[Sequence[int]]) -> list[Row]:
    """Windows of text, of which every prediction counts."""
    return [Row(tuple(window)) for window in windows if window]


def first_tokens(rows: Sequence[Row], count: int) -> list[Row]:
    """The first rows, as many as have `count` tokens together, and at least one."""
    taken: list[Row] = []
    total = 0
    for row in rows:
        if total >= count:
            break
        taken.append(row)
        total += len(row.tokens)
    return taken
