"""p-values and bounds on counts: against scipy, and against the probability of every outcome there is."""

from functools import cache

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest, multinomial, norm

from transformers_badge.calibration.bounds import (
    binomial_bounds,
    binomial_p_value,
    paired_p_value,
    paired_upper_bound,
    rows_needed,
)


ROWS, LEVEL = 60, 0.05
COUNTS = [(0, 50), (1, 50), (3, 400), (12, 1200), (49, 50), (50, 50)]


def outcomes(rows):
    """All pairs of lost and gained rows: two arrays."""
    pairs = np.array([(lost, gained) for lost in range(rows + 1) for gained in range(rows + 1 - lost)])
    return pairs[:, 0], pairs[:, 1]


def chances(lost, gained, rows, rate_lost, rate_gained):
    counts = np.stack([lost, gained, rows - lost - gained], axis=-1)
    return multinomial.pmf(counts, rows, [rate_lost, rate_gained, 1 - rate_lost - rate_gained])


@cache
def p_values(increase):
    """The p-value of every outcome, next to what the normal approximation gives."""
    lost, gained = outcomes(ROWS)
    paired = [paired_p_value(int(a), int(b), ROWS, increase, LEVEL) for a, b in zip(lost, gained, strict=True)]
    mean = (lost - gained) / ROWS
    deviation = np.sqrt(np.maximum((lost + gained) / ROWS - mean**2, 1e-12) / ROWS)
    return np.array(paired), norm.cdf((mean - increase) / deviation)


@pytest.mark.parametrize(("events", "rows"), COUNTS)
@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_the_binomial_p_value_is_the_one_of_the_textbook(events, rows, rate):
    expected = binomtest(events, rows, rate, alternative="less").pvalue
    assert binomial_p_value(events, rows, rate) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_the_binomial_p_value_is_valid(rate):
    events = np.arange(301)
    chance = binom.pmf(events, 300, rate)
    exact = np.array([binomial_p_value(int(n), 300, rate) for n in events])
    assert 0.3 * LEVEL < chance[exact <= LEVEL].sum() <= LEVEL
    if rate < 0.1:
        share = events / 300
        normal = norm.cdf((share - rate) / np.sqrt(np.maximum(share * (1 - share), 1e-9) / 300))
        assert chance[normal <= LEVEL].sum() > 1.5 * LEVEL


@pytest.mark.parametrize(("events", "rows"), COUNTS)
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_the_binomial_bounds_are_those_of_clopper_and_pearson(events, rows, confidence):
    # each end of the two-sided 80 % interval is a one-sided 90 % bound
    interval = binomtest(events, rows).proportion_ci(2 * confidence - 1, method="exact")
    lower, upper = binomial_bounds(events, rows, confidence)
    assert (lower, upper) == pytest.approx((interval.low, interval.high), abs=1e-9)
    if events < rows:  # the bound is where the test of the same level stops to exclude
        assert binomial_p_value(events, rows, upper) == pytest.approx(1 - confidence)


@pytest.mark.parametrize("increase", [0.05, 0.3])
def test_the_p_value_of_an_increase_is_valid_whatever_the_rate_of_gains(increase):
    lost, gained = outcomes(ROWS)
    rates = np.linspace(0, 0.99 * (1 - increase) / 2, 30)
    # an increase of exactly this much, the hardest of those that are to be excluded
    excluded = np.array(
        [
            [chance[p_value <= LEVEL].sum() for p_value in p_values(increase)]
            for chance in (chances(lost, gained, ROWS, rate + increase, rate) for rate in rates)
        ]
    )
    paired, normal = excluded.max(axis=0)
    assert 0.8 * LEVEL < paired <= LEVEL
    assert normal > 1.1 * LEVEL


def likelihood_score(lost, gained, rows, increase):
    """The statistic by its definition: the rate of gains is sought where the outcome is most likely."""

    def against(rate):
        rates = np.clip([rate + increase, rate, 1 - increase - 2 * rate], 1e-300, 1)
        return -(np.array([lost, gained, rows - lost - gained]) * np.log(rates)).sum()

    rate = minimize_scalar(against, bounds=(0, (1 - increase) / 2), method="bounded", options={"xatol": 1e-10}).x
    return (lost - gained - rows * increase) / np.sqrt(rows * (2 * rate + increase - increase**2))


