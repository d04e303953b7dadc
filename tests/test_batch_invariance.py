"""The property that the whole project stands on: what a row is answered does not depend on its neighbours, padding or
batch size.

2,000 random batches (1 to 64 rows of 1 to 128 tokens; all families, exit 0, every criterion) against one row at a time:
the same exit layer and the same label. Most batches are parted by length on the way: they are counted. Rows with a
score within 1e-5 of a threshold may differ in float rounding: they are counted and printed.
"""

import numpy as np
import pytest
import torch

from tiny import FAMILIES, pad, random_rows, tiny_model
from transformers_badge import ExitPolicy, ExitTable
from transformers_badge.calibration.replay import score_exits, take_exits
from transformers_badge.model.criteria_badge import COMBINATORS, CRITERIA
from transformers_badge.model.early_exit_badge import length_groups


BATCHES = 2000
# Weights of the learned criterion's features, and a constant, for the three exits before the last.
RULE = [
    [-1.0, -0.5, -0.3, 0.4, -0.5, 2.0, 0.5],
    [-0.8, -0.2, -0.6, 0.1, -0.4, 1.0, 0.3],
    [-1.2, 0.1, -0.2, 0.3, 0, 1, 0],
]
DISCRETE = {"patience": 0.0, "voting": 0.8}  # thresholds for scores that are counts, never close to one
POLICIES = {
    "dge": ExitPolicy(criterion="dge", window=3, confidence_weight=1.0),
    "dge, literal": ExitPolicy(criterion="dge", window=2, confidence_weight=0.0, divergence="symmetric_kl"),
    "dge, patience": ExitPolicy(criterion="dge", window=2, confidence_weight=2.0, patience=2),
    "entropy": ExitPolicy(criterion="entropy"),
    "patience": ExitPolicy(criterion="patience", patience=1),
    "max_probability": ExitPolicy(criterion="max_probability"),
    "margin": ExitPolicy(criterion="margin", temperature=(2.0, 1.5, 1.0, 1.0)),
    "pcee": ExitPolicy(criterion="pcee"),
    "f_pabee": ExitPolicy(criterion="f_pabee", patience=1),
    "f_pabee_averaged": ExitPolicy(criterion="f_pabee_averaged", patience=1),
    "beem": ExitPolicy(criterion="beem"),
    "voting": ExitPolicy(criterion="voting"),
    "learned": ExitPolicy(criterion="learned", rule=RULE),
    "any_of": ExitPolicy(
        criterion="any_of",
        parts=[{"criterion": "entropy", "threshold": 0.6}, {"criterion": "f_pabee", "threshold": 0.05}],
    ),
    "all_of": ExitPolicy(
        criterion="all_of", parts=[{"criterion": "margin", "threshold": 0.7}, {"criterion": "beem", "threshold": 1.0}]
    ),
}


class Pool:
    """Rows of one model, each answered alone."""

    def __init__(self, family, size=64, **fields):
        # One head: with four, attention takes more time than all else.
        one_head = {"n_heads" if family == "distilbert" else "num_attention_heads": 1}
        self.model = tiny_model(family, encoder=one_head, **fields)
        lengths = np.random.default_rng(7).integers(1, 129, size)
        self.rows = random_rows([int(n) for n in lengths], seed=11)
        outputs = [self.model.early_exit_predict(**pad([row]), output_exit_logits=True) for row in self.rows]
        exit_logits = torch.cat([output.exit_logits for output in outputs]).numpy()
        self.table = ExitTable(exit_logits=exit_logits, exit_layers=self.model.exit_layers)

    def prepare(self, policy):
        """Thresholds in the middle of each exit's scores, and every row's answer by itself, from a real run on that
        row.
        """
        scores, discrete = score_exits(self.table, policy), policy.criterion in DISCRETE
        middle = (
            [DISCRETE[policy.criterion]] * 4
            if discrete
            else np.nanmedian(np.where(np.isfinite(scores), scores, 9.0), axis=0)
        )
        self.policy = ExitPolicy.of(policy, threshold=[float(value) for value in middle])
        self.close = (np.abs(scores - np.array(middle)) <= 1e-5).any(axis=1) & (not discrete)
        alone = [self.model.early_exit_predict(**pad([row]), policy=self.policy) for row in self.rows]
        self.layers = np.array([int(output.exit_layer) for output in alone])
        self.labels = np.array([int(output.logits.argmax()) for output in alone])
        assert len(set(self.layers)) >= 2, "rows must leave at different exits for this test to mean anything"
        # and the runs one by one are those that the stored logits replay to
        replayed = np.array(self.model.exit_layers)[take_exits(scores, self.policy.thresholds(4))]
        assert np.array_equal(replayed[~self.close], self.layers[~self.close])

    def compare(self, chosen, side):
        """How many of the chosen rows are answered otherwise in a batch, and how many of those are excused."""
        batch = pad([self.rows[i] for i in chosen], side)
        output = self.model.early_exit_predict(**batch, policy=self.policy)
        differs = (output.exit_layer.numpy() != self.layers[chosen]) | (
            output.logits.argmax(-1).numpy() != self.labels[chosen]
        )
        return int((differs & ~self.close[chosen]).sum()), int((differs & self.close[chosen]).sum())


@pytest.fixture(scope="module")
def pools():
    with_exit_0 = Pool("bert", lexical_exit=True, exit_layers=[0, 1, 2, 4])
    return {**{family: Pool(family) for family in FAMILIES}, "bert, exit 0": with_exit_0}


def test_2000_random_batches_answer_as_one_row_at_a_time(pools, record_property):
    generator = np.random.default_rng(3)
    cells = [(family, name) for family in sorted(pools) for name in POLICIES]
    wrong, excused, rows, batches, parted = {}, 0, 0, 0, 0
    for index, (family, name) in enumerate(cells):
        pool = pools[family]
        pool.prepare(POLICIES[name])
        for number in range(BATCHES // len(cells) + (index < BATCHES % len(cells))):
            chosen = generator.integers(0, len(pool.rows), generator.integers(1, 65))
            bad, close = pool.compare(chosen, "left" if number % 4 == 0 else "right")
            mask = pad([pool.rows[i] for i in chosen])["attention_mask"].numpy() > 0
            parted += len(length_groups(mask, pool.model.run_cost)) > 1
            wrong[family, name] = wrong.get((family, name), 0) + bad
            excused, rows, batches = excused + close, rows + len(chosen), batches + 1
    record_property(
        "batch invariance",
        f"{batches} batches, {rows} rows: {sum(wrong.values())} answered otherwise, "
        f"{excused} more with a score within 1e-5 of a threshold",
    )
    assert batches == BATCHES
    assert BATCHES / 2 < parted < BATCHES
    assert {cell: count for cell, count in wrong.items() if count} == {}


def test_a_wrong_row_index_is_caught(pools, monkeypatch):
    """Negative control: dropping the wrong one of the rows must show."""
    pool = pools["bert"]
    pool.prepare(POLICIES["entropy"])
    correct = pool.model.compact

    def wrong(state, rows, columns, padded):
        return correct(state, rows if rows is None else np.maximum(rows - 1, 0), columns, padded)

    monkeypatch.setattr(pool.model, "compact", wrong, raising=False)
    bad = sum(pool.compare(np.arange(start, start + 24), "right")[0] for start in range(0, 48, 24))
    assert bad > 0


def test_every_criterion_is_among_the_policies():
    # At a fixed depth all rows leave together: there is nothing about a row that its neighbours could change.
    assert {policy.criterion for policy in POLICIES.values()} == {*CRITERIA, *COMBINATORS} - {"fixed_depth"}
