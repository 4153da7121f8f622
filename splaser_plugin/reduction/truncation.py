"""Low-rank truncation that knows what a matrix is for, with its predicted cost in nats a token.

For y = W x, with C = E[x x'] of the inputs and G = E[g g'] of the gradients of the outputs, a change dW of the weight
moves the model's predictions by about 1/2 tr(dW' G dW C) nats a token (the Fisher information with the Kronecker
factors of Martens & Grosse 2015). The best W_r of rank r is the truncated SVD of G^1/2 W C^1/2 = U S V', brought back:
what it costs is 1/2 sum_{i>r} S_i^2. With G = I that is the truncation of SVD-LLM (Wang et al. 2024), with both
trivial the plain one (Eckart & Young 1936).

Everything is done on the weight's short side, here its columns: with C = L L' (Cholesky) and the eigenvectors V of
L' (W' G W) L,

    W_r = W P,  P = (L V_r) (V_r' L^-1)

is a projection of the weight, so that G is never inverted, and L only by substitution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from splaser_plugin.errors import RankError, SpectrumError
from splaser_plugin.reduction.moments import Moments
from splaser_plugin.spectra import spectrum

LEAST_SHRINKAGE = 1e-3
"""Share of the mean diagonal that moments always get: a direction that no token had still counts."""
_FLOAT64_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Projection:
    """How a matrix is brought to any rank: by `basis[:, :rank] @ dual[:rank]` beside it, on its short side."""

    basis: Tensor
    """(short, short): the directions that are kept, the most important one in the first column. float32, or float64
    for a float64 weight."""
    dual: Tensor
    """(short, short): the inverse of `basis`."""
    on_columns: bool
    """Whether the short side is the columns, so that the matrix is multiplied on the right."""

    def factors(self, weight: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The weight's part along the directions `first` to `last - 1`: (rows, count) and (count, columns)."""
        weight = weight.detach().to(self.basis.dtype)
        basis, dual = self.basis[:, first:last], self.dual[first:last]
        return (weight @ basis, dual) if self.on_columns else (basis, dual @ weight)


