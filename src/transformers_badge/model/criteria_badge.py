"""The exit criteria: pure functions from the logits of the exits so far to a score per row; lower is readier to leave.

They are numpy on purpose. The loop over blocks has to bring its decision to the host anyway, to pick the rows that
stay; and a replay of a policy on stored logits then runs the very same code, so that it takes the very same exits.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .exit_rule_badge import MOST_ALONE, row_score, rule_features, rule_scores


if TYPE_CHECKING:
    from .policy_badge import ExitPolicy

Array = np.ndarray[Any, np.dtype[Any]]

_TINY = 1e-30  # keeps log(0) finite; 0 * log(tiny) is 0, as the limit of p log p is


def exit_probabilities(
    logits: Array, problem_type: str, temperature: "float | tuple[float, ...] | None" = None
) -> Array:
    """Predicted distributions.

    Args:
        logits: (rows, exits, labels).
        problem_type: `"single_label_classification"` or `"multi_label_classification"`.
        temperature: what the logits are divided by: a number, or one for each of the exits or more. `None`: 1.
            Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Returns:
        (rows, questions, exits, classes), float64. A single-label model answers one question with `labels` classes; a
        multi-label model answers `labels` questions with two classes each.

    Raises:
        ValueError: a regression model predicts no distribution.
    """
    # In one memory order, whatever the caller's: numpy adds in another order in another memory order.
    logits = np.asarray(logits, dtype=np.float64, order="C")
    # A logit that is not finite makes its distribution NaN, without a warning, and NaN never leaves.
    logits = np.where(np.isfinite(logits), logits, np.nan)
    if problem_type == "regression":
        raise ValueError(
            "Early exit needs predicted probabilities, which a model with problem_type='regression' does not have: "
            "leave the threshold at None."
        )
    if temperature is not None:
        divisor = np.asarray(temperature, dtype=np.float64)
        logits = logits / (divisor[: logits.shape[1], None] if divisor.ndim else divisor)
    if problem_type == "multi_label_classification":
        answers = np.stack([np.zeros_like(logits), logits], axis=-1).transpose(0, 2, 1, 3)
    else:
        answers = logits[:, None]
    answers = np.ascontiguousarray(answers)
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

    Source: DeeBERT (Xin et al., ACL 2020).
    """
    return mean_entropy(probabilities[..., -1:, :])


def pcee(probabilities: Array, policy: "ExitPolicy") -> Array:
    """Entropy, low at `patience` exits in a row (the policy sees to that).

    Source: PCEE-BERT (Zhang et al., Findings of NAACL 2022).
    """
    return entropy(probabilities, policy)


def max_probability(probabilities: Array, policy: "ExitPolicy") -> Array:
    """1 minus the largest probability of this exit's prediction.

    Source: Hendrycks and Gimpel, ICLR 2017; for early exit Schwartz et al., ACL 2020.
    """
    return np.asarray(np.maximum(1 - probabilities[..., -1, :].max(axis=-1), 0.0))


def margin(probabilities: Array, policy: "ExitPolicy") -> Array:
    """1 minus the difference between the two largest probabilities of this exit. One class: 0.

    Source: Scheffer et al., "Active Hidden Markov Models for Information Extraction", IDA 2001.
    """
    if probabilities.shape[-1] < 2:
        return np.asarray(0.0 * probabilities[..., -1, 0])
    top = np.sort(probabilities[..., -1, :], axis=-1)  # NaN comes last, and stays NaN
    return np.asarray(np.maximum(1 - (top[..., -1] - top[..., -2]), 0.0))


def f_pabee(probabilities: Array, policy: "ExitPolicy") -> Array:
    """Divergence from the exit before, low at `patience` exits in a row (the policy sees to that).

    Source: F-PABEE (Zhang et al., ICASSP 2023), as its text has it. The first exit has nothing to compare with.
    """
    if probabilities.shape[-2] < 2:
        return np.full(probabilities.shape[:-2], np.inf)
    return DIVERGENCES[policy.divergence](probabilities[..., -2:, :])


