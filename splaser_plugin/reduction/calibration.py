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


def spread(rows: Sequence[Row], tokens: int) -> list[Row]:
    """Rows with about so many tokens together, evenly spaced over all of them; at least one, all where they are fewer.

    Rows side by side are alike, so those from all over a text tell more than as many from its start.
    """
    total = sum(len(row.tokens) for row in rows)
    count = min(len(rows), max(1, round(len(rows) * tokens / max(1, total))))
    return [rows[len(rows) * place // count] for place in range(count)]


def mixed(answers: Sequence[Row], windows: Sequence[Row], tokens: int) -> list[Row]:
    """Rows of both, together about so many tokens: half of each, and more of one where the other has fewer."""
    of_windows = min(tokens // 2, token_count(windows))
    chosen = spread(answers, tokens - of_windows) if answers else []
    return chosen + (spread(windows, tokens - token_count(chosen)) if windows else [])


def token_count(rows: Iterable[Row]) -> int:
    """Of all rows together."""
    return sum(len(row.tokens) for row in rows)
