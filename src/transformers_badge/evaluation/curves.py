"""What a criterion buys at every threshold: curves over layer speedup, from an exit table. Numpy only."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.integrate import trapezoid

from transformers_badge.calibration.fitting import Goal, fit_rule
from transformers_badge.calibration.replay import agreement, correctness, score_exits, take_exits
from transformers_badge.exit_table import ExitTable
from transformers_badge.model.policy_badge import ExitPolicy


Array = np.ndarray[Any, np.dtype[Any]]

THRESHOLDS = 200  # of a curve, at quantiles of the scores
SPEEDUPS = 81  # of the common axis of the curves
MOST_SPEEDUPS = 4
RESAMPLES = 200
LOSSES = (0.0, 0.005, 0.01, 0.02)


def compared_policies(exits: int) -> dict[str, ExitPolicy]:
    """Every criterion that needs no fitting, with the dials of its source; a curve goes over the thresholds."""
    dials: dict[str, dict[str, Any]] = {
        "entropy": {},
        "max_probability": {},
        "margin": {},
        "dge": {"window": 2, "confidence_weight": 1.0},
        "dge_divergence_only": {"criterion": "dge", "window": 2, "confidence_weight": 0.0},
        "patience": {"patience": max(1, exits - 1)},  # the threshold then counts how many may be missing
        "pcee": {},
        "f_pabee": {},
        "f_pabee_averaged": {},
        "beem": {},
        "voting": {},
        "fixed_depth": {},
    }
    return {name: ExitPolicy.of({"criterion": name, **fields}) for name, fields in dials.items()}


def cross_fitted_scores(table: ExitTable, seed: int = 0, goal: Goal = "regret", enough: int | None = None) -> Array:
    """Scores of the learned criterion, (rows, exits), each row's by a rule that was fitted to the other half.

    Args:
        goal, enough: as in `fit_rule`.
    """
    half = np.random.default_rng(seed).permutation(len(table)) % 2 == 0
    scores = np.empty(table.exit_logits.shape[:2])
    for part in (half, ~half):
        rule = fit_rule(table.select(~part), goal=goal, enough=enough)
        scores[part] = score_exits(table.select(part), ExitPolicy(criterion="learned", rule=rule))
    return scores


@dataclass(frozen=True)
class Runs:
    """What every row does at every threshold of a criterion.

    Args:
        thresholds: (thresholds,); the first is -1, nobody leaves, and the last infinity, everyone at the first exit.
        taken: (thresholds, rows), index of the exit.
    """

    thresholds: Array
    taken: Array


def run_thresholds(scores: Array, thresholds: int = THRESHOLDS) -> Runs:
    """Replay thresholds at quantiles of the scores (rows, exits), from nobody leaving to everyone at the first exit.

    A criterion that keeps rows back at its first exits, whatever the threshold, does not get that far by itself; the
    last run is there for all of them, so that curves end at the same point.
    """
    inner = scores[:, :-1]
    finite = inner[np.isfinite(inner)]
    levels = np.unique(np.quantile(finite, np.linspace(0, 1, thresholds))) if finite.size else np.empty(0)
    taken = [take_exits(scores, [float(level)] * scores.shape[1]) for level in (-1.0, *levels)]
    return Runs(np.array([-1.0, *levels, np.inf]), np.stack([*taken, np.zeros(len(scores), dtype=taken[0].dtype)]))


def speedup_axis(table: ExitTable) -> Array:
    """Layer speedups from 1 to that of the first exit, but no more than `MOST_SPEEDUPS` times the number of blocks.

    An exit before the first block costs next to nothing, and what it alone answers is of no interest.
    """
    costs = np.asarray(table.costs)
    return np.linspace(1.0, min(costs[-1] / max(costs[0], 1e-9), MOST_SPEEDUPS * table.blocks), SPEEDUPS)


def curve(costs: Array, values: Array, full: float, axis: Array) -> Array:
    """Means of the values at the speedups of an axis.

    Between two thresholds a value is had by leaving some rows to one and some to the other, so it is linear in the mean
    cost.

    Args:
        costs, values: (..., thresholds), means over rows, at rising thresholds.
        full: cost of full depth.
        axis: (speedups,).

    Returns:
        (..., speedups).
    """
    wanted = full / axis
    if costs.ndim > 1:
        return np.stack([curve(c, v, full, axis) for c, v in zip(costs, values, strict=True)])
    order = np.argsort(costs, kind="stable")
    return np.asarray(np.interp(wanted, costs[order], values[order]))


def speedup_at(axis: Array, losses: Array, allowed: float) -> float:
    """The largest speedup at which no more than `allowed` is lost; 1 where there is none.

    Args:
        axis: (speedups,), ascending, the first is 1.
        losses: (speedups,), at the axis.
    """
    held = np.flatnonzero(losses <= allowed + 1e-12)
    if held.size == 0:
        return 1.0
    last = int(held[-1])
    if last + 1 < len(axis):
        rise = losses[last + 1] - losses[last]
        return float(axis[last] + (axis[last + 1] - axis[last]) * (allowed - losses[last]) / rise)
    return float(axis[last])


def area(axis: Array, values: Array) -> float:
    """Mean of a curve over the speedups: the area under it, by its width."""
    width = np.ptp(axis)
    return float(trapezoid(values, axis) / width) if width else float(values.mean())


def goal_of(table: ExitTable) -> Goal:
    """What a rule had best learn for what `measure` shows of a table."""
    return "disagreement" if table.labels is None else "labelled_regret"


def measure(table: ExitTable) -> tuple[str, Array]:
    """What a curve shows of a table: accuracy where there are labels, else agreement with full depth; (rows, exits)."""
    return ("agreement", agreement(table)) if table.labels is None else ("accuracy", correctness(table))


def describe_criterion(table: ExitTable, scores: Array, axis: Array, seed: int = 0) -> dict[str, Any]:
    """The curve of a criterion with its bootstrap band, the area under it, and the speedup at small losses.

    Args:
        scores: (rows, exits).
        axis: (speedups,), see `speedup_axis`.

    Returns:
        mean, low and high (speedups,), the band being the middle 95 % over resampled rows of what is lost against full
        depth of the same rows; area; `speedup_at_loss`.
    """
    runs = run_thresholds(scores)
    values, rows = measure(table)[1].astype(np.float64), np.arange(len(table))
    costs_of, values_of = np.asarray(table.costs)[runs.taken], values[rows, runs.taken]
    full = float(np.asarray(table.costs)[-1])
    mean = curve(costs_of.mean(axis=1), values_of.mean(axis=1), full, axis)
    weights = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), RESAMPLES) / len(
        rows
    )
    resampled = curve(weights @ costs_of.T, weights @ values_of.T, full, axis)
    low, high = mean[0] + np.quantile(resampled - resampled[:, :1], [0.025, 0.975], axis=0)
    losses = mean[0] - mean
    return {
        "mean": mean.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "area": area(axis, mean),
        "speedup_at_loss": {str(loss): speedup_at(axis, losses, loss) for loss in LOSSES},
    }


def tradeoff_curve(table: ExitTable, policy: ExitPolicy, thresholds: int = 60) -> list[dict[str, float]]:
    """Accuracy and layer speedup of a policy at thresholds one for all exits."""
    runs, right = run_thresholds(score_exits(table, policy), thresholds), correctness(table)
    costs = np.asarray(table.costs)
    return [
        {
            "threshold": float(threshold),
            "accuracy": float(right[np.arange(len(taken)), taken].mean()),
            "layer_speedup": float(costs[-1] / costs[taken].mean()),
        }
        for threshold, taken in zip(runs.thresholds, runs.taken, strict=True)
        if 0 <= threshold < np.inf
    ]
