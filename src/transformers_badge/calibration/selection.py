"""The threshold that saves most within a budget of accuracy."""

from collections.abc import Sequence
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
    exit_logits, labels = np.asarray(exit_logits, dtype=np.float64), np.asarray(labels)
    if not 0 <= max_accuracy_drop < 1:
        raise ValueError(f"max_accuracy_drop must be a share in [0, 1), such as 0.01, got {max_accuracy_drop}.")
    if len(labels) == 0 or labels.shape != exit_logits.shape[:1]:
        raise ValueError(
            f"Choosing a threshold needs one label per row, got labels {labels.shape} for logits {exit_logits.shape}."
        )
    scores = score_exits(exit_logits, policy, "single_label_classification")
    finite = scores[np.isfinite(scores)]
    if finite.size == 0:
        return replace(policy, threshold=None)

    right = exit_logits.argmax(axis=-1) == labels[:, None]
    rows = np.arange(len(labels))
    best, fewest_blocks = None, float(exit_layers[-1])
    for threshold in np.unique(np.quantile(finite, np.linspace(0, 1, candidates))):
        taken = take_exits(scores, [float(threshold)] * len(exit_layers))
        lost = right[:, -1].astype(np.float64) - right[rows, taken]
        blocks = np.asarray(exit_layers)[taken].mean()
        if (
            lost.mean() + _ONE_SIDED_95 * lost.std() / np.sqrt(len(lost)) <= max_accuracy_drop
            and blocks < fewest_blocks
        ):
            best, fewest_blocks = float(threshold), blocks
    return replace(policy, threshold=best)
