"""Criteria against hand computations, and the properties that every one of them must have."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import entropy as scipy_entropy

from transformers_badge import ExitPolicy
from transformers_badge.model import criteria_badge
from transformers_badge.model.criteria_badge import (
    COMBINATORS,
    CRITERIA,
    DIVERGENCES,
    exit_probabilities,
    exit_scores,
    is_ready,
)
from transformers_badge.model.exit_rule_badge import FEATURES, row_score, rule_features


SINGLE = "single_label_classification"
MULTI = "multi_label_classification"
PROBLEMS = [SINGLE, MULTI]
EXITS, LABELS = 5, 3  # of the rows that the contract is tested on
RULE = tuple(map(tuple, np.random.default_rng(5).normal(scale=0.5, size=(EXITS - 1, len(FEATURES) + 1)).tolist()))
TEMPERATURES = (0.5, 2.0, 1.0, 3.0, 0.8)

PARTS = (
    {"criterion": "entropy", "threshold": 0.6},
    {"criterion": "patience", "threshold": 0},
    {"criterion": "voting", "threshold": (1.0, None, 0.8, 1.2, 1.0)},
)
POLICIES = [
    *[ExitPolicy(criterion=name) for name in CRITERIA if name != "learned"],
    ExitPolicy(criterion="learned", rule=RULE),
    ExitPolicy(criterion="learned", rule=RULE, patience=2, temperature=2.0),
    ExitPolicy(criterion="entropy", patience=2),
    ExitPolicy(criterion="margin", temperature=0.5),
    ExitPolicy(criterion="patience", patience=2),
    *[
        ExitPolicy(criterion="dge", divergence=divergence, window=3, confidence_weight=0.5)
        for divergence in DIVERGENCES
    ],
    *[ExitPolicy(criterion="f_pabee", divergence=divergence, patience=1) for divergence in DIVERGENCES],
    ExitPolicy(criterion="dge", window=2, confidence_weight=0.0),
    ExitPolicy(criterion="dge", window=2, confidence_weight=2.0, patience=2, temperature=TEMPERATURES),
    *[ExitPolicy(criterion=name, parts=PARTS[:2]) for name in COMBINATORS],
    *[ExitPolicy(criterion=name, parts=PARTS, patience=2) for name in COMBINATORS],
    ExitPolicy(criterion="all_of", parts=(PARTS[0], {"criterion": "any_of", "parts": PARTS[1:], "threshold": 1})),
]

over_policies = pytest.mark.parametrize(
    "policy", POLICIES, ids=[f"{i}-{policy.criterion}" for i, policy in enumerate(POLICIES)]
)
over_problems = pytest.mark.parametrize("problem_type", PROBLEMS)


def logits_of(*distributions):
    """One row whose exits predict these distributions."""
    return np.log(np.array(distributions, dtype=float))[None]


def random_logits(rows, exits=EXITS, labels=LABELS, seed=1):
    """Rows of which some are sure and steady, and some are not."""
    generator = np.random.default_rng(seed)
    scale = generator.uniform(0.2, 4, size=(rows, 1, 1))
    return scale * (generator.normal(size=(rows, 1, labels)) + generator.normal(size=(rows, exits, labels)))


def score(policy, *distributions, problem_type=SINGLE):
    """Score of one row."""
    scores = exit_scores(logits_of(*distributions), policy, problem_type)
    assert scores.shape == (1,)
    return float(scores[0])


def scores_at_exits(logits, policy, problem_type):
    """(rows, exits), asked for exit by exit as a run asks."""
    seen = range(1, logits.shape[1] + 1)
    return np.stack([exit_scores(logits[:, :last], policy, problem_type) for last in seen], axis=1)


# The contract: what holds for every criterion and every combination.


def test_all_criteria_and_combinators_are_tested():
    assert {policy.criterion for policy in POLICIES} == {*CRITERIA, *COMBINATORS}


@over_problems
@over_policies
def test_a_row_is_scored_alone(policy, problem_type):
    logits = random_logits(200)
    for seen in range(1, EXITS + 1):
        together = exit_scores(logits[:, :seen], policy, problem_type)
        alone = np.concatenate([exit_scores(logits[i : i + 1, :seen], policy, problem_type) for i in range(200)])
        shuffled = np.random.default_rng(0).permutation(200)
        assert np.array_equal(together, alone)
        assert np.array_equal(together[shuffled], exit_scores(logits[shuffled, :seen], policy, problem_type))
        assert np.array_equal(together, exit_scores(logits[:, :seen].copy(order="F"), policy, problem_type))
        assert together.shape == (200,)
        assert together.dtype == np.float64


@pytest.mark.parametrize("name", CRITERIA)
@over_problems
def test_a_row_is_scored_alone_with_many_exits_and_labels_too(name, problem_type):
    """Sums over more than eight terms are where numpy changes the order of its additions."""
    logits, rule = random_logits(40, exits=24, labels=77), None
    if name == "learned":
        weights = np.random.default_rng(6).normal(scale=0.5, size=(24, len(FEATURES) + 1))
        rule = tuple(map(tuple, weights.tolist()))
    policy = ExitPolicy(criterion=name, window=12, rule=rule)
    together = exit_scores(logits, policy, problem_type)
    alone = np.concatenate([exit_scores(logits[i : i + 1].copy(), policy, problem_type) for i in range(40)])
    assert np.array_equal(together, alone)
    assert np.array_equal(together, exit_scores(logits.copy(order="F"), policy, problem_type))


@over_problems
@over_policies
def test_scores_are_never_negative(policy, problem_type):
    logits = np.concatenate([random_logits(300), np.zeros((1, EXITS, LABELS)), 50 * random_logits(50, seed=3)])
    scores = scores_at_exits(logits, policy, problem_type)
    assert not np.isnan(scores).any()
    assert (scores >= 0).all()
    assert np.isfinite(scores[:, -1]).any()


@over_problems
@over_policies
def test_a_higher_threshold_keeps_no_row_longer(policy, problem_type):
    scores = scores_at_exits(random_logits(300, seed=2), policy, problem_type)
    grid = [0.0, *np.geomspace(1e-4, 4, 40)]
    ready = [np.stack([is_ready(column, threshold) for column in scores.T], axis=1) for threshold in grid]
    taken = [np.where(leaves.any(axis=1), leaves.argmax(axis=1), EXITS - 1) for leaves in ready]
    assert all((bolder <= stricter).all() for stricter, bolder in pairwise(taken))
    assert (taken[-1] < taken[0]).any(), "some rows have to leave earlier for this test to mean anything"
    assert not is_ready(scores[:, -1], None).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@over_problems
@over_policies
def test_a_logit_that_is_not_finite_never_leaves(policy, problem_type, bad):
    for seen in range(1, EXITS + 1):
        logits = np.tile(np.array([9.0, -9.0, -9.0]), (2, seen, 1))
        logits[0, -1, 1] = bad
        with np.errstate(invalid="raise", divide="raise", over="raise"):  # and numpy has nothing to complain about
            ready = is_ready(exit_scores(logits, policy, problem_type), np.inf)
        assert not ready[0], seen
    assert ready[1], "the sound row next to it leaves"
    assert not is_ready(exit_scores(np.full((1, EXITS, LABELS), bad), policy, problem_type), np.inf).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@over_policies
def test_an_earlier_exit_that_is_not_finite_disturbs_no_other_row(policy, bad):
    logits = random_logits(50)
    expected = exit_scores(logits, policy, SINGLE)
    logits[7, :-1] = bad
    with np.errstate(invalid="raise", divide="raise", over="raise"):
        scores = exit_scores(logits, policy, SINGLE)
    assert np.array_equal(np.delete(scores, 7), np.delete(expected, 7))


@over_problems
@over_policies
def test_later_exits_are_not_looked_at(policy, problem_type):
    logits = random_logits(100)
    expected = scores_at_exits(logits, policy, problem_type)
    for seen in range(1, EXITS):
        changed = logits.copy()
        changed[:, seen:] = np.nan  # as a run finds them: not reached yet
        assert np.array_equal(scores_at_exits(changed, policy, problem_type)[:, :seen], expected[:, :seen])


@pytest.mark.parametrize("size", [1e3, 1e6, 1e38])
@over_problems
@over_policies
def test_certainty_beyond_float_precision_is_still_finite(policy, problem_type, size):
    sure = np.tile([size, -size, -size], (1, EXITS, 1))
    torn = sure.copy()
    torn[0, ::2] = [-size, -size, size]  # as certain of something else at every other exit
    with np.errstate(invalid="raise", divide="raise", over="raise"):
        assert np.isfinite(exit_scores(sure, policy, problem_type)).all()
        scores = exit_scores(torn, policy, problem_type)
    assert not np.isnan(scores).any()
    assert np.isfinite(scores).all() or policy.parts  # a part that is far from ready makes a combination infinite


@over_problems
@over_policies
def test_a_temperature_is_the_same_as_dividing_the_logits(policy, problem_type):
    logits = random_logits(100)
    for temperature in (0.5, 7, TEMPERATURES):
        divided = logits / np.broadcast_to(np.array(temperature, dtype=float), (EXITS,))[:, None]
        without = tempered(policy, None)
        for seen in (1, 3, EXITS):
            scores = exit_scores(logits[:, :seen], tempered(policy, temperature), problem_type)
            assert np.array_equal(scores, exit_scores(divided[:, :seen], without, problem_type))


def tempered(policy, temperature):
    """The policy with another temperature; a combination's parts have one each."""
    parts = policy.parts and tuple(tempered(part, temperature) for part in policy.parts)
    return ExitPolicy.of(policy, parts=parts, temperature=None if parts else temperature)


