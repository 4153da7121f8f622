"""What a part of the pairs says about all of them. scipy.stats takes long to import, so the first call does it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

RESAMPLES = 10_000
NUMBERS_AT_ONCE = 2**20
RISK = 0.05
"""That an interval doesn't hold what it is for: all that are told are of 95 %."""
POWER = 0.8
"""Chance that a difference is shown of which a run says that its pairs can show it."""
SMALLEST_LOG_RISK = -200.0
"""scipy's quantiles of Student's t are exact down to probabilities of this logarithm, and wrong below about -690."""
LARGEST_T = 1e100


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
    return float(values.mean() + t_critical(math.log(risk), len(values) - 1) * spread)


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
    from scipy import stats

    values = np.asarray(differences, dtype=np.float64)
    count = len(values)
    level = stats.norm.cdf(-math.sqrt(count / (count - 1)) * t_critical(math.log(risk / 2), count - 1))
    found = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=1 - 2 * level,
        method="percentile",
        n_resamples=resamples,
        batch=max(1, NUMBERS_AT_ONCE // count),
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def trimmed_mean(differences: Sequence[float]) -> float:
    """Their mean without the lowest and the highest tenth, which a few pairs can't rule."""
    from scipy import stats

    return float(stats.trim_mean(differences, 0.1))


def least_significant_mean(sample: Sequence[float], size: int, log_risk: float) -> float:
    """The mean of `size` values from which a one-sided t test says that the true mean is above zero.

    sample: some or all of the values, at least 2, for their spread. log_risk: natural logarithm of the probability
    that the test says so of a true mean of zero. Source: Student 1908.
    """
    spread = float(np.std(sample, ddof=1)) / math.sqrt(size)
    return t_critical(log_risk, size - 1) * spread if spread else 0.0


def smallest_difference(spread: float, size: int, *, power: float = POWER, risk: float = RISK) -> float:
    """The smallest true mean difference that `size` pairs are likely to show.

    (t(1 - risk/2) + t(power)) * spread / sqrt(size), with quantiles of Student's t of size - 1 degrees of freedom:
    the two-sided paired t test (Cohen, Statistical Power Analysis, 1988, chapter 2), with a central t for the
    noncentral one.

    Args:
        spread: Standard deviation of the pairs' differences, in the result's unit.
        size: Number of pairs, at least 2.
        power: Chance that a difference of this size is shown.
        risk: Chance that one is shown where there is none, half on either side.
    """
    quantiles = t_critical(math.log(risk / 2), size - 1) + t_critical(math.log(1 - power), size - 1)
    return quantiles * spread / math.sqrt(size)


def pairs_needed(spread: float, difference: float, *, power: float = POWER, risk: float = RISK) -> int:
    """The fewest pairs whose `smallest_difference` is at most `difference`, which is above 0; at least 2."""
    few, enough = 1, 2
    while smallest_difference(spread, enough, power=power, risk=risk) > difference:
        few, enough = enough, 2 * enough
    while enough - few > 1:
        middle = (few + enough) // 2
        if smallest_difference(spread, middle, power=power, risk=risk) > difference:
            few = middle
        else:
            enough = middle
    return enough


def largest_share(count: int, size: int, risk: float) -> float:
    """A share that the whole population exceeds with a probability of `risk` at most, where `count` of `size` have it.

    Source: Clopper & Pearson 1934, one-sided; 1 - risk^(1/size) where none has it.
    """
    from scipy import stats

    return 1.0 if count == size else float(stats.beta.isf(risk, count + 1, size - count))


@cache
def t_critical(log_risk: float, degrees: int) -> float:
    """What Student's t exceeds with a probability of exp(log_risk), at most 1/2; infinite above `LARGEST_T`.

    In logarithms, as a search of 1,100 candidates tests at 2^-1100, which no float holds. scipy works with the
    probability itself, so below `SMALLEST_LOG_RISK` the tail is inverted here. degrees: of freedom, at least 1.
    """
    from scipy import optimize, stats

    if log_risk >= SMALLEST_LOG_RISK:
        return float(stats.t.isf(math.exp(log_risk), degrees))
    if far_log_t_tail(LARGEST_T, degrees) > log_risk:
        return math.inf
    nearest = float(stats.t.isf(math.exp(SMALLEST_LOG_RISK), degrees))
    log_t = optimize.brentq(
        lambda log_t: far_log_t_tail(math.exp(log_t), degrees) - log_risk,
        math.log(nearest),
        math.log(LARGEST_T),
        xtol=1e-14,
        rtol=1e-14,
    )
    return math.exp(log_t)


def far_log_t_tail(t: float, degrees: int) -> float:
    """Natural logarithm of the probability that Student's t exceeds `t`, for tails below `SMALLEST_LOG_RISK`.

    Half a regularised incomplete beta function I_x(a, b) (Abramowitz & Stegun 1964, 26.5.27), by DLMF 8.17.8.
    """
    from scipy import special

    x, a, b = degrees / (degrees + t * t), degrees / 2, 0.5
    series = float(special.hyp2f1(a + b, 1, a + 1, x))
    return a * math.log(x) + b * math.log1p(-x) + math.log(series / (2 * a)) - float(special.betaln(a, b))
