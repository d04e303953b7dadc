"""Exact p-values and confidence bounds on integer counts. Pure functions; no asymptotics.

A p-value here belongs to the hypothesis that a risk is *larger* than allowed, so that a small one certifies the risk.
"""

from collections.abc import Callable

import numpy as np
from scipy.stats import beta, binom


CELLS = 40  # into which the unknown rate of gained rows is cut
# Where fewer lost rows than this are allowed on average, losses alone are counted; found by simulation on exit tables.
FEW_EVENTS = 18
_CUT = 1e-10  # probability of the counts of changed rows that are left out on either side, and then added


def binomial_p_value(events: int, rows: int, max_rate: float) -> float:
    """P(at most so many events among the rows), if the rate were `max_rate`: exact for independent rows."""
    return float(binom.cdf(events, rows, max_rate))


def binomial_bounds(events: int, rows: int, confidence: float) -> tuple[float, float]:
    """Exact one-sided bounds, each with this confidence, on the rate behind a count.

    Source: Clopper and Pearson, Biometrika 26, 1934.
    """
    lower = 0.0 if events == 0 else float(beta.ppf(1 - confidence, events, rows - events + 1))
    upper = 1.0 if events == rows else float(beta.ppf(confidence, events + 1, rows - events))
    return lower, upper


def paired_p_value(lost: int, gained: int, rows: int, max_increase: float, spent: float) -> float:
    """A p-value for a signed, paired loss: +1 for rows that are lost, -1 for rows that are gained, 0 for the others.

    The hypothesis is P(lost) - P(gained) >= max_increase. The test statistic is lost - gained. Its distribution depends
    on one nuisance, P(gained), so the p-value is the largest over an exact confidence interval of that, plus the
    probability `spent` that the interval misses it. Source of this device: Berger and Boos, "P Values Maximized Over a
    Confidence Set for the Nuisance Parameter", JASA 89, 1994. Within each of the cells that the interval is cut into,
    the losses are taken at their least and the gains at their most likely, so that the result is an upper bound, not
    an approximation. Chosen over the range-based bounds of the field (Hoeffding, Bentkus) because nearly all rows are
    0: those know the range, this knows the counts.

    Args:
        lost: rows that full depth answers rightly and early exit wrongly.
        gained: the reverse.
        rows: all rows.
        max_increase: the increase in errors that is to be excluded, in (0, 1).
        spent: see above; a small part of the level at which the p-value will be used.
    """
    edges = np.linspace(0.0, binomial_bounds(gained, rows, 1 - spent)[1], CELLS + 1)
    rate_lost = edges[:-1] + max_increase
    possible = rate_lost < 1
    if not possible.any():
        return min(1.0, spent)
    rate_lost = rate_lost[possible]
    rate_gained = np.minimum(edges[1:][possible], 1 - rate_lost)
    changed = rate_lost + rate_gained
    # P(lost - gained <= d) = sum over m changed rows of P(m) * P(lost <= (m + d) / 2 | m)
    first = int(binom.ppf(_CUT, rows, changed.min()))
    last = int(binom.isf(_CUT, rows, changed.max()))
    counts = np.arange(first, last + 1)[None, :]
    weight = binom.pmf(counts, rows, changed[:, None])
    at_most = binom.cdf((counts + lost - gained) // 2, counts, (rate_lost / changed)[:, None])
    return float(min(1.0, (weight * at_most).sum(axis=1).max() + 2 * _CUT + spent))


def error_increase_p_value(lost: int, gained: int, rows: int, max_increase: float, level: float) -> float:
    """A p-value for "errors increase by `max_increase` or more", to be used at one level.

    Many rows: `paired_p_value`, which sets gains against losses. Few rows: a gain is worth less than what it takes to
    learn the rate of gains, and as the increase is never more than the rate of losses, the exact binomial test of the
    losses alone is valid and stronger. Which of them it is depends on the number of rows and not on what they show.
    """
    if rows * max_increase < FEW_EVENTS:
        return binomial_p_value(lost, rows, max_increase)
    return paired_p_value(lost, gained, rows, max_increase, spent=level / 10)


def paired_upper_bound(lost: int, gained: int, rows: int, confidence: float) -> float:
    """The smallest increase in errors that `paired_p_value` excludes at this confidence, from above to 1e-5."""
    level = 1 - confidence
    return _smallest(lambda increase: paired_p_value(lost, gained, rows, increase, level / 10) <= level)


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