def test_a_temperature_changes_scores():
    logits = random_logits(50, exits=EXITS - 1)
    for policy in POLICIES:
        if policy.criterion in ("patience", "voting", "fixed_depth"):
            continue  # these see only which class is the largest, or nothing
        cold, hot = (exit_scores(logits, tempered(policy, t), SINGLE) for t in (0.5, 3.0))
        assert not np.array_equal(cold, hot), policy


@over_policies
def test_of_several_labels_the_least_ready_counts(policy):
    logits = random_logits(100)
    together = exit_scores(logits, tempered(policy, None), MULTI)
    each = [exit_scores(logits[..., i : i + 1], tempered(policy, None), MULTI) for i in range(LABELS)]
    if policy.criterion == "any_of" or (policy.parts and any(part.parts for part in policy.parts)):
        # One part has to be ready for all labels: one part for some and another for the rest would not do.
        assert (together >= np.max(each, axis=0)).all()
    else:
        assert np.array_equal(together, np.max(each, axis=0))


# Hand computations, criterion by criterion.


def test_probabilities_are_softmax_of_the_logits_and_sigmoid_per_label():
    logits = np.array([[[2.0, -1.0, 0.5]]])
    single = exit_probabilities(logits, SINGLE)
    assert single.shape == (1, 1, 1, 3)
    assert np.allclose(single[0, 0, 0], np.exp(logits[0, 0]) / np.exp(logits[0, 0]).sum())
    multi = exit_probabilities(logits, MULTI)
    assert multi.shape == (1, 3, 1, 2)
    assert np.allclose(multi[0, :, 0, 1], 1 / (1 + np.exp(-logits[0, 0])))