def test_the_p_value_of_an_increase_is_an_upper_bound_and_a_close_one():
    rows, increase, level = 30, 0.15, 0.05
    lost, gained = outcomes(rows)
    scores = np.array([likelihood_score(a, b, rows, increase) for a, b in zip(lost, gained, strict=True)])
    for seen_lost, seen_gained in ((0, 0), (3, 0), (3, 2), (6, 1), (8, 8), (1, 6)):
        least, most = binomial_bounds(seen_gained, rows, 1 - level / 200)
        extreme = scores <= scores[(lost == seen_lost) & (gained == seen_gained)] + 1e-6
        rates = np.linspace(least, min(most, 0.999 * (1 - increase) / 2), 200)
        exact = max(chances(lost, gained, rows, rate + increase, rate)[extreme].sum() for rate in rates)
        p_value = paired_p_value(seen_lost, seen_gained, rows, increase, level)
        if scores[extreme].max() >= 0:
            assert p_value == 1
        else:
            assert exact <= p_value <= 1.1 * exact + level / 50


def test_what_is_spent_on_the_rate_of_gains_is_paid():
    for level in (0.001, 0.01, 0.1):
        assert paired_p_value(0, 0, 5000, 0.05, level) == pytest.approx(level / 100, abs=1e-6)


@pytest.mark.parametrize("increase", [0.05, 0.3])
def test_more_losses_never_make_a_smaller_p_value_nor_more_gains_a_larger_one(increase):
    square = np.full((ROWS + 1, ROWS + 1), np.nan)
    square[outcomes(ROWS)] = p_values(increase)[0]
    by_losses, by_gains = np.diff(square, axis=0), np.diff(square, axis=1)
    assert np.nanmin(by_losses) >= -1e-12
    assert np.nanmax(by_losses) > 0.05
    # a gain widens the interval in which the rate of gains is sought, which may weigh a hair more than the gain itself
    assert np.nanmax(by_gains) <= LEVEL / 100
    assert np.nanmin(by_gains) < -0.05


@pytest.mark.parametrize("rows", [320, 850, 5000])
def test_gains_make_up_for_losses_and_cost_nothing_where_there_are_none(rows):
    """As many losses are allowed as if losses alone were counted where nothing is gained, and more where there is."""
    alone = max(lost for lost in range(rows) if binomial_p_value(lost, rows, 0.01) <= LEVEL)
    allowed = [
        max(lost for lost in range(alone + gained + 2) if paired_p_value(lost, gained, rows, 0.01, LEVEL) <= LEVEL)
        for gained in (0, 10, 30)
    ]
    assert allowed[0] == alone
    assert allowed[0] < allowed[1] - 5 < allowed[2] - 15


@pytest.mark.parametrize(("rate_lost", "rate_gained"), [(0.03, 0.0), (0.1, 0.05), (0.05, 0.05)])
def test_the_upper_bound_of_an_increase_covers_it(rate_lost, rate_gained):
    rows, confidence = 40, 0.9
    lost, gained = outcomes(rows)
    chance = chances(lost, gained, rows, rate_lost, rate_gained)
    likely = chance > 1e-5
    lost, gained, chance = lost[likely], gained[likely], chance[likely]
    bounds = np.array([paired_upper_bound(int(a), int(b), rows, confidence) for a, b in zip(lost, gained, strict=True)])
    truth, mean = rate_lost - rate_gained, (lost - gained) / rows
    assert (bounds >= mean).all()
    assert chance[bounds >= truth].sum() >= confidence
    if rate_gained < rate_lost:
        normal = mean + norm.ppf(confidence) * np.sqrt(np.maximum((lost + gained) / rows - mean**2, 0) / rows)
        assert chance[normal >= truth].sum() < confidence - 0.02


def test_the_upper_bound_is_where_the_test_begins_to_exclude():
    for lost, gained, rows in ((0, 0, 300), (7, 3, 500), (40, 80, 2000)):
        bound = paired_upper_bound(lost, gained, rows, 0.95)
        assert paired_p_value(lost, gained, rows, bound, 0.05) <= 0.05
        assert bound < 2e-5 or paired_p_value(lost, gained, rows, bound - 2e-5, 0.05) > 0.05


def test_rows_needed_is_the_first_number_of_rows_that_will_do():
    assert rows_needed(lambda rows: binomial_p_value(0, rows, 0.01), 0.05) == 299
    for events, rate, level in ((0, 0.3, 0.05), (0, 0.9, 0.2), (1, 0.02, 0.1), (5, 0.05, 0.01)):
        directly = next(rows for rows in range(1, 2000) if binomial_p_value(events, rows, rate) <= level)
        assert rows_needed(lambda rows, n=events, p=rate: binomial_p_value(n, rows, p), level) == directly
    assert rows_needed(lambda rows: 0.0, 0.05) == 1


def test_where_no_number_of_rows_will_do_there_is_none():
    assert rows_needed(lambda rows: binomial_p_value(int(0.02 * rows), rows, 0.01), 0.05) is None
    assert rows_needed(lambda rows: binomial_p_value(0, rows, 0.01), 0.05, most=256) is None
    assert rows_needed(lambda rows: binomial_p_value(0, rows, 0.01), 0.05, most=512) == 299
