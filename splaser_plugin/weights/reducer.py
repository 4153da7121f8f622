"""Ways to bring a matrix to a lower rank."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from splaser_plugin.spectra import spectrum
from splaser_plugin.weights.matrices import Matrix


class Reducer(Protocol):
    """Gives a matrix of lower rank in place of another, whole or as factors."""

    def truncated(self, matrix: Matrix, weight: Tensor, rank: int) -> Tensor:
        """A new tensor of that rank, in the weight's shape, dtype and device.

        Args:
            matrix: Which one it is.
            weight: What it is now, (rows, columns) as stored.
            rank: 1 to the shorter side.

        Raises:
            RankError: The rank is out of range.
        """

    def factors(self, matrix: Matrix, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The same as two factors, (rows, rank) and (rank, columns), before it is rounded."""


class PlainReducer:
    """The nearest matrix of that rank, by the singular value decomposition (Eckart & Young 1936)."""

    def truncated(self, matrix: Matrix, weight: Tensor, rank: int) -> Tensor:
        return spectrum.truncate(weight, rank)

    def factors(self, matrix: Matrix, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return spectrum.factors(weight, rank)