def test_probabilities_at_a_temperature_by_hand():
    logits = np.log([[[0.8, 0.2], [0.5, 0.5], [0.9, 0.1]]])
    assert exit_probabilities(logits, SINGLE, 0.5)[0, 0, 0] == pytest.approx([0.64 / 0.68, 0.04 / 0.68])
    each = exit_probabilities(logits, SINGLE, (1.0, 3.0, 2.0, 9.0))[0, 0]  # one more than there are exits so far
    assert each == pytest.approx(np.array([[0.8, 0.2], [0.5, 0.5], [0.75, 0.25]]))


def test_a_regression_model_has_no_probabilities():
    with pytest.raises(ValueError, match="problem_type='regression' does not have: leave the threshold at None"):
        exit_scores(np.zeros((1, 1, 1)), ExitPolicy(), "regression")


def test_entropy_is_that_of_the_last_exit():
    assert score(ExitPolicy(criterion="entropy"), [0.5, 0.5], [0.9, 0.1]) == pytest.approx(scipy_entropy([0.9, 0.1]))


def test_max_probability_is_what_is_missing_to_certainty():
    policy = ExitPolicy(criterion="max_probability")
    assert score(policy, [0.1, 0.2, 0.7]) == pytest.approx(0.3)
    assert score(policy, [0.1, 0.2, 0.7], [0.5, 0.25, 0.25]) == pytest.approx(0.5)
    logits = np.log([[[3.0, 0.25]]])  # of two labels, with probabilities 3/4 and 1/5
    assert exit_scores(logits, policy, MULTI) == pytest.approx([0.25])


