"""Searching a threshold for every exit: a path of policies from strict to bold."""

from typing import Any

import numpy as np


Array = np.ndarray[Any, np.dtype[Any]]

_PRICES = np.geomspace(300.0, 0.3, 60)  # of one unit of risk, in units of the cost of full depth
_QUANTILES = 40  # thresholds that are tried per exit: few, so that they do not follow single rows
_SWEEPS = 8
_GROWTH = np.concatenate([np.linspace(0.01, 1.5, 150), np.geomspace(1.55, 100, 50)])


def per_exit_path(scores: Array, losses: Array, costs: Array, max_loss: float) -> list[list[float | None]]:
    """Thresholds per exit, from strict to bold: one shape, grown.

    The shape: mean cost / full cost + price x mean loss is made small by coordinate descent, at the lowest price at
    which the mean loss on these rows is within `max_loss`. Given the thresholds of the other exits, the best one of an
    exit follows from adding up, in the order of the scores, what every row that gets there would save and lose by
    leaving. The path: at every exit the share of rows that are ready grows in step, from none to all. In the manner of
    Pareto testing (Laufer-Goldshtein et al., ICLR 2023) the path is then tested on other rows, from its strict end; it
    is not made of the optima at many prices, because on few rows even the strictest of those is bold.

    Args:
        scores: (rows, exits).
        losses: (rows, exits), what it costs in risk if a row leaves there; the last exit's are 0.
        costs: (exits,).
        max_loss: see above.

    Returns:
        One list of thresholds per policy; `None` closes an exit.
    """
    rows, exits = scores.shape
    scores = np.where(np.isfinite(scores), scores, np.inf)
    grids = [_grid(scores[:, index]) for index in range(exits - 1)]
    shape = thresholds = np.full(exits - 1, -1.0)
    for price in _PRICES:
        thresholds = _descend(scores, costs / costs[-1] + price * losses, grids, thresholds)
        leaves = np.concatenate([scores[:, :-1] <= thresholds, np.ones((rows, 1), dtype=bool)], axis=1)
        if losses[np.arange(rows), leaves.argmax(axis=1)].mean() > max_loss:
            break
        shape = thresholds
    ready = (scores[:, :-1] <= shape).mean(axis=0)  # of all rows, at every exit
    path: list[list[float | None]] = []
    for growth in _GROWTH:
        entry: list[float | None] = []
        for index, share in enumerate(ready):
            finite = scores[np.isfinite(scores[:, index]), index]
            level = min(1.0, growth * share)
            entry.append(float(np.quantile(finite, level)) if level > 0 and finite.size else None)
        path.append([*entry, None])
    return path


def _descend(scores: Array, paid: Array, grids: list[Array], thresholds: Array) -> Array:
    """Thresholds per exit at which the mean of what is paid, (rows, exits), cannot be made smaller one by one."""
    rows, exits = scores.shape
    thresholds = thresholds.copy()
    for _ in range(_SWEEPS):
        before = thresholds.copy()
        for index in reversed(range(exits - 1)):
            leaves = np.concatenate([scores[:, :-1] <= thresholds, np.ones((rows, 1), dtype=bool)], axis=1)
            arrives = ~leaves[:, :index].any(axis=1)
            leaves[:, : index + 1] = False
            otherwise = leaves.argmax(axis=1)
            gain = np.where(arrives, paid[np.arange(rows), otherwise] - paid[:, index], 0.0)
            order = np.argsort(scores[:, index], kind="stable")
            added = np.concatenate([[0.0], np.cumsum(gain[order])])
            upto = np.searchsorted(scores[order, index], grids[index], side="right")
            thresholds[index] = grids[index][np.argmax(added[upto])]
        if np.array_equal(before, thresholds):
            break
    return thresholds


def _grid(scores: Array) -> Array:
    """Thresholds to try at an exit: none (-1), and quantiles of its scores."""
    finite = scores[np.isfinite(scores)]
    if finite.size == 0:
        return np.array([-1.0])
    return np.concatenate([[-1.0], np.unique(np.quantile(finite, np.linspace(0, 1, _QUANTILES)))])
