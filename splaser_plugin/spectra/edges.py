"""Edges: where in the singular values of a weight noise is taken to end and signal to begin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from splaser_plugin.config.stages import EDGES
from splaser_plugin.errors import SpectrumError
from splaser_plugin.files.validation import NO_OTHER_KEYS, Number, Whole


@dataclass(frozen=True)
class EdgeFit:
    """One edge placed in one spectrum. Every number is finite; what has no finite value is None."""

    __pydantic_config__ = NO_OTHER_KEYS

    sigma: Number
    """Noise scale, in the weight's unit: of the singular values for `iqr`, of one entry for the others."""
    threshold: Number
    """Singular values above it count as signal, the others as noise."""
    rank: Whole
    """How many singular values are above the threshold."""
    snr: Number | None
    """Sum of the singular values above the threshold over the sum of the others."""
    snr_ratio: Number | None
    """`snr` divided by the largest singular value; unlike `snr` it depends on the weight's scale."""
    reason: str | None
    """Why `snr` or `snr_ratio` is None."""


@lru_cache(maxsize=1024)
def mp_median(beta: float) -> float:
    """Median of the Marchenko-Pastur law of unit variance.

    beta: short side over long side of the matrix, 0 < beta <= 1.
    Source: Marchenko & Pastur 1967. With x = 1 + beta + 2 sqrt(beta) cos(t) the probability above x is
    2/pi times the integral of sin(s)^2 / (1 + beta + 2 sqrt(beta) cos(s)) over s from 0 to t, which is
    smooth, so that Gauss-Legendre nodes and Newton steps reach about 1e-14.
    Raises SpectrumError when beta is outside its range.
    """
    if not 0.0 < beta <= 1.0:
        raise SpectrumError(f"beta {beta!r} is not in (0, 1]: give the short side over the long side.")
    nodes, node_weights = np.polynomial.legendre.leggauss(96)
    center, radius = 1.0 + beta, 2.0 * math.sqrt(beta)
    angle = math.pi / 2
    for _ in range(50):
        nodes_t = 0.5 * angle * (nodes + 1.0)
        density = np.sin(nodes_t) ** 2 / (center + radius * np.cos(nodes_t))
        above = angle / math.pi * float(node_weights @ density)
        slope = 2.0 / math.pi * math.sin(angle) ** 2 / (center + radius * math.cos(angle))
        step = (above - 0.5) / slope
        angle -= step
        if abs(step) < 1e-15:
            break
    return center + radius * math.cos(angle)