def test_margin_is_one_minus_the_lead_of_the_first_over_the_second():
    policy = ExitPolicy(criterion="margin")
    assert score(policy, [0.1, 0.2, 0.7]) == pytest.approx(0.5)
    assert score(policy, [0.1, 0.2, 0.7], [0.4, 0.2, 0.4]) == pytest.approx(1.0)
    assert exit_scores(np.log([[[3.0, 0.25]]]), policy, MULTI) == pytest.approx([0.5])  # leads of 1/2 and 3/5
    assert exit_scores(np.zeros((2, 1, 1)), policy, SINGLE).tolist() == [0.0, 0.0]  # one class has no second


def test_jensen_shannon_against_scipy():
    p, q, r = [0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]
    expected = scipy_entropy(np.mean([p, q, r], axis=0)) - np.mean([scipy_entropy(x) for x in (p, q, r)])
    policy = ExitPolicy(criterion="dge", window=3, confidence_weight=0.0)
    assert score(policy, p, q, r) == pytest.approx(expected)


def test_kl_family_against_scipy():
    p, q, r = [0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]
    forward = (scipy_entropy(p, q) + scipy_entropy(q, r)) / 2
    reverse = (scipy_entropy(q, p) + scipy_entropy(r, q)) / 2
    for name, expected in (("kl", forward), ("reverse_kl", reverse), ("symmetric_kl", (forward + reverse) / 2)):
        policy = ExitPolicy(criterion="dge", window=3, confidence_weight=0.0, divergence=name)
        assert score(policy, p, q, r) == pytest.approx(expected), name


def test_confidence_weight_one_is_the_entropy_of_the_averaged_prediction():
    p, q = [0.7, 0.3], [0.2, 0.8]
    policy = ExitPolicy(criterion="dge", window=2, confidence_weight=1.0)
    assert score(policy, p, q) == pytest.approx(scipy_entropy(np.mean([p, q], axis=0)))


def test_a_window_of_one_is_entropy_times_the_weight():
    logits = np.random.default_rng(0).normal(size=(50, 4, 3))
    dge = exit_scores(logits, ExitPolicy(criterion="dge", window=1, confidence_weight=0.7), SINGLE)
    assert np.allclose(dge, 0.7 * exit_scores(logits, ExitPolicy(criterion="entropy"), SINGLE))


def test_the_literal_rule_waits_for_a_second_exit():
    policy = ExitPolicy(criterion="dge", window=3, confidence_weight=0.0)
    assert score(policy, [0.9, 0.1]) == np.inf
    assert score(policy, [0.9, 0.1], [0.9, 0.1]) == pytest.approx(0.0, abs=1e-12)


def test_pabee_patience_counts_exits_that_confirm():
    a, b = [0.9, 0.1], [0.2, 0.8]
    for patience, path, missing in [
        (1, [a], 1), (1, [a, a], 0), (2, [a, a], 1), (2, [a, a, a], 0), (2, [b, a, a], 1), (2, [a, a, b], 2),
        (3, [b, a, a, a, a], 0), (1, [a, a, a, b], 1),
    ]:  # fmt: skip
        assert score(ExitPolicy(criterion="patience", patience=patience), *path) == missing, (patience, path)


def test_patience_asks_for_several_exits_in_a_row():
    sure, unsure = [0.99, 0.01], [0.6, 0.4]
    policy = ExitPolicy(criterion="entropy", patience=2)
    assert score(policy, sure) == np.inf
    assert score(policy, unsure, sure) == pytest.approx(scipy_entropy(unsure))
    assert score(policy, unsure, sure, sure) == pytest.approx(scipy_entropy(sure))


def test_pcee_is_entropy_that_two_exits_in_a_row_keep_below_the_threshold():
    a, b, c = [0.99, 0.01], [0.6, 0.4], [0.9, 0.1]
    policy = ExitPolicy(criterion="pcee")
    assert score(policy, a) == np.inf
    assert score(policy, a, b) == pytest.approx(0.6730117)  # -(0.6 ln 0.6 + 0.4 ln 0.4)
    assert score(policy, a, b, c) == pytest.approx(0.6730117)
    assert score(policy, b, a, c) == pytest.approx(0.3250830)  # -(0.9 ln 0.9 + 0.1 ln 0.1)
    assert score(ExitPolicy(criterion="pcee", patience=3), b, a, c) == pytest.approx(0.6730117)


