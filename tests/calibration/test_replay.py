"""Replaying a policy on stored exit logits, made up for the purpose."""

from dataclasses import replace

import numpy as np
import pytest

from transformers_badge import ExitPolicy
from transformers_badge.calibration.replay import (
    agreement,
    answers,
    at_exits,
    correctness,
    layer_speedup,
    replay,
    score_exits,
    take_exits,
)
from transformers_badge.exit_table import ExitTable
from transformers_badge.model.criteria_badge import CRITERIA, exit_scores, is_ready


SEVERAL = "multi_label_classification"


def made_up(rows=2000, exits=6, seed=0, **fields):
    """Exits that grow better with depth, surer where they are right."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, rows)
    ease = generator.normal(1.0, 1.5, rows)
    signal = np.stack([ease + 0.5 * depth + generator.normal(0, 1, rows) for depth in range(exits)], axis=1)
    sign = np.where(labels == 1, 1.0, -1.0)[:, None] * signal
    layers = tuple(range(1, exits + 1))
    return ExitTable(exit_logits=np.stack([-sign, sign], axis=-1), exit_layers=layers, labels=labels, **fields)


def made_up_several(rows=2000, exits=6, labels=3, seed=0):
    """The same with several labels per row."""
    parts = [made_up(rows, exits, seed + 1000 * label) for label in range(labels)]
    logits = np.stack([part.exit_logits[..., 1] for part in parts], axis=-1)
    right = np.stack([part.labels for part in parts], axis=-1)
    return ExitTable(exit_logits=logits, exit_layers=parts[0].exit_layers, labels=right, problem_type=SEVERAL)


def by_hand(logits, labels=None, **fields):
    logits = np.array(logits, dtype=np.float64)
    labels = None if labels is None else np.array(labels)
    return ExitTable(exit_logits=logits, exit_layers=tuple(range(1, logits.shape[1] + 1)), labels=labels, **fields)


def policy_of(criterion, exits=6, **fields):
    """A policy with a rule or with parts, where the criterion needs them."""
    generator = np.random.default_rng(0)
    if criterion == "learned":
        fields["rule"] = generator.normal(0, 0.3, (exits - 1, 7)) + np.array([-1.0] + 6 * [0.0])
    if criterion in ("all_of", "any_of"):
        fields["parts"] = [ExitPolicy(threshold=0.3), ExitPolicy(criterion="dge", threshold=0.5)]
    return ExitPolicy(criterion=criterion, **fields)


def test_rows_leave_at_the_first_exit_that_is_ready():
    scores = np.array([[0.5, 0.2, 0.0], [0.5, 0.4, 0.0], [np.nan, np.inf, 0.9], [0.1, 0.0, 0.0]])
    given = scores.copy()
    assert take_exits(scores, [0.3, 0.3, 0.3]).tolist() == [1, 2, 2, 0]
    assert take_exits(scores, [None, 0.3, 0.3]).tolist() == [1, 2, 2, 1]
    assert take_exits(scores, [0.5, None, None]).tolist() == [0, 0, 2, 0]
    assert take_exits(scores, [0.0, 0.4, 0.0]).tolist() == [1, 1, 2, 1]
    assert take_exits(scores, [np.inf] * 3).tolist() == [0, 0, 2, 0]  # neither NaN nor infinity is ready
    assert take_exits(scores, [None] * 3).tolist() == [2, 2, 2, 2]
    assert np.array_equal(scores, given, equal_nan=True)


def test_a_policy_without_a_threshold_takes_the_last_exit():
    table = made_up(20)
    assert replay(table, ExitPolicy()).tolist() == [5] * 20
    assert replay(table, ExitPolicy(threshold=[None] * 6)).tolist() == [5] * 20
    assert (replay(table, ExitPolicy(threshold=0.3)) < 5).any()


@pytest.mark.parametrize("criterion", [*CRITERIA, "all_of", "any_of"])
@pytest.mark.parametrize("make", [made_up, made_up_several])
def test_a_replay_takes_the_exits_that_one_row_after_the_other_would_take(criterion, make):
    table = make(40)
    logits = table.exit_logits.copy()
    logits[3, 1], logits[4, :, 0], logits[5, 2:] = np.nan, np.inf, -np.inf
    table, policy = replace(table, exit_logits=logits), policy_of(criterion)
    scores = score_exits(table, policy)
    inner = scores[:, :-1][np.isfinite(scores[:, :-1])]

    def slowly(threshold):
        for row in logits:
            ready = [
                bool(is_ready(exit_scores(row[None, :seen], policy, table.problem_type), threshold)[0])
                for seen in range(1, 7)
            ]
            yield ready.index(True) if any(ready) else 5

    for threshold in (float(np.median(inner)), float(inner.min()), np.inf):
        taken = replay(table, replace(policy, threshold=threshold))
        assert taken.tolist() == list(slowly(threshold))
        assert (taken < 5).any()
    assert taken.tolist() != list(slowly(None))


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "fixed_depth"])
def test_scores_do_not_look_at_later_exits(criterion):
    table = made_up(50)
    changed = table.exit_logits.copy()
    changed[:, 3:] *= -7
    policy = policy_of(criterion, window=3)
    before, after = score_exits(table, policy), score_exits(replace(table, exit_logits=changed), policy)
    assert before.shape == (50, 6)
    assert np.array_equal(before[:, :3], after[:, :3])
    assert not np.array_equal(before[:, 3:], after[:, 3:])


def test_agreement_by_hand():
    one = by_hand([[[1, 0], [0, 1], [0, 2]], [[3, 0], [1, 0], [2, 1]]])
    assert answers(one).tolist() == [[0, 1, 1], [0, 0, 0]]
    assert agreement(one).tolist() == [[False, True, True], [True, True, True]]
    several = by_hand([[[1, 1], [1, -1], [2, -3]], [[-1, 0], [-1, 2], [-2, -1]]], problem_type=SEVERAL)
    assert answers(several)[1].tolist() == [[False, False], [False, True], [False, False]]  # 0 is a no
    assert agreement(several).tolist() == [[False, True, True], [True, False, True]]


def test_correctness_by_hand():
    logits = [[[1, 0], [0, 1], [0, 2]], [[3, 0], [1, 0], [2, 1]]]
    assert correctness(by_hand(logits, [1, 1])).tolist() == [[False, True, True], [False, False, False]]
    several = by_hand([[[1, 1], [1, -1], [2, -3]]], [[1, 1]], problem_type=SEVERAL)
    assert correctness(several).tolist() == [[True, False, False]]  # a row is right where all its labels are
    with pytest.raises(ValueError, match="The exit table has no labels"):
        correctness(by_hand(logits))


def test_what_rows_find_at_their_exits():
    values = np.array([[1, 2, 3], [4, 5, 6]])
    assert at_exits(values, np.array([2, 0])).tolist() == [3, 4]


def test_the_layer_speedup_counts_in_costs():
    table = replace(by_hand(np.zeros((4, 3, 2))), exit_layers=(2, 3, 6), costs=None)
    taken = np.array([0, 0, 1, 2])
    assert layer_speedup(table, taken) == pytest.approx(6 / ((2 + 2 + 3 + 6) / 4))
    assert layer_speedup(table, np.array([2, 2])) == 1
    dear = replace(table, costs=np.array([10.0, 20.0, 40.0]))
    assert layer_speedup(dear, taken) == pytest.approx(40 / ((10 + 10 + 20 + 40) / 4))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ExitPolicy(threshold=[0.1, 0.2]), "threshold lists 2 numbers, but the model has 6 exits"),
        (ExitPolicy(temperature=[1.0] * 5), "temperature lists 5 numbers, but the model has 6 exits"),
        (policy_of("learned", exits=4), "rule was fitted to a model with 4 exits, but this one has 6"),
        (ExitPolicy(criterion="any_of", parts=[{}, {"threshold": [0.5, 1]}]), "threshold lists 2 numbers"),
    ],
)
def test_a_policy_for_another_number_of_exits_is_an_error(policy, message):
    with pytest.raises(ValueError, match=message):
        replay(made_up(10), policy)
