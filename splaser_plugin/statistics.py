"""What a part of the pairs says about all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist

import numpy as np


def upper_bound(sample: Sequence[float], population: float, risk: float) -> float:
    """A value that the mean of the whole population exceeds with a probability of about `risk` at most.

    sample: values drawn without replacement, at least 2, in the unit of the result. population: how many there
    are in all, the sample among them; may be infinite. risk: between 0 and 1.
    Student's t with the finite-population correction 1 - n/N (Cochran, Sampling Techniques, 1977, chapter 2);
    with the whole population it is the mean itself. Exact for normal values, approximate for others: bounds
    that need no such assumption (Bardenet & Maillard 2015) are several times wider at these sizes.
    """
    values = np.asarray(sample, dtype=np.float64)
    spread = values.std(ddof=1) * math.sqrt((1 - len(values) / population) / len(values))
    return float(values.mean() + t_quantile(1 - risk, len(values) - 1) * spread)


def least_significant_mean(sample: Sequence[float], size: int, risk: float) -> float:
    """The mean of `size` values from which a one-sided t test says that the true mean is above zero.

    sample: some or all of the values, at least 2, for their spread. risk: probability that the test says so of
    a true mean of zero. Source: Student 1908.
    """
    spread = float(np.std(sample, ddof=1)) / math.sqrt(size)
    return t_quantile(1 - risk, size - 1) * spread


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution. degrees: degrees of freedom, at least 1."""
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, max(1.0, NormalDist().inv_cdf(probability))
    while t_cumulative(high, degrees) < probability:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_cumulative(middle, degrees) < probability else (low, middle)
    return high


def t_cumulative(t: float, degrees: int) -> float:
    """Probability that Student's t is below `t`. Source: Abramowitz & Stegun 1964, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    is_odd = degrees % 2 == 1
    term = math.cos(angle) if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for power in range(3 if is_odd else 2, degrees - 1, 2):
        term *= (power - 1) / power * math.cos(angle) ** 2
        total += term
    within = math.sin(angle) * total
    if is_odd:
        within = (angle + within) * 2 / math.pi
    return (1 + within) / 2
