"""A matrix of rank r as r of its rows and what the others take from them: r (n + m - r) numbers, no break-even point.

Two factors of an (n, m) matrix hold r (n + m) numbers, r^2 more than such a matrix has degrees of freedom: an
invertible (r, r) matrix can stand between them. Taken so that r of the rows of the left factor are the identity, it
leaves R, the matrix's own pivot rows, and L with the other rows as L R; or the same with columns. Below full rank that
is always less than n m. The pivots are chosen so that no entry of L is large, by QR with column pivoting and then by
swaps that raise the volume of the pivot rows (strong rank-revealing QR: Gu & Eisenstat 1996; Goreinov & Tyrtyshnikov
2001), so that rounding is amplified little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import qr, solve_triangular
from torch import Tensor

BOUND = 2.0
"""No entry of the interpolating factor is larger in magnitude."""


@dataclass(frozen=True)
class Gauge:
    """A matrix (outputs, inputs) of rank r by its pivot rows, or by its pivot columns."""

    pivots: Tensor
    """(r,) int64, rising: the outputs, or inputs, whose rows or columns are stored as they are."""
    skeleton: Tensor
    """The pivot rows, (r, inputs), or the pivot columns, (outputs, r)."""
    interpolation: Tensor
    """The other rows are `interpolation @ skeleton`: (outputs - r, r); or the other columns are
    `skeleton @ interpolation`: (r, inputs - r)."""
    by_rows: bool

    @property
    def rank(self) -> int:
        return len(self.pivots)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)"""
        rows, columns = self.skeleton.shape
        others = self.interpolation.shape[0 if self.by_rows else 1]
        return (rows + others, columns) if self.by_rows else (rows, columns + others)

    @torch.no_grad()
    def product(self) -> Tensor:
        """The matrix, multiplied in float64 and rounded once to the stored dtype."""
        place = torch.device("cpu") if self.skeleton.device.type == "mps" else self.skeleton.device
        skeleton, interpolation = (each.to(place) for each in (self.skeleton, self.interpolation))
        pivots = self.pivots.to(place)
        upright = skeleton if self.by_rows else skeleton.mT
        mixed = interpolation if self.by_rows else interpolation.mT
        whole = upright.new_empty(len(upright) + len(mixed), upright.shape[1])
        whole[pivots] = upright
        whole[others_of(pivots, len(whole))] = (mixed.double() @ upright.double()).to(whole.dtype)
        return (whole if self.by_rows else whole.mT).contiguous().to(self.skeleton.device)


def gauge(left: Tensor, right: Tensor, dtype: torch.dtype) -> Gauge:
    """left @ right stored by pivot rows or by pivot columns, whichever is closer to it once rounded to the dtype.

    Args:
        left: (outputs, rank).
        right: (rank, inputs). The product must have that rank, which is below both sides.
        dtype: To store it in.

    Returns:
        The form with the smaller Frobenius error, on the factors' device.
    """
    exact = left.double().cpu() @ right.double().cpu()
    forms = []
    for by_rows in (True, False):
        side = left.double().cpu() if by_rows else right.double().cpu().mT
        pivots, coefficients = map(torch.from_numpy, interpolative(side.numpy()))
        skeleton = exact[pivots] if by_rows else exact[:, pivots]
        interpolation = coefficients if by_rows else coefficients.mT
        rounded = [each.to(dtype).contiguous().to(left.device) for each in (skeleton, interpolation)]
        forms.append(Gauge(pivots.to(left.device), rounded[0], rounded[1], by_rows))
    return min(forms, key=lambda each: float((each.product().double().cpu() - exact).norm()))


def interpolative(left: np.ndarray, bound: float = BOUND) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a tall matrix that the others are bounded combinations of.

    Args:
        left: (rows, rank) of full column rank, rank < rows.
        bound: Largest magnitude of a coefficient, above 1.

    Returns:
        The pivots (rank,), rising, and the coefficients (rows - rank, rank), such that the other rows, in their
        order, are coefficients @ left[pivots].
    """
    rank = left.shape[1]
    upper, order = qr(left.T, mode="r", pivoting=True)
    mixed = solve_triangular(upper[:rank, :rank], upper[:rank, rank:]).T
    pivots, others = order[:rank].copy(), order[rank:].copy()
    while True:
        place = int(np.argmax(np.abs(mixed)))
        row, column = divmod(place, rank)
        if abs(mixed[row, column]) <= bound:
            break
        pivots[column], others[row] = others[row], pivots[column]
        _swap(mixed, row, column)
    by_pivot, by_other = np.argsort(pivots), np.argsort(others)
    return pivots[by_pivot], np.ascontiguousarray(mixed[np.ix_(by_other, by_pivot)])


def _swap(mixed: np.ndarray, row: int, column: int) -> None:
    """Update the coefficients in place when another row and a pivot change places: a rank-one change."""
    scale = mixed[row, column]
    its_row, its_column = mixed[row].copy(), mixed[:, column].copy()
    mixed -= np.outer(its_column, its_row / scale)
    mixed[row] = -its_row / scale
    mixed[:, column] = its_column / scale
    mixed[row, column] = 1 / scale


def others_of(pivots: Tensor, size: int) -> Tensor:
    """The places from 0 to size - 1 that are no pivots, rising."""
    is_other = torch.ones(size, dtype=torch.bool, device=pivots.device)
    is_other[pivots] = False
    return is_other.nonzero().flatten()