def test_f_pabee_is_the_divergence_from_the_exit_before_and_its_released_code_the_entropy_of_the_mean():
    p, q = [0.52, 0.48], [0.50, 0.50]
    text, code = (ExitPolicy(criterion=name, patience=1) for name in ("f_pabee", "f_pabee_averaged"))
    # H(.51) - (H(.52) + H(.50)) / 2: two exits that are unsure alike do agree, and are far from certain
    assert score(text, p, q) == pytest.approx(0.69294717 - (0.69234697 + 0.69314718) / 2, abs=1e-8)
    assert score(text, p, q) == pytest.approx(0.0002, abs=5e-5)
    assert score(code, p, q) == pytest.approx(0.69294717, abs=1e-8)
    for policy in (text, code):
        assert score(policy, p) == np.inf  # nothing to compare with yet
        assert score(policy, [0.9, 0.1], p, q) == score(policy, p, q)  # exits further back are not read


def test_f_pabee_waits_for_as_many_small_divergences_as_its_patience():
    p, q, r = [0.9, 0.1], [0.2, 0.8], [0.25, 0.75]
    wide = scipy_entropy(np.mean([p, q], axis=0)) - (scipy_entropy(p) + scipy_entropy(q)) / 2
    narrow = scipy_entropy(np.mean([q, r], axis=0)) - (scipy_entropy(q) + scipy_entropy(r)) / 2
    policy = ExitPolicy(criterion="f_pabee")
    assert score(policy, p, q) == np.inf  # one comparison, and two are asked for
    assert score(policy, p, q, r) == pytest.approx(wide)
    assert score(policy, p, q, r, q) == pytest.approx(narrow)
    averaged = ExitPolicy(criterion="f_pabee_averaged")
    assert score(averaged, p, q, r) == pytest.approx(scipy_entropy(np.mean([p, q], axis=0)))
    reverse = ExitPolicy(criterion="f_pabee", divergence="reverse_kl", patience=1)
    assert score(reverse, p, q) == pytest.approx(scipy_entropy(q, p))


def test_beem_sums_depth_times_confidence_over_the_unbroken_run():
    a, b, c = [0.9, 0.1], [0.2, 0.8], [0.6, 0.4]
    policy = ExitPolicy(criterion="beem")
    assert score(policy, a) == pytest.approx(1 / 0.9)
    assert score(policy, a, c) == pytest.approx(1 / (1 * 0.9 + 2 * 0.6))
    assert score(policy, a, b) == pytest.approx(1 / (2 * 0.8))
    assert score(policy, a, b, c, a) == pytest.approx(1 / (3 * 0.6 + 4 * 0.9))
    assert score(policy, b, a, c, a, b, b) == pytest.approx(1 / (5 * 0.8 + 6 * 0.8))


def test_voting_is_for_what_this_exit_predicts():
    a, b, c = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]
    policy = ExitPolicy(criterion="voting")
    for path, votes in [([a], 1), ([a, a], 2), ([a, b], 1), ([a, b, a], 2), ([a, a, b], 1), ([a, c, a, b, a], 3)]:
        assert score(policy, *path) == pytest.approx(math.sqrt(len(path)) / votes), path


def test_an_exit_that_is_not_finite_confirms_nothing_and_has_no_vote():
    broken = logits_of([0.9, 0.1], [0.9, 0.1], [0.9, 0.1])
    broken[0, 1] = np.nan  # its argmax would be class 0
    for criterion, expected in (("patience", 1.0), ("beem", 1 / (3 * 0.9)), ("voting", math.sqrt(3) / 2)):
        assert exit_scores(broken, ExitPolicy(criterion=criterion), SINGLE) == pytest.approx([expected]), criterion


def test_fixed_depth_leaves_at_the_exit_that_the_threshold_names():
    logits = random_logits(7, exits=12)
    scores = scores_at_exits(logits, ExitPolicy(criterion="fixed_depth"), SINGLE)
    for k in range(1, 13):
        leaves = scores <= 1 / k
        assert (leaves.argmax(axis=1) == k - 1).all(), k
        assert leaves.any(axis=1).all(), k


