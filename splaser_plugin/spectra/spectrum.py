"""Singular values and low-rank truncation of a weight, from the Gram matrix of its short side.

The eigenvalues of W^T W (or W W^T, whichever is smaller) are the squared singular values. They cost about a
tenth of a full SVD, but squaring loses what is small, so every result is checked against a bound of its own
rounding error, and a weight that doesn't pass goes to the SVD.

float64 is used wherever the device has it, also on GPUs that are slow at it: in float32 the lower quartile of
small and well-conditioned weights is already off by 4e-6 to 2e-3 relative, so that a check at 1e-6 would
refuse it every time. float32 is for those who ask for it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from splaser_plugin.errors import RankError, SpectrumError
from splaser_plugin.spectra.edges import same_fits

Precision = Literal["auto", "float32", "float64", "svd"]

_DTYPES = {
    "auto": (torch.float64,),
    "float32": (torch.float32, torch.float64),
    "float64": (torch.float64,),
    "svd": (),
}
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
FLOAT64_DEVICES = ("cpu", "cuda")
_BLOCK_BYTES = 32 * 2**20
_PANEL = 192
_BATCH_BYTES = 8 * 2**20
_BATCH_OF_AT_LEAST = 8


def singular_values(weight: Tensor, *, precision: Precision = "auto") -> np.ndarray:
    """All singular values of a weight.

    weight: (rows, columns), any float dtype (float8 too), any device, any strides.
    precision: `auto` and `float64` give the thresholds, sums and snr of every edge to 1e-6 relative and the
    exact ranks, as a full SVD in float64 does. `float32` takes about 0.6 of the time and gives them to about
    1 %; a weight too ill-conditioned for that is computed in float64. `svd` is a full SVD in float64, which gives
    small singular values too, to about 1e-15 of the largest one; it takes several times as long.
    Returns (min(rows, columns),) float64, descending, in the weight's unit. Beside the weight, memory holds
    two square float64 matrices of the short side, or one and a block of 32 MiB; where the SVD is needed, as for a
    weight of exactly low rank, at most about eight of them.
    Raises SpectrumError when the weight is not a matrix of floats, is empty, or holds inf or nan.
    """
    dtypes = _dtypes(precision)
    matrix = _readable(weight, dimensions=2)
    with exact_products(matrix.device, *dtypes[:1]):
        exponent = _exponent(matrix)
        for dtype in dtypes:
            squares = _descending(torch.linalg.eigvalsh(_gram(matrix, exponent, dtype)))
            if _resolved(squares, matrix.shape, dtype):
                return _unscaled(np.sqrt(squares), exponent)
        values = torch.linalg.svdvals(_shortened(matrix, exponent))
        return _unscaled(values.cpu().numpy(), exponent)


def singular_values_of_batch(weights: Tensor, *, precision: Precision = "auto") -> np.ndarray:
    """All singular values of many weights of one shape, such as the experts of one layer.

    weights: (count, rows, columns). Returns (count, min(rows, columns)) float64, every row descending. Weights of
    at most 1 MiB in float64 are computed as many at once as make 8 MiB, larger ones, where that is no faster,
    one by one. For the rest see `singular_values`.
    """
    dtypes = _dtypes(precision)
    stack = _readable(weights, dimensions=3)
    count, rows, columns = stack.shape
    at_once = _BATCH_BYTES // (8 * rows * columns)
    values = np.empty((count, min(rows, columns)))
    if at_once < _BATCH_OF_AT_LEAST or not dtypes:
        for index in range(count):
            values[index] = singular_values(stack[index], precision=precision)
        return values
    with exact_products(stack.device, dtypes[0]):
        for start in range(0, count, at_once):
            some = stack[start : start + at_once]
            exponents = _exponents(some, start)
            grams = _grams(some, exponents, dtypes[0])
            for index, squares in enumerate(_descending(torch.linalg.eigvalsh(grams))):
                if _resolved(squares, (rows, columns), dtypes[0]):
                    values[start + index] = _unscaled(np.sqrt(squares), exponents[index])
                else:
                    values[start + index] = singular_values(some[index], precision="float64")
    return values


def truncate(weight: Tensor, rank: int, *, precision: Precision = "auto") -> Tensor:
    """The best approximation of a weight by a matrix of a given rank, in any unitarily invariant norm.

    weight: as in `singular_values`. rank: 1 to min(rows, columns); the full rank gives an exact copy.
    Returns a new tensor of the weight's shape, dtype and device. Rounding to that dtype brings back small
    singular values (`factors` keeps the rank exact); entries beyond its range become its largest number.
    precision: `auto` and `float64` are as good as a full SVD in float64 to 1e-6 of the truncation's norm;
    `float32` is faster and gives way to float64 where it would be off by more than 1 %.
    Source: Eckart & Young 1936, as W V V^T with V the first eigenvectors of W^T W.
    Raises RankError for a rank out of range, SpectrumError as `singular_values` does.
    """
    matrix, kept, removed, exponent = _split(weight, rank, precision)
    if removed.shape[1] == 0:
        return weight.detach().clone()
    if weight.element_size() <= 2:
        kept, removed = kept.float(), removed.float()
    truncated = torch.empty_like(weight, device=matrix.device, requires_grad=False)
    largest = torch.finfo(weight.dtype).max
    with exact_products(matrix.device, kept.dtype):
        for source, target in zip(_row_blocks(matrix), _row_blocks(truncated), strict=True):
            block = _scaled(source, exponent).to(kept.dtype)
            if rank <= removed.shape[1]:
                block = (block @ kept) @ kept.mT
            else:
                block = torch.addmm(block, block @ removed, removed.mT, alpha=-1)
            target.copy_(_unscaled_tensor(block, exponent).clamp_(-largest, largest))
    return truncated.to(weight.device)


def factors(weight: Tensor, rank: int, *, precision: Precision = "auto") -> tuple[Tensor, Tensor]:
    """Two thin matrices whose product is `truncate(weight, rank)` before that is rounded.

    Returns (rows, rank) and (rank, columns) on the weight's device, in float64 (in float32 on a device that
    has no float64). The one on the weight's short side has orthonormal rows or columns.
    Raises RankError for a rank out of range, SpectrumError as `singular_values` does.
    """
    matrix, kept, _, exponent = _split(weight, rank, precision)
    with exact_products(matrix.device, kept.dtype):
        projected = [_scaled(block, exponent).to(kept.dtype) @ kept for block in _row_blocks(matrix)]
        long_side = _unscaled_tensor(torch.cat(projected), exponent)
        short_side = kept.to(long_side.dtype)
    dtype = torch.float64 if weight.device.type in FLOAT64_DEVICES else torch.float32
    long_side, short_side = (side.to(dtype).to(weight.device) for side in (long_side, short_side))
    rows, columns = matrix.shape
    return (long_side, short_side.mT) if rows >= columns else (short_side, long_side.mT)


def components(weight: Tensor) -> tuple[Tensor, Tensor]:
    """All singular values of a weight, and its singular vectors on the short side, in one order: largest first.

    Returns (short,) and (short, short), whose columns are right singular vectors where rows >= columns and left
    ones elsewhere; on the weight's device, in float32, or float64 for a float64 weight. The vectors are those
    that `truncate` keeps and removes, from the same Gram matrix.
    Raises SpectrumError as `singular_values` does.
    """
    matrix = _readable(weight, dimensions=2)
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.element_size() > 1 else torch.float32
    with exact_products(matrix.device, torch.float64):
        exponent = _exponent(matrix)
        squares, vectors = torch.linalg.eigh(_gram(matrix, exponent, torch.float64))
        values = _unscaled_tensor(squares.flip(0).clamp_(min=0).sqrt_(), exponent)
    return values.to(dtype).to(weight.device), vectors.flip(1).to(dtype).to(weight.device)


def _dtypes(precision: str) -> tuple[torch.dtype, ...]:
    if precision not in _DTYPES:
        raise SpectrumError(f"unknown precision {precision!r}. Use one of: {', '.join(_DTYPES)}.")
    return _DTYPES[precision]


def _readable(weight: Tensor, dimensions: int) -> Tensor:
    """The weight in a dtype that arithmetic knows, on a device that has float64 and eigenvalues."""
    shape = tuple(weight.shape)
    if weight.dim() != dimensions or 0 in shape:
        wanted = "(rows, columns)" if dimensions == 2 else "(count, rows, columns)"
        raise SpectrumError(f"weight of shape {shape}: expected {wanted} with at least one entry.")
    if weight.is_meta or not weight.is_floating_point():
        raise SpectrumError(
            f"weight of shape {shape} is {weight.dtype} on {weight.device}: singular values need floating point "
            "entries in memory. Load it, or dequantize it first."
        )
    weight = weight.detach()
    if weight.device.type not in FLOAT64_DEVICES:
        weight = weight.cpu()
    return weight.to(torch.bfloat16) if weight.element_size() == 1 else weight


class _FullFloat32:
    """Inside, no TF32 or bfloat16 in float32 matrix products; what the user had set comes back afterwards.

    The switches are those of the whole process, and in a backward pass each device has a thread of its own: the first
    to come sets them, and the last to go sets them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[str] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = _float32_precisions()
                _set_float32_precisions(["ieee"] * len(self._before))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                _set_float32_precisions(self._before)


