"""A matrix of rank r as r of its rows and what the others take from them: r (n + m - r) numbers, no break-even point.

Two factors of an (n, m) matrix hold r (n + m) numbers, r^2 more than such a matrix has degrees of freedom: an
invertible (r, r) matrix, a gauge, can stand between them. Taken so that r of the rows of the left factor are the
identity, it leaves R, the matrix's own pivot rows, and L with the other rows as L R (an interpolative decomposition);
or the same with columns. Below full rank that is always less than n m. The pivots are chosen so that no entry of L is
large, by QR with column pivoting and then by swaps that raise the volume of the pivot rows (strong rank-revealing QR:
Gu & Eisenstat 1996; Goreinov & Tyrtyshnikov 2001), so that rounding is amplified little.
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
    """A matrix (rows, columns) of rank r by its pivot rows, or by its pivot columns."""

    pivots: Tensor
    """(r,) int64, rising: which rows, or columns, are stored as they are."""
    skeleton: Tensor
    """The pivot rows, (r, columns), or the pivot columns, (rows, r)."""
    interpolation: Tensor
    """The other rows are `interpolation @ skeleton`: (rows - r, r); or the other columns are
    `skeleton @ interpolation`: (r, columns - r)."""
    by_rows: bool

    @property
    def rank(self) -> int:
        return len(self.pivots)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows, columns = self.skeleton.shape
        others = self.interpolation.shape[0 if self.by_rows else 1]
        return (rows + others, columns) if self.by_rows else (rows, columns + others)

    @property
    def size(self) -> int:
        """How many numbers it holds: r (rows + columns - r)."""
        return self.skeleton.numel() + self.interpolation.numel()

    @property
    def mT(self) -> Gauge:  # noqa: N802, torch's own name
        """The transposed matrix, in the same numbers."""
        skeleton, interpolation = self.skeleton.mT.contiguous(), self.interpolation.mT.contiguous()
        return Gauge(self.pivots, skeleton, interpolation, not self.by_rows)

    @torch.no_grad()
    def product(self) -> Tensor:
        """The matrix, multiplied in float64 and rounded once to the stored dtype, on the device where it is stored.

        Products of bfloat16 and float16 numbers are exact there, so that the order in which a device adds
        them hardly ever shows.
        """
        device = torch.device("cpu") if self.skeleton.device.type == "mps" else self.skeleton.device
        upright = self if self.by_rows else self.mT
        skeleton, pivots = upright.skeleton.to(device), self.pivots.to(device)
        whole = skeleton.new_empty(upright.shape)
        whole[pivots] = skeleton
        others = upright.interpolation.to(device).double() @ skeleton.double()
        whole[others_of(pivots, len(whole))] = _rounded(others, whole.dtype)
        return (whole if self.by_rows else whole.mT.contiguous()).to(self.skeleton.device)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(rows, r) and (r, columns), whose product it is, in the stored dtype: one of them holds the identity."""
        if not self.by_rows:
            left, right = self.mT.factors()
            return right.mT, left.mT
        left = self.interpolation.new_zeros(self.shape[0], self.rank)
        left[self.pivots, torch.arange(self.rank, device=left.device)] = 1
        left[others_of(self.pivots, len(left))] = self.interpolation
        return left, self.skeleton


def gauge(left: Tensor, right: Tensor, dtype: torch.dtype) -> Gauge:
    """left @ right stored by pivots of its shorter side: rows, or columns where these are fewer.

    Choosing them takes less time there, fewer of a token's numbers are to be put in order, and rounding adds less
    (tests/benchmarks/factored.py).

    Args:
        left: (rows, rank).
        right: (rank, columns). The rank is below both sides; that of the product may be lower still.
        dtype: To store it in; what is beyond its range becomes its largest number.

    Returns:
        The matrix, on the factors' device.
    """
    if len(left) > right.shape[1]:
        return gauge(right.mT, left.mT, dtype).mT
    wide_left, wide_right = (factor.detach().cpu().double() for factor in (left, right))
    pivots, coefficients = map(torch.from_numpy, interpolative(wide_left.numpy()))
    skeleton, interpolation = (_rounded(part, dtype) for part in (wide_left[pivots] @ wide_right, coefficients))
    return Gauge(pivots.to(left.device), skeleton.to(left.device), interpolation.to(left.device), by_rows=True)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype).contiguous()


def interpolative(left: np.ndarray, bound: float = BOUND) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a tall matrix that the others are bounded combinations of.

    Args:
        left: (rows, rank), rank < rows.
        bound: Largest magnitude of a coefficient, above 1.

    Returns:
        The pivots (rank,), rising, and the coefficients (rows - rank, rank), such that the other rows, in their
        order, are coefficients @ left[pivots].
    """
    rank = left.shape[1]
    basis = np.linalg.qr(left)[0]  # of full rank where `left` is not, and no column of it is small
    upper, order = qr(basis.T, mode="r", pivoting=True)
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
