"""Seconds of real runs beside the curves: every criterion at a few thresholds, against full depth, in turns."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from transformers_badge.calibration.replay import score_exits
from transformers_badge.evaluation.curves import measure, run_thresholds
from transformers_badge.evaluation.timing import time_in_turns
from transformers_badge.exit_table import ExitTable
from transformers_badge.model.policy_badge import ExitPolicy


SPEEDUPS = (1.5, 2.5)  # in layers, that thresholds are chosen for
ROUNDS = 3


def time_policies(
    model: Any,
    batches: Sequence[Any],
    table: ExitTable,
    policies: dict[str, ExitPolicy],
    on_round: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Time every policy at thresholds that give it some layer speedups, over the same batches.

    Args:
        model: a `BadgeForSequenceClassification` or a `BadgePredictor`.
        batches: inputs of `early_exit_predict`.
        table: of the same kind of rows, to choose thresholds from, and for the accuracy at them.
        policies: by the name of the criterion; their thresholds are replaced.
        on_round: called after every round.

    Returns:
        `full_depth_seconds`; and under `criteria`, by name, a list of layer_speedup, seconds, speedup over full depth
        (median, min, max of the rounds' own ratios), and accuracy (or agreement) on the table.
    """
    name, values = measure(table)
    rows, costs = np.arange(len(table)), np.asarray(table.costs)
    chosen: dict[str, tuple[str, ExitPolicy, float, float]] = {}
    for criterion, policy in policies.items():
        runs = run_thresholds(score_exits(table, policy))
        speedups = costs[-1] / costs[runs.taken].mean(axis=1)
        own = len(speedups) - 1  # the last run is no threshold of this criterion
        for index in sorted({int(np.abs(speedups[:own] - target).argmin()) for target in SPEEDUPS} - {0}):
            timed = replace(policy, threshold=float(runs.thresholds[index]), certificate=None)
            value = float(values[rows, runs.taken[index]].mean())
            chosen[f"{criterion} {index}"] = criterion, timed, float(speedups[index]), value

    def run(policy: ExitPolicy) -> Callable[[], Any]:
        return lambda: [model.early_exit_predict(**batch, policy=policy) for batch in batches]

    with torch.no_grad():
        timings = time_in_turns(
            {
                "full depth": run(ExitPolicy()),
                **{key: run(entry[1]) for key, entry in chosen.items()},
            },
            ROUNDS,
            on_round=on_round,
        )
    timed_criteria: dict[str, list[dict[str, Any]]] = {}
    for key, (criterion, _, speedup, value) in chosen.items():
        timed_criteria.setdefault(criterion, []).append(
            {
                "layer_speedup": speedup,
                name: value,
                "seconds": timings.median(key),
                "speedup": timings.speedup(key, "full depth"),
            }
        )
    return {"full_depth_seconds": timings.median("full depth"), "criteria": timed_criteria}