def f_pabee_averaged(probabilities: Array, policy: "ExitPolicy") -> Array:
    """Entropy of the mean of this exit's prediction and the one before, low at `patience` exits in a row, in nats.

    Source: F-PABEE, as its released code computes it; see `f_pabee`.
    """
    if probabilities.shape[-2] < 2:
        return np.full(probabilities.shape[:-2], np.inf)
    return mean_entropy(probabilities[..., -2:, :].mean(axis=-2, keepdims=True))


def predictions(probabilities: Array) -> Array:
    """The class that every exit predicts, -1 where not finite: (..., exits, classes) to (..., exits)."""
    finite = np.isfinite(probabilities).all(axis=-1)
    return np.asarray(np.where(finite, probabilities.argmax(axis=-1), -1))


def agreeing_run(probabilities: Array) -> Array:
    """Which exits belong to the unbroken run, up to this one, that predicts as this one does: (..., exits), 0 or 1."""
    predicted = predictions(probabilities)
    same = (predicted == predicted[..., -1:]).astype(np.int64)
    return np.asarray(np.cumprod(same[..., ::-1], axis=-1)[..., ::-1])


def patience(probabilities: Array, policy: "ExitPolicy") -> Array:
    """How many exits are still missing until `patience` exits in a row have confirmed the prediction; 0 is ready.

    An exit confirms when it predicts the same class as the exit before it. Leave at `threshold=0`.
    Source: PABEE (Zhou et al., NeurIPS 2020).
    """
    confirmed = agreeing_run(probabilities).sum(axis=-1) - 1
    missing = np.maximum(policy.patience - confirmed, 0).astype(np.float64)  # type: ignore[operator]
    return _where_finite(missing, probabilities)


def beem(probabilities: Array, policy: "ExitPolicy") -> Array:
    """1 / S, with S the sum of depth x largest probability over the unbroken run of exits that predict as this one.

    Source: BEEM (Bajpai and Hanawal, ICLR 2025), with its cost-based weights, which grow linearly with depth; their
    scale is of no account here. The reciprocal makes lower the readier.
    """
    weights = np.arange(1, probabilities.shape[-2] + 1) * agreeing_run(probabilities)
    confidence = np.where(weights > 0, probabilities.max(axis=-1), 0.0)
    return _where_finite(1 / np.maximum((weights * confidence).sum(axis=-1), _TINY), probabilities)


def voting(probabilities: Array, policy: "ExitPolicy") -> Array:
    """sqrt(n) / votes: of the n exits so far, how many predict what this one predicts.

    Source: Sun et al., "Early Exiting with Ensemble Internal Classifiers", 2021 (arXiv 2105.13792), whose votes are set
    against a power of n; that the power is 1/2, and that the votes are for this exit's own prediction, is our choice.
    """
    predicted = predictions(probabilities)
    votes = (predicted == predicted[..., -1:]).sum(axis=-1)
    return _where_finite(np.sqrt(predicted.shape[-1]) / votes, probabilities)


def fixed_depth(probabilities: Array, policy: "ExitPolicy") -> Array:
    """1 / k at the k-th exit: with `threshold=1/k` everyone leaves there. The baseline of every comparison."""
    return _where_finite(np.full(probabilities.shape[:-2], 1 / probabilities.shape[-2]), probabilities)


def learned(probabilities: Array, policy: "ExitPolicy") -> Array:
    """The policy's rule: how much would be lost by this answer against the last exit's, as predicted.

    See `exit_rule_badge` for what is read and `calibration.fitting` for what is predicted. Both are our design; that a
    learned rule may decide is from BERxiT (Xin et al., EACL 2021).
    """
    rule = policy.rule or ()
    exit_index = probabilities.shape[-2] - 1
    if exit_index >= len(rule):  # the last exit
        return _where_finite(np.zeros(probabilities.shape[:-2]), probabilities)
    return rule_scores(rule_features(probabilities), np.array(rule[exit_index]))


