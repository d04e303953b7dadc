"""Calibrating: that what a certificate says is true as often as it says, and what is done with which rows."""

import json
import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from test_replay import SEVERAL, by_hand, made_up, made_up_several

from transformers_badge import ExitPolicy
from transformers_badge.calibration.bounds import binomial_bounds, binomial_p_value, paired_upper_bound
from transformers_badge.calibration.calibrate import (
    _FIXED_GRID,
    RISKS,
    _rows_to_give,
    _split,
    calibrate,
    check_same_model,
)
from transformers_badge.calibration.fitting import fit_rule, fit_temperatures
from transformers_badge.calibration.replay import (
    agreement,
    at_exits,
    correctness,
    layer_speedup,
    replay,
    score_exits,
    take_exits,
)
from transformers_badge.model.criteria_badge import COMBINATORS, CRITERIA


PARTS = ({"criterion": "entropy", "threshold": 0.4}, {"criterion": "dge", "threshold": 0.5})
# What a demand allows, as `measured` measures it.
DEMANDS = {
    "disagreement": (0.02, {"risk": "disagreement", "max_risk": 0.02}),
    "error_increase": (0.02, {"risk": "error_increase", "max_risk": 0.02}),
    "error_increase, few rows": (0.01, {"risk": "error_increase", "max_risk": 0.01}),
    "min_class_accuracy": (0.2, {"max_risk": None, "min_class_accuracy": 0.8}),
}
CONFIDENCE = 0.9


@cache
def population(exits=3):
    """What rows are drawn from, and its scores by entropy."""
    table = made_up(40_000, exits, seed=1)
    return table, score_exits(table, ExitPolicy(criterion="entropy"))


@cache
def population_losses(risk, exits=3):
    table = population(exits)[0]
    if risk == "disagreement":
        return (~agreement(table)).astype(float)
    right = correctness(table).astype(float)
    return 1 - right if risk == "min_class_accuracy" else right[:, -1:] - right


def measured(risk, losses, labels, taken):
    found = at_exits(losses, taken)
    return max(found[labels == k].mean() for k in (0, 1)) if risk == "min_class_accuracy" else found.mean()


def at_most_expected(violations):
    """Whether so many of the draws, by chance, are no more than the confidence allows, but for two standard errors."""
    allowed = 1 - CONFIDENCE
    return np.mean(violations) <= allowed + 2 * np.sqrt(allowed * (1 - allowed) / len(violations))


def threshold_of(policy):
    return list(policy.threshold) if isinstance(policy.threshold, tuple) else [policy.threshold]


def repeated(table, times):
    return table.select(np.tile(np.arange(len(table)), times))


def with_digests(table, first=0):
    return replace(table, row_digests=np.arange(first, first + len(table), dtype=np.uint64))