def log_odds(probability):
    return max(-20.0, min(20.0, math.log(probability) - math.log(1 - probability)))


def plain_features(path):
    """The features of a rule in plain Python, at the last of the exits of a path."""
    here, earlier = path[-1], path[:-1]
    winner = here.index(max(here))
    own = [log_odds(p[winner]) for p in path]
    leads = [math.log(p[winner] / max(x for label, x in enumerate(p) if label != winner)) for p in path]
    if not earlier:
        return [own[0], math.sqrt(leads[0]), 0, 0, 0, 0]

    def h(p):
        return -sum(x * math.log(x) for x in p if x)

    mixture = [(x + y) / 2 for x, y in zip(here, earlier[-1], strict=True)]
    return [
        own[-1],
        math.sqrt(leads[-1]),
        own[-2],
        sum(leads[:-1]) / len(earlier),
        sum(p.index(max(p)) == winner for p in earlier) / len(earlier),
        h(mixture) - (h(here) + h(earlier[-1])) / 2,
    ]


def test_the_features_of_two_exits_by_hand():
    features = rule_features(np.array([[0.8, 0.2], [0.4, 0.6]]))
    odds, before = 0.4054651, -1.3862944  # ln(0.6 / 0.4), and of the same class one exit earlier ln(0.2 / 0.8)
    # H(0.6, 0.4) - (H(0.8, 0.2) + H(0.4, 0.6)) / 2, the mean of the two exits being (0.6, 0.4)
    divergence = 0.6730117 - (0.5004024 + 0.6730117) / 2
    assert features == pytest.approx([odds, math.sqrt(odds), before, before, 0.0, divergence], abs=1e-7)
    assert rule_features(np.array([[0.2, 0.8]])) == pytest.approx([1.3862944, 1.3862944**0.5, 0, 0, 0, 0])
    assert len(FEATURES) == 6


def test_the_features_against_plain_python():
    probabilities = exit_probabilities(random_logits(60, exits=4), SINGLE)[:, 0]
    for seen in range(1, 5):
        features = rule_features(probabilities[:, :seen])
        assert features.shape == (60, len(FEATURES))
        for row in range(60):
            assert features[row] == pytest.approx(plain_features(probabilities[row, :seen].tolist()), abs=1e-9)


def test_a_learned_score_against_plain_python():
    policy = ExitPolicy(criterion="learned", rule=RULE)
    for path in ([[0.7, 0.2, 0.1]], [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], [[0.2, 0.7, 0.1], [0.1, 0.6, 0.3]]):
        *weights, constant = RULE[len(path) - 1]
        logit = sum(w * x for w, x in zip(weights, plain_features(path), strict=True)) + constant
        assert score(policy, *path) == pytest.approx(1 / (1 + math.exp(-logit)))


@pytest.mark.parametrize("temperature", [None, 1.7, (0.4, 3.0, 1.0, 2.5, 0.7, 1.3, 0.9, 1.1)])
@pytest.mark.parametrize("labels", [2, 3, 7])
def test_a_learned_score_is_the_same_to_the_last_bit_in_plain_numbers(labels, temperature, monkeypatch):
    weights = np.random.default_rng(8).normal(size=(7, len(FEATURES) + 1))
    policy = ExitPolicy(criterion="learned", rule=tuple(map(tuple, weights.tolist())), temperature=temperature)
    logits = random_logits(400, exits=8, labels=labels)
    logits[:100] *= 40.0  # beyond log-odds of 20
    logits[100:110] = 0.0  # ties
    logits[110, 3, 0], logits[111, 1, 1], logits[112, 0, 0] = np.nan, np.inf, -np.inf
    scored = []

    def counted(*given):
        scored.append(row_score(*given))
        return scored[-1]

    monkeypatch.setattr(criteria_badge, "row_score", counted)
    for seen in range(1, 9):
        together = exit_scores(logits[:, :seen], policy, SINGLE)
        assert scored == []
        alone = np.concatenate([exit_scores(row[None, :seen], policy, SINGLE) for row in logits])
        np.testing.assert_array_equal(alone, together)
        assert len(scored) == (400 if seen < 8 else 0)  # the rule has nothing to say of the last
        scored.clear()
    sharper = [row_score((1.01 * row[:3]).tolist(), [1.0] * 3, weights[2].tolist()) for row in logits[200:]]
    other = exit_scores(logits[200:, :3], replace(policy, temperature=None), SINGLE)
    assert (sharper != other).mean() > 0.9  # the control: the last bits would show it


