"""Exact p-values and confidence bounds on integer counts. Pure functions; no asymptotics.

A p-value here belongs to the hypothesis that a risk is *larger* than allowed, so that a small one certifies the risk.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy  # which loads scipy.stats when it is used: that takes longer than all else that a predictor imports


Array = np.ndarray[Any, np.dtype[Any]]

CELLS = 100  # into which the unknown rate of gained rows is cut
_SPENT = 0.01  # part of a level that goes into not knowing that rate
_CUT = 1e-10  # probability of the counts of gained rows that are left out on either side, and then added


def binomial_p_value(events: int, rows: int, max_rate: float) -> float:
    """P(at most so many events among the rows), if the rate were `max_rate`: exact for independent rows."""
    return float(scipy.stats.binom.cdf(events, rows, max_rate))


def binomial_bounds(events: int, rows: int, confidence: float) -> tuple[float, float]:
    """Exact one-sided bounds, each with this confidence, on the rate behind a count.

    Source: Clopper and Pearson, Biometrika 26, 1934.
    """
    lower = 0.0 if events == 0 else float(scipy.stats.beta.ppf(1 - confidence, events, rows - events + 1))
    upper = 1.0 if events == rows else float(scipy.stats.beta.ppf(confidence, events + 1, rows - events))
    return lower, upper


def paired_p_value(lost: int, gained: int, rows: int, max_increase: float, level: float) -> float:
    """A p-value for a signed, paired loss: +1 for rows that are lost, -1 for rows that are gained, 0 for the others.

    The hypothesis is P(lost) - P(gained) >= max_increase. Outcomes are ordered by a score statistic: lost - gained
    against what is allowed, over its standard deviation at the rate of gains that is most likely under the hypothesis
    (Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
    Statistics in Medicine 17, 1998). The p-value is the exact probability of an outcome as extreme, the largest over
    the one nuisance, P(gained) (Hsueh, Liu and Chen, "Unconditional exact tests for equivalence or noninferiority for
    paired binary endpoints", Biometrics 57, 2001); here over an exact confidence interval of it, plus the probability
    that the interval misses it (Berger and Boos, "P Values Maximized Over a Confidence Set for the Nuisance Parameter",
    JASA 89, 1994). Within each of the cells that the interval is cut into, losses are taken at their least likely and
    gains at their most, so that the result is an upper bound, not an approximation. Chosen over bounds from the range
    of the loss (Hoeffding, Bentkus), since nearly all rows are 0: those know the range, this knows the counts.

    Args:
        lost: rows that full depth answers rightly and early exit wrongly.
        gained: the reverse.
        rows: all rows.
        max_increase: the increase in errors that is to be excluded, in (0, 1).
        level: at which the p-value will be used.
    """
    seen = float(_score(lost, gained, rows, max_increase))
    if seen >= 0:
        return 1.0  # no fewer were lost than the hypothesis has it
    spent = level * _SPENT
    least, most = binomial_bounds(gained, rows, 1 - spent / 2)
    edges = np.linspace(least, most, CELLS + 1)
    rate_lost = edges[:-1] + max_increase
    possible = rate_lost < 1
    if not possible.any():
        return min(1.0, spent)
    rate_lost = rate_lost[possible]
    rate_gained = np.minimum(edges[1:][possible], 1 - rate_lost)
    first = int(scipy.stats.binom.ppf(_CUT, rows, rate_gained.min()))
    last = int(scipy.stats.binom.isf(_CUT, rows, rate_gained.max()))
    gains = np.arange(first, last + 1)
    losses = np.maximum.accumulate(_most_lost(gains, rows, max_increase, seen))
    # P(as extreme) = sum over gains g of P(g) * P(lost <= losses[g] | g)
    weight = scipy.stats.binom.pmf(gains, rows, rate_gained[:, None])
    share = np.minimum(1.0, rate_lost / np.maximum(1 - rate_gained, 1e-300))
    at_most = scipy.stats.binom.cdf(losses, rows - gains, share[:, None])
    return float(min(1.0, (weight * at_most).sum(axis=1).max() + 2 * _CUT + spent))


def _score(lost: Array | int, gained: Array | int, rows: int, max_increase: float) -> Array:
    """Tango's statistic: below 0 where fewer are lost than the hypothesis has it."""
    changed, difference = lost + gained, lost - gained
    linear = (2 * rows - difference) * max_increase - changed
    constant = gained * max_increase * (1 - max_increase)
    likely = (np.sqrt(linear**2 + 8 * rows * constant) - linear) / (4 * rows)  # the rate of gains
    variance = rows * (2 * likely + max_increase * (1 - max_increase))
    return np.asarray((difference - rows * max_increase) / np.sqrt(variance))


def _most_lost(gained: Array, rows: int, max_increase: float, seen: float) -> Array:
    """Of every number of gained rows, how many may be lost for a score of `seen`, below 0, or less; -1: none."""
    low = np.full(len(gained), -1)  # the score rises with the losses, up to where it is 0
    high = np.minimum(np.ceil(gained + rows * max_increase).astype(int), rows - gained) + 1
    while (high - low > 1).any():
        middle = (low + high) // 2
        extreme = _score(middle, gained, rows, max_increase) <= seen + 1e-12
        low, high = np.where(extreme, middle, low), np.where(extreme, high, middle)
    return low


def paired_upper_bound(lost: int, gained: int, rows: int, confidence: float) -> float:
    """The smallest increase in errors that `paired_p_value` excludes at this confidence, from above to 1e-5."""
    level = 1 - confidence
    return _smallest(lambda increase: paired_p_value(lost, gained, rows, increase, level) <= level)


def _smallest(holds: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def rows_needed(p_value: Callable[[int], float], level: float, most: int = 10_000_000) -> int | None:
    """How many rows it takes until a p-value, a function of their number, comes down to a level. `None`: too many."""
    high = 1
    while p_value(high) > level:
        high *= 2
        if high > most:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(middle) <= level else (middle, high)
    return high