def without_warnings(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return calibrate(*args, **kwargs)


@pytest.mark.parametrize("name", DEMANDS)
def test_the_guarantee_holds_as_often_as_it_says(name, record_property):
    allowed, demand = DEMANDS[name]
    risk = name.split(",")[0]
    table, scores = population()
    losses, bold_first = population_losses(risk), np.geomspace(1, 1e-4, 120)
    generator = np.random.default_rng(0)
    broken, broken_uncertified, speedup, speedup_uncertified = [], [], [], []
    for _ in range(300 if name in RISKS else 100):
        rows = generator.integers(0, len(table), 1000)
        policy = without_warnings(table.select(rows), "entropy", confidence=CONFIDENCE, **demand)
        taken = take_exits(scores, threshold_of(policy))
        broken.append(measured(risk, losses, table.labels, taken) > allowed)
        speedup.append(layer_speedup(table, taken))
        # what one would take without a certificate: the boldest that these rows do not speak against
        seen = (losses[rows], table.labels[rows])
        chosen = next(t for t in bold_first if measured(risk, *seen, take_exits(scores[rows], [t])) <= allowed)
        taken = take_exits(scores, [chosen])
        broken_uncertified.append(measured(risk, losses, table.labels, taken) > allowed)
        speedup_uncertified.append(layer_speedup(table, taken))
    record_property(
        f"{name}: draws that break it", f"{np.mean(broken):.1%}, uncertified {np.mean(broken_uncertified):.1%}"
    )
    record_property(f"{name}: layer speedup", f"{np.mean(speedup):.2f}, uncertified {np.mean(speedup_uncertified):.2f}")
    assert at_most_expected(broken)
    assert np.mean(broken_uncertified) > 2 * (1 - CONFIDENCE)
    assert np.mean(speedup) > 1.05
    assert np.mean(speedup) >= np.mean(speedup_uncertified) / 2
    assert np.mean(speedup) - 1 >= (np.mean(speedup_uncertified) - 1) / 2


def test_thresholds_per_exit_keep_the_guarantee_because_other_rows_certify_them(record_property):
    table, scores = population(5)
    losses = population_losses("disagreement", 5)
    generator = np.random.default_rng(0)
    broken, broken_by_the_same_rows = [], []
    for _ in range(100):
        rows = table.select(generator.integers(0, len(table), 500))
        for learn_from, violations in ((None, broken), (rows, broken_by_the_same_rows)):
            policy = without_warnings(
                rows, "entropy", max_risk=0.05, confidence=CONFIDENCE, per_exit=True, learn_from=learn_from
            )
            taken = take_exits(scores, threshold_of(policy))
            violations.append(at_exits(losses, taken).mean() > 0.05)
    shares = f"{np.mean(broken):.1%}, by the same rows {np.mean(broken_by_the_same_rows):.1%}"
    record_property("thresholds per exit: draws that break it", shares)
    assert at_most_expected(broken)
    assert not at_most_expected(broken_by_the_same_rows)


@pytest.mark.parametrize("risk", ["disagreement", "error_increase"])
def test_the_risk_stated_at_a_speedup_holds_as_often_as_it_says(risk):
    table, scores = population()
    losses, generator = population_losses(risk), np.random.default_rng(0)
    broken, above_the_observed = [], []
    for _ in range(100):
        rows = table.select(generator.integers(0, len(table), 800))
        policy = calibrate(rows, "entropy", target_speedup=1.5, risk=risk, confidence=CONFIDENCE)
        truth = at_exits(losses, take_exits(scores, threshold_of(policy))).mean()
        broken.append(truth > policy.certificate["max_risk"])
        above_the_observed.append(truth > policy.certificate["observed"][risk])
    assert at_most_expected(broken)
    assert not at_most_expected(above_the_observed)


@pytest.mark.parametrize(
    ("learning", "share"), [({"criterion": "learned"}, 0.15), ({"per_exit": True}, 0.5), ({"temperature": True}, 0.15)]
)
def test_rows_that_are_searched_do_not_certify(learning, share):
    table = with_digests(made_up(1501, 4))
    search, certify = _split(table, seed=3, half=share == 0.5)
    assert sorted([*search.row_digests, *certify.row_digests]) == list(range(1501))
    kwargs = {"criterion": "entropy", "max_risk": 0.05, **learning}
    policy = calibrate(table, seed=3, **kwargs)
    assert (policy.certificate["rows_searched"], policy.certificate["rows"]) == (len(search), len(certify))
    assert abs(len(search) - share * 1501) <= 1
    # it is what comes of learning from some and of certifying on the others
    by_parts = calibrate(certify, learn_from=search, **kwargs)
    assert replace(policy, certificate=None) == replace(by_parts, certificate=None)
    assert policy.certificate["observed"] == by_parts.certificate["observed"]
    assert policy.certificate["p_value"] == by_parts.certificate["p_value"]
    swapped = calibrate(search, learn_from=certify, **kwargs)
    assert swapped.certificate["observed"] != policy.certificate["observed"]
    # which rows they are is up to the seed
    assert calibrate(table, seed=3, **kwargs) == policy
    assert calibrate(table, seed=4, **kwargs).certificate["observed"] != policy.certificate["observed"]


@pytest.mark.parametrize("half", [False, True])
def test_as_many_rows_as_are_asked_for_certify(half):
    for rows in (2, 3, 50, 399, 400, 401, 1000, 1332, 1333, 1334, 1401, 3000):
        certifying = len(_split(made_up(rows, 2), seed=0, half=half)[1])
        assert len(_split(made_up(_rows_to_give(certifying, half), 2), seed=0, half=half)[1]) >= certifying
        assert rows - 2 <= _rows_to_give(certifying, half) <= rows + 2


def test_where_nothing_is_learned_all_rows_certify_and_have_no_part_in_what_is_tried():
    table = made_up(1000)
    chosen = {calibrate(made_up(1000, seed=seed), "entropy", max_risk=0.05).threshold for seed in range(8)}
    assert len(chosen) > 2
    assert chosen <= set(_FIXED_GRID)
    certificate = calibrate(table, "entropy", max_risk=0.05).certificate
    assert (certificate["rows"], certificate["rows_searched"]) == (1000, 0)
    shuffled = table.select(np.random.default_rng(0).permutation(1000))
    assert calibrate(shuffled, "entropy", max_risk=0.05, seed=5).certificate == certificate


def test_rows_to_learn_from_leave_all_rows_to_certify():
    table, others = made_up(800, 4), made_up(1200, 4, seed=1)
    policy = calibrate(table, max_risk=0.05, learn_from=others)
    assert (policy.certificate["rows"], policy.certificate["rows_searched"]) == (800, 1200)
    assert policy.rule == fit_rule(others, goal="disagreement")
    assert policy.rule != fit_rule(table, goal="disagreement")


@pytest.mark.parametrize(
    ("demand", "goal"),
    [
        ({"risk": "disagreement"}, "disagreement"),
        ({"risk": "error_increase"}, "labelled_regret"),
        ({"risk": "disagreement", "min_class_accuracy": 0.5}, "labelled_regret"),
    ],
)
def test_labels_teach_the_rule_where_the_demand_is_about_right_answers(demand, goal):
    table = made_up(800, 4)
    search = _split(table, seed=0, half=False)[0]
    rules = {goal: fit_rule(search, goal=goal) for goal in ("disagreement", "regret", "labelled_regret")}
    assert len(set(rules.values())) == 3
    assert calibrate(table, max_risk=0.1, **demand).rule == rules[goal]
    # rows that may have been trained on: never the labels
    others = made_up(1200, 4, seed=1)
    unlabelled = "regret" if goal == "labelled_regret" else goal
    assert calibrate(table, max_risk=0.1, learn_from=others, **demand).rule == fit_rule(others, goal=unlabelled)


def test_rows_that_are_shared_are_not_learned_from():
    table, others = with_digests(made_up(800, 4)), with_digests(made_up(1200, 4, seed=1), first=500)
    policy = calibrate(table, max_risk=0.05, learn_from=others)
    assert (policy.certificate["rows"], policy.certificate["rows_searched"]) == (800, 900)
    assert policy.rule == fit_rule(others.select(slice(300, None)), goal="disagreement")
    assert policy.rule != fit_rule(others, goal="disagreement")
    with pytest.raises(ValueError, match="All rows of learn_from are in the table too"):
        calibrate(table, max_risk=0.05, learn_from=table.select(slice(0, 100)))


def test_testing_stops_at_the_first_policy_that_is_not_cleared():
    # the surest 400 rows are right at the first exit, the next 60 lost; of the others 300 are gained, so that leaving
    # at once would be better than full depth: whoever looks on after a failure takes that, and tests too often
    margin = np.linspace(9, 1, 1000)
    lost, gained = (np.isin(np.arange(1000), rows) for rows in (np.arange(400, 460), np.arange(600, 900)))
    logits = np.stack(
        [np.stack([-each, each], axis=-1) for each in (np.where(lost, -margin, margin), np.where(gained, -1, margin))],
        1,
    )
    table = by_hand(logits, np.ones(1000, dtype=int))
    taken = replay(table, calibrate(table, "entropy", risk="error_increase", max_risk=0.03))
    assert (taken[:400] == 0).all()
    assert (taken[460:] == 1).all()
    without_lost = calibrate(table.select(~lost), "entropy", risk="error_increase", max_risk=0.03)
    assert (replay(table, without_lost) == 0).all()


@pytest.mark.parametrize("criterion", ["entropy", "dge", "learned"])
@pytest.mark.parametrize("risk", ["disagreement", "error_increase"])
def test_a_larger_risk_is_never_slower(criterion, risk):
    table = made_up(1500)
    risks = (0.005, 0.009, 0.03, 0.06, 0.15, 0.4)
    policies = [without_warnings(table, criterion, max_risk=r, risk=risk) for r in risks]
    speedups = [layer_speedup(table, replay(table, policy)) for policy in policies]
    assert speedups == sorted(speedups)
    assert speedups[0] < 1.6 < speedups[-1]
    stricter = without_warnings(table, criterion, max_risk=0.06, risk=risk, confidence=0.9999)
    assert layer_speedup(table, replay(table, stricter)) < speedups[3]


@pytest.mark.parametrize("risk", ["disagreement", "error_increase"])
@pytest.mark.parametrize("learning", [{"criterion": "entropy"}, {"criterion": "learned"}, {"per_exit": True}])
def test_a_speedup_is_reached_and_its_risk_stated(risk, learning):
    table, kwargs = made_up(3000), {"risk": risk, **{"criterion": "entropy", **learning}}
    risks = []
    for target in (1.3, 2.0, 4.0):
        policy = calibrate(table, target_speedup=target, confidence=0.9, **kwargs)
        certificate, taken = policy.certificate, replay(made_up(5000, seed=9), policy)
        for speedup in (layer_speedup(table, taken), certificate["observed"]["layer_speedup"]):
            assert speedup > 0.88 * target
            # Of what is fast enough the most accurate is taken, which may be faster still: rows can be answered better
            # by an earlier exit. Never so where the last exit's answers count.
            assert speedup < (1.12 if risk == "disagreement" else 1.3) * target
        assert (certificate["target_speedup"], certificate["risk"]) == (target, risk)
        certify = _split(table, seed=0, half=True)[1]
        taken = replay(certify, policy)
        if risk == "disagreement":
            changed = int((~at_exits(agreement(certify), taken)).sum())
            bound = binomial_bounds(changed, len(certify), 0.9)[1]
        else:
            early, full = at_exits(correctness(certify), taken), correctness(certify)[:, -1]
            bound = paired_upper_bound(int((full & ~early).sum()), int((early & ~full).sum()), len(certify), 0.9)
        assert certificate["max_risk"] == bound
        assert certificate["observed"][risk] < bound < certificate["observed"][risk] + 0.04
        risks.append(certificate["observed"][risk])
    assert risks == sorted(risks)
    assert risks[0] < risks[-1]


def test_a_speedup_that_a_criterion_cannot_reach_is_an_error_that_says_so():
    table = made_up(400)
    for criterion in ("pcee", "f_pabee", "f_pabee_averaged"):
        assert calibrate(table, criterion, target_speedup=1.5).certificate["observed"]["layer_speedup"] > 1.4
        with pytest.raises(ValueError, match="target_speedup"):
            calibrate(table, criterion, target_speedup=6.0)  # it never leaves at the first exit


def unequal(rows=12_000, seed=0):
    """One row in six is of class 1, which the first exits often take for class 0, and are sure of it."""
    table = made_up(rows, 4, seed)
    logits = table.exit_logits.copy() * 2
    late = (table.labels == 1) & (np.arange(rows) % 5 < 3)
    logits[late, :3] = np.array([4.0, -4.0]) + np.random.default_rng(seed).normal(0, 1, (int(late.sum()), 3, 2))
    rare = (table.labels == 0) | (np.arange(rows) % 5 == 0) | (np.arange(rows) % 100 == 4)
    return replace(table, exit_logits=logits, label_names=("common", "rare")).select(rare)


@pytest.mark.parametrize("learning", [{"criterion": "entropy"}, {"criterion": "learned"}, {"per_exit": True}])
def test_the_accuracy_within_every_class_is_kept(learning):
    table, others, kwargs = unequal(), unequal(seed=1), {"criterion": "entropy", "max_risk": 0.14, **learning}

    def accuracies(policy):
        right = at_exits(correctness(others), replay(others, policy))
        return [right[others.labels == k].mean() for k in (0, 1)]

    careless, careful = calibrate(table, **kwargs), calibrate(table, min_class_accuracy=0.8, **kwargs)
    assert accuracies(careless)[0] > 0.8 > accuracies(careless)[1]
    assert min(accuracies(careful)) >= 0.8
    assert 1.1 < careful.certificate["observed"]["layer_speedup"] < careless.certificate["observed"]["layer_speedup"]
    assert careful.certificate["min_class_accuracy"] == 0.8
    alone = calibrate(table, **{**kwargs, "max_risk": None}, min_class_accuracy=0.8)
    assert min(accuracies(alone)) >= 0.8
    assert "max_risk" not in alone.certificate


def test_both_demands_hold_where_there_are_two():
    table = made_up(4000)
    classes, risk = {"min_class_accuracy": 0.7}, {"max_risk": 0.02}
    both = calibrate(table, "entropy", **classes, **risk)
    assert both.threshold == calibrate(table, "entropy", **risk).threshold
    assert both.threshold < calibrate(table, "entropy", max_risk=None, **classes).threshold


def test_too_few_rows_give_full_depth_and_say_how_many_would_do():
    for rows, criterion, needed, half in ((100, "entropy", 299, 1), (100, "learned", 499, 2)):
        with pytest.warns(UserWarning, match=rf"about {needed} rows, {needed - rows} more") as seen:
            policy = calibrate(made_up(rows), criterion, max_risk=0.01)
        assert seen[0].filename == __file__
        certificate = policy.certificate
        assert policy.threshold is None
        assert certificate["summary"] == str(seen[0].message)
        assert (certificate["met"], certificate["rows_needed"]) == (False, needed)
        assert (certificate["max_risk"], certificate["confidence"], certificate["rows"]) == (0.01, 0.95, rows // half)
        assert replay(made_up(10), policy).tolist() == [5] * 10
        fewer = without_warnings(made_up(needed - 1), criterion, max_risk=0.01)
        assert fewer.threshold is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            enough = calibrate(made_up(needed), criterion, max_risk=0.01)
        assert enough.threshold is not None
        assert enough.certificate["met"] is True


def test_where_some_answers_differ_more_rows_of_the_kind_are_asked_for():
    def differing(events, rows=200):
        sure, other = [[0, 3], [0, 3]], [[3, 0], [0, 3]]
        return by_hand([other] * events + [sure] * (rows - events))

    few = repeated(differing(1), 2)
    certificate = without_warnings(few, "fixed_depth", max_risk=0.01).certificate
    assert certificate["met"] is False
    assert certificate["rows_needed"] > 2 * 400
    half, enough = (repeated(differing(1), int(np.ceil(certificate["rows_needed"] * k / 200))) for k in (0.5, 1.2))
    assert calibrate(enough, "fixed_depth", max_risk=0.01).certificate["met"]
    assert not without_warnings(half, "fixed_depth", max_risk=0.01).certificate["met"]
    with pytest.warns(UserWarning, match="more rows of this kind would not change that"):
        hopeless = calibrate(differing(8, 400), "fixed_depth", max_risk=0.01)
    assert hopeless.threshold is None
    assert "rows_needed" not in hopeless.certificate
    assert not without_warnings(differing(400, 20_000), "fixed_depth", max_risk=0.01).certificate["met"]


def test_what_few_rows_speak_against_is_not_promised_for_a_few_more():
    # too few to show anything, and yet four in 200 are more than one in a hundred
    table = by_hand([[[3, 0], [0, 3]]] * 4 + [[[0, 3], [0, 3]]] * 196)
    needed = without_warnings(table, "fixed_depth", max_risk=0.01).certificate.get("rows_needed")
    assert (
        needed is None
        or without_warnings(repeated(table, -(-needed // 200)), "fixed_depth", max_risk=0.01).certificate["met"]
    )


def test_where_full_depth_does_not_keep_a_class_accuracy_the_class_is_named():
    def right_in(*shares, rows=100):
        labels = np.repeat(np.arange(len(shares)), rows)
        answers = np.where(np.arange(len(labels)) % rows < np.repeat(shares, rows) * rows, labels, 0 + (labels == 0))
        logits = 4.0 * np.eye(len(shares))[answers][:, None].repeat(2, axis=1)
        return by_hand(logits, labels, label_names=("one", "two", "three"))

    demand = {"criterion": "entropy", "max_risk": None, "min_class_accuracy": 0.85}
    table = right_in(0.95, 0.9, 0.99)
    with pytest.warns(UserWarning, match="not even full depth .*class 'two' has 90 of 100 rows right"):
        policy = calibrate(table, **demand)
    assert policy.threshold is None
    needed = policy.certificate["rows_needed"]
    assert 300 < needed <= 900
    assert calibrate(repeated(table, -(-needed // 300)), **demand).certificate["met"]
    with pytest.warns(UserWarning, match="more rows of this kind would not change that"):
        calibrate(right_in(0.95, 0.8, 0.99), **demand)


def test_the_class_that_is_named_is_the_worst_where_another_has_no_rows_to_certify():
    table = unequal(600)
    labels = np.where(np.arange(len(table)) == 0, 0, table.labels + 1)
    logits = np.concatenate([np.full((*table.exit_logits.shape[:2], 1), -9.0), table.exit_logits], axis=-1)
    logits[labels == 2] = np.array([-9.0, 2.0, -2.0])  # always wrong
    logits[labels == 1] = np.array([-9.0, 4.0, -4.0])  # always right
    table = replace(table, exit_logits=logits, labels=labels, label_names=("single", "common", "rare"))
    seed = next(seed for seed in range(20) if 0 not in _split(table, seed, half=False)[1].labels)
    with pytest.warns(UserWarning, match="class '(single|rare)' has"):
        calibrate(table, "learned", max_risk=None, min_class_accuracy=0.8, seed=seed)


def test_where_exits_are_wrong_and_sure_of_it_the_answer_is_full_depth():
    table = made_up(2000)
    logits = table.exit_logits.copy()
    logits[:, :-1] *= -1
    for per_exit in (False, True):
        policy = without_warnings(replace(table, exit_logits=logits), "entropy", max_risk=0.002, per_exit=per_exit)
        assert policy.threshold is None
    assert calibrate(table, "entropy", max_risk=0.002).threshold is not None


def test_rows_are_not_asked_for_where_the_criterion_never_leaves():
    table = made_up(1000, 2)  # two exits have to be ready in a row, and the second is the last
    for criterion in ("pcee", "f_pabee"):
        for per_exit in (False, True):
            policy = without_warnings(table, criterion, max_risk=0.5, per_exit=per_exit)
            assert policy.threshold is None
            assert policy.certificate["met"] is False
            assert "rows_needed" not in policy.certificate


def test_rows_to_learn_from_need_not_grow_with_those_that_certify():
    table, others = made_up(100), made_up(5000, seed=1)
    needed = without_warnings(table, learn_from=others).certificate["rows_needed"]
    assert calibrate(made_up(299), learn_from=others).certificate["met"]
    assert needed <= 299 + len(others)


@pytest.mark.parametrize(
    ("criterion", "learning"),
    [
        *((criterion, {}) for criterion in (*CRITERIA, *COMBINATORS)),
        # by fixed depth all rows have the same score, so that there is nothing to search at an exit
        *((criterion, {"per_exit": True}) for criterion in (*CRITERIA, *COMBINATORS) if criterion != "fixed_depth"),
        *((criterion, {"temperature": True}) for criterion in (*CRITERIA, *COMBINATORS)),
    ],
)
def test_every_criterion_can_be_calibrated(criterion, learning):
    table = with_digests(replace(made_up(1500), model="abc"))
    given = ExitPolicy(criterion=criterion, parts=PARTS) if criterion in COMBINATORS else criterion
    policy = calibrate(table, given, max_risk=0.12, **learning)
    certificate, searched = policy.certificate, bool(learning) or criterion == "learned"
    assert policy.criterion == criterion
    # the certificate says what a replay finds
    certify = _split(table, seed=0, half="per_exit" in learning)[1] if searched else table
    taken = replay(certify, policy)
    changed = int((~at_exits(agreement(certify), taken)).sum())
    right = correctness(certify)
    assert certificate["observed"] == pytest.approx(
        {
            "layer_speedup": layer_speedup(certify, taken),
            "disagreement": changed / len(certify),
            "accuracy": at_exits(right, taken).mean(),
            "error_increase": right[:, -1].mean() - at_exits(right, taken).mean(),
        }
    )
    assert certificate["p_value"] == binomial_p_value(changed, len(certify), 0.12) <= 1 - 0.95
    assert certificate["observed"]["layer_speedup"] > 1.1
    assert (certificate["met"], certificate["data"], certificate["model"]) == (True, table.data, "abc")
    fresh = made_up(4000, seed=7)
    assert (~at_exits(agreement(fresh), replay(fresh, policy))).mean() <= 0.13
    assert isinstance(policy.threshold, tuple) == ("per_exit" in learning)
    tempered = policy.parts or (policy,)  # a combination has none of its own
    assert all((part.temperature is not None) == ("temperature" in learning) for part in tempered)


@pytest.mark.parametrize("criterion", ["entropy", "learned", "voting"])
@pytest.mark.parametrize("per_exit", [False, True])
def test_several_labels_can_be_calibrated(criterion, per_exit):
    table = made_up_several(3000)
    for risk in ("disagreement", "error_increase"):
        policy = calibrate(table, criterion, max_risk=0.15, risk=risk, per_exit=per_exit)
        fresh = made_up_several(4000, seed=7)
        taken, right = replay(fresh, policy), correctness(fresh)
        losses = ~agreement(fresh) if risk == "disagreement" else right[:, -1:].astype(float) - right
        assert at_exits(losses, taken).mean() <= 0.15
        assert layer_speedup(fresh, taken) > 1.1


def test_dials_and_a_rule_are_kept_and_a_threshold_is_replaced():
    table = made_up(1500)
    dials = ExitPolicy(criterion="dge", window=3, confidence_weight=2, threshold=[0.1] * 6, temperature=1.7, patience=2)
    policy = calibrate(table, dials, max_risk=0.05)
    assert replace(policy, threshold=None, certificate=None) == replace(dials, threshold=None)
    assert policy.threshold == calibrate(table, replace(dials, threshold=None), max_risk=0.05).threshold
    learned = ExitPolicy(criterion="learned", rule=fit_rule(made_up(500, seed=3)), certificate={"old": True})
    policy = calibrate(table, learned, max_risk=0.05)
    assert (policy.rule, policy.certificate["rows_searched"]) == (learned.rule, 0)
    assert "old" not in policy.certificate
    assert calibrate(table, "patience", max_risk=0.05).patience == 5
    for patient in (replace(learned, patience=2), ExitPolicy(patience=2)):
        policies = [calibrate(table, patient, max_risk=0.2, temperature=on) for on in (False, True)]
        assert [policy.patience for policy in policies] == [2, 2]


def test_temperatures_reach_the_parts_of_a_combination():
    table = made_up(1000, 4)
    for criterion in COMBINATORS:
        policy = calibrate(table, ExitPolicy(criterion=criterion, parts=PARTS), max_risk=0.1, temperature=True)
        assert not np.array_equal(score_exits(table, policy), score_exits(table, replace(policy, parts=PARTS)))


def test_a_learned_part_is_fitted_anew_for_new_temperatures():
    table = made_up(1000, 4)
    part = ExitPolicy(criterion="learned", rule=fit_rule(made_up(500, 4, seed=3)), threshold=0.1)
    both = ExitPolicy(criterion="any_of", parts=[part, {"criterion": "margin", "threshold": 0.1}])
    learned = calibrate(table, both, max_risk=0.1, temperature=True).parts[0]
    search = _split(table, seed=0, half=False)[0]
    assert learned.rule == fit_rule(search, learned.temperature, "disagreement") != part.rule
    assert calibrate(table, both, max_risk=0.1).parts[0] == part


def test_rows_to_learn_from_are_checked_though_there_is_nothing_to_learn():
    with pytest.raises(ValueError, match="do not belong together: exit_layers"):
        calibrate(made_up(400, 4), "entropy", learn_from=made_up(400, 3))
    with pytest.raises(TypeError, match="learn_from must be an ExitTable or None, got dict"):
        calibrate(made_up(400), learn_from={})


def test_temperatures_are_those_of_the_rows_that_are_searched():
    table = made_up(1000, 4)
    search = _split(table, seed=0, half=False)[0]
    assert calibrate(table, "entropy", max_risk=0.05, temperature=True).temperature == fit_temperatures(search)
    assert fit_temperatures(search) != fit_temperatures(table)


def test_temperatures_mend_a_criterion_that_compares_exits():
    table = made_up(3000, 4)
    skewed = replace(table, exit_logits=table.exit_logits * np.array([8.0, 1.0, 1.0, 1.0])[:, None])
    with_them, without = (
        without_warnings(skewed, "entropy", max_risk=0.05, temperature=on).certificate for on in (True, False)
    )
    assert (
        with_them["observed"]["layer_speedup"] > without.get("observed", {"layer_speedup": 1.0})["layer_speedup"] + 0.1
    )


def test_the_learned_criterion_is_no_slower_with_temperatures():
    table = made_up(4000)
    table = replace(table, exit_logits=5 * table.exit_logits)
    plain, tempered = (calibrate(table, max_risk=0.03, temperature=on) for on in (False, True))
    speedups = [policy.certificate["observed"]["layer_speedup"] for policy in (plain, tempered)]
    assert speedups[1] > 0.95 * speedups[0]


def test_labels_of_any_whole_type_will_do():
    table = made_up(1000)
    demand = {"criterion": "entropy", "risk": "error_increase", "max_risk": 0.05, "min_class_accuracy": 0.5}
    expected = calibrate(table, **demand)
    for kind in (np.int32, np.uint8, np.uint64):
        assert calibrate(replace(table, labels=table.labels.astype(kind)), **demand) == expected


def test_without_labels_nothing_is_said_about_accuracy():
    policy = calibrate(replace(made_up(1000), labels=None), max_risk=0.05)
    assert sorted(policy.certificate["observed"]) == ["disagreement", "layer_speedup"]
    assert "accuracy" not in policy.certificate["summary"]
    assert "accuracy was" in calibrate(made_up(1000), max_risk=0.05).certificate["summary"]


def test_the_costs_of_the_table_are_what_speedups_are_made_of():
    table = made_up(2000)
    dear = replace(table, costs=np.array([5.0, 5.2, 5.4, 5.6, 5.8, 6.0]))
    plain, costly = (calibrate(each, "entropy", max_risk=0.05) for each in (table, dear))
    assert plain.threshold == costly.threshold
    assert 1 < costly.certificate["observed"]["layer_speedup"] < 1.2 < plain.certificate["observed"]["layer_speedup"]
    with pytest.raises(ValueError, match="at most 1.20"):
        calibrate(dear, "entropy", target_speedup=1.5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"criterion": "learned", "max_risk": 0.05},
        {"criterion": "entropy", "max_risk": 0.05, "per_exit": True, "temperature": True},
        {"criterion": "dge", "target_speedup": 1.5, "risk": "error_increase"},
        {"criterion": "margin", "max_risk": None, "min_class_accuracy": 0.6},
        {"criterion": ExitPolicy(criterion="all_of", parts=PARTS), "max_risk": 0.05},
        {"criterion": "entropy", "max_risk": 0.0001},
        {"criterion": "entropy", "max_risk": np.float32(0.05), "confidence": np.float32(0.9)},
    ],
    ids=str,
)
def test_a_policy_and_its_certificate_survive_json(kwargs):
    policy = without_warnings(with_digests(made_up(800)), **kwargs)
    text = json.dumps(policy.to_dict(), allow_nan=False)
    read = ExitPolicy.of(json.loads(text))
    assert read == policy
    assert read.certificate == policy.certificate
    assert policy.certificate["summary"]
    assert ExitPolicy.of(read, threshold=0.5).certificate is None  # it was shown of another policy


def test_a_threshold_at_which_everyone_leaves_survives_json_too():
    table = made_up(1000, 3)
    logits = table.exit_logits * np.array([-1, 1, 1])[:, None]  # the first exit is of no use, and yet has to be taken
    policy = calibrate(replace(table, exit_logits=logits), "entropy", per_exit=True, target_speedup=3.0)
    assert policy.certificate["observed"]["layer_speedup"] == 3
    assert ExitPolicy.of(json.loads(json.dumps(policy.to_dict(), allow_nan=False))) == policy


def test_a_summary_does_not_round_the_confidence_up():
    for confidence, stated in ((0.95, "95%"), (0.999, "99.9%")):
        summary = calibrate(made_up(1500), "entropy", max_risk=0.05, confidence=confidence).certificate["summary"]
        demanded = "the share of rows answered otherwise than at full depth is at most 5.00%."
        assert summary.startswith(f"With {stated} confidence, {demanded}")


def test_a_summary_does_not_round_the_risk_down():
    for seed in range(10):
        certificate = calibrate(made_up(600, seed=seed), "entropy", target_speedup=1.5).certificate
        stated = float(certificate["summary"].split("at most ")[1].split("%")[0])
        assert certificate["max_risk"] <= stated / 100 < certificate["max_risk"] + 2e-4


def nan_at(table, row, index):
    logits = table.exit_logits.copy()
    logits[row, index, 0] = np.nan
    return replace(table, exit_logits=logits)


def one_class(table):
    return replace(table, labels=np.zeros(len(table), dtype=int), label_names=("no", "yes"))


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        (None, {"criterion": "entropie"}, r"criterion must be one of 'entropy', .*'learned', got 'entropie'"),
        (None, {"criterion": "all_of"}, r"give a combination as an ExitPolicy\), got 'all_of'"),
        (None, {"confidence": None}, "confidence must be between 0 and 1, both excluded"),
        (None, {"criterion": 5}, "An exit policy must be an ExitPolicy or a dict, got 5"),
        (None, {"criterion": ExitPolicy(temperature=[1.0, 2.0])}, "temperature lists 2 numbers, but the model has 6"),
        (None, {"risk": "accuracy"}, "risk must be one of 'disagreement', 'error_increase', got 'accuracy'"),
        (None, {"max_risk": 0}, "max_risk must be between 0 and 1, both excluded.* got 0"),
        (None, {"max_risk": 1.0}, "max_risk must be between 0 and 1, both excluded.* got 1.0"),
        (None, {"max_risk": float("nan")}, "max_risk must be between 0 and 1, both excluded.* got nan"),
        (None, {"confidence": 1}, "confidence must be between 0 and 1, both excluded.* got 1"),
        (None, {"confidence": -0.5}, "confidence must be between 0 and 1, both excluded.* got -0.5"),
        (None, {"min_class_accuracy": 95}, "min_class_accuracy must be between 0 and 1, both excluded.* got 95"),
        (None, {"max_risk": None}, "There is no demand: give max_risk, min_class_accuracy or target_speedup"),
        (None, {"target_speedup": 1.5, "min_class_accuracy": 0.9}, "either target_speedup or min_class_accuracy"),
        (None, {"target_speedup": 1.0}, "target_speedup must be above 1, such as 2.5; got 1.0"),
        (None, {"target_speedup": 6.01}, "target_speedup must be at most 6.00.* got 6.01"),
        (None, {"target_speedup": float("nan")}, "target_speedup must be above 1, such as 2.5; got nan"),
        (lambda t: nan_at(t, 7, 2), {}, "Row 7 has a logit that is not finite at exit layer 3"),
        (lambda t: made_up(50, 1), {}, "The model has one exit only: there is nowhere to leave early"),
        (lambda t: t.select([0]), {}, "needs two rows at least"),
        (lambda t: replace(t, labels=None), {"risk": "error_increase"}, "risk='error_increase' needs labels"),
        (lambda t: replace(t, labels=None), {"min_class_accuracy": 0.5}, "min_class_accuracy needs labels"),
        (
            lambda t: made_up_several(50),
            {"min_class_accuracy": 0.5},
            "needs problem_type='single_label_classification'",
        ),
        (one_class, {"min_class_accuracy": 0.5}, "The class 'yes' has no rows, so nothing can be shown about it"),
        (None, {"learn_from": nan_at(made_up(50), 0, 0)}, "learn_from has logits that are not finite"),
        (
            None,
            {"learn_from": made_up(50, 4)},
            r"exit_layers is \(1, 2, 3, 4, 5, 6\) in one|exit_layers is \(1, 2, 3, 4\)",
        ),
        (None, {"learn_from": made_up_several(50, labels=2)}, "do not belong together: problem_type is"),
        (
            None,
            {"learn_from": replace(made_up(50), labels=None), "risk": "error_increase", "per_exit": True},
            "The exit table has no labels",
        ),
    ],
)
def test_bad_calls_are_named(change, kwargs, message):
    table = made_up(60)
    with pytest.raises(ValueError, match=message):
        calibrate(table if change is None else change(table), **kwargs)


def test_something_else_than_an_exit_table_is_an_error():
    with pytest.raises(TypeError, match="calibrate needs an ExitTable, got ndarray: make one with make_exit_table"):
        calibrate(made_up(50).exit_logits)


def test_tables_of_different_models_do_not_belong_together():
    table = replace(made_up(10), model="abc", label_names=("no", "yes"))
    check_same_model(table, table.select([1]))
    check_same_model(table, replace(table, model="", labels=None, costs=np.arange(1.0, 7.0)))  # not known is no error
    for name, other in (
        ("exit_layers", (1, 2, 3, 4, 5, 7)),
        ("label_names", ("yes", "no")),
        ("problem_type", SEVERAL),
        ("model", "abd"),
    ):
        with pytest.raises(ValueError, match=f"do not belong together: {name} is .* in one and .* in the other"):
            check_same_model(table, replace(table, labels=None, **{name: other}))


@pytest.mark.parametrize("criterion", ["learned", "entropy"])
def test_an_exit_0_that_knows_nothing_is_closed_and_one_that_knows_is_used(criterion):
    later = made_up(6_000, 3, seed=4)
    generator = np.random.default_rng(0)
    nothing = generator.normal(scale=0.1, size=(len(later), 1, 2)).astype(later.exit_logits.dtype)
    knowing = later.exit_logits[:, :1]
    layers, costs = (0, *later.exit_layers), np.array([0.02, *np.asarray(later.costs) + 0.02])
    left = {}
    for name, first in (("nothing", nothing), ("knowing", knowing)):
        logits = np.concatenate([first, later.exit_logits], axis=1)
        table = replace(later, exit_logits=logits, exit_layers=layers, costs=costs)
        policy = calibrate(table, criterion, max_risk=0.05)
        taken = replay(table, policy)
        assert (taken < len(layers) - 1).mean() > 0.1
        left[name] = int((taken == 0).sum())
    assert left["nothing"] == 0
    assert left["knowing"] > 100
