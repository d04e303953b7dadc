"""The learned criterion's rule and the temperatures, fitted to exits made up for the purpose."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit, softmax
from scipy.stats import mannwhitneyu
from test_replay import SEVERAL, made_up, made_up_several

from transformers_badge import ExitPolicy
from transformers_badge.calibration.fitting import expected_losses, fit_rule, fit_temperatures
from transformers_badge.calibration.replay import agreement, answers, at_exits, correctness, replay, score_exits
from transformers_badge.exit_table import ExitTable
from transformers_badge.model.criteria_badge import exit_probabilities
from transformers_badge.model.exit_rule_badge import FEATURES, rule_features, rule_scores


FACTORS = np.array([4.0, 0.25, 1.0, 2.0])  # the truth of `calibrated`


def stretched(table, factors):
    """The same exits, with logits of another scale."""
    return replace(table, exit_logits=table.exit_logits * np.asarray(factors, dtype=np.float64)[None, :, None])


def learned(table):
    return ExitPolicy(criterion="learned", rule=fit_rule(table))


def ranking(table, policy):
    """How often a row that disagrees scores above one that agrees, of all exits but the last together: 1 is perfect."""
    scores, agrees = score_exits(table, policy)[:, :-1].ravel(), agreement(table)[:, :-1].ravel()
    return mannwhitneyu(scores[~agrees], scores[agrees]).statistic / ((~agrees).sum() * agrees.sum())


def calibrated(rows=4000, problem_type="single_label_classification", seed=0):
    """Labels drawn from what the exits would say at the temperatures FACTORS."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (rows, 3))
    if problem_type == SEVERAL:
        labels = (generator.random((rows, 3)) < expit(logits)).astype(np.int64)
    else:
        labels = (softmax(logits, axis=-1).cumsum(axis=-1) < generator.random((rows, 1))).sum(axis=-1)
    layers = tuple(range(1, len(FACTORS) + 1))
    return stretched(
        ExitTable(
            exit_logits=logits[:, None].repeat(len(FACTORS), axis=1),
            exit_layers=layers,
            labels=labels,
            problem_type=problem_type,
        ),
        FACTORS,
    )


def counted_losses(table):
    """1 where the last exit is right and this one is not, -1 where it is the other way round."""
    right = correctness(table).astype(float)
    return right[:, -1:] - right


@pytest.mark.parametrize("make", [made_up, made_up_several])
@pytest.mark.parametrize("factors", [[6, 1, 1, 1], [1, 6, 1, 1], [1, 0.1, 1, 1]])
def test_the_rule_finds_agreement_where_one_exit_is_surer_of_itself_than_it_should_be(make, factors):
    table, others = (stretched(make(1500, 4, seed=seed), factors) for seed in (0, 100))
    policy = learned(table)
    assert np.shape(policy.rule) == (3, len(FEATURES) + 1)
    rank = ranking(others, policy)
    assert rank > ranking(others, ExitPolicy(criterion="entropy")) + 0.05
    # what it has learned is about these exits: on exits of the right scale it finds less, and entropy more
    plain = make(1500, 4, seed=100)
    assert ranking(plain, policy) < rank
    assert ranking(plain, ExitPolicy(criterion="entropy")) > ranking(others, ExitPolicy(criterion="entropy")) + 0.03
    assert rank > ranking(plain, learned(make(1500, 4))) - 0.02  # the wrong scale has cost it nothing


def test_the_score_is_the_regret_of_the_last_exit():
    table, others = (stretched(made_up(4000, 4, seed=seed), [6, 1, 1, 1]) for seed in (0, 1))
    last = exit_probabilities(others.exit_logits, others.problem_type)[:, 0, -1]
    given = answers(others)
    regret = np.stack([last.max(axis=-1) - at_exits(last, given[:, index]) for index in range(3)], axis=1)
    scores = score_exits(others, learned(table))[:, :-1]
    assert scores.mean(axis=0) == pytest.approx(regret.mean(axis=0), abs=0.02)
    for index in range(3):  # among sure and among unsure rows
        sure = scores[:, index] <= np.median(scores[:, index])
        for rows in (sure, ~sure):
            assert scores[rows, index].mean() == pytest.approx(regret[rows, index].mean(), abs=0.03)
        assert regret[~sure, index].mean() > 2 * regret[sure, index].mean()