_full_float32 = _FullFloat32()


@contextmanager
def exact_products(device: torch.device, dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """No gradients, no autocast and, for float32, no TF32 or bfloat16 inside matrix products."""
    is_float32 = dtype == torch.float32
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _full_float32 if is_float32 else nullcontext():
        yield


def _float32_switches() -> list[Any]:
    """None in torch before 2.9, which has one setting for all."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return []
    return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]


def _float32_precisions() -> list[str]:
    return [switch.fp32_precision for switch in _float32_switches()] or [torch.get_float32_matmul_precision()]


def _set_float32_precisions(precisions: Sequence[str]) -> None:
    switches = _float32_switches()
    if not switches:
        torch.set_float32_matmul_precision("highest" if precisions[0] == "ieee" else precisions[0])
        return
    for switch, precision in zip(switches, precisions, strict=True):
        switch.fp32_precision = precision


def _exponent(matrix: Tensor) -> int:
    """The power of two that brings the largest entry to between 0.5 and 1, so that no square overflows."""
    low, high = torch.aminmax(matrix)
    return _binary_exponent(float(torch.maximum(low.abs(), high.abs())), tuple(matrix.shape))


def _exponents(stack: Tensor, first: int) -> list[int]:
    peaks = stack.abs().amax(dim=(1, 2)).tolist()  # several times as fast as aminmax over dimensions
    shape = tuple(stack.shape[1:])
    return [_binary_exponent(peak, shape, f", number {index} of its batch,") for index, peak in enumerate(peaks, first)]


def _binary_exponent(peak: float, shape: tuple[int, ...], which: str = "") -> int:
    if not math.isfinite(peak):
        raise SpectrumError(
            f"weight of shape {shape}{which} holds inf or nan: it has no singular values. "
            "Repair the checkpoint, or exclude this matrix."
        )
    return max(-1000, min(1000, math.frexp(peak)[1]))


def _scaled(block: Tensor, exponent: int) -> Tensor:
    return block.to(torch.float64, copy=True).mul_(2.0**-exponent)


def _unscaled(values: np.ndarray, exponent: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = np.ldexp(values, exponent)
    if not np.isfinite(values).all():
        raise SpectrumError("the largest singular value is beyond float64. Scale the weight down.")
    return values


def _unscaled_tensor(block: Tensor, exponent: int) -> Tensor:
    return block.to(torch.float64).mul_(2.0**exponent)


def _row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of the matrix, its long side upright, every view with as many rows as fit into a block of float64."""
    rows, columns = matrix.shape
    upright = matrix if rows >= columns else matrix.mT
    return upright.split(max(1, _BLOCK_BYTES // (8 * upright.shape[1])))


def _gram(matrix: Tensor, exponent: int, dtype: torch.dtype) -> Tensor:
    """Lower triangle of the short side's Gram matrix; what is above the diagonal blocks stays zero."""
    short = min(matrix.shape)
    gram = torch.zeros(short, short, dtype=dtype, device=matrix.device)
    for source in _row_blocks(matrix):
        block = _scaled(source, exponent).to(dtype)
        for start in range(0, short, _PANEL):
            end = min(start + _PANEL, short)
            gram[start:end, :end].addmm_(block[:, start:end].mT, block[:, :end])
    return gram


def _shortened(matrix: Tensor, exponent: int) -> Tensor:
    """A float64 matrix with the singular values of the weight, and its singular vectors of the short side.

    The weight itself, or where it is more than twice as long as it is wide, R of its QR decomposition, long side
    upright, from one square block of rows after the other (Demmel, Grigori, Hoemmen & Langou 2012): no copy of a long
    weight is needed.
    """
    if max(matrix.shape) <= 2 * min(matrix.shape):
        return _scaled(matrix, exponent)
    upright = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    short = upright.shape[1]
    triangle = _scaled(upright[:short], exponent)
    for block in upright[short:].split(short):
        triangle = torch.linalg.qr(torch.cat([triangle, _scaled(block, exponent)]), mode="r").R
    return triangle


def _grams(stack: Tensor, exponents: list[int], dtype: torch.dtype) -> Tensor:
    scales = torch.tensor([2.0**-exponent for exponent in exponents], dtype=torch.float64, device=stack.device)
    blocks = stack.to(torch.float64, copy=True).mul_(scales[:, None, None]).to(dtype)
    upright = blocks if blocks.shape[1] >= blocks.shape[2] else blocks.mT
    return upright.mT @ upright


def _descending(eigenvalues: Tensor) -> np.ndarray:
    """Eigenvalues of positive semidefinite matrices as float64 on the CPU, descending, none negative."""
    return np.maximum(eigenvalues.cpu().numpy()[..., ::-1].astype(np.float64), 0.0)


def _error_bound(squares: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """How far each eigenvalue of the Gram matrix may be from a squared singular value.

    Weyl: no farther than the norm of the rounding error, which is at most about u (sqrt(rows) + sqrt(columns))
    times the trace (rounding errors of random sign: Higham & Mary 2019), here doubled. Measured errors of
    random, trained and ill-conditioned weights were 0.2 to 15 u times the trace; float32, which promises less,
    takes u times the trace, the size usually seen.
    """
    rounding = torch.finfo(dtype).eps / 2 * float(squares.sum())
    if dtype == torch.float32:
        return rounding
    return 2.0 * (math.sqrt(shape[0]) + math.sqrt(shape[1])) * rounding


def _resolved(squares: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    bound = _error_bound(squares, shape, dtype)
    lower, upper = np.sqrt(np.maximum(squares - bound, 0.0)), np.sqrt(squares + bound)
    return same_fits(lower, upper, (shape[0], shape[1]), _TOLERANCE[dtype])


def _split(weight: Tensor, rank: int, precision: Precision) -> tuple[Tensor, Tensor, Tensor, int]:
    """The readable weight, singular vectors of its short side to keep and to remove, and its exponent."""
    dtypes = _dtypes(precision)
    matrix = _readable(weight, dimensions=2)
    short = min(matrix.shape)
    if not 1 <= rank <= short:
        raise RankError(
            f"rank {rank}, but a weight of shape {tuple(matrix.shape)} allows 1 to {short}. "
            "Choose a rank in that range."
        )
    with exact_products(matrix.device, *dtypes[:1]):
        exponent = _exponent(matrix)
        for dtype in dtypes:
            squares, vectors = torch.linalg.eigh(_gram(matrix, exponent, dtype))
            if _separated(_descending(squares), rank, matrix.shape, dtype):
                return matrix, vectors[:, short - rank :], vectors[:, : short - rank], exponent
        plain = _shortened(matrix, exponent)
        left, _, right = torch.linalg.svd(plain, full_matrices=False)
    vectors = right.mT if plain.shape[0] >= plain.shape[1] else left
    return matrix, vectors[:, :rank], vectors[:, rank:], exponent


def _separated(squares: np.ndarray, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the eigenvectors kept are separated from the others well enough for the truncation.

    The error bound over the gap between the last square kept and the first one removed is the sine of the angle
    by which the two mix (Davis & Kahan 1970); what is mixed is no larger than the last singular value kept.
    """
    if rank == squares.size:
        return True
    bound = _error_bound(squares, shape, dtype)
    gap = squares[rank - 1] - squares[rank]
    sine = bound / gap if bound < gap else 1.0
    return sine * math.sqrt(squares[rank - 1] + bound) <= _TOLERANCE[dtype] * math.sqrt(squares[:rank].sum())
