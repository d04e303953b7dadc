"""Replay and the choice of a threshold, on exit logits made up for the purpose."""

import numpy as np
import pytest

from transformers_badge import ExitPolicy
from transformers_badge.calibration.replay import replay, score_exits, take_exits
from transformers_badge.calibration.selection import (
    agreement,
    choose_threshold,
    choose_threshold_by_agreement,
    rows_needed,
    wilson_upper_bound,
)


PROBLEM = "single_label_classification"


def made_up(rows=2000, exits=6, seed=0):
    """Exits that grow better with depth, surer where they are right."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, rows)
    ease = generator.normal(1.0, 1.5, rows)
    signal = np.stack([ease + 0.5 * depth + generator.normal(0, 1, rows) for depth in range(exits)], axis=1)
    sign = np.where(labels == 1, 1.0, -1.0)[:, None] * signal
    return np.stack([-sign, sign], axis=-1), labels


def test_replay_by_hand():
    scores = np.array([[0.5, 0.2, 0.0], [0.5, 0.4, 0.0], [np.nan, np.inf, 0.9], [0.1, 0.0, 0.0]])
    assert take_exits(scores, [0.3, 0.3, 0.3]).tolist() == [1, 2, 2, 0]
    assert take_exits(scores, [None, 0.3, 0.3]).tolist() == [1, 2, 2, 1]
    assert take_exits(scores, [np.inf] * 3).tolist() == [0, 0, 2, 0]
    assert take_exits(scores, [None] * 3).tolist() == [2, 2, 2, 2]


def test_a_policy_without_a_threshold_takes_the_last_exit():
    logits, _ = made_up(20)
    assert (replay(logits, ExitPolicy(), PROBLEM) == 5).all()


@pytest.mark.parametrize("policy", [ExitPolicy(), ExitPolicy(criterion="entropy")], ids=str)
def test_the_chosen_threshold_saves_blocks_and_keeps_to_the_budget(policy):
    logits, labels = made_up()
    chosen = choose_threshold(logits, labels, [1, 2, 3, 4, 5, 6], policy, max_accuracy_drop=0.01)
    taken = replay(logits, chosen, PROBLEM)
    right = logits.argmax(-1) == labels[:, None]
    assert right[:, -1].mean() - right[np.arange(len(taken)), taken].mean() <= 0.01
    assert 6 / (taken + 1).mean() > 1.2
    # on other rows of the same kind it keeps to it as well
    others, other_labels = made_up(seed=1)
    taken, right = replay(others, chosen, PROBLEM), others.argmax(-1) == other_labels[:, None]
    assert right[:, -1].mean() - right[np.arange(len(taken)), taken].mean() <= 0.01


def test_a_larger_budget_never_runs_more_blocks():
    logits, labels = made_up()
    depths = []
    for budget in (0.0, 0.005, 0.02, 0.1):
        chosen = choose_threshold(logits, labels, [1, 2, 3, 4, 5, 6], ExitPolicy(), max_accuracy_drop=budget)
        depths.append(replay(logits, chosen, PROBLEM).mean())
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > depths[-1]


def test_where_nothing_keeps_to_the_budget_the_answer_is_full_depth():
    logits, labels = made_up(500)
    logits[:, :-1] = -logits[:, :-1]  # every exit but the last is wrong, and sure of it
    assert (
        choose_threshold(logits, labels, [1, 2, 3, 4, 5, 6], ExitPolicy(criterion="entropy"), 0.001).threshold is None
    )
    assert choose_threshold(logits * np.nan, labels, [1, 2, 3, 4, 5, 6], ExitPolicy()).threshold is None


def test_agreement_by_hand():
    logits = np.array([[[1.0, 0], [0, 1], [0, 2]], [[3, 0], [1, 0], [2, 1]]])
    assert agreement(logits).tolist() == [[False, True, True], [True, True, True]]
    several = np.array([[[1.0, 1], [1, -1], [2, -3]]])
    assert agreement(several, "multi_label_classification").tolist() == [[False, True, True]]


@pytest.mark.parametrize("policy", [ExitPolicy(), ExitPolicy(criterion="entropy")], ids=str)
def test_a_threshold_by_agreement_keeps_to_its_budget_on_other_rows_too(policy):
    logits, _ = made_up()
    chosen = choose_threshold_by_agreement(logits, [1, 2, 3, 4, 5, 6], policy, max_disagreement=0.02)
    for rows in (logits, made_up(seed=1)[0]):
        taken = replay(rows, chosen, PROBLEM)
        assert (~agreement(rows)[np.arange(len(taken)), taken]).mean() <= 0.02
        assert 6 / (taken + 1).mean() > 1.2
    strict = choose_threshold_by_agreement(logits, [1, 2, 3, 4, 5, 6], policy, max_disagreement=0.005)
    assert replay(logits, strict, PROBLEM).mean() > replay(logits, chosen, PROBLEM).mean()


def test_too_few_rows_to_know_give_full_depth():
    logits, _ = made_up(40)
    assert choose_threshold_by_agreement(logits, [1, 2, 3, 4, 5, 6], ExitPolicy(), 0.01).threshold is None


@pytest.mark.parametrize("budget", [0.005, 0.01, 0.3])
def test_fewer_rows_than_needed_can_show_nothing(budget):
    rows = int(rows_needed(budget))
    assert wilson_upper_bound(0, rows) <= budget < wilson_upper_bound(0, rows - 1)
    assert rows_needed(0) == float("inf")


def test_the_wilson_bound_is_the_one_of_the_textbook():
    from scipy.stats import binomtest

    for events, rows in ((0, 50), (3, 400), (12, 1200), (50, 50)):
        # the upper end of the two-sided 90 % interval is the one-sided 95 % bound
        expected = binomtest(events, rows).proportion_ci(0.90, method="wilson").high
        assert wilson_upper_bound(events, rows) == pytest.approx(expected, abs=1e-4)


def test_scores_do_not_look_at_later_exits():
    logits, _ = made_up(50)
    changed = logits.copy()
    changed[:, 3:] *= -7
    policy = ExitPolicy(window=3, patience=2)
    before, after = score_exits(logits, policy, PROBLEM), score_exits(changed, policy, PROBLEM)
    assert np.array_equal(before[:, :3], after[:, :3])
    assert not np.array_equal(before[:, 3:], after[:, 3:])


def test_bad_calls_are_named():
    logits, labels = made_up(20)
    with pytest.raises(ValueError, match=r"share in \[0, 1\), such as 0.01, got 1.5"):
        choose_threshold(logits, labels, range(1, 7), ExitPolicy(), 1.5)
    with pytest.raises(ValueError, match="needs one label per row"):
        choose_threshold(logits, labels[:5], range(1, 7), ExitPolicy())
    with pytest.raises(ValueError, match="needs one label per row"):
        choose_threshold(logits[:0], labels[:0], range(1, 7), ExitPolicy())
    with pytest.raises(ValueError, match="max_disagreement must be a share"):
        choose_threshold_by_agreement(logits, range(1, 7), ExitPolicy(), -0.1)
    with pytest.raises(ValueError, match="needs at least one row"):
        choose_threshold_by_agreement(logits[:0], range(1, 7), ExitPolicy())
    with pytest.raises(ValueError, match="lists 2 numbers, but the model has 6 exits"):
        replay(logits, ExitPolicy(threshold=[0.1, 0.2]), PROBLEM)
