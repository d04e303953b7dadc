"""Curves and records from exit tables made up for the purpose."""

import json

import numpy as np
import pytest

from transformers_badge import ExitPolicy, ExitTable
from transformers_badge.calibration.fitting import fit_rule
from transformers_badge.calibration.replay import score_exits, take_exits
from transformers_badge.evaluation.curves import (
    LOSSES,
    area,
    compared_policies,
    cross_fitted_scores,
    curve,
    describe_criterion,
    run_thresholds,
    speedup_at,
    speedup_axis,
    tradeoff_curve,
)
from transformers_badge.evaluation.record import describe_leaving, disagreements, evaluate_table, reliability
from transformers_badge.evaluation.report import markdown_table, write_report
from transformers_badge.model.criteria_badge import CRITERIA


def made_up(rows=1500, exits=4, seed=0, labelled=True, **fields):
    """Exits that grow better with depth, surer where they are right."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, rows)
    ease = generator.normal(1.0, 1.5, rows)
    signal = np.stack([ease + 0.7 * depth + generator.normal(0, 1, rows) for depth in range(exits)], axis=1)
    sign = np.where(labels == 1, 1.0, -1.0)[:, None] * signal
    return ExitTable(
        exit_logits=np.stack([-sign, sign], axis=-1).astype(np.float32),
        exit_layers=tuple(range(1, exits + 1)),
        labels=labels if labelled else None,
        lengths=generator.integers(3, 60, rows),
        **fields,
    )


def test_a_curve_is_linear_in_the_mean_cost():
    # half of the rows at full depth (cost 4, right 1.0), half at cost 2 (right 0.8): cost 3, right 0.9
    values = curve(np.array([4.0, 2.0]), np.array([1.0, 0.8]), 4.0, np.array([1.0, 4 / 3, 2.0]))
    assert values == pytest.approx([1.0, 0.9, 0.8])


def test_speedup_at_a_loss_and_area_by_hand():
    axis, losses = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 0.01, 0.03, 0.02])
    assert speedup_at(axis, losses, 0.01) == pytest.approx(2.0)
    assert speedup_at(axis, losses, 0.005) == pytest.approx(1.5)
    assert speedup_at(axis, losses, 0.02) == pytest.approx(4.0)
    assert speedup_at(axis, np.array([0.0, 0.1, 0.2, 0.3]), -0.1) == 1.0
    assert area(axis, losses) == pytest.approx((0.005 + 0.02 + 0.025) / 3)


def test_runs_go_from_full_depth_to_the_first_exit():
    table = made_up()
    runs = run_thresholds(score_exits(table, ExitPolicy(criterion="f_pabee")))
    assert (runs.taken[0] == 3).all()
    assert (runs.taken[-1] == 0).all()
    assert (runs.taken[1:-1] > 0).all()  # of itself f_pabee lets nobody leave at the first exit
    blocks = runs.taken.mean(axis=1)
    assert (np.diff(blocks) <= 0).all()


def test_every_criterion_is_compared():
    assert {policy.criterion for policy in compared_policies(4).values()} == set(CRITERIA) - {"learned"}


def test_the_band_is_of_what_is_lost_and_closes_at_full_depth():
    table = made_up()
    axis = speedup_axis(table)
    entry = describe_criterion(table, score_exits(table, ExitPolicy()), axis)
    mean, low, high = (np.array(entry[name]) for name in ("mean", "low", "high"))
    assert low[0] == high[0] == pytest.approx(mean[0])
    assert (low <= mean + 1e-9).all()
    assert (mean <= high + 1e-9).all()
    assert (high - low)[-1] > 0.01
    again = describe_criterion(made_up(6000), score_exits(made_up(6000), ExitPolicy()), axis)
    assert np.mean(np.subtract(again["high"], again["low"])) < np.mean(high - low)


def test_cross_fitted_scores_are_those_of_rules_fitted_to_other_rows():
    table = made_up(400)
    scores = cross_fitted_scores(table)
    half = np.random.default_rng(0).permutation(400) % 2 == 0
    other = score_exits(table.select(half), ExitPolicy(criterion="learned", rule=fit_rule(table.select(~half))))
    assert np.array_equal(scores[half], other)
    own = score_exits(table.select(half), ExitPolicy(criterion="learned", rule=fit_rule(table.select(half))))
    assert not np.allclose(scores[half], own)  # negative control


def test_costs_other_than_depth_count():
    table = made_up(costs=np.array([1.0, 1.5, 9.0, 10.0]))
    assert speedup_axis(table)[-1] == 10.0
    points = tradeoff_curve(table, ExitPolicy())
    taken = take_exits(score_exits(table, ExitPolicy()), [points[10]["threshold"]] * 4)
    assert points[10]["layer_speedup"] == pytest.approx(10 / table.costs[taken].mean())


def test_reliability_by_hand():
    sure = np.array([[0.95, 1.0], [0.95, 0.0], [0.55, 1.0], [0.55, 1.0]])
    result = reliability(sure)
    assert result["error"] == pytest.approx(0.5 * 0.45 + 0.5 * 0.45)
    assert [entry["rows"] for entry in result["bins"]] == [2, 2]


def test_the_record_holds_what_it_says_and_is_json(tmp_path):
    table = made_up(row_digests=np.arange(1500, dtype=np.uint64), label_names=("no", "yes"))
    texts = [f"row {i}" for i in range(len(table))]
    record = evaluate_table(table, ExitPolicy(threshold=0.3), texts)
    assert json.loads(json.dumps(record)) == record
    assert set(record["criteria"]) == {*compared_policies(4), "learned"}
    assert [entry["layer"] for entry in record["exits"]] == [1, 2, 3, 4]
    accuracy = [entry["accuracy"] for entry in record["exits"]]
    assert accuracy == pytest.approx([(table.exit_logits[:, i].argmax(-1) == table.labels).mean() for i in range(4)])
    policy = record["policy"]
    assert policy["layer_speedup"] == pytest.approx(4 / policy["mean_exit_layer"])
    assert policy["accuracy"]["low"] < policy["accuracy"]["share"] < policy["accuracy"]["high"]
    assert set(record["criteria"]["entropy"]["speedup_at_loss"]) == {str(loss) for loss in LOSSES}
    leaving = record["leaving"]
    assert sum(leaving["all"]["shares"]) == pytest.approx(1)
    assert sum(entry["rows"] for entry in leaving["by_length"]) == 1500
    assert sum(entry["rows"] for entry in leaving["by_class"].values()) == 1500
    for entry in record["disagreements"]:
        assert entry["first_exit"]["label"] != entry["last_exit"]["label"]
        assert entry["text"].startswith("row ")
    files = write_report(record, tmp_path)
    assert all((tmp_path / name).stat().st_size for name in files)
    assert {path.name for path in tmp_path.iterdir()} == set(files)
    assert "| learned |" in (tmp_path / "evaluation.md").read_text()


def test_without_labels_agreement_is_shown(tmp_path):
    record = evaluate_table(made_up(300, labelled=False), ExitPolicy())
    assert record["measure"] == "agreement"
    assert record["criteria"]["entropy"]["mean"][0] == 1.0
    assert record["policy"]["disagreement"]["share"] == 0.0
    assert "accuracy" not in record["exits"][0]
    write_report(record, tmp_path)


def test_multi_label_tables_are_evaluated_too():
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 2, (400, 3))
    logits = (2 * truth[:, None] - 1) + generator.normal(0, 2, (400, 4, 3)) / np.arange(1, 5)[None, :, None]
    table = ExitTable(
        exit_logits=logits, exit_layers=(1, 2, 3, 4), labels=truth, problem_type="multi_label_classification"
    )
    record = evaluate_table(table, ExitPolicy(threshold=0.2), [f"row {i}" for i in range(400)])
    accuracy = [entry["accuracy"] for entry in record["exits"]]
    assert accuracy == sorted(accuracy)
    assert record["disagreements"] == []


def test_where_rows_leave_by_hand():
    table = ExitTable(
        exit_logits=np.zeros((4, 2, 2)),
        exit_layers=(1, 2),
        labels=np.array([0, 0, 0, 1]),
        lengths=np.array([1, 1, 9, 9]),
        label_names=("no", "yes"),
    )
    leaving = describe_leaving(table, np.array([0, 0, 1, 0]))
    assert leaving["all"]["shares"] == [0.75, 0.25]
    assert leaving["by_class"]["no"]["shares"] == pytest.approx([2 / 3, 1 / 3])
    assert leaving["by_class"]["yes"]["shares"] == [1.0, 0.0]
    assert [entry["rows"] for entry in leaving["by_length"]] == [2, 2]


def test_disagreements_come_with_the_surest_first():
    logits = np.array([[[1.0, 0], [0, 1]], [[3, 0], [0, 1]], [[3, 0], [1, 0]]])
    table = ExitTable(exit_logits=logits, exit_layers=(1, 2), label_names=("no", "yes"))
    found = disagreements(table, ["a", "b", "c"])
    assert [entry["text"] for entry in found] == ["b", "a"]
    assert found[0]["first_exit"]["label"] == "no"


def test_logits_that_are_not_finite_are_named():
    logits = np.zeros((3, 2, 2))
    logits[1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        evaluate_table(ExitTable(exit_logits=logits, exit_layers=(1, 2)), ExitPolicy())


def test_markdown_tables_are_tables():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