@dataclass(frozen=True)
class Decomposition:
    """All truncations of one matrix."""

    costs: np.ndarray
    """Predicted cost of each rank from 0 to the full one, falling to 0: (short + 1,), in nats a token where both
    sides were weighed."""
    projection: Projection | None
    """None where neither side was weighed: then the truncation is that of `splaser_plugin.spectra.spectrum`."""

    def truncated(self, weight: Tensor, rank: int) -> Tensor:
        """The best matrix of that rank in place of the weight.

        Args:
            weight: The matrix that was decomposed, (rows, columns).
            rank: 1 to the shorter side; the full rank gives an exact copy.

        Returns:
            A new tensor of the weight's shape, dtype and device; entries beyond the dtype's range become its largest.

        Raises:
            RankError: The rank is out of range.
        """
        if self.projection is None:
            return spectrum.truncate(weight, rank)
        short = _check_rank(weight, rank)
        if rank == short:
            return weight.detach().clone()
        with spectrum.exact_products(weight.device, self.projection.basis.dtype):
            if rank <= short - rank:
                left, right = self.projection.factors(weight, 0, rank)
                truncated = left @ right
            else:
                left, right = self.projection.factors(weight, rank, short)
                truncated = weight.detach().to(left.dtype).addmm(left, right, alpha=-1)
            largest = torch.finfo(weight.dtype).max
            return truncated.clamp_(-largest, largest).to(weight.dtype)

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Two factors, (rows, rank) and (rank, columns), whose product is `truncated` before that is rounded.

        Raises:
            RankError: The rank is out of range.
        """
        if self.projection is None:
            return spectrum.factors(weight, rank)
        _check_rank(weight, rank)
        with spectrum.exact_products(weight.device, self.projection.basis.dtype):
            return self.projection.factors(weight, 0, rank)


@torch.no_grad()
def decompose(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Decomposition:
    """Decompose one matrix for truncation to any rank, by the second moments of both of its sides.

    Args:
        weight: (rows, columns), any float dtype.
        rows: Second moments that weigh its rows, (rows, rows), symmetric and positive definite: of the output
            gradients, or of the inputs where the matrix is stored the other way round. None for the identity.
        columns: The same for its columns, (columns, columns).

    Returns:
        The decomposition, on the weight's device.

    Raises:
        SpectrumError: The weight has no singular values, a moment doesn't fit to its shape, or the moments of its
            shorter side are not positive definite.
    """
    if rows is None and columns is None:
        return decompose_plainly(weight)
    for side, moments in enumerate((rows, columns)):
        if moments is not None and tuple(moments.shape) != (weight.shape[side],) * 2:
            raise SpectrumError(
                f"moments of shape {tuple(moments.shape)} for side {side} of a weight of shape {tuple(weight.shape)}. "
                "Give those of its own inputs and outputs."
            )
    long_side, short_side = (rows, columns) if _is_upright(weight) else (columns, rows)
    upright = _upright(weight)
    weighed = upright if long_side is None else long_side.to(upright) @ upright
    return _decompose(weight, upright.mT @ weighed, short_side)


def decompose_plainly(weight: Tensor) -> Decomposition:
    """The plain singular value decomposition: costs are half the squared error of the weight itself."""
    return Decomposition(_tail_sums(spectrum.singular_values(weight) ** 2), None)


@torch.no_grad()
def decompose_by_moments(weight: Tensor, moments: Moments, *, with_gradients: bool = True) -> Decomposition:
    """Decompose one matrix for truncation to any rank, by what was measured of it.

    Both sides' moments are shrunk towards their mean diagonal, by as much as they are expected to be wrong for having
    been measured on so few tokens (Ledoit & Wolf 2004), but at least by `LEAST_SHRINKAGE`; wholly for a single token.

    Args:
        weight: (rows, columns), the weights that the moments were measured with.
        moments: Of this matrix.
        with_gradients: Whether outputs are weighed by their gradients, so that costs are in nats a token; without,
            costs are half the squared error of the outputs.

    Raises:
        SpectrumError: The weight or the moments hold inf or nan.
    """
    upright = _upright(weight)
    plain = upright.mT @ upright
    shrunk_long = _shrunk(moments.gram.to(plain), moments.long_mean * plain, moments.gram_noise)
    short = moments.short.to(plain)
    shrunk_short = _shrunk(short, short.diagonal().mean() * torch.eye(len(short)).to(short), moments.short_noise)
    if with_gradients:
        return _decompose(weight, shrunk_long, shrunk_short)
    if moments.short_is_inputs:
        return _decompose(weight, plain, shrunk_short)
    return _decompose(weight, shrunk_long, None)


def _shrunk(measured: Tensor, target: Tensor, noise: float) -> Tensor:
    """The mixture of both that is closest to the truth: noise is the squared error expected of what was measured."""
    distance = float((measured - target).square().sum())
    share = min(1.0, max(LEAST_SHRINKAGE, noise / distance)) if distance else 1.0
    return torch.lerp(measured, target, share)


def _decompose(weight: Tensor, gram: Tensor, short_side: Tensor | None) -> Decomposition:
    """gram: W' M W on the short side, for the moments M of the long one; short_side: moments, None for the identity."""
    with spectrum.exact_products(weight.device):
        if short_side is not None:
            lower = _cholesky(short_side.to(gram), tuple(weight.shape))
            gram = lower.mT @ gram @ lower
        if not torch.isfinite(gram).all():
            raise SpectrumError(
                f"weight of shape {tuple(weight.shape)}, or its moments, hold inf or nan. "
                "Repair the checkpoint, or exclude this matrix."
            )
        squares, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
        vectors = vectors.flip(1)
        basis, dual = vectors, vectors.mT
        if short_side is not None:
            basis = lower @ vectors
            dual = torch.linalg.solve_triangular(lower.mT, vectors, upper=True).mT
        if not _is_upright(weight):
            basis, dual = dual.mT, basis.mT
    stored = torch.float64 if weight.dtype == torch.float64 else torch.float32
    place = weight.device
    projection = Projection(
        basis.to(stored).contiguous().to(place), dual.to(stored).contiguous().to(place), _is_upright(weight)
    )
    return Decomposition(_tail_sums(squares.flip(0).clamp(min=0).cpu().numpy()), projection)


def _is_upright(weight: Tensor) -> bool:
    """Whether the columns are the short side."""
    return weight.shape[0] >= weight.shape[1]


def _upright(weight: Tensor) -> Tensor:
    """The weight in float64, its columns being the short side; on the CPU where its device has no float64."""
    exact = weight.detach()
    if exact.device.type not in _FLOAT64_DEVICES:
        exact = exact.cpu()
    exact = exact.double()
    return exact if _is_upright(weight) else exact.mT


def _tail_sums(squares: np.ndarray) -> np.ndarray:
    """Half the sum of the squares from each place on."""
    return np.append(np.cumsum(squares[::-1])[::-1] / 2, 0.0)


def _cholesky(moments: Tensor, shape: tuple[int, ...]) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(moments)
    if failed or not torch.isfinite(lower).all():
        raise SpectrumError(
            f"the moments of the shorter side of a weight of shape {shape} are not positive definite, as those "
            "of too few tokens aren't. Exclude this matrix, or use --reduce svd."
        )
    return lower


def _check_rank(weight: Tensor, rank: int) -> int:
    """The full rank."""
    short = min(weight.shape)
    if not 1 <= rank <= short:
        raise RankError(
            f"rank {rank}, but a weight of shape {tuple(weight.shape)} allows 1 to {short}. "
            "Choose a rank in that range."
        )
    return short
