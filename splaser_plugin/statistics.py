"""What a part of the pairs says about all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
NUMBERS_AT_ONCE = 2**20


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


def can_reach(differences: Sequence[float], risk: float) -> bool:
    """Whether enough differences aren't zero for a one-sided sign test to reach this level, did they all agree.

    Where most pairs are equal, Student's t and the bootstrap would call it sure after two or three of them.
    """
    return 0.5 ** int(np.count_nonzero(differences)) <= risk


def paired_bootstrap(
    differences: Sequence[float], *, risk: float, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Interval for the mean of the population that these differences are a sample of, in their unit.

    differences: of pairs, result minus base, at least 2. risk: probability that the mean lies outside, half on
    either side. The expanded percentile interval of Hesterberg 2015 (What Teachers Should Know About the
    Bootstrap, section 5.3): quantiles of resampled means, at levels that make it as wide as Student's t where
    the values are normal. With many zeros, as where answers stay the same, BCa and studentised intervals missed
    their level by more; with strongly skewed values (exponential, 60 of them) this one covers 93 % instead of 95.
    """
    values = np.asarray(differences, dtype=np.float64)
    count = len(values)
    random = np.random.default_rng(seed)
    rows = max(1, NUMBERS_AT_ONCE // count)
    means = np.concatenate(
        [
            values[random.integers(count, size=(min(rows, resamples - start), count))].mean(1)
            for start in range(0, resamples, rows)
        ]
    )
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * t_quantile(1 - risk / 2, count - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


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
