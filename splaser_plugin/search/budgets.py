"""Budgets: whole models of falling size, each with the ranks of least predicted cost for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from splaser_plugin.errors import RankError
from splaser_plugin.files.text import printable
from splaser_plugin.reduction.allocation import allocate, curve, gauge_storage
from splaser_plugin.search.judge import Judgement, Outcome
from splaser_plugin.weights.matrices import Matrix, by_name

STEP = 0.02
"""Of the parameters, between one budget and the next."""


@dataclass(frozen=True)
class Budget:
    """A share of the parameters to remove, and how."""

    share: float
    """Asked for, of all parameters that the run may reduce: 0 to 1."""
    ranks: Mapping[Matrix, int]
    """Of the matrices that are reduced, in the model's order."""
    parameters_removed: int
    """If each of these is stored as `--save factored` does."""
    predicted_cost: float | None
    """In nats a token; None where costs are in another unit."""

    @property
    def name(self) -> str:
        return f"{100 * self.share:g} %"


@dataclass(frozen=True)
class BudgetTrial:
    """One budget tried."""

    budget: Budget
    judgement: Judgement
    """By the run's scorer."""
    text: Judgement | None
    """By the text's perplexity; None without a text, and where the scorer alone turned the budget down."""
    elapsed_s: float

    @property
    def outcome(self) -> Outcome:
        """`kept`, or why not: see `Judgement.outcome`."""
        return self.judgement.outcome if self.text is None else self.text.outcome

    @property
    def kept(self) -> bool:
        return self.outcome == "kept"

    @property
    def summary(self) -> str:
        """All about it in one line for people: what it removes, the predicted and the true cost, the outcome."""
        budget, judgement = self.budget, self.judgement
        parts = [f"{budget.parameters_removed:,} parameters of {len(budget.ranks)} matrices"]
        if budget.predicted_cost is not None:
            parts.append(f"predicted {budget.predicted_cost:.4f} nats a token")
        if judgement.scores is not None:
            parts.append(f"score {judgement.scores.mean:+.4f} ({judgement.change})")
        if self.text is not None and self.text.scores is not None:
            parts.append(f"text {self.text.scores.mean:+.4f} ({self.text.change})")
        last = judgement if self.text is None else self.text
        parts.append(last.summary)
        if last.reason is not None:
            parts.append(printable(last.reason))
        return "  ".join(parts)


def shares(most: float) -> list[float]:
    """2 %, 4 %, ... and at last `most`."""
    steps = [STEP * count for count in range(1, math.ceil(most / STEP))]
    return [*(round(step, 10) for step in steps if step < most - 1e-9), most]


def least_removed(share: float, parameters: int) -> int:
    """How many of the parameters a model of that budget has to lose, whatever rounding does to their product."""
    return max(1, math.ceil(share * parameters - 1e-6))


def plan_budgets(costs: Mapping[Matrix, np.ndarray], parameters: int, most: float, *, in_nats: bool) -> list[Budget]:
    """The budgets up to a share, from gentle to hard; each takes no matrix to a higher rank than the one before.

    Args:
        costs: Of each matrix that can be stored smaller, for each rank from 0 to the full one.
        parameters: Of which the shares are: all entries of the matrices that the run may reduce.
        most: The largest share, above 0 and below 1.
        in_nats: Whether the costs are in nats a token.

    Returns:
        At least one; those that can't be reached, or remove nothing more than the one before, are left out.

    Raises:
        RankError: Not even the gentlest can be reached.
    """
    matrices = list(costs)
    curves = [curve(member.shape, costs[member], gauge_storage) for member in matrices]
    dense = sum(math.prod(member.shape) for member in matrices)
    most_removed = dense - sum(int(choices.sizes.min()) for choices in curves)
    found: list[Budget] = []
    for share in shares(most):
        removed = least_removed(share, parameters)
        if removed > most_removed:
            if not found:
                raise RankError(
                    f"--budget {most:g}: not even {share:g} can be reached, which removes {removed:,} of "
                    f"{parameters:,} parameters; {len(matrices)} matrices that can be stored as factors have "
                    f"{most_removed:,} to give. Lower --budget, or --exclude what can't be stored so."
                )
            break
        allocation = allocate(curves, dense - removed)
        ranks = {
            matrix: rank for matrix, rank in zip(matrices, allocation.ranks, strict=True) if rank < min(matrix.shape)
        }
        if not found or ranks != found[-1].ranks:
            cost = allocation.cost if in_nats else None
            found.append(Budget(share, ranks, dense - allocation.parameters, cost))
    return found


def packed(budgets: Sequence[Budget]) -> list[dict[str, Any]]:
    """Plain values, matrices by their names."""
    return [
        {**vars(budget), "ranks": {matrix.name: rank for matrix, rank in budget.ranks.items()}} for budget in budgets
    ]


def unpacked(stored: Sequence[Mapping[str, Any]], matrices: Sequence[Matrix]) -> list[Budget]:
    """What `packed` gave, for the same matrices."""
    named = by_name(matrices)
    return [
        Budget(**{**matrix, "ranks": {named[name]: int(rank) for name, rank in matrix["ranks"].items()}})
        for matrix in stored
    ]
