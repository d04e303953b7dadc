"""The loop over blocks, and `early_exit_predict` on top of it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tiny import in_threads, pad, random_rows, table_of, tiny_model
from transformers_badge import ExitPolicy
from transformers_badge.calibration.replay import replay
from transformers_badge.model.early_exit_badge import length_groups, predict_with_policy, run_blocks, token_columns


LENGTHS = [9, 30, 4, 17, 1, 12, 25]


class ScriptedStages:
    """Stages over plain row numbers: row i is sure from exit `leaves_at[i]` on. Records which rows each block saw."""

    def __init__(self, leaves_at, exit_layers=(1, 2, 3, 4), run_cost=np.inf):
        self.exit_layers, self.run_cost = list(exit_layers), run_cost
        self.leaves_at = np.array(leaves_at)
        self.seen, self.widths, self.embedded = [], [], []

    def embed(self, state):
        self.embedded.append(state.tolist())
        return state

    def run_block(self, layer, state):
        self.seen.append((layer, state.tolist()))
        return state

    def read_exit(self, exit_index, state):
        return np.where(self.leaves_at[state] <= exit_index, 10.0, 0.1)[:, None] * np.array([1.0, -1.0])

    def compact(self, state, rows, columns, padded):
        self.widths.append((columns.stop - columns.start, padded))
        return state if rows is None else state[rows]

    def to_host(self, logits):
        return logits


def test_the_loop_runs_each_block_on_the_rows_that_are_still_inside():
    stages = ScriptedStages([0, 3, 1, 9, 0])
    mask = np.ones((5, 6), dtype=bool)
    logits, taken = predict_with_policy(
        stages, np.arange(5), mask, 2, ExitPolicy(criterion="entropy", threshold=0.1), "single_label_classification"
    )
    assert taken.tolist() == [0, 3, 1, 3, 0]
    assert stages.seen == [(1, [0, 1, 2, 3, 4]), (2, [1, 2, 3]), (3, [1, 3]), (4, [1, 3])]
    assert np.isnan(logits[0, 1:]).all()
    assert np.isfinite(logits[3]).all()


def test_rows_that_leave_before_the_first_block_are_not_embedded():
    stages = ScriptedStages([0, 3, 1, 0, 2], exit_layers=(0, 1, 2, 4))
    policy = ExitPolicy(criterion="entropy", threshold=0.1)
    _, taken = predict_with_policy(
        stages, np.arange(5), np.ones((5, 6), dtype=bool), 2, policy, "single_label_classification"
    )
    assert taken.tolist() == [0, 3, 1, 0, 2]
    assert stages.embedded == [[1, 2, 4]]
    assert stages.seen == [(1, [1, 2, 4]), (2, [1, 4]), (3, [1]), (4, [1])]

    everyone = ScriptedStages([0, 0], exit_layers=(0, 4))
    predict_with_policy(everyone, np.arange(2), np.ones((2, 6), dtype=bool), 2, policy, "single_label_classification")
    assert everyone.embedded == everyone.seen == []


def test_the_loop_ends_when_everyone_has_left():
    stages = ScriptedStages([0, 1, 1])
    predict_with_policy(
        stages,
        np.arange(3),
        np.ones((3, 2), dtype=bool),
        2,
        ExitPolicy(criterion="entropy", threshold=0.1),
        "single_label_classification",
    )
    assert [layer for layer, _ in stages.seen] == [1, 2]


def test_padding_goes_with_the_rows_that_needed_it():
    mask = np.zeros((3, 10), dtype=bool)
    mask[0, :10], mask[1, :4], mask[2, 2:6] = True, True, True
    stages = ScriptedStages([0, 1, 9])
    predict_with_policy(
        stages, np.arange(3), mask, 2, ExitPolicy(criterion="entropy", threshold=0.1), "single_label_classification"
    )
    assert stages.widths == [(6, True), (4, False)]
    assert token_columns(mask[1:]) == slice(0, 6)


LONG_AND_SHORT = np.arange(12) < np.array([[12], [2], [11], [3], [12], [2]])
ENTROPY = ExitPolicy(criterion="entropy", threshold=0.1)


def test_rows_unlike_in_length_run_apart():
    stages = ScriptedStages([9, 9, 0, 0, 1, 2], run_cost=10)
    logits, taken = predict_with_policy(stages, np.arange(6), LONG_AND_SHORT, 2, ENTROPY, "single_label_classification")
    assert taken.tolist() == [3, 3, 0, 0, 1, 2]
    seen = {layer: sorted(rows for run, rows in stages.seen if run == layer) for layer in (1, 2, 3, 4)}
    assert seen == {1: [[0, 2, 4], [1, 3, 5]], 2: [[0, 4], [1, 5]], 3: [[0], [1, 5]], 4: [[0], [1]]}
    together = ScriptedStages([9, 9, 0, 0, 1, 2])
    whole, _ = predict_with_policy(together, np.arange(6), LONG_AND_SHORT, 2, ENTROPY, "single_label_classification")
    np.testing.assert_array_equal(logits, whole)
    assert [rows for layer, rows in together.seen if layer == 1] == [[0, 1, 2, 3, 4, 5]]


def test_parts_run_side_by_side_in_an_executor():
    class Meeting(ScriptedStages):
        """Both parts have to be at the first block at the same time."""

        def __init__(self, patience, **fields):
            super().__init__([9, 9, 0, 0, 1, 2], run_cost=10, **fields)
            self.meeting = threading.Barrier(2, timeout=patience)

        def run_block(self, layer, state):
            if layer == 1:
                self.meeting.wait()
            return super().run_block(layer, state)

    given = np.arange(6), LONG_AND_SHORT, 2, ENTROPY, "single_label_classification"
    expected, expected_taken = predict_with_policy(ScriptedStages([9, 9, 0, 0, 1, 2]), *given)
    with ThreadPoolExecutor(2) as executor:
        logits, taken = predict_with_policy(Meeting(patience=20), *given, executor)
    np.testing.assert_array_equal(logits, expected)
    assert taken.tolist() == expected_taken.tolist()
    with pytest.raises(threading.BrokenBarrierError):  # one after the other they wait in vain
        predict_with_policy(Meeting(patience=0.05), *given)
    with ThreadPoolExecutor(2) as executor, pytest.raises(threading.BrokenBarrierError):  # an error comes through
        predict_with_policy(Meeting(patience=0), *given, executor)


def test_rows_are_not_parted_before_those_that_need_no_block_have_left():
    stages = ScriptedStages([0, 0, 9, 9, 9, 0], exit_layers=(0, 2), run_cost=10)
    _, taken = predict_with_policy(stages, np.arange(6), LONG_AND_SHORT, 2, ENTROPY, "single_label_classification")
    assert taken.tolist() == [0, 0, 1, 1, 1, 0]
    assert sorted(stages.embedded) == [[2, 3, 4]]  # of three the one is not worth a run of its own
    cheap = ScriptedStages([0, 0, 9, 9, 9, 0], exit_layers=(0, 2), run_cost=5)
    predict_with_policy(cheap, np.arange(6), LONG_AND_SHORT, 2, ENTROPY, "single_label_classification")
    assert sorted(cheap.embedded) == [[2, 4], [3]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("run_cost", [0, 5, 40, np.inf])
def test_a_group_more_saves_more_padding_than_a_run_costs(run_cost, side):
    generator = np.random.default_rng(0)
    for rows in (1, 2, 7, 33):
        lengths = generator.integers(1, 40, rows)
        mask = np.arange(40) < lengths[:, None]
        mask = mask if side == "right" else mask[:, ::-1]
        groups = length_groups(mask, run_cost)
        assert sorted(np.concatenate(groups).tolist()) == list(range(rows))
        widths = [lengths[group].max() for group in groups]
        assert widths == sorted(widths)
        assert all(group.tolist() == sorted(group.tolist()) for group in groups)
        if run_cost == np.inf:
            assert len(groups) == 1
        elif run_cost == 0:  # no padding at all
            assert len(groups) == len(np.unique(lengths))
        else:
            computed = sum(len(group) * width for group, width in zip(groups, widths, strict=True))
            saved = rows * lengths.max() - computed
            assert saved >= run_cost * (len(groups) - 1)
            for group, width in zip(groups, widths, strict=True):  # nor would another have
                here = np.sort(lengths[group])
                assert (np.arange(1, len(here) + 1) * (width - here)).max() <= run_cost


def test_an_accelerator_runs_batches_whole():
    model = tiny_model("bert", exit_layers=[1], encoder={"num_hidden_layers": 1})
    assert 0 < model.run_cost < np.inf
    assert model.to(torch.bfloat16).run_cost > model.to(torch.float64).run_cost == model.to(torch.float32).run_cost
    assert model.to("meta").run_cost == np.inf


def test_exits_may_be_fewer_than_blocks():
    stages = ScriptedStages([0, 1, 9], exit_layers=(2, 4))
    _, taken = predict_with_policy(
        stages,
        np.arange(3),
        np.ones((3, 2), dtype=bool),
        2,
        ExitPolicy(criterion="entropy", threshold=0.1),
        "single_label_classification",
    )
    assert taken.tolist() == [0, 1, 1]
    assert [layer for layer, _ in stages.seen] == [1, 2, 3, 4]


def test_run_blocks_shows_the_embedding_and_every_block():
    shown = []
    run_blocks(ScriptedStages([9]), np.arange(1), lambda index, state: state, lambda layer, state: shown.append(layer))
    assert shown == [0, 1, 2, 3, 4]


def test_a_fresh_model_never_leaves_early(model):
    batch = pad(random_rows(LENGTHS))
    output = model.early_exit_predict(**batch)
    assert output.exit_layer.tolist() == [4] * len(LENGTHS)
    assert output.exit_logits is None
    with torch.no_grad():
        assert torch.allclose(output.logits, model(**batch).logits, atol=1e-6)


@pytest.mark.parametrize("criterion", ["dge", "entropy", "patience"])
def test_rows_are_answered_by_the_exit_that_they_took(model, criterion):
    batch = pad(random_rows(LENGTHS))
    with torch.no_grad():
        every = model(**batch).exit_logits
    threshold = 0.0 if criterion == "patience" else 0.75
    output = model.early_exit_predict(**batch, criterion=criterion, threshold=threshold, output_exit_logits=True)
    assert output.logits.shape == (len(LENGTHS), 3)
    assert output.exit_layer.dtype == torch.int64
    assert 1 <= output.exit_layer.min() < output.exit_layer.max(), "the threshold must split the rows to test anything"
    for row, layer in enumerate(output.exit_layer.tolist()):
        assert torch.allclose(output.logits[row], every[row, layer - 1], atol=1e-5)
        assert torch.allclose(output.exit_logits[row, :layer], every[row, :layer], atol=1e-5)
        assert output.exit_logits[row, layer:].isnan().all()


def test_the_exits_taken_are_those_of_a_replay_on_stored_logits(model):
    batch = pad(random_rows([int(n) for n in np.random.default_rng(0).integers(1, 40, 200)]))
    with torch.no_grad():
        table = table_of(model(**batch).exit_logits)
    for policy in (
        ExitPolicy(criterion="entropy", threshold=0.8),
        ExitPolicy(criterion="entropy", threshold=(0.5, None, 0.7, 0.0)),
        ExitPolicy(criterion="patience", threshold=0, patience=2),
    ):
        taken = replay(table, policy)
        assert len(set(taken.tolist())) > 1, policy
        assert model.early_exit_predict(**batch, policy=policy).exit_layer.tolist() == (taken + 1).tolist(), policy


def test_blocks_after_the_last_row_left_do_not_run(model):
    calls = []
    for layer, block in enumerate(model.adapter.blocks(model.encoder), start=1):
        block.register_forward_pre_hook(lambda module, args, layer=layer: calls.append((layer, len(args[0]))))
    output = model.early_exit_predict(**pad(random_rows(LENGTHS)), criterion="entropy", threshold=0.75)
    layers = output.exit_layer
    expected = [(layer, int((layers >= layer).sum())) for layer in range(1, int(layers.max()) + 1)]
    assert calls == expected
    calls.clear()
    model.early_exit_predict(**pad(random_rows(LENGTHS)), threshold=float("inf"))
    assert calls == [(1, len(LENGTHS))]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_no_answer(model, side):
    rows = random_rows(LENGTHS)
    plain = model.early_exit_predict(**pad(rows), criterion="entropy", threshold=0.75)
    padded = model.early_exit_predict(**pad(rows, side, extra=50), criterion="entropy", threshold=0.75)
    assert torch.allclose(plain.logits, padded.logits, atol=1e-5)
    assert torch.equal(plain.exit_layer, padded.exit_layer)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_forward_does_not_depend_on_padding_either(family, pooling):
    model, rows = tiny_model(family, pooling=pooling), random_rows(LENGTHS)
    with torch.no_grad():
        plain = model(**pad(rows)).exit_logits
        for side in ("right", "left"):
            assert torch.allclose(plain, model(**pad(rows, side, extra=20)).exit_logits, atol=1e-5), side


def test_a_nan_never_leaves_early_and_is_seen_in_the_answer(bert):
    with torch.no_grad():
        bert.exits[1].classifier.bias[0] = float("nan")
    output = bert.early_exit_predict(
        **pad(random_rows(LENGTHS)), threshold=float("inf"), window=2, output_exit_logits=True
    )
    assert (output.exit_layer == 1).all()  # exit 1 is sound, and a threshold of infinity takes it
    output = bert.early_exit_predict(
        **pad(random_rows(LENGTHS)), threshold=[None, float("inf"), float("inf"), 0], window=1
    )
    assert (output.exit_layer == 3).all()
    with torch.no_grad():
        bert.exits[3].classifier.bias[0] = float("nan")
    assert bert.early_exit_predict(**pad(random_rows(LENGTHS))).logits.isnan().any()


def test_dropout_is_off_and_the_mode_comes_back(bert):
    batch = pad(random_rows(LENGTHS))
    expected = bert.early_exit_predict(**batch, criterion="entropy", threshold=0.75)
    bert.train()
    bert.exits[0].eval()  # frozen by somebody
    output = bert.early_exit_predict(**batch, criterion="entropy", threshold=0.75)
    assert torch.equal(output.logits, expected.logits)
    assert bert.training
    assert bert.encoder.training
    assert not bert.exits[0].training


def test_the_policy_of_the_config_is_used_and_fields_can_be_overridden(bert):
    batch = pad(random_rows(LENGTHS))
    bert.config.exit_policy = {"criterion": "entropy", "threshold": 0.7}
    stored = bert.early_exit_predict(**batch)
    assert torch.equal(
        stored.exit_layer,
        bert.early_exit_predict(**batch, policy={"criterion": "entropy", "threshold": 0.7}).exit_layer,
    )
    assert not torch.equal(stored.exit_layer, bert.early_exit_predict(**batch, threshold=None).exit_layer)
    with pytest.raises(ValueError, match="chosen for criterion='entropy'"):
        bert.early_exit_predict(**batch, criterion="dge")


def test_multi_label_models_leave_early_and_regression_says_why_not():
    batch = pad(random_rows(LENGTHS))
    multi = tiny_model("bert", problem_type="multi_label_classification")
    layers = multi.early_exit_predict(**batch, criterion="entropy", threshold=0.5).exit_layer
    assert layers.min() < 4
    regression = tiny_model("bert", problem_type="regression", num_labels=1)
    assert (regression.early_exit_predict(**batch).exit_layer == 4).all()
    with pytest.raises(ValueError, match="regression.*threshold at None"):
        regression.early_exit_predict(**batch, threshold=0.5)


def test_threads_do_not_disturb_each_other(bert):
    batches = [pad(random_rows(LENGTHS, seed=seed)) for seed in range(6)]
    expected = [bert.early_exit_predict(**batch, criterion="entropy", threshold=0.75) for batch in batches]
    wrong = []

    def work(i):
        for _ in range(5):
            output = bert.early_exit_predict(**batches[i], criterion="entropy", threshold=0.75)
            if not torch.equal(output.exit_layer, expected[i].exit_layer):
                wrong.append(i)

    in_threads(work, 6)
    assert wrong == []