@pytest.mark.parametrize(
    ("logits", "problem_type", "patience"),
    [
        (random_logits(1, exits=3, labels=8), SINGLE, 1),
        (random_logits(1, exits=8), SINGLE, 1),
        (random_logits(2, exits=3), SINGLE, 1),
        (random_logits(1, exits=3), MULTI, 1),
        (random_logits(1, exits=3), SINGLE, 2),
    ],
)
def test_numpy_scores_what_plain_numbers_are_not_for(logits, problem_type, patience, monkeypatch):
    monkeypatch.setattr(criteria_badge, "row_score", None)
    policy = ExitPolicy(criterion="learned", rule=((0.1,) * (len(FEATURES) + 1),) * 9, patience=patience)
    assert np.isfinite(exit_scores(logits, policy, problem_type)).all()


def test_a_learned_score_is_zero_at_the_last_exit_and_of_several_labels_the_largest():
    policy = ExitPolicy(criterion="learned", rule=RULE[:2])
    logits = random_logits(20, exits=3)
    assert exit_scores(logits, policy, SINGLE).tolist() == [0.0] * 20
    inner = exit_scores(logits[:, :2], policy, MULTI)
    p = 1 / (1 + np.exp(-logits[0, :2]))
    *weights, constant = RULE[1]
    each = [np.dot(weights, plain_features([[1 - x, x] for x in p[:, label]])) + constant for label in range(LABELS)]
    assert inner[0] == pytest.approx(max(1 / (1 + np.exp(-np.array(each)))))


def test_a_rule_does_not_extrapolate_beyond_log_odds_of_20():
    sure = np.array([[[30.0, 0.0]], [[1000.0, 0.0]]])
    scores = exit_scores(sure, ExitPolicy(criterion="learned", rule=RULE), SINGLE)
    assert scores[0] == scores[1]
    steep = [[1e6] * (len(FEATURES) + 1)], [[-1e6] * (len(FEATURES) + 1)]
    with np.errstate(invalid="raise", divide="raise", over="raise"):
        ends = [exit_scores(sure, ExitPolicy(criterion="learned", rule=rule), SINGLE)[0] for rule in steep]
    assert ends[0] == pytest.approx(1.0)
    assert 0 < ends[1] < 1e-12  # small, and not ready at a threshold of 0


# Combinations.


def combined(criterion, *parts, **fields):
    return ExitPolicy(criterion=criterion, parts=parts, **fields)


def test_a_combination_is_the_largest_or_the_least_share_of_its_parts_thresholds():
    p = [0.1, 0.2, 0.7]
    parts = {"criterion": "max_probability", "threshold": 0.5}, {"criterion": "margin", "threshold": 0.25}
    assert score(combined("all_of", *parts), p) == pytest.approx(0.5 / 0.25)
    assert score(combined("any_of", *parts), p) == pytest.approx(0.3 / 0.5)


@over_problems
@pytest.mark.parametrize("thresholds", [0.5, 0.31, (0.1, 0.4, None, 0.7, 0.2), None, 0, np.inf])
def test_a_combination_is_ready_where_all_its_parts_are_or_one_of_them_is(problem_type, thresholds):
    parts = [
        ExitPolicy(criterion="entropy", threshold=thresholds, temperature=TEMPERATURES),
        ExitPolicy(criterion="max_probability", threshold=(0.5, None, 0.3, 0.0, 0.2)),
        ExitPolicy(criterion="patience", threshold=0),
        ExitPolicy(criterion="learned", rule=RULE, threshold=(0.5, 0.4, 0.6, 0.3, None)),
    ]
    logits = random_logits(400)
    seen_both = set()
    for seen in range(1, EXITS + 1):
        ready = [
            is_ready(exit_scores(logits[:, :seen], part, problem_type), part.thresholds(EXITS)[seen - 1])
            for part in parts
        ]
        for chosen in ([0, 1], [0, 2], [2, 3], [0, 1, 2, 3]):
            for criterion, rule in (("all_of", np.all), ("any_of", np.any)):
                policy = combined(criterion, *[parts[i] for i in chosen])
                got = is_ready(exit_scores(logits[:, :seen], policy, problem_type), 1.0)
                assert np.array_equal(got, rule([ready[i] for i in chosen], axis=0)), (seen, chosen, criterion)
                seen_both |= {(criterion, bool(answer)) for answer in got}
    assert len(seen_both) == 4