def _where_finite(scores: Array, probabilities: Array) -> Array:
    """The scores, but NaN where this exit's probabilities are not finite."""
    return np.asarray(np.where(np.isfinite(probabilities[..., -1, :]).all(axis=-1), scores, np.nan))


CRITERIA: dict[str, Callable[[Array, "ExitPolicy"], Array]] = {
    "entropy": entropy,
    "max_probability": max_probability,
    "margin": margin,
    "dge": dge,
    "patience": patience,
    "pcee": pcee,
    "f_pabee": f_pabee,
    "f_pabee_averaged": f_pabee_averaged,
    "beem": beem,
    "voting": voting,
    "fixed_depth": fixed_depth,
    "learned": learned,
}

# How scores over thresholds of several policies become one, to be left at 1: all have to be ready, or one of them.
COMBINATORS: dict[str, Callable[..., Array]] = {"all_of": np.max, "any_of": np.min}


def exit_scores(logits: Array, policy: "ExitPolicy", problem_type: str) -> Array:
    """Score of every row at the last of the exits given.

    Args:
        logits: (rows, exits so far, labels).
        policy: the criterion and its dials.
        problem_type: as in the config; of several labels, the one that is least ready counts.

    Returns:
        (rows,), float64, >= 0. NaN or infinite where there is no ground for leaving.
    """
    seen = np.shape(logits)[1]
    # PABEE's patience is about predictions, and its score counts them itself.
    in_a_row = 1 if policy.criterion == "patience" else policy.patience or 1
    if seen < in_a_row:
        return np.full(len(logits), np.inf)
    if policy.criterion == "learned" and in_a_row == 1 and _is_one_small_row(logits, policy, problem_type):
        temperature = (
            policy.temperature if isinstance(policy.temperature, tuple) else [policy.temperature or 1.0] * seen
        )
        return np.array([row_score(np.asarray(logits)[0].tolist(), temperature, (policy.rule or ())[seen - 1])])
    if policy.parts:
        scores = [_combined(logits[:, :last], policy, problem_type) for last in range(seen - in_a_row + 1, seen + 1)]
    else:
        probabilities, criterion = (
            exit_probabilities(logits, problem_type, policy.temperature),
            CRITERIA[policy.criterion],
        )
        scores = [
            criterion(probabilities[..., :last, :], policy).max(axis=-1)
            for last in range(seen - in_a_row + 1, seen + 1)
        ]
    return np.asarray(scores[0] if in_a_row == 1 else np.max(scores, axis=0))


def _is_one_small_row(logits: Array, policy: "ExitPolicy", problem_type: str) -> bool:
    """Whether it is what `row_score` takes, at an exit that the rule is for."""
    rows, exits, labels = np.shape(logits)
    inner = exits <= len(policy.rule or ())
    single = problem_type == "single_label_classification"
    return rows == 1 and single and inner and exits <= MOST_ALONE and 2 <= labels <= MOST_ALONE


def _combined(logits: Array, policy: "ExitPolicy", problem_type: str) -> Array:
    """Scores of a combination: of every part its score as a share of its threshold here, then the largest or least."""
    shares = []
    for part in policy.parts or ():
        scores = exit_scores(logits, part, problem_type)
        threshold = part.threshold[logits.shape[1] - 1] if isinstance(part.threshold, tuple) else part.threshold
        ready = is_ready(scores, np.inf)
        if threshold is None:
            ready, threshold = np.zeros_like(ready), 1.0
        if threshold == 0:
            share = np.where(scores == 0, 0.0, np.inf)
        else:
            share = np.where(ready, np.where(ready, scores, 0.0) / threshold, np.inf)
        shares.append(np.where(ready, share, np.inf))
    return COMBINATORS[policy.criterion](np.stack(shares), axis=0)


def is_ready(scores: Array, threshold: float | None) -> Array:
    """Which rows leave, given their scores (rows,): finite, and at most the threshold. `None`: nobody leaves."""
    if threshold is None:
        return np.zeros(len(scores), dtype=bool)
    return np.asarray(np.isfinite(scores) & (scores <= threshold))
