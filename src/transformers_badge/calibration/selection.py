"""The threshold that saves most within a budget: of accuracy, where there are labels, or of changed answers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from transformers_badge.calibration.replay import score_exits, take_exits
from transformers_badge.model.configuration_badge import ExitPolicy


Array = np.ndarray[Any, np.dtype[Any]]

_ONE_SIDED_95 = 1.645  # standard errors


def choose_threshold(
    exit_logits: Array,
    labels: Array,
    exit_layers: Sequence[int],
    policy: ExitPolicy,
    max_accuracy_drop: float = 0.01,
    candidates: int = 200,
) -> ExitPolicy:
    """The policy with the threshold that runs the fewest blocks while accuracy stays within the budget.

    What is held to the budget is the upper end of the drop's one-sided 95 % interval (paired, row by row; normal
    approximation), so that a lucky sample does not buy a threshold too bold. Many thresholds are tried on the same
    rows, so it is a careful estimate and no guarantee.

    Args:
        exit_logits: (rows, exits, labels), single-label.
        labels: (rows,), the right classes.
        exit_layers: depth of every exit.
        policy: the criterion and its dials; its threshold is replaced.
        max_accuracy_drop: the budget, as a share: 0.01 is one point below full depth.
        candidates: how many thresholds are tried, at quantiles of the scores.

    Returns:
        The policy with a threshold; with `None`, full depth, where no threshold keeps to the budget.

    Raises:
        ValueError: no rows, labels that do not belong to the logits, or a budget outside [0, 1).
    """
    labels = np.asarray(labels)
    _check_budget("max_accuracy_drop", max_accuracy_drop)
    if len(labels) == 0 or labels.shape != np.shape(exit_logits)[:1]:
        raise ValueError(
            f"Choosing a threshold needs one label per row, got labels {labels.shape} for logits "
            f"{np.shape(exit_logits)}."
        )
    right = np.asarray(exit_logits).argmax(axis=-1) == labels[:, None]

    def drop_at_most(taken: Array) -> float:
        lost = right[:, -1].astype(np.float64) - right[np.arange(len(taken)), taken]
        return float(lost.mean() + _ONE_SIDED_95 * lost.std() / np.sqrt(len(lost)))

    return _cheapest(
        exit_logits, exit_layers, policy, "single_label_classification", drop_at_most, max_accuracy_drop, candidates
    )


def choose_threshold_by_agreement(
    exit_logits: Array,
    exit_layers: Sequence[int],
    policy: ExitPolicy,
    max_disagreement: float = 0.01,
    problem_type: str = "single_label_classification",
    candidates: int = 200,
) -> ExitPolicy:
    """The policy with the threshold that runs the fewest blocks while few answers differ from those at full depth.

    What is held to the budget is the upper end of the one-sided 95 % interval of the share of rows that are answered
    otherwise (Wilson score interval). Many thresholds are tried on the same rows, so it is a careful estimate and no
    guarantee. No labels are needed.

    Args:
        exit_logits: (rows, exits, labels); single-label, or multi-label, where a row differs if any of its labels does.
        exit_layers, policy, candidates: as in `choose_threshold`.
        max_disagreement: the budget, as a share: 0.01 is one row in a hundred.

    Returns:
        The policy with a threshold; with `None`, full depth, where no threshold keeps to the budget.

    Raises:
        ValueError: no rows, or a budget outside [0, 1).
    """
    _check_budget("max_disagreement", max_disagreement)
    if len(exit_logits) == 0:
        raise ValueError("Choosing a threshold needs at least one row, got none.")
    agrees = agreement(exit_logits, problem_type)

    def disagreement_at_most(taken: Array) -> float:
        return wilson_upper_bound(int((~agrees[np.arange(len(taken)), taken]).sum()), len(taken))

    return _cheapest(exit_logits, exit_layers, policy, problem_type, disagreement_at_most, max_disagreement, candidates)


def agreement(exit_logits: Array, problem_type: str = "single_label_classification") -> Array:
    """Whether an exit answers a row as the last exit does: logits (rows, exits, labels) to (rows, exits), bool."""
    logits = np.asarray(exit_logits)
    if problem_type == "multi_label_classification":
        return np.asarray(((logits > 0) == (logits[:, -1:] > 0)).all(axis=-1))
    return np.asarray(logits.argmax(axis=-1) == logits[:, -1:].argmax(axis=-1))


def wilson_upper_bound(events: int, rows: int) -> float:
    """Upper end of the one-sided 95 % score interval of a share (Wilson, 1927): of `events` among `rows`."""
    share, z2 = events / rows, _ONE_SIDED_95**2
    spread = _ONE_SIDED_95 * np.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2))
    return float((share + z2 / (2 * rows) + spread) / (1 + z2 / rows))


def rows_needed(budget: float) -> float:
    """With fewer rows than this, not even a row without any event keeps `wilson_upper_bound` within a budget."""
    return float(np.ceil(_ONE_SIDED_95**2 * (1 - budget) / budget)) if budget > 0 else float("inf")


def _cheapest(
    exit_logits: Array,
    exit_layers: Sequence[int],
    policy: ExitPolicy,
    problem_type: str,
    risk_at_most: Callable[[Array], float],
    budget: float,
    candidates: int,
) -> ExitPolicy:
    """The threshold with the fewest blocks among those whose risk, a function of the exits taken, is in the budget."""
    scores = score_exits(np.asarray(exit_logits, dtype=np.float64), policy, problem_type)
    finite = scores[np.isfinite(scores)]
    best, fewest_blocks = None, float(exit_layers[-1])
    if finite.size == 0:
        return replace(policy, threshold=None)
    for threshold in np.unique(np.quantile(finite, np.linspace(0, 1, candidates))):
        taken = take_exits(scores, [float(threshold)] * len(exit_layers))
        blocks = np.asarray(exit_layers)[taken].mean()
        if blocks < fewest_blocks and risk_at_most(taken) <= budget:
            best, fewest_blocks = float(threshold), blocks
    return replace(policy, threshold=best)


def _check_budget(name: str, budget: float) -> None:
    if not 0 <= budget < 1:
        raise ValueError(f"{name} must be a share in [0, 1), such as 0.01, got {budget}.")