@pytest.mark.parametrize("make", [made_up, made_up_several])
def test_a_rule_is_finite_where_exits_always_or_never_agree(make):
    table = make(400, 4)
    last = table.exit_logits[:, -1:]
    policies = {}
    for name, sign in (("always", 1), ("never", -1)):
        same = replace(table, exit_logits=np.concatenate([sign * last] * 3 + [last], axis=1))
        policies[name] = learned(same)
        assert np.shape(policies[name].rule) == (3, len(FEATURES) + 1)
        assert np.isfinite(policies[name].rule).all()
        scores = score_exits(same, policies[name])[:, :-1]
        assert (scores > 0).all()
        assert (scores < 1).all()
        assert scores.max() < 0.1 if name == "always" else scores.mean() > 0.5


def test_a_rule_can_be_fitted_to_one_row_and_to_one_class():
    table = made_up(50, 3)
    assert np.isfinite(fit_rule(table.select([0]))).all()
    single = replace(table, exit_logits=table.exit_logits[..., :1], labels=None, label_names=())
    assert np.isfinite(fit_rule(single)).all()


@pytest.mark.parametrize("goal", ["disagreement", "regret"])
def test_a_rule_needs_no_labels_and_does_not_read_them(goal):
    table = made_up(300, 4)
    rule = fit_rule(table, goal=goal)
    assert rule == fit_rule(replace(table, labels=None), goal=goal)
    assert rule == fit_rule(replace(table, labels=1 - table.labels), goal=goal)
    assert rule != fit_rule(table.select(slice(0, 299)), goal=goal)


def test_a_rule_for_disagreement_minds_other_answers_though_the_last_exit_is_torn():
    """Five classes, and a last exit that is often torn: to it another answer is then no regret, but it is another."""

    def torn(seed):
        generator = np.random.default_rng(seed)
        says = generator.normal(0, 1, (3000, 1, 5)).repeat(3, axis=1)
        heard = generator.normal(0, [[[1.0], [0.5], [0.0]]], (3000, 3, 5))
        scale = generator.choice([0.3, 3.0], (3000, 1, 1))  # torn or sure
        return ExitTable(exit_logits=(says + heard) * scale, exit_layers=(1, 2, 3))

    table, others = torn(0), torn(1)
    ranks = {
        goal: ranking(others, ExitPolicy(criterion="learned", rule=fit_rule(table, goal=goal)))
        for goal in ("disagreement", "regret")
    }
    assert ranks["disagreement"] > ranks["regret"] + 0.05
    assert ranks["disagreement"] > 0.6
    # the control: where nobody is torn they are after the same
    sure = [replace(made, exit_logits=made.exit_logits * 20) for made in (torn(0), torn(1))]
    near = [ranking(sure[1], ExitPolicy(criterion="learned", rule=fit_rule(sure[0], goal=goal))) for goal in ranks]
    assert abs(near[0] - near[1]) < 0.03


@pytest.mark.parametrize("make", [made_up, made_up_several])
def test_labels_teach_a_rule_what_a_bad_last_exit_cannot(make):
    """The last exit is made worse than the others: the rule of the labels tells wrong answers better than its own."""

    def spoiled(seed):
        table, generator = make(2000, 5, seed=seed), np.random.default_rng(seed)
        noise = generator.normal(0, 6, table.exit_logits[:, -1].shape)
        return replace(table, exit_logits=np.concatenate([table.exit_logits[:, :-1], (noise)[:, None]], axis=1))

    def tells_wrong(rule, table):
        scores = score_exits(table, ExitPolicy(criterion="learned", rule=rule))[:, 2]
        right = correctness(table)[:, 2]
        return mannwhitneyu(scores[~right], scores[right]).statistic / ((~right).sum() * right.sum())

    table, others = spoiled(0), spoiled(1)
    labelled, unlabelled = fit_rule(table, goal="labelled_regret"), fit_rule(table)
    assert tells_wrong(labelled, others) > 0.75
    assert tells_wrong(unlabelled, others) < tells_wrong(labelled, others) - 0.05
    # the control: labels that have nothing to do with the exits teach nothing
    shuffled = replace(table, labels=np.random.default_rng(0).permutation(table.labels))
    assert tells_wrong(fit_rule(shuffled, goal="labelled_regret"), others) < tells_wrong(labelled, others) - 0.05
    with pytest.raises(ValueError, match="The exit table has no labels"):
        fit_rule(replace(table, labels=None), goal="labelled_regret")


