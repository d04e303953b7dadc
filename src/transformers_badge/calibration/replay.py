"""Replaying a policy on stored exit logits: the same criteria, hence the same exits, as a run of the model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from transformers_badge.exit_table import ExitTable
from transformers_badge.model.criteria_badge import exit_scores
from transformers_badge.model.policy_badge import ExitPolicy


Array = np.ndarray[Any, np.dtype[Any]]


def score_exits(table: ExitTable, policy: ExitPolicy) -> Array:
    """Score of every row at every exit, (rows, exits); the policy's thresholds have no part in it."""
    logits = np.asarray(table.exit_logits, dtype=np.float64)
    exits = range(1, logits.shape[1] + 1)
    return np.stack([exit_scores(logits[:, :seen], policy, table.problem_type) for seen in exits], axis=1)


def take_exits(scores: Array, thresholds: Sequence[float | None]) -> Array:
    """Index of the exit that every row takes: scores (rows, exits) and a threshold per exit to (rows,)."""
    # NaN is never at most anything; infinity has to be kept from leaving at an infinite threshold.
    limits = np.array([-1.0 if t is None else min(t, np.finfo(np.float64).max) for t in thresholds])
    leaves = scores <= limits
    leaves[:, -1] = True  # at the last exit everyone leaves
    return np.asarray(leaves.argmax(axis=1))


def replay(table: ExitTable, policy: ExitPolicy) -> Array:
    """Index of the exit that every row of a table takes under a policy, (rows,).

    Raises:
        ValueError: the policy was made for another number of exits.
    """
    exits = table.exit_logits.shape[1]
    thresholds = policy.thresholds(exits)
    if policy.threshold is None:
        return np.full(len(table), exits - 1)
    return take_exits(score_exits(table, policy), thresholds)


def answers(table: ExitTable) -> Array:
    """What every exit answers: (rows, exits), class indices; for multi-label (rows, exits, labels), bool."""
    if table.problem_type == "multi_label_classification":
        return np.asarray(table.exit_logits > 0)
    return np.asarray(table.exit_logits.argmax(axis=-1))


def agreement(table: ExitTable) -> Array:
    """Whether an exit answers a row as the last exit does, in all labels: (rows, exits), bool."""
    given = answers(table)
    same = given == given[:, -1:]
    return np.asarray(same.all(axis=-1) if same.ndim == 3 else same)


def correctness(table: ExitTable) -> Array:
    """Whether an exit answers a row rightly, in all labels: (rows, exits), bool.

    Raises:
        ValueError: the table has no labels.
    """
    if table.labels is None:
        raise ValueError("The exit table has no labels: make it from rows that have them.")
    same = answers(table) == table.labels[:, None]
    return np.asarray(same.all(axis=-1) if same.ndim == 3 else same)


def at_exits(values: Array, taken: Array) -> Array:
    """What a row finds at the exit that it takes: (rows, exits) and (rows,) to (rows,)."""
    return np.asarray(values[np.arange(len(taken)), taken])


def layer_speedup(table: ExitTable, taken: Array) -> float:
    """Cost of full depth over the mean cost of the exits taken."""
    costs = np.asarray(table.costs)
    return float(costs[-1] / costs[taken].mean())
