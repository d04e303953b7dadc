"""Criteria against hand computations, and the properties that every one of them must have."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import entropy as scipy_entropy

from transformers_badge import ExitPolicy
from transformers_badge.model.criteria_badge import CRITERIA, DIVERGENCES, exit_probabilities, exit_scores, is_ready


SINGLE = "single_label_classification"
MULTI = "multi_label_classification"
POLICIES = [
    ExitPolicy(criterion="entropy"),
    ExitPolicy(criterion="entropy", patience=2),
    ExitPolicy(criterion="patience", patience=2),
    *[ExitPolicy(divergence=divergence, window=3, confidence_weight=0.5) for divergence in DIVERGENCES],
    ExitPolicy(window=2, confidence_weight=0.0),
    ExitPolicy(window=2, confidence_weight=2.0, patience=2),
]


def logits_of(*distributions):
    """One row whose exits predict these distributions."""
    return np.log(np.array(distributions, dtype=float))[None]


def test_probabilities_are_softmax_of_the_logits_and_sigmoid_per_label():
    logits = np.array([[[2.0, -1.0, 0.5]]])
    single = exit_probabilities(logits, SINGLE)
    assert single.shape == (1, 1, 1, 3)
    assert np.allclose(single[0, 0, 0], np.exp(logits[0, 0]) / np.exp(logits[0, 0]).sum())
    multi = exit_probabilities(logits, MULTI)
    assert multi.shape == (1, 3, 1, 2)
    assert np.allclose(multi[0, :, 0, 1], 1 / (1 + np.exp(-logits[0, 0])))


def test_entropy_is_that_of_the_last_exit():
    scores = exit_scores(logits_of([0.5, 0.5], [0.9, 0.1]), ExitPolicy(criterion="entropy"), SINGLE)
    assert scores == pytest.approx(scipy_entropy([0.9, 0.1]))


def test_jensen_shannon_against_scipy():
    p, q, r = [0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]
    expected = scipy_entropy(np.mean([p, q, r], axis=0)) - np.mean([scipy_entropy(x) for x in (p, q, r)])
    scores = exit_scores(logits_of(p, q, r), ExitPolicy(window=3, confidence_weight=0.0), SINGLE)
    assert scores == pytest.approx(expected)


def test_kl_family_against_scipy():
    p, q, r = [0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]
    forward = (scipy_entropy(p, q) + scipy_entropy(q, r)) / 2
    reverse = (scipy_entropy(q, p) + scipy_entropy(r, q)) / 2
    for name, expected in (("kl", forward), ("reverse_kl", reverse), ("symmetric_kl", (forward + reverse) / 2)):
        policy = ExitPolicy(window=3, confidence_weight=0.0, divergence=name)
        assert exit_scores(logits_of(p, q, r), policy, SINGLE) == pytest.approx(expected), name


def test_confidence_weight_one_is_the_entropy_of_the_averaged_prediction():
    p, q = [0.7, 0.3], [0.2, 0.8]
    scores = exit_scores(logits_of(p, q), ExitPolicy(window=2, confidence_weight=1.0), SINGLE)
    assert scores == pytest.approx(scipy_entropy(np.mean([p, q], axis=0)))


def test_a_window_of_one_is_entropy_times_the_weight():
    logits = np.random.default_rng(0).normal(size=(50, 4, 3))
    dge = exit_scores(logits, ExitPolicy(window=1, confidence_weight=0.7), SINGLE)
    assert np.allclose(dge, 0.7 * exit_scores(logits, ExitPolicy(criterion="entropy"), SINGLE))


def test_the_literal_rule_waits_for_a_second_exit():
    policy = ExitPolicy(window=3, confidence_weight=0.0)
    assert np.isinf(exit_scores(logits_of([0.9, 0.1]), policy, SINGLE)).all()
    assert exit_scores(logits_of([0.9, 0.1], [0.9, 0.1]), policy, SINGLE) == pytest.approx(0.0, abs=1e-12)


def test_pabee_patience_counts_exits_that_confirm():
    a, b = [0.9, 0.1], [0.2, 0.8]
    for patience, path, missing in [
        (1, [a], 1), (1, [a, a], 0), (2, [a, a], 1), (2, [a, a, a], 0), (2, [b, a, a], 1), (2, [a, a, b], 2),
        (3, [b, a, a, a, a], 0), (1, [a, a, a, b], 1),
    ]:  # fmt: skip
        policy = ExitPolicy(criterion="patience", patience=patience)
        assert exit_scores(logits_of(*path), policy, SINGLE) == [missing], (patience, path)


def test_patience_asks_for_several_exits_in_a_row():
    sure, unsure = [0.99, 0.01], [0.6, 0.4]
    policy = ExitPolicy(criterion="entropy", patience=2)
    assert np.isinf(exit_scores(logits_of(sure), policy, SINGLE))
    assert exit_scores(logits_of(unsure, sure), policy, SINGLE) == pytest.approx(scipy_entropy(unsure))
    assert exit_scores(logits_of(unsure, sure, sure), policy, SINGLE) == pytest.approx(scipy_entropy(sure))


def test_of_several_labels_the_least_ready_counts():
    logits = np.array([[[8.0, 0.1, -8.0]]])
    score = exit_scores(logits, ExitPolicy(criterion="entropy"), MULTI)
    p = 1 / (1 + np.exp(-0.1))
    assert score == pytest.approx(scipy_entropy([p, 1 - p]))


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_row_is_scored_alone(policy, problem_type):
    logits = np.random.default_rng(1).normal(scale=3, size=(200, 5, 3))
    together = exit_scores(logits, policy, problem_type)
    alone = np.concatenate([exit_scores(logits[i : i + 1], policy, problem_type) for i in range(200)])
    assert np.array_equal(together, alone)
    assert together.shape == (200,)
    assert (together >= 0).all()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_higher_threshold_keeps_no_row_longer(policy):
    logits = np.random.default_rng(2).normal(scale=3, size=(300, 4, 3))
    scores = exit_scores(logits, policy, SINGLE)
    ready = [is_ready(scores, threshold) for threshold in np.linspace(0, 3, 20)]
    assert all((later >= earlier).all() for earlier, later in pairwise(ready))
    assert not is_ready(scores, None).any()
    assert ready[-1].any()  # the last threshold is one that rows do meet


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_logit_that_is_not_finite_never_leaves(policy, problem_type, bad):
    logits = np.tile(np.array([9.0, -9.0, -9.0]), (2, 5, 1))
    logits[0, -1, 1] = bad
    with np.errstate(invalid="raise", divide="raise", over="raise"):  # and numpy has nothing to complain about
        ready = is_ready(exit_scores(logits, policy, problem_type), np.inf)
    assert ready.tolist() == [False, True]


def test_certainty_beyond_float_precision_is_still_finite():
    logits = np.array([[[1000.0, -1000.0], [1000.0, -1000.0]]])
    for policy in POLICIES:
        assert np.isfinite(exit_scores(logits, policy, SINGLE)).all(), policy


def test_all_criteria_are_tested():
    assert {policy.criterion for policy in POLICIES} == set(CRITERIA)
