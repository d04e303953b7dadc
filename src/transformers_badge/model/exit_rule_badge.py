"""The learned criterion: at every exit a small logistic model of the exits so far.

It predicts what this exit's answer would lose against the last exit's, so that its score means the same at every exit.
The weights are plain numbers in the exit policy; they are fitted by the package (`calibration.fitting`), which a
checkpoint does not need.
"""

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


# Sums and these two instead of mean and clip, and above a product instead of take_along_axis: they do the same in a
# third of the time for a single row, and at batch size 1 on a fast engine the criterion is a fifth of the time.
def _within(values: Array, least: float, most: float) -> Array:
    """Clipped; NaN stays NaN."""
    return np.asarray(np.minimum(np.maximum(values, least), most))


def _plogp(probabilities: Array) -> Array:
    return np.asarray(probabilities * np.log(np.maximum(probabilities, _TINY)))
