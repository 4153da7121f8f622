"""Ranks for all matrices at once: the least predicted cost that fits into a number of parameters.

The cost is a sum over matrices, so one Lagrange multiplier, the price of a parameter in nats a token, ties them all:
at a price each matrix takes the rank of least cost + price x parameters, and bisection finds the price at which they
fit (Everett 1963). What comes out is the optimum for exactly the parameters it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from splaser_plugin.errors import RankError

Storage = Callable[[int, int, int], int]
"""Numbers stored for (rows, columns, rank) below full rank."""

_HALVINGS = 200
"""At most; the price is then exact to the last bit."""


def plain_storage(rows: int, columns: int, rank: int) -> int:
    """Numbers in two thin factors."""
    return rank * (rows + columns)


def gauge_storage(rows: int, columns: int, rank: int) -> int:
    """Numbers in a factor and what the other rows take from it, see `splaser_plugin.weights.gauge`."""
    return rank * (rows + columns - rank)


@dataclass(frozen=True)
class Curve:
    """What each rank of one matrix costs, and what it takes to store."""

    costs: np.ndarray
    """Predicted cost in nats a token: (choices,)."""
    sizes: np.ndarray
    """Numbers stored: (choices,)."""
    ranks: np.ndarray
    """(choices,), rising; the last is the full rank, which keeps the matrix as it is."""


def curve(shape: tuple[int, int], costs: np.ndarray, storage: Storage, *, least_rank: int = 1) -> Curve:
    """The choices of one matrix: every rank from `least_rank` whose storage is below the dense one, and the full rank.

    Args:
        shape: (rows, columns) of the matrix.
        costs: Of each rank from 0 to the full one, as `Decomposition.costs` has them, scaled by whatever corrects
            the prediction.
        storage: `plain_storage` or `gauge_storage`.
        least_rank: The lowest rank to choose.
    """
    rows, columns = shape
    full = min(shape)
    ranks = np.arange(max(1, least_rank), full)
    sizes = np.array([storage(rows, columns, int(rank)) for rank in ranks], dtype=np.int64)
    smaller = sizes < rows * columns
    return Curve(
        np.append(costs[ranks[smaller]], 0.0),
        np.append(sizes[smaller], rows * columns),
        np.append(ranks[smaller], full),
    )


@dataclass(frozen=True)
class Allocation:
    """A rank for every matrix."""

    ranks: list[int]
    """In the matrices' order."""
    parameters: int
    """Numbers stored by all of them."""
    cost: float
    """Predicted, of all of them: in nats a token."""
    price: float
    """Nats a token that one more parameter would save."""


def allocate(curves: Sequence[Curve], parameters: int) -> Allocation:
    """The ranks of least predicted cost among all that store at most so many numbers.

    No choice of ranks that stores no more than the result does costs less. A smaller budget never gives a matrix a
    higher rank, so models for falling budgets are nested.

    Raises:
        RankError: Even the lowest ranks take more.
    """

    def choice(price: float) -> np.ndarray:
        """The place of each matrix's best rank, the smaller one where two are as good."""
        return np.array([int(np.argmin(curve.costs + price * curve.sizes)) for curve in curves])

    def stored(places: np.ndarray) -> int:
        return sum(int(curve.sizes[place]) for curve, place in zip(curves, places, strict=True))

    least = sum(int(curve.sizes.min()) for curve in curves)
    if least > parameters:
        raise RankError(
            f"{parameters:,} parameters, but the lowest ranks of {len(curves)} matrices take {least:,}. "
            "Raise the budget, or leave matrices out."
        )
    low, high = 0.0, 1.0
    if stored(choice(low)) > parameters:
        while stored(choice(high)) > parameters:
            low, high = high, high * 16
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if middle in (low, high):
                break
            low, high = (middle, high) if stored(choice(middle)) > parameters else (low, middle)
    else:
        high = 0.0
    places = choice(high)
    return Allocation(
        [int(curve.ranks[place]) for curve, place in zip(curves, places, strict=True)],
        stored(places),
        float(sum(curve.costs[place] for curve, place in zip(curves, places, strict=True))),
        high,
    )
