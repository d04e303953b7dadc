"""The learned criterion: at every exit a small logistic model of the exits so far.

It predicts what this exit's answer would lose against the last exit's, so that its score means the same at every exit.
The weights are plain numbers in the exit policy; they are fitted by the package (`calibration.fitting`), which a
checkpoint does not need.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


Array = np.ndarray[Any, np.dtype[Any]]

# What is read of the exits so far, all of it about the class that this exit predicts. Its lead is the logarithm of how
# many times as probable it is as the most probable other class: with two classes that is its log-odds.
FEATURES = (
    "log-odds at this exit",
    "square root of the lead at this exit",
    "log-odds at the exit before",
    "mean lead at the earlier exits",
    "share of the earlier exits that predict the same class",
    "Jensen-Shannon divergence from the exit before",
)
# Log-odds beyond 20 are all the same certainty, and a rule must not extrapolate to them.
_LEAST = 1 / (1 + np.exp(20.0))
_TINY = 1e-30


def rule_features(probabilities: Array) -> Array:
    """The features of a rule at the last of the exits given: (..., exits so far, classes) to (..., features).

    At the first exit the features of earlier exits are 0. Where a probability of any exit is NaN, features are NaN.
    """
    exits, classes = probabilities.shape[-2:]
    earlier = exits - 1
    if earlier or classes > 2:
        predicted = probabilities.argmax(axis=-1)
        here = np.arange(classes) == predicted[..., -1:, None]
        own = (probabilities * here).sum(axis=-1)  # of the class predicted at this exit
    else:
        own = probabilities.max(axis=-1)
    own = _within(own, _LEAST, 1 - _LEAST)
    odds = lead = np.log(own / (1 - own))
    if classes > 2:
        lead = np.log(own / _within((probabilities * ~here).max(axis=-1), _LEAST, 1 - _LEAST))
    features = np.zeros((*odds.shape[:-1], len(FEATURES)))
    features[..., 0] = odds[..., -1]
    features[..., 1] = np.sqrt(np.maximum(lead[..., -1], 0))
    if earlier:
        features[..., 2] = odds[..., -2]
        features[..., 3] = lead[..., :-1].sum(axis=-1) / earlier
        features[..., 4] = (predicted[..., :-1] == predicted[..., -1:]).sum(axis=-1) / earlier
        before, now = probabilities[..., -2, :], probabilities[..., -1, :]
        # H of the mean, less the mean of the two H, in one sum over the classes.
        features[..., 5] = ((_plogp(before) + _plogp(now)) / 2 - _plogp((before + now) / 2)).sum(axis=-1)
    return features


def rule_scores(features: Array, weights: Array) -> Array:
    """A score in (0, 1), the predicted loss: (..., features) and weights (features + 1,) to (...)."""
    # Clipped, so that no score is 0 or 1 by rounding; NaN stays NaN.
    # Not a matrix product, whose last bits depend on the number of rows.
    logit = _within((features * weights[:-1]).sum(axis=-1) + weights[-1], -30, 30)
    return np.asarray(1 / (1 + np.exp(-logit)))


MOST_ALONE = 7  # exits, and classes, that `row_score` takes: numpy adds more numbers than that in another order


def row_score(logits: list[list[float]], temperatures: Sequence[float], weights: Sequence[float]) -> float:
    """`rule_scores` of one row, to the last bit, from its logits [exit][class] at the exits so far; NaN if one is.

    For rows that are scored one at a time: numpy takes twice as long for as many arrays of a few numbers. Only its exp
    and log are used, since others round otherwise.

    Args:
        logits: of at most `MOST_ALONE` exits and classes; two classes at least.
        temperatures: one for each exit, or more.
        weights: as in `rule_scores`.
    """
    if not all(math.isfinite(value) for at_exit in logits for value in at_exit):
        return math.nan
    exits, classes = len(logits), len(logits[0])
    scaled = [[value / by for value in at_exit] for at_exit, by in zip(logits, temperatures, strict=False)]
    tops = map(max, scaled)
    powers = np.exp([v - top for at_exit, top in zip(scaled, tops, strict=True) for v in at_exit]).tolist()
    probabilities = []
    for start in range(0, exits * classes, classes):
        at_exit = powers[start : start + classes]
        total = _total(at_exit)
        probabilities.append([power / total for power in at_exit])
    predicted = [at_exit.index(max(at_exit)) for at_exit in probabilities]
    answer = predicted[-1]
    own = [min(max(at_exit[answer], _LEAST), 1 - _LEAST) for at_exit in probabilities]
    asked = [p / (1 - p) for p in own]  # of all logarithms at once
    if classes > 2:
        others = [max(at_exit[:answer] + at_exit[answer + 1 :]) for at_exit in probabilities]
        asked += [p / min(max(other, _LEAST), 1 - _LEAST) for p, other in zip(own, others, strict=True)]
    leads, parts = len(asked) - exits, []
    if exits > 1:
        before, now = probabilities[-2:]
        parts = [*before, *now, *[(b + n) / 2 for b, n in zip(before, now, strict=True)]]
    logs = np.log([*asked, *[max(p, _TINY) for p in parts]]).tolist()
    odds, lead = logs[:exits], logs[leads : leads + exits]
    features = [odds[-1], math.sqrt(max(lead[-1], 0.0)), 0.0, 0.0, 0.0, 0.0]
    if exits > 1:
        terms = [p * log for p, log in zip(parts, logs[leads + exits :], strict=True)]
        of_each = zip(terms[:classes], terms[classes : 2 * classes], terms[2 * classes :], strict=True)
        features[2] = odds[-2]
        features[3] = _total(lead[:-1]) / (exits - 1)
        features[4] = predicted[:-1].count(answer) / (exits - 1)
        features[5] = _total([(b + n) / 2 - mixed for b, n, mixed in of_each])
    *factors, constant = weights
    logit = _total([feature * factor for feature, factor in zip(features, factors, strict=True)]) + constant
    return 1 / (1 + float(np.exp(-min(max(logit, -30.0), 30.0))))


def _total(values: list[float]) -> float:
    """From left to right, as numpy adds a few numbers; Python's own sum rounds otherwise since 3.12."""
    total = 0.0
    for value in values:
        total += value
    return total


# Sums and these two instead of mean and clip, and above a product instead of take_along_axis: they do the same in a
# third of the time for a single row, and at batch size 1 on a fast engine the criterion is a fifth of the time.
def _within(values: Array, least: float, most: float) -> Array:
    """Clipped; NaN stays NaN."""
    return np.asarray(np.minimum(np.maximum(values, least), most))


def _plogp(probabilities: Array) -> Array:
    return np.asarray(probabilities * np.log(np.maximum(probabilities, _TINY)))
