"""What a certificate says: facts for programs, and sentences for people."""

from typing import Any

import numpy as np

from transformers_badge.calibration.demand import RISKS, Counts, Demand
from transformers_badge.calibration.replay import at_exits, correctness, layer_speedup
from transformers_badge.exit_table import ExitTable


Array = np.ndarray[Any, np.dtype[Any]]


def observed(table: ExitTable, counts: Counts, taken: Array) -> dict[str, float]:
    """What the certifying rows show, as shares; the points of errors only where there are labels."""
    shown = {"layer_speedup": layer_speedup(table, taken), "disagreement": counts.changed / counts.rows}
    if table.labels is not None:
        shown["error_increase"] = (counts.lost - counts.gained) / counts.rows
        shown["accuracy"] = float(at_exits(correctness(table), taken).mean())
    return shown


def demand_facts(demand: Demand) -> dict[str, Any]:
    """What was asked for."""
    facts: dict[str, Any] = {"confidence": demand.confidence}
    if demand.max_risk is not None:
        facts |= {"risk": demand.risk, "max_risk": demand.max_risk}
    if demand.min_class_accuracy is not None:
        facts["min_class_accuracy"] = demand.min_class_accuracy
    return facts


def percent(value: float) -> str:
    """A share as a percentage, not rounded to fewer digits than it has."""
    return f"{100 * value:.6g}%"


def _percent_at_most(value: float) -> str:
    """A share as a percentage with two decimals, rounded up."""
    return f"{np.ceil(round(1e4 * value, 6)) / 100:.2f}%"


def demanded(demand: Demand) -> str:
    """What was asked for, in words."""
    parts = []
    if demand.max_risk is not None:
        parts.append(f"{RISKS[demand.risk]} is at most {_percent_at_most(demand.max_risk)}")
    if demand.min_class_accuracy is not None:
        parts.append(f"the accuracy within every class is at least {demand.min_class_accuracy:.1%}")
    return " and ".join(parts)


def summarise(demand: Demand, table: ExitTable, counts: Counts, taken: Array) -> str:
    """What was shown, in two sentences."""
    shown = observed(table, counts, taken)
    seen = f"{shown['disagreement']:.2%} of the answers differed"
    if "accuracy" in shown:
        seen += f", accuracy was {shown['accuracy']:.2%}, {100 * shown['error_increase']:+.2f} points of errors"
    return (
        f"With {percent(demand.confidence)} confidence, {demanded(demand)}. On the {counts.rows:,} rows that show it, "
        f"{seen}, at a layer speedup of {shown['layer_speedup']:.2f}x."
    )