def test_a_closed_exit_of_a_part_is_never_ready():
    sure = [0.999, 0.001]
    open_, closed = {"criterion": "margin", "threshold": 0.5}, {"criterion": "entropy", "threshold": (0.5, None, 0.5)}
    never = {"criterion": "entropy"}  # a part without a threshold
    for first, second in ((open_, closed), (closed, open_)):
        assert score(combined("all_of", first, second), sure) < 1
        assert score(combined("all_of", first, second), sure, sure) == np.inf
        assert score(combined("any_of", first, second), sure, sure) == pytest.approx(0.002 / 0.5)
        assert score(combined("all_of", first, second), sure, sure, sure) < 1
    assert score(combined("all_of", open_, never), sure) == np.inf
    assert score(combined("any_of", open_, never), sure) == pytest.approx(0.002 / 0.5)
    assert score(combined("any_of", never, never), sure) == np.inf


def test_a_part_with_threshold_zero_is_ready_at_zero_and_nowhere_else():
    a, b = [0.9, 0.1], [0.2, 0.8]
    confirmed, likely = {"criterion": "patience", "threshold": 0}, {"criterion": "max_probability", "threshold": 0.15}
    assert score(combined("all_of", confirmed, likely), a, a) == pytest.approx(0.1 / 0.15)
    assert score(combined("all_of", confirmed, likely), b, a) == np.inf
    assert score(combined("any_of", confirmed, likely), b, a) == pytest.approx(0.1 / 0.15)
    assert score(combined("any_of", confirmed, likely), a, a) == 0.0
    assert score(combined("any_of", confirmed, likely), a, b) == pytest.approx(0.2 / 0.15)


def test_a_part_that_has_no_finite_score_is_not_ready():
    a = [0.9, 0.1]
    waiting, likely = {"criterion": "f_pabee", "threshold": np.inf}, {"criterion": "max_probability", "threshold": 0.2}
    assert score(combined("all_of", waiting, likely), a) == np.inf  # f_pabee has nothing to compare with
    assert score(combined("any_of", waiting, likely), a) == pytest.approx(0.5)
    # An exit before this one is broken: the divergence is NaN, and this exit's own probability is sound.
    broken = logits_of(a, a)
    broken[0, 0] = np.nan
    diverging = {"criterion": "f_pabee", "patience": 1, "threshold": np.inf}
    assert exit_scores(broken, combined("all_of", diverging, likely), SINGLE).tolist() == [np.inf]
    assert exit_scores(broken, combined("any_of", diverging, likely), SINGLE) == pytest.approx([0.5])


def test_a_combination_has_a_patience_of_its_own():
    a, b = [0.9, 0.1], [0.6, 0.4]
    parts = {"criterion": "max_probability", "threshold": 0.2}, {"criterion": "margin", "threshold": 0.4}
    policy = combined("all_of", *parts, patience=2)
    assert score(policy, a) == np.inf
    assert score(policy, b, a) == pytest.approx(2.0)  # 1 - 0.6 is twice 0.2, 1 - 0.2 twice 0.4
    assert score(policy, b, a, a) == pytest.approx(0.5)


def test_a_combination_may_stand_within_another():
    a, b = [0.9, 0.1], [0.6, 0.4]
    either = {"criterion": "any_of", "threshold": 0.5, "parts": [
        {"criterion": "max_probability", "threshold": 0.4}, {"criterion": "margin", "threshold": 0.1},
    ]}  # fmt: skip
    policy = combined("all_of", either, {"criterion": "patience", "threshold": 0})
    assert score(policy, a, a) == pytest.approx(0.1 / 0.4 / 0.5)
    assert score(policy, b, b) == pytest.approx(0.4 / 0.4 / 0.5)
