"""Evaluating an exit table: one JSON record, from which tables and pictures are made. Numpy only."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np

from transformers_badge.calibration.bounds import binomial_bounds
from transformers_badge.calibration.fitting import fit_temperatures
from transformers_badge.calibration.replay import (
    agreement,
    answers,
    at_exits,
    correctness,
    layer_speedup,
    replay,
    score_exits,
)
from transformers_badge.evaluation.curves import (
    compared_policies,
    cross_fitted_scores,
    describe_criterion,
    goal_of,
    measure,
    speedup_axis,
)
from transformers_badge.exit_table import ExitTable
from transformers_badge.model.criteria_badge import exit_probabilities
from transformers_badge.model.policy_badge import ExitPolicy


Array = np.ndarray[Any, np.dtype[Any]]

BINS = 10  # of a reliability diagram, of equal width
LENGTH_GROUPS = 4
EXAMPLES = 20


def evaluate_table(table: ExitTable, policy: ExitPolicy, texts: Sequence[Any] | None = None) -> dict[str, Any]:
    """All that can be said from an exit table.

    Args:
        table: rows that the model was not trained on; with labels accuracy is shown, without agreement with full depth.
        policy: the checkpoint's. A rule of the learned criterion is taken from it; where there is none, one is fitted
            to each half of the rows for the other.
        texts: the rows' texts, to show where the first and the last exit disagree.

    Returns:
        What JSON can hold: `exits` (accuracy, agreement, temperature, calibration error), `criteria` (a curve over
        `speedup_axis` each), `policy` (what it does, with exact 95 % intervals), `leaving` (where rows leave, by class
        and by length), `disagreements`.

    Raises:
        ValueError: logits that are not finite, or a policy for another number of exits.
    """
    if not np.isfinite(table.exit_logits).all():
        raise ValueError("The exit table has logits that are not finite: the model or its input is broken.")
    axis, taken = speedup_axis(table), replay(table, policy)
    scores = {name: score_exits(table, one) for name, one in compared_policies(len(table.exit_layers)).items()}
    if policy.criterion == "learned":
        scores["learned"] = score_exits(table, policy)
    elif len(table.exit_layers) > 1 and len(table) > 1:
        scores["learned"] = cross_fitted_scores(table, goal=goal_of(table))
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "rows": len(table),
        "data": table.data,
        "model": table.model,
        "label_names": list(table.label_names),
        "measure": measure(table)[0],
        "exit_layers": list(table.exit_layers),
        "exits": describe_exits(table),
        "speedup_axis": axis.tolist(),
        "criteria": {name: describe_criterion(table, values, axis) for name, values in scores.items()},
        "policy": {"fields": policy.to_dict(), **describe_policy(table, taken)},
        "leaving": describe_leaving(table, taken),
    }
    if texts is not None:
        record["disagreements"] = disagreements(table, texts)
    return record


def describe_exits(table: ExitTable) -> list[dict[str, Any]]:
    """Every exit: accuracy, agreement with full depth, and how far its probabilities can be believed.

    Reliability is against the labels, or without labels against the last exit's answer; after temperature scaling it is
    measured on rows that the temperature was not fitted to.
    """
    agrees, temperatures = agreement(table).mean(axis=0), fit_temperatures(table)
    right = correctness(table).mean(axis=0) if table.labels is not None else None
    halves = np.arange(len(table)) % 2 == 0
    scaled = np.empty((*table.exit_logits.shape[:2], 2))
    plain = _confidence(table, None)
    for half in (halves, ~halves):
        if half.any() and (~half).any():
            scaled[half] = _confidence(table.select(half), fit_temperatures(table.select(~half)))
        else:
            scaled = plain
    described = []
    for index, layer in enumerate(table.exit_layers):
        before, after = reliability(plain[:, index]), reliability(scaled[:, index])
        described.append(
            {
                "layer": layer,
                **({} if right is None else {"accuracy": float(right[index])}),
                "agreement": float(agrees[index]),
                "temperature": temperatures[index],
                "reliability": before,
                "reliability_after_temperature": after,
            }
        )
    return described


def _confidence(table: ExitTable, temperatures: tuple[float, ...] | None) -> Array:
    """Of every row at every exit the largest probability, and whether it was right to hold it: (rows, exits, 2).

    Of several labels the mean over them.
    """
    probabilities = exit_probabilities(table.exit_logits, table.problem_type, temperatures)
    if table.labels is None:
        wanted = probabilities[:, :, -1:].argmax(axis=-1)
    else:
        wanted = (table.labels if table.labels.ndim == 2 else table.labels[:, None])[:, :, None]
    held = probabilities.argmax(axis=-1) == wanted
    return np.stack([probabilities.max(axis=-1).mean(axis=1), held.mean(axis=1)], axis=-1)


def reliability(confidence: Array) -> dict[str, Any]:
    """Expected calibration error, and its bins: (rows, 2) of confidence and of being right.

    Source: Naeini et al., AAAI 2015; Guo et al., ICML 2017.
    """
    bins = np.minimum((confidence[:, 0] * BINS).astype(int), BINS - 1)
    entries, error = [], 0.0
    for number in range(BINS):
        here = confidence[bins == number]
        if len(here):
            sure, right = here.mean(axis=0)
            error += len(here) / len(confidence) * abs(sure - right)
            entries.append({"confidence": float(sure), "right": float(right), "rows": len(here)})
    return {"error": float(error), "bins": entries}


def describe_policy(table: ExitTable, taken: Array) -> dict[str, Any]:
    """What a policy does to the rows: layer speedup, disagreement and accuracy, with exact 95 % intervals."""

    def share(events: int) -> dict[str, Any]:
        low, high = binomial_bounds(events, len(taken), 0.975)
        return {"share": events / len(taken), "low": low, "high": high}

    described = {
        "layer_speedup": layer_speedup(table, taken),
        "mean_exit_layer": float(np.array(table.exit_layers)[taken].mean()),
        "disagreement": share(int((~at_exits(agreement(table), taken)).sum())),
    }
    if table.labels is not None:
        right = correctness(table)
        described["accuracy"] = share(int(at_exits(right, taken).sum()))
        described["full_depth_accuracy"] = share(int(right[:, -1].sum()))
    return described


def describe_leaving(table: ExitTable, taken: Array) -> dict[str, Any]:
    """Which share of the rows leaves at every exit: of all rows, by class (predicted, where no labels), by length."""
    exits = len(table.exit_layers)

    def shares(rows: Array) -> dict[str, Any]:
        return {"rows": int(rows.sum()), "shares": (np.bincount(taken[rows], minlength=exits) / rows.sum()).tolist()}

    leaving: dict[str, Any] = {"all": shares(np.ones(len(taken), dtype=bool))}
    if table.problem_type == "single_label_classification":
        classes = answers(table)[:, -1] if table.labels is None else table.labels
        leaving["by_class"] = {
            name: shares(classes == index) for index, name in enumerate(table.label_names) if (classes == index).any()
        }
    if table.lengths is not None:
        edges = np.unique(np.quantile(table.lengths, np.linspace(0, 1, LENGTH_GROUPS + 1)).astype(int))
        leaving["by_length"] = []
        for number, (low, high) in enumerate(pairwise(edges)):
            rows = (table.lengths >= low if number == 0 else table.lengths > low) & (table.lengths <= high)
            if rows.any():
                leaving["by_length"].append({"tokens": [int(low) + (number > 0), int(high)], **shares(rows)})
    return leaving


def disagreements(table: ExitTable, texts: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows that the first and the last exit answer otherwise, those first of which the first exit is surest."""
    if table.problem_type != "single_label_classification":
        return []
    probabilities, given = exit_probabilities(table.exit_logits, table.problem_type)[:, 0], answers(table)
    differ = np.flatnonzero(given[:, 0] != given[:, -1])
    order = differ[np.argsort(-probabilities[differ, 0].max(axis=-1), kind="stable")][:EXAMPLES]
    names = table.label_names
    return [
        {
            "text": texts[row] if isinstance(texts[row], str) else list(texts[row]),
            "first_exit": {"label": names[given[row, 0]], "score": float(probabilities[row, 0].max())},
            "last_exit": {"label": names[given[row, -1]], "score": float(probabilities[row, -1].max())},
            **({} if table.labels is None else {"label": names[table.labels[row]]}),
        }
        for row in order.tolist()
    ]