def with_wrong(shares, rows=1000, seed=0):
    """Exits that are wrong on so many of the rows, each on rows of its own, and sure of themselves all the same."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, rows)
    says = np.repeat(labels[:, None], len(shares), axis=1)
    start = 0
    for index, share in enumerate(shares):
        wrong = slice(start, start + round(share * rows))
        says[wrong, index] = 1 - labels[wrong]
        start = wrong.stop
    logits = np.eye(2)[says] * generator.uniform(1, 4, (rows, 1, 1))
    return ExitTable(exit_logits=logits, exit_layers=tuple(range(1, len(shares) + 1)), labels=labels)


@pytest.mark.parametrize(
    ("wrong", "rows", "deepest"),
    [
        ((0.20, 0.05, 0.00, 0.10), 1000, 2),  # the second is better than the last, and the third is better still
        ((0.20, 0.05, 0.06, 0.10), 1000, 1),
        ((0.20, 0.10, 0.09, 0.10), 1000, 3),  # the third too, but no more than by chance
        ((0.20, 0.10, 0.00, 0.00), 1000, 2),  # right on the very same rows
        ((0.20, 0.05, 0.06, 0.10), 100, 3),  # too few rows to tell
    ],
)
def test_nobody_goes_past_an_exit_that_labels_show_to_be_as_good_as_the_last(wrong, rows, deepest):
    table = with_wrong(wrong, rows)
    policy = ExitPolicy(criterion="learned", rule=fit_rule(table, goal="labelled_regret"), threshold=1e-9)
    others = with_wrong(wrong, rows, seed=1)
    assert replay(others, policy).max() == deepest
    assert replay(others, replace(policy, threshold=None)).min() == 3  # nobody leaves early without a threshold
    # the control: who is to answer as the last exit does goes on to it
    for goal in ("regret", "disagreement"):
        other = ExitPolicy(criterion="learned", rule=fit_rule(table, goal=goal), threshold=1e-9)
        assert replay(others, other).max() == 3


def test_a_rule_is_fitted_at_the_temperatures_that_it_is_for():
    table, factors = made_up(300, 4), (2.0, 0.25, 1.0, 4.0)
    hot = stretched(table, factors)
    assert np.array(fit_rule(hot, factors)) == pytest.approx(np.array(fit_rule(table)), rel=1e-6)
    assert np.array(fit_rule(hot)) != pytest.approx(np.array(fit_rule(table)), rel=0.1)
    policy = ExitPolicy(criterion="learned", rule=fit_rule(hot, factors), temperature=factors)
    assert score_exits(hot, policy) == pytest.approx(score_exits(table, learned(table)))


def test_scores_of_a_rule_are_between_0_and_1_however_far_it_goes():
    features = np.array([[-1000.0], [-40.0], [0.0], [40.0], [1000.0], [np.nan]])
    scores = rule_scores(features, np.array([1.0, 0.0]))
    assert np.isnan(scores[-1])
    assert scores[2] == 0.5
    assert (np.diff(scores[:-1]) >= 0).all()
    assert (scores[:-1] > 0).all()
    assert (scores[:-1] < 1).all()


def test_a_lead_is_over_the_most_probable_other_class():
    probabilities = np.array([[[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]], [[0.4, 0.4, 0.2], [0.2, 0.1, 0.7]]])
    features = dict(zip(FEATURES, rule_features(probabilities).T, strict=True))
    np.testing.assert_allclose(features["log-odds at this exit"], np.log([0.6 / 0.4, 0.7 / 0.3]))
    np.testing.assert_allclose(features["square root of the lead at this exit"], np.sqrt(np.log([2, 3.5])))
    np.testing.assert_allclose(features["log-odds at the exit before"], np.log([0.2 / 0.8, 0.2 / 0.8]))
    np.testing.assert_allclose(features["mean lead at the earlier exits"], np.log([0.2 / 0.5, 0.2 / 0.4]))
    # With two classes it is the log-odds, to the bit; and a third that nobody thinks of changes nothing.
    two = np.random.default_rng(0).dirichlet([1, 1], (50, 3))
    features = rule_features(two)
    np.testing.assert_array_equal(features[:, 1], np.sqrt(features[:, 0]))
    three = np.concatenate([two, np.full((50, 3, 1), 1e-12)], axis=-1)
    np.testing.assert_allclose(rule_features(three), features, atol=1e-5)
    assert np.isnan(rule_features(np.array([[np.nan, 0.5, 0.5]]))[:2]).all()


def test_a_model_with_one_exit_has_nothing_to_learn():
    with pytest.raises(ValueError, match="The model has one exit only: there is nothing to learn"):
        fit_rule(made_up(50, 1))


@pytest.mark.parametrize("problem_type", ["single_label_classification", SEVERAL])
def test_temperatures_are_found_with_labels_and_without(problem_type):
    table = calibrated(problem_type=problem_type)
    assert fit_temperatures(table) == pytest.approx(FACTORS, rel=0.05)
    without = fit_temperatures(replace(table, labels=None))
    assert without[:-1] == pytest.approx(FACTORS[:-1] / FACTORS[-1], rel=1e-4)  # the last exit is the teacher
    assert without[-1] == 1.0
    again = stretched(table, 1 / FACTORS)
    assert fit_temperatures(again) == pytest.approx(np.ones(4), rel=0.05)


def test_temperatures_stay_within_their_bounds():
    table = stretched(calibrated(500), [100, 1e-3, 1, 1])
    found = fit_temperatures(table)
    assert found[:2] == pytest.approx((20, 0.05), rel=1e-3)
    assert all(0.05 <= temperature <= 20 for temperature in found)


@pytest.mark.parametrize("problem_type", ["single_label_classification", SEVERAL])
def test_expected_losses_have_less_noise_than_counting(problem_type):
    """Rows of which even the best exit is unsure, as rows where exits disagree mostly are."""

    def make(rows, seed):
        table, generator = calibrated(rows, problem_type, seed), np.random.default_rng(seed + 1)
        noise = generator.normal(0, 1, table.exit_logits.shape) * np.array([1.0, 0.7, 0.4, 0.2])[:, None]
        return replace(table, exit_logits=table.exit_logits / FACTORS[:, None] / 2 + noise)

    def lost(losses, table):
        """By a policy that lets the surest three quarters leave at the second exit."""
        sure = exit_probabilities(table.exit_logits, problem_type)[:, :, 1].max(axis=-1).min(axis=1)
        return np.where(sure > np.quantile(sure, 0.25), losses[:, 1], 0).mean()

    everything = make(50_000, 999)
    truth = lost(counted_losses(everything), everything)
    tables = [make(300, seed) for seed in range(40)]
    expected = np.array([lost(expected_losses(table), table) for table in tables])
    counted = np.array([lost(counted_losses(table), table) for table in tables])
    assert truth > 0.02
    assert expected.mean() == pytest.approx(truth, abs=0.01)
    assert np.sqrt(((expected - truth) ** 2).mean()) < 0.9 * np.sqrt(((counted - truth) ** 2).mean())


@pytest.mark.parametrize("problem_type", ["single_label_classification", SEVERAL])
def test_expected_losses_follow_the_labels_of_rows_where_exits_disagree(problem_type):
    """Where they agree they are right; where they do not, the last is nine times in ten, whatever either thinks."""
    generator = np.random.default_rng(1)
    table = calibrated(4000, problem_type)
    logits = table.exit_logits / FACTORS[:, None]
    logits[:, 0] += generator.normal(0, 2, logits[:, 0].shape)
    table = replace(table, exit_logits=logits)
    first, last = answers(table)[:, 0], answers(table)[:, -1]
    last_is_right = generator.random(first.shape) < 0.9
    table = replace(table, labels=np.where(last_is_right, last, first).astype(np.int64))
    truth = counted_losses(table)[:, 0].mean()
    assert truth > 0.1
    expected = expected_losses(table)
    assert expected[:, 0].mean() == pytest.approx(truth, rel=0.1)
    assert not expected[agreement(table)].any()
    # the control: the same exits, where it is the first that is right
    opposite = replace(table, labels=np.where(last_is_right, first, last).astype(np.int64))
    assert expected_losses(opposite)[:, 0].mean() == pytest.approx(-truth, rel=0.1)


def test_expected_losses_of_labels_that_have_nothing_to_do_with_the_exits_are_none():
    table = made_up(2000, 4)
    losses = expected_losses(table)
    assert losses.shape == (2000, 4)
    assert losses.mean(axis=0) == pytest.approx(counted_losses(table).mean(axis=0), abs=0.02)
    shuffled = replace(table, labels=np.random.default_rng(0).permutation(table.labels))
    assert expected_losses(shuffled).mean(axis=0) == pytest.approx(np.zeros(4), abs=0.03)
    assert expected_losses(table)[:, 0].mean() > 0.05  # the control
    with pytest.raises(ValueError, match="The exit table has no labels"):
        expected_losses(replace(table, labels=None))
