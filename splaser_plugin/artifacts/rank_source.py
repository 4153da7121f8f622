"""Where a rank came from, and how files say that: `iqr`, `0.5`, `budget 0.1`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias

from pydantic import BeforeValidator, PlainSerializer, PlainValidator

from splaser_plugin.config.stages import EDGES, Edge, edge_or_fraction

BUDGET = "budget "


@dataclass(frozen=True)
class BudgetShare:
    """The whole model's budget: the share of its parameters that it removes."""

    share: float

    def __str__(self) -> str:
        return f"{BUDGET}{self.share:g}"


def _parsed(stored: object) -> Edge | float | BudgetShare:
    if isinstance(stored, str):
        is_budget = stored.startswith(BUDGET)
        found = edge_or_fraction(stored.removeprefix(BUDGET))
        if is_budget and isinstance(found, float):
            return BudgetShare(found)
        if not is_budget and found is not None:
            return found
    raise ValueError(f"one of {', '.join(EDGES)}, a fraction of components, or '{BUDGET}' and a share")


RankSource: TypeAlias = Annotated[Edge | float | BudgetShare, PlainValidator(_parsed), PlainSerializer(str)]
"""An edge, the fraction of components that stayed, or a budget's share; a text in files."""
OptionalRankSource: TypeAlias = Annotated[RankSource | None, BeforeValidator(lambda stored: stored or None)]
"""None where a file doesn't say it, or says "", as files of version 0.1.0 may."""
