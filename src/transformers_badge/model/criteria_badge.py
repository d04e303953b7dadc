"""The exit criteria: pure functions from the logits of the exits so far to a score per row; lower is readier to leave.

They are numpy on purpose. The loop over blocks has to bring its decision to the host anyway, to pick the rows that
stay; and a replay of a policy on stored logits then runs the very same code, so that it takes the very same exits.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from .configuration_badge import ExitPolicy

Array = np.ndarray[Any, np.dtype[Any]]

_TINY = 1e-30  # keeps log(0) finite; 0 * log(tiny) is 0, as the limit of p log p is


def exit_probabilities(logits: Array, problem_type: str) -> Array:
    """Predicted distributions.

    Args:
        logits: (rows, exits, labels).
        problem_type: `"single_label_classification"` or `"multi_label_classification"`.

    Returns:
        (rows, questions, exits, classes), float64. A single-label model answers one question with `labels` classes; a
        multi-label model answers `labels` questions with two classes each.

    Raises:
        ValueError: a regression model predicts no distribution.
    """
    logits = np.asarray(logits, dtype=np.float64)
    # A logit that is not finite makes its distribution NaN, without a warning, and NaN never leaves.
    logits = np.where(np.isfinite(logits), logits, np.nan)
    if problem_type == "regression":
        raise ValueError(
            "Early exit needs predicted probabilities, which a model with problem_type='regression' does not have: "
            "leave the threshold at None."
        )
    if problem_type == "multi_label_classification":
        answers = np.stack([np.zeros_like(logits), logits], axis=-1).transpose(0, 2, 1, 3)
    else:
        answers = logits[:, None]
    weights = np.exp(answers - answers.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def mean_entropy(probabilities: Array) -> Array:
    """Mean entropy in nats: (..., exits, classes) to (...)."""
    return np.asarray(-(probabilities * np.log(np.maximum(probabilities, _TINY))).sum(axis=-1).mean(axis=-1))


def jensen_shannon(probabilities: Array) -> Array:
    """Generalised Jensen-Shannon divergence, H(mean p) - mean H(p), in nats: (..., exits, classes) to (...).

    Source: J. Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 37(1), 1991, with
    equal weights.
    """
    mixture = probabilities.mean(axis=-2, keepdims=True)
    # Rounding can take the difference of two equal entropies a hair below zero.
    return np.asarray(np.maximum(mean_entropy(mixture) - mean_entropy(probabilities), 0.0))


def kl(probabilities: Array) -> Array:
    """Mean over neighbouring exits of KL(earlier || later), in nats: (..., exits, classes) to (...). One exit: 0."""
    if probabilities.shape[-2] < 2:
        return np.asarray(0.0 * probabilities.sum(axis=(-2, -1)))
    logs = np.log(np.maximum(probabilities, _TINY))
    terms = probabilities[..., :-1, :] * (logs[..., :-1, :] - logs[..., 1:, :])
    return np.asarray(np.maximum(terms.sum(axis=-1).mean(axis=-1), 0.0))


def reverse_kl(probabilities: Array) -> Array:
    """Mean over neighbouring exits of KL(later || earlier), in nats."""
    return kl(probabilities[..., ::-1, :])


def symmetric_kl(probabilities: Array) -> Array:
    """Mean of `kl` and `reverse_kl`, in nats."""
    return np.asarray((kl(probabilities) + reverse_kl(probabilities)) / 2)


DIVERGENCES: dict[str, Callable[[Array], Array]] = {
    "jensen_shannon": jensen_shannon,
    "kl": kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
}


def dge(probabilities: Array, policy: "ExitPolicy") -> Array:
    """Divergence-based exiting over the last `window` exits (all of them, while there are fewer).

    score = D(p_{m-w+1}, ..., p_m) + confidence_weight * mean entropy over the window

    The idea is the paper's (BADGE, doi 10.18653/v1/2023.acl-industry.48: stop when the exits so far agree); the
    divergence, the window and the confidence term are choices of this project. With `confidence_weight=1` and
    Jensen-Shannon the score is the entropy of the averaged prediction; a window of 1 is the entropy criterion.
    """
    window = probabilities[..., -policy.window :, :]
    if window.shape[-2] == 1 and policy.confidence_weight == 0:
        # One exit has nothing to agree with, and no confidence was asked for: there is no reason to leave yet.
        return np.full(window.shape[:-2], np.inf)
    return np.asarray(DIVERGENCES[policy.divergence](window) + policy.confidence_weight * mean_entropy(window))


def entropy(probabilities: Array, policy: "ExitPolicy") -> Array:
    """Entropy of this exit's prediction, in nats.

    Source: DeeBERT (Xin et al., ACL 2020). With `patience` above 1: PCEE-BERT (Zhang et al., Findings of NAACL 2022).
    """
    return mean_entropy(probabilities[..., -1:, :])


def patience(probabilities: Array, policy: "ExitPolicy") -> Array:
    """How many exits are still missing until `patience` exits in a row have confirmed the prediction; 0 is ready.

    An exit confirms when it predicts the same class as the exit before it. Leave at `threshold=0`.
    Source: PABEE (Zhou et al., NeurIPS 2020).
    """
    finite = np.asarray(np.isfinite(probabilities).all(axis=-1))
    predictions = np.where(finite, probabilities.argmax(axis=-1), -1)
    same = (predictions[..., :-1] == predictions[..., -1:]).astype(np.int64)
    confirmed = np.cumprod(same[..., ::-1], axis=-1).sum(axis=-1)
    missing = np.maximum(policy.patience - confirmed, 0).astype(np.float64)
    return np.asarray(np.where(finite[..., -1], missing, np.nan))


CRITERIA: dict[str, Callable[[Array, "ExitPolicy"], Array]] = {"dge": dge, "entropy": entropy, "patience": patience}


def exit_scores(logits: Array, policy: "ExitPolicy", problem_type: str) -> Array:
    """Score of every row at the last of the exits given.

    Args:
        logits: (rows, exits so far, labels).
        policy: the criterion and its dials.
        problem_type: as in the config; of several labels, the one that is least ready counts.

    Returns:
        (rows,), float64, >= 0. NaN or infinite where there is no ground for leaving.
    """
    probabilities = exit_probabilities(logits, problem_type)
    criterion, seen = CRITERIA[policy.criterion], probabilities.shape[-2]
    in_a_row = 1 if policy.criterion == "patience" else policy.patience
    if seen < in_a_row:
        return np.full(len(probabilities), np.inf)
    scores = [criterion(probabilities[..., :last, :], policy) for last in range(seen - in_a_row + 1, seen + 1)]
    return np.asarray(np.max(scores, axis=0).max(axis=-1))


def is_ready(scores: Array, threshold: float | None) -> Array:
    """Which rows leave, given their scores (rows,): finite, and at most the threshold. `None`: nobody leaves."""
    if threshold is None:
        return np.zeros(len(scores), dtype=bool)
    return np.asarray(np.isfinite(scores) & (scores <= threshold))
