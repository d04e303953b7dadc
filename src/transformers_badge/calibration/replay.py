"""Replaying a policy on stored exit logits: the same criteria, hence the same exits, as a run of the model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from transformers_badge.model.configuration_badge import ExitPolicy
from transformers_badge.model.criteria_badge import exit_scores, is_ready


Array = np.ndarray[Any, np.dtype[Any]]


def score_exits(exit_logits: Array, policy: ExitPolicy, problem_type: str) -> Array:
    """Score of every row at every exit: logits (rows, exits, labels) to (rows, exits)."""
    exits = range(1, exit_logits.shape[1] + 1)
    return np.stack([exit_scores(exit_logits[:, :seen], policy, problem_type) for seen in exits], axis=1)


def take_exits(scores: Array, thresholds: Sequence[float | None]) -> Array:
    """Index of the exit that every row takes: scores (rows, exits) and a threshold per exit to (rows,)."""
    leaves = np.stack([is_ready(scores[:, i], t) for i, t in enumerate(thresholds)], axis=1)
    leaves[:, -1] = True  # at the last exit everyone leaves
    return np.asarray(leaves.argmax(axis=1))


def replay(exit_logits: Array, policy: ExitPolicy, problem_type: str) -> Array:
    """Index of the exit that every row takes under a policy: logits (rows, exits, labels) to (rows,).

    Raises:
        ValueError: the policy has thresholds for another number of exits.
    """
    if policy.threshold is None:
        return np.full(len(exit_logits), exit_logits.shape[1] - 1)
    return take_exits(score_exits(exit_logits, policy, problem_type), policy.thresholds(exit_logits.shape[1]))
