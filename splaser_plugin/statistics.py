"""What a part of the pairs says about all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
NUMBERS_AT_ONCE = 2**20
FRACTION_TERMS = 1000
"""Far more than a continued fraction needs to converge."""


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


def least_significant_mean(sample: Sequence[float], size: int, log_risk: float) -> float:
    """The mean of `size` values from which a one-sided t test says that the true mean is above zero.

    sample: some or all of the values, at least 2, for their spread. log_risk: natural logarithm of the probability
    that the test says so of a true mean of zero. Source: Student 1908.
    """
    spread = float(np.std(sample, ddof=1)) / math.sqrt(size)
    return t_critical(log_risk, size - 1) * spread if spread else 0.0


def largest_share(count: int, size: int, risk: float) -> float:
    """A share that the whole population exceeds with a probability of `risk` at most, where `count` of `size` have it.

    Source: Clopper & Pearson 1934, one-sided; 1 - risk^(1/size) where none has it.
    """
    if count == size:
        return 1.0

    def probability(share: float) -> float:
        """Of at most `count`."""
        ways = [math.lgamma(size + 1) - math.lgamma(n + 1) - math.lgamma(size - n + 1) for n in range(count + 1)]
        kept, lost = math.log(share), math.log1p(-share)
        return sum(math.exp(way + n * kept + (size - n) * lost) for n, way in enumerate(ways))

    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) > risk else (low, middle)
    return high


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution. degrees: degrees of freedom, at least 1."""
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    return t_critical(math.log1p(-probability), degrees)


@cache
def t_critical(log_risk: float, degrees: int) -> float:
    """What Student's t exceeds with a probability of exp(log_risk), at most 1/2; infinite above 1e100.

    In logarithms, as a probability of 2^-100 is lost in its difference to 1. degrees: see `t_quantile`.
    """
    low, high = 0.0, 1.0
    while log_t_tail(high, degrees) > log_risk:
        low, high = high, 2 * high
        if high > 1e100:
            return math.inf
    while high - low > 1e-12 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if log_t_tail(middle, degrees) > log_risk else (low, middle)
    return high


def log_t_tail(t: float, degrees: int) -> float:
    """Natural logarithm of the probability that Student's t exceeds `t`, at least 0.

    Half an incomplete beta function (Abramowitz & Stegun 1964, 26.5.27), by the continued fraction DLMF 8.17.22 on
    that side of it where it converges fast.
    """
    if t * t < 3 * degrees / (degrees + 2):
        log_within = _log_beta_ratio(t * t / (degrees + t * t), 0.5, degrees / 2) if t else -math.inf
        return math.log(0.5) + math.log1p(-math.exp(log_within))
    return math.log(0.5) + _log_beta_ratio(degrees / (degrees + t * t), degrees / 2, 0.5)


def _log_beta_ratio(x: float, a: float, b: float) -> float:
    """Logarithm of the regularised incomplete beta function I_x(a, b), for x up to about (a + 1) / (a + b + 2)."""
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    fraction, above, below = 1.0, 1.0, 0.0
    for step in range(1, FRACTION_TERMS):
        half = step // 2
        if step % 2:
            term = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            term = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        above, below = 1 + term / above, 1 / (1 + term * below)
        fraction *= above * below
        if abs(above * below - 1) < 1e-15:
            break
    return a * math.log(x) + b * math.log1p(-x) - math.log(a) - log_beta - math.log(fraction)