def mp_density(values: np.ndarray, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """Density of the singular values of pure noise: integrated over them it gives 1.

    values: where it is wanted, in the weight's unit, not negative. shape: (rows, columns). sigma: standard
    deviation of one entry, above 0, as the edge `mp` estimates it.
    Source: Marchenko & Pastur 1967, for the eigenvalues of W W' / max(shape), here as a density of their roots:
    sqrt((high^2 - s^2) (s^2 - low^2)) / (pi sigma^2 min(shape) s), low and high = sigma |sqrt(rows) -+ sqrt(columns)|.
    """
    rows, columns = shape
    low = sigma * abs(math.sqrt(rows) - math.sqrt(columns))
    high = sigma * (math.sqrt(rows) + math.sqrt(columns))
    below = np.divide(low, values, out=np.full(np.shape(values), math.inf if low else 0.0), where=values > 0)
    inside = np.clip(high**2 - values**2, 0.0, None) * np.clip(1.0 - below**2, 0.0, None)
    return np.sqrt(inside) / (math.pi * sigma**2 * min(shape))


def fit_edge(values: np.ndarray, shape: tuple[int, int], edge: str) -> EdgeFit:
    """Places one edge in the singular values of a weight and measures signal against noise.

    values: all min(shape) singular values, any order. shape: (rows, columns) of the weight.
    edge: `iqr` (the published one, not calibrated: it finds signal in pure noise), `mp` or `gavish-donoho`.
    With beta = min(shape) / max(shape) and s = median / sqrt(mp_median(beta) max(shape)):
    iqr: (q75 - q25) / 1.349 (1 + sqrt(beta)); mp: s (sqrt(rows) + sqrt(columns)), the largest singular value
    noise reaches (Bai & Yin 1993); gavish-donoho: s sqrt(max(shape)) sqrt(2 (beta + 1) + 8 beta / (beta + 1
    + sqrt(beta^2 + 14 beta + 1))), the best hard threshold (Gavish & Donoho 2014).
    Raises SpectrumError for an unknown edge and for values that can't be those of a weight of that shape.
    """
    if edge not in EDGES:
        raise SpectrumError(f"unknown edge {edge!r}. Use one of: {', '.join(EDGES)}.")
    return _fit(_checked(values, shape), shape, edge)


def fit_edges(values: np.ndarray, shape: tuple[int, int]) -> dict[str, EdgeFit]:
    """Places every edge in the same singular values; see `fit_edge`."""
    values = _checked(values, shape)
    return {edge: _fit(values, shape, edge) for edge in EDGES}


def same_fits(lower: np.ndarray, upper: np.ndarray, shape: tuple[int, int], tolerance: float) -> bool:
    """Whether all spectra between two bounds have the same fit, to a relative tolerance, at each edge.

    lower, upper: descending bounds of each singular value. Compared are the threshold, the rank (which may
    differ by `tolerance` times the number of values, so by nothing at all when that is below one) and the
    sums of signal and noise, whose errors add up in the snr.
    """
    for edge in EDGES:
        factor = _threshold_factor(shape, edge)
        threshold_low = max(0.0, _sigma(upper, lower, shape, edge)) * factor
        threshold_high = _sigma(lower, upper, shape, edge) * factor
        rank_low = int(np.count_nonzero(lower > threshold_high))
        rank_high = int(np.count_nonzero(upper > threshold_low))
        signal_low, signal_high = lower[:rank_low].sum(), upper[:rank_high].sum()
        noise_low, noise_high = lower[rank_high:].sum(), upper[rank_low:].sum()
        settled = (
            rank_high - rank_low <= tolerance * lower.size
            and threshold_high - threshold_low <= tolerance * threshold_high
            and signal_high - signal_low <= tolerance / 2 * signal_high
            and noise_high - noise_low <= tolerance / 2 * noise_high
        )
        if not settled:
            return False
    return True


def _checked(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if len(shape) != 2 or min(shape) < 1 or values.shape != (min(shape),):
        raise SpectrumError(
            f"{values.shape} singular values for a weight of shape {tuple(shape)}: expected one a row or column, "
            "whichever are fewer. Give all of them."
        )
    if not np.isfinite(values).all() or values.min() < 0:
        raise SpectrumError(
            f"singular values of a weight of shape {tuple(shape)} must be finite and not negative, "
            f"got {values.min()} to {values.max()}. Check the weight for inf and nan."
        )
    return np.sort(values)[::-1]


def _fit(values: np.ndarray, shape: tuple[int, int], edge: str) -> EdgeFit:
    with np.errstate(over="ignore"):
        sigma = _sigma(values, values, shape, edge)
        threshold = sigma * _threshold_factor(shape, edge)
    if not math.isfinite(threshold):
        raise SpectrumError(
            f"the {edge} threshold is too large for float64: singular values go up to {values[0]}. "
            "Scale the weight down."
        )
    rank = int(np.count_nonzero(values > threshold))
    snr, snr_ratio, reason = _signal_to_noise(values, rank)
    return EdgeFit(sigma, threshold, rank, snr, snr_ratio, reason)


def _signal_to_noise(values: np.ndarray, rank: int) -> tuple[float | None, float | None, str | None]:
    """snr, snr_ratio and the reason where one is missing; `values` descending, the first `rank` are signal."""
    top = float(values[0])
    if top == 0.0:
        return None, None, "every singular value is zero"
    if rank == values.size:
        return None, None, f"no singular value is at or below the threshold: all {rank} count as signal"
    relative = values / top
    signal, noise = float(relative[:rank].sum()), float(relative[rank:].sum())
    if noise == 0.0:
        return None, None, f"the {values.size - rank} singular values at or below the threshold are zero"
    with np.errstate(over="ignore"):
        snr = float(np.float64(signal) / noise)
        snr_ratio = float(np.float64(snr) / top)
    if not math.isfinite(snr):
        return None, None, "the ratio of signal to noise is too large for float64"
    if not math.isfinite(snr_ratio):
        return snr, None, f"the snr divided by the largest singular value, {top}, is too large for float64"
    return snr, snr_ratio, None


def _sigma(low: np.ndarray, high: np.ndarray, shape: tuple[int, int], edge: str) -> float:
    """The noise scale from descending values; with two bounds, the largest between `low` and `high`."""
    if edge == "iqr":
        return (_quantile(high, 0.75) - _quantile(low, 0.25)) / 1.349
    return _quantile(high, 0.5) / math.sqrt(mp_median(min(shape) / max(shape)) * max(shape))


def _threshold_factor(shape: tuple[int, int], edge: str) -> float:
    """Threshold of an edge for a noise scale of one."""
    rows, columns = shape
    beta = min(shape) / max(shape)
    if edge == "iqr":
        return 1.0 + math.sqrt(beta)
    if edge == "mp":
        return math.sqrt(rows) + math.sqrt(columns)
    root = math.sqrt(beta * beta + 14.0 * beta + 1.0)
    return math.sqrt(max(shape)) * math.sqrt(2.0 * (beta + 1.0) + 8.0 * beta / (beta + 1.0 + root))


def _quantile(values: np.ndarray, fraction: float) -> float:
    """Linearly interpolated quantile of descending values; np.quantile takes 20 times as long."""
    position = (1.0 - fraction) * (values.size - 1)
    above = math.floor(position)
    below = min(above + 1, values.size - 1)
    high, low = float(values[above]), float(values[below])
    return high + (low - high) * (position - above)
