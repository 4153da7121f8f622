"""How good a model is at its task: one number an item (a pair, as a rule), higher is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from splaser_plugin.errors import ScoreError
from splaser_plugin.generation.generator import Answer


@dataclass(frozen=True)
class Scores:
    """One measurement of a model."""

    items: tuple[int, ...]
    """What was scored: places in the scorer's items, ascending."""
    values: tuple[float, ...]
    """One score for each item."""
    answers: tuple[Answer, ...] = ()
    """The model's answer to each item; empty for scorers that generate nothing."""

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
        """How many answers were cut off at the longest length."""
        return sum(answer.is_cut for answer in self.answers)

    @property
    def half_read_answers(self) -> int:
        """How many answers are longer than what the embedder reads."""
        return sum(answer.is_half_read for answer in self.answers)

    @property
    def half_read_warning(self) -> str:
        """One line for people about them."""
        return (
            f"{self.half_read_answers} of {len(self.answers)} answers are longer than the embedder reads, and their "
            "ends aren't compared. Lower --max-new-tokens, or give --embedder a model that reads more."
        )

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
    """Measures the model it was made with."""

    name: str
    size: int
    """How many items it has."""

    def score(self, items: Sequence[int], like: Scores | None = None) -> Scores:
        """Measure the model as it is now on some of the items, given by their places.

        like: a measurement of all items, of a model that is probably much the same. An answer that is the same there
        need not be embedded again; the result does not depend on it otherwise.
        With several processes, every process measures its part and gets the whole.
        """
