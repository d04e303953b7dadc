"""Choosing thresholds from an exit table, with a guarantee that is stated in a certificate.

Learn then Test (Angelopoulos et al., "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control",
2021) with fixed-sequence testing: policies are put in an order that does not depend on the rows that certify, from the
strictest to the boldest, and each is tested for "its true risk is larger than allowed" with an exact p-value. Testing
stops at the first policy that is not cleared, and the boldest one before it is taken. The chance, over the draw of the
certifying rows, that the true risk of the result is larger than allowed is then at most 1 - confidence, however many
were tested.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np

from transformers_badge.calibration.bounds import binomial_bounds, paired_upper_bound
from transformers_badge.calibration.certificate import demand_facts, demanded, observed, percent, summarise
from transformers_badge.calibration.demand import RISKS, Counts, Demand, Risk, counting, losses_at_exits
from transformers_badge.calibration.fitting import Goal, fit_rule, fit_temperatures
from transformers_badge.calibration.replay import (
    at_exits,
    layer_speedup,
    score_exits,
    take_exits,
)
from transformers_badge.calibration.search import per_exit_path
from transformers_badge.exit_table import ExitTable
from transformers_badge.model.criteria_badge import COMBINATORS, CRITERIA
from transformers_badge.model.policy_badge import ExitPolicy


Array = np.ndarray[Any, np.dtype[Any]]
Thresholds = list[float | None]

# A rule or temperatures are learned on this share of the rows, but on so many at least, if that is not over half.
_LEARNING, _LEAST_TO_LEARN = 0.15, 200
_QUANTILES = 300  # thresholds that are tried where some rows are there to choose them from
# Where all rows certify, the thresholds that are tried must not depend on them: 0, and these.
_FIXED_GRID = np.geomspace(1e-6, 1e2, 500)


def calibrate(
    table: ExitTable,
    criterion: str | ExitPolicy = "learned",
    *,
    risk: Risk = "disagreement",
    max_risk: float | None = 0.01,
    confidence: float = 0.95,
    min_class_accuracy: float | None = None,
    target_speedup: float | None = None,
    per_exit: bool = False,
    temperature: bool = False,
    learn_from: ExitTable | None = None,
    seed: int = 0,
) -> ExitPolicy:
    """The fastest policy whose risk is small, with a guarantee.

    With the confidence asked for, over the draw of the rows of the table, the true risk of the policy on rows of the
    same kind is at most `max_risk`. The rows must not have been trained on. What is learned is learned on some of the
    rows and certified on the others: the rule of the learned criterion and temperatures on 15 % of them (but at least
    200, if that is no more than half), thresholds per exit on half of them. Or it is learned from a table of its own,
    and certified on all rows.

    Args:
        table: every exit's logits for rows like those to come.
        criterion: a name, or an `ExitPolicy` with its dials (or its rule, which is then kept); its threshold is
            replaced.
        risk: `"disagreement"`, the share of rows answered otherwise than at full depth, which needs no labels; or
            `"error_increase"`, the increase in the share of wrong answers, which does.
        max_risk: at most this, in (0, 1). `None`: no bound, where `min_class_accuracy` is the demand.
        confidence: in (0, 1).
        min_class_accuracy: besides, the accuracy within every class is to be at least this. Needs labels.
        target_speedup: instead of demands: as little risk as can be had at this layer speedup. The certificate then
            states what risk was certified.
        per_exit: search a threshold for every exit.
        temperature: fit a temperature for every exit first.
        learn_from: rows to learn from, instead of some of the table; those that are in the table as well are left out.
            They may be rows that the model was trained on, so that a rule is then taught by the last exit; otherwise,
            where the demand is about right answers, by the labels. Exits look better on such rows than they are, and a
            rule learned from them is the worse for it, the longer the training was.
        seed: of which rows are learned from.

    Returns:
        The policy; `certificate["summary"]` says in a sentence what was shown, or why the policy runs at full depth
        (`threshold=None`; then a warning says so too).

    Raises:
        ValueError: a value outside what is written above, labels that are missing, a class without rows, logits that
            are not finite.
    """
    if not isinstance(table, ExitTable):
        raise TypeError(f"calibrate needs an ExitTable, got {type(table).__name__}: make one with make_exit_table.")
    demand = check_demand(criterion, risk, max_risk, confidence, min_class_accuracy, target_speedup)
    _check_table(table, demand, target_speedup)
    policy = _starting_policy(table, criterion)
    searching = policy is None or per_exit or temperature or target_speedup is not None
    search, certify = None, table
    if learn_from is not None:
        learn_from = _checked_source(learn_from, table)
    half = per_exit or target_speedup is not None
    if searching:
        search, certify = _split(table, seed, half) if learn_from is None else (learn_from, table)
    if search is not None:
        goal: Goal = "disagreement"
        if demand.needs_labels:
            # Labels of rows that were trained on say too much for the exits that know them.
            goal = "labelled_regret" if learn_from is None else "regret"
        policy = _learned_parts(search, policy, temperature, goal)
    assert policy is not None
    tried = _candidates(search, policy, demand, per_exit)
    facts = {"rows": len(certify), "rows_searched": 0 if search is None else len(search), "data": table.data,
             "model": table.model, "date": datetime.now(UTC).date().isoformat()}  # fmt: skip
    if target_speedup is not None:
        assert search is not None
        chosen = _at_speedup(search, policy, tried, risk, target_speedup)
        return _bounded(certify, replace(policy, threshold=_compact(chosen)), demand, target_speedup, facts)

    scores, count, best = score_exits(certify, policy), counting(certify), None
    strictest: Counts | None = None  # of the policies that let rows leave at all
    failed = False
    before: Array | None = None
    for thresholds in tried:
        taken = take_exits(scores, thresholds)
        if before is not None and np.array_equal(taken, before):
            continue
        before, counts = taken, count(taken)
        if strictest is None and (taken < scores.shape[1] - 1).any():
            strictest = counts
        failed = failed or demand.p_value(counts) > demand.level
        if not failed:
            best = thresholds, taken, counts
        elif strictest is not None:
            break
    if best is None or (best[1] == scores.shape[1] - 1).all():
        split = search is not None and learn_from is None
        rows_of = partial(_rows_to_give, half=half) if split else int
        return _full_depth(certify, policy, demand, strictest, facts, rows_of)
    thresholds, taken, counts = best
    certificate = {
        "summary": summarise(demand, certify, counts, taken),
        "met": True,
        **demand_facts(demand),
        **facts,
        "p_value": demand.p_value(counts),
        "observed": observed(certify, counts, taken),
    }
    return replace(policy, threshold=_compact(thresholds), certificate=certificate)


def check_demand(
    criterion: Any, risk: Any, max_risk: Any, confidence: Any, min_class_accuracy: Any, target_speedup: Any
) -> Demand:
    """What is demanded, as far as it can be checked before there is an exit table; arguments as in `calibrate`.

    Raises:
        ValueError: a value outside what `calibrate` takes.
    """
    if isinstance(criterion, str) and criterion not in CRITERIA:
        combine = " (give a combination as an ExitPolicy)" if criterion in COMBINATORS else ""
        raise ValueError(f"criterion must be one of {', '.join(map(repr, CRITERIA))}{combine}, got {criterion!r}.")
    if risk not in RISKS:
        raise ValueError(f"risk must be one of {', '.join(map(repr, RISKS))}, got {risk!r}.")
    for name, value in (("max_risk", max_risk), ("confidence", confidence), ("min_class_accuracy", min_class_accuracy)):
        if value is None and name != "confidence":
            continue
        if value is None or not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, both excluded, such as 0.01 or 0.95; got {value}.")
    if max_risk is None and min_class_accuracy is None and target_speedup is None:
        raise ValueError("There is no demand: give max_risk, min_class_accuracy or target_speedup.")
    if target_speedup is not None and min_class_accuracy is not None:
        raise ValueError("Give either target_speedup or min_class_accuracy: one chooses by speed, the other by risk.")
    if target_speedup is not None and not target_speedup > 1:
        raise ValueError(f"target_speedup must be above 1, such as 2.5; got {target_speedup}.")
    return Demand(
        risk=risk,
        max_risk=None if max_risk is None else float(max_risk),
        min_class_accuracy=None if min_class_accuracy is None else float(min_class_accuracy),
        confidence=float(confidence),
    )


def _check_table(table: ExitTable, demand: Demand, target_speedup: float | None) -> None:
    """See that a demand can be put to this table.

    Raises:
        ValueError: it cannot; the message says why.
    """
    if target_speedup is not None:
        costs = np.asarray(table.costs)
        fastest = costs[-1] / costs[0] if costs[0] else np.inf
        if target_speedup > fastest:
            raise ValueError(
                f"target_speedup must be at most {fastest:.2f}, which is everyone leaving at the first exit; got "
                f"{target_speedup}."
            )
    finite = np.isfinite(table.exit_logits).all(axis=-1)
    if not finite.all():
        row, exit_index = (int(i[0]) for i in np.nonzero(~finite))
        raise ValueError(
            f"Row {row} has a logit that is not finite at exit layer {table.exit_layers[exit_index]}: the model or its "
            "input is broken; a guarantee cannot rest on it."
        )
    if table.exit_logits.shape[1] < 2:
        raise ValueError("The model has one exit only: there is nowhere to leave early.")
    demand.check_labels(table.labels)
    if demand.min_class_accuracy is not None:
        if table.problem_type != "single_label_classification":
            raise ValueError("min_class_accuracy needs problem_type='single_label_classification'.")
        empty = np.flatnonzero(np.bincount(np.asarray(table.labels), minlength=len(table.label_names)) == 0)
        if empty.size:
            raise ValueError(
                f"The class {table.label_names[empty[0]]!r} has no rows, so nothing can be shown about it: give rows "
                "of every class, or leave min_class_accuracy out."
            )


def _checked_source(learn_from: ExitTable, table: ExitTable) -> ExitTable:
    """The rows to learn from that do not certify, once it is known that they are of the same model."""
    if not isinstance(learn_from, ExitTable):
        raise TypeError(f"learn_from must be an ExitTable or None, got {type(learn_from).__name__}.")
    check_same_model(learn_from, table)
    if learn_from.row_digests is not None and table.row_digests is not None:
        others = ~np.isin(learn_from.row_digests, table.row_digests)
        if not others.any():
            raise ValueError(
                "All rows of learn_from are in the table too: learn from other rows than those that certify."
            )
        learn_from = learn_from.select(others)
    if not np.isfinite(learn_from.exit_logits).all():
        raise ValueError("learn_from has logits that are not finite: the model or its input is broken.")
    return learn_from


def check_same_model(one: ExitTable, other: ExitTable) -> None:
    """See that two tables are of one model and have the same labels.

    Raises:
        ValueError: they differ; the message says in what.
    """
    for name in ("exit_layers", "label_names", "problem_type", "model"):
        mine, yours = getattr(one, name), getattr(other, name)
        if mine != yours and (mine and yours):
            raise ValueError(
                f"The exit tables do not belong together: {name} is {mine} in one and {yours} in the other."
            )


def _starting_policy(table: ExitTable, criterion: str | ExitPolicy) -> ExitPolicy | None:
    """The policy whose thresholds are looked for; `None` where its rule has to be fitted first."""
    if criterion == "learned":
        return None
    if isinstance(criterion, str):
        # PABEE counts up to its patience, so with the largest one the threshold says how many are needed.
        dials = {"patience": table.exit_logits.shape[1] - 1} if criterion == "patience" else {}
        return ExitPolicy.of({"criterion": criterion, **dials})
    policy = ExitPolicy.of(criterion, threshold=None)
    policy.thresholds(table.exit_logits.shape[1])
    return policy


def _split(table: ExitTable, seed: int, half: bool) -> tuple[ExitTable, ExitTable]:
    """Rows to learn from, and those that certify."""
    rows = len(table)
    if rows < 2:
        raise ValueError("Calibrating this needs two rows at least: one to learn from, one to certify.")
    learning = rows // 2 if half else min(rows // 2, max(_LEAST_TO_LEARN, round(_LEARNING * rows)))
    order = np.random.default_rng(seed).permutation(rows)
    return table.select(np.sort(order[:learning])), table.select(np.sort(order[learning:]))


def _rows_to_give(certifying: int, half: bool) -> int:
    """How many rows there have to be, for so many of them to certify."""
    if half:
        return 2 * certifying
    return min(2 * certifying, max(certifying + _LEAST_TO_LEARN, math.ceil(certifying / (1 - _LEARNING))))


def _learned_parts(search: ExitTable, policy: ExitPolicy | None, temperature: bool, goal: Goal) -> ExitPolicy:
    temperatures = fit_temperatures(search) if temperature else None

    def fitted() -> tuple[tuple[float, ...], ...]:
        return fit_rule(search, temperatures, goal)

    def at_temperatures(policy: ExitPolicy) -> ExitPolicy:
        """The policy, or all of its parts, with these temperatures."""
        if policy.parts:
            return ExitPolicy.of(policy, parts=[at_temperatures(part) for part in policy.parts])
        if policy.criterion == "learned":  # a rule is for the temperatures that it was fitted with
            return ExitPolicy.of(policy, rule=fitted(), temperature=temperatures)
        return ExitPolicy.of(policy, temperature=temperatures)

    if policy is None:
        return ExitPolicy(criterion="learned", rule=fitted(), temperature=temperatures)
    return policy if temperatures is None else at_temperatures(policy)


def _candidates(search: ExitTable | None, policy: ExitPolicy, demand: Demand, per_exit: bool) -> list[Thresholds]:
    """Thresholds from the strictest to the boldest; the rows that certify have no part in them."""
    if search is None:
        return [[float(t)] for t in (0.0, *_FIXED_GRID)]
    scores = score_exits(search, policy)
    if per_exit:
        return per_exit_path(
            scores, losses_at_exits(search, demand.risk), np.asarray(search.costs), demand.max_risk or 0.01
        )
    inner = scores[:, :-1]
    finite = inner[np.isfinite(inner)]
    if finite.size == 0:
        return []
    return [[float(t)] for t in np.unique(np.quantile(finite, np.linspace(0, 1, _QUANTILES)))]


def _compact(thresholds: Thresholds) -> float | tuple[float | None, ...] | None:
    """One number, where it stands for all exits."""
    return thresholds[0] if len(thresholds) == 1 else tuple(thresholds)


def _full_depth(
    table: ExitTable,
    policy: ExitPolicy,
    demand: Demand,
    strictest: Counts | None,
    facts: dict[str, Any],
    rows_of: Callable[[int], int],
) -> ExitPolicy:
    """The answer where nothing meets the demand: full depth, with what it would take.

    `rows_of` so many that certify: how many there are in all.
    """
    full = counting(table)(np.full(len(table), table.exit_logits.shape[1] - 1))
    needed, instead = None, "a larger risk"
    if demand.min_class_accuracy is not None and replace(demand, max_risk=None).p_value(full) > demand.level:
        p_values = demand.class_p_values(full)
        worst = int(np.argmax(p_values))
        right, rows = full.right[worst], full.right[worst] + full.wrong[worst]
        why = (
            "not even full depth can be shown to meet it "
            f"(class {table.label_names[worst]!r} has {right:,} of {rows:,} rows right at full depth)"
        )
        needed, instead = demand.rows_needed(full), "a lower min_class_accuracy"
    elif strictest is None:
        why = f"criterion {policy.criterion!r} lets no row leave at any threshold"
    else:
        why = "no threshold that lets rows leave early can be shown to meet it"
        needed = demand.rows_needed(strictest)
    certificate: dict[str, Any] = {"met": False, **demand_facts(demand), **facts}
    if needed is None:
        advice = f"more rows of this kind would not change that: allow {instead}, or train a better model"
    else:
        total, present = rows_of(max(needed, len(table) + 1)), rows_of(len(table))
        advice = f"it would take about {total:,} rows, {total - present:,} more, or {instead}"
        certificate["rows_needed"] = total
    summary = (
        f"The policy runs at full depth: asked was, with {percent(demand.confidence)} confidence, that "
        f"{demanded(demand)}; with {facts['rows']:,} rows to show it, {why}; {advice}."
    )
    warnings.warn(summary, stacklevel=3)
    return replace(policy, threshold=None, certificate={"summary": summary, **certificate})


def _at_speedup(
    search: ExitTable, policy: ExitPolicy, tried: Sequence[Thresholds], risk: Risk, target: float
) -> Thresholds:
    """The thresholds with the least risk, on the rows to search in, among those that are fast enough."""
    scores, losses = score_exits(search, policy), losses_at_exits(search, risk)
    reached: list[tuple[float, float, Thresholds]] = []
    everyone_at_once: Thresholds = [float(np.finfo(np.float64).max)]  # infinity is not JSON
    for thresholds in (*tried, everyone_at_once):
        taken = take_exits(scores, thresholds)
        speedup = layer_speedup(search, taken)
        if speedup >= target:
            reached.append((float(at_exits(losses, taken).mean()), speedup, thresholds))
    if not reached:
        raise ValueError(
            f"target_speedup={target} is more than criterion {policy.criterion!r} reaches at any threshold, "
            f"{layer_speedup(search, taken):.2f}x on these rows: ask for less, or take another criterion."
        )
    return min(reached, key=lambda entry: entry[:2])[2]


def _bounded(table: ExitTable, policy: ExitPolicy, demand: Demand, target: float, facts: dict[str, Any]) -> ExitPolicy:
    """A policy chosen by speed, with the risk that the certifying rows show for it."""
    taken = take_exits(score_exits(table, policy), policy.thresholds(table.exit_logits.shape[1]))
    counts = counting(table)(taken)
    if demand.risk == "disagreement":
        bound = binomial_bounds(counts.changed, counts.rows, demand.confidence)[1]
    else:
        bound = paired_upper_bound(counts.lost, counts.gained, counts.rows, demand.confidence)
    shown = replace(demand, max_risk=bound)
    certificate = {
        "summary": summarise(shown, table, counts, taken),
        "met": True,
        "target_speedup": target,
        **demand_facts(shown),
        **facts,
        "observed": observed(table, counts, taken),
    }
    return replace(policy, certificate=certificate)
