"""The property that the whole project stands on: what a row is answered does not depend on its neighbours, padding or
batch size.

2,000 random batches (1 to 64 rows of 1 to 128 tokens; all families, every criterion) against one row at a time: the
same exit layer and the same label. Rows with a score within 1e-5 of a threshold may differ in float rounding: they
are counted and printed.
"""

import numpy as np
import pytest
import torch

from tiny import FAMILIES, pad, random_rows, tiny_model
from transformers_badge import ExitPolicy
from transformers_badge.calibration.replay import score_exits, take_exits
from transformers_badge.model.criteria_badge import CRITERIA


BATCHES = 2000
POLICIES = {
    "dge": ExitPolicy(criterion="dge", window=3, confidence_weight=1.0),
    "dge, literal": ExitPolicy(criterion="dge", window=2, confidence_weight=0.0, divergence="symmetric_kl"),
    "dge, patience": ExitPolicy(criterion="dge", window=2, confidence_weight=2.0, patience=2),
    "entropy": ExitPolicy(criterion="entropy"),
    "patience": ExitPolicy(criterion="patience", patience=1),
}
PROBLEM = "single_label_classification"


class Pool:
    """Rows of one model, each answered alone."""

    def __init__(self, family, size=96):
        self.model = tiny_model(family)
        lengths = np.random.default_rng(7).integers(1, 129, size)
        self.rows = random_rows([int(n) for n in lengths], seed=11)
        outputs = [self.model.early_exit_predict(**pad([row]), output_exit_logits=True) for row in self.rows]
        self.exit_logits = torch.cat([output.exit_logits for output in outputs]).double().numpy()

    def prepare(self, policy):
        """Thresholds in the middle of each exit's scores, and every row's answer by itself, from a real run on that
        row.
        """
        scores = score_exits(self.exit_logits, policy, PROBLEM)
        middle = (
            [0.0] * 4
            if policy.criterion == "patience"
            else np.nanmedian(np.where(np.isfinite(scores), scores, 9.0), axis=0)
        )
        self.policy = ExitPolicy.of(policy, threshold=[float(value) for value in middle])
        self.close = (np.abs(scores - np.array(middle)) <= 1e-5).any(axis=1) & (policy.criterion != "patience")
        alone = [self.model.early_exit_predict(**pad([row]), policy=self.policy) for row in self.rows]
        self.layers = np.array([int(output.exit_layer) for output in alone])
        self.labels = np.array([int(output.logits.argmax()) for output in alone])
        assert len(set(self.layers)) >= 3, "rows must leave at different exits for this test to mean anything"
        # and the runs one by one are those that the stored logits replay to
        replayed = take_exits(scores, self.policy.thresholds(4)) + 1
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
    return {family: Pool(family) for family in FAMILIES}


def test_2000_random_batches_answer_as_one_row_at_a_time(pools, record_property):
    generator = np.random.default_rng(3)
    cells = [(family, name) for family in sorted(pools) for name in POLICIES]
    wrong, excused, rows, batches = {}, 0, 0, 0
    for family, name in cells:
        pool = pools[family]
        pool.prepare(POLICIES[name])
        for number in range(BATCHES // len(cells)):
            chosen = generator.integers(0, len(pool.rows), generator.integers(1, 65))
            bad, close = pool.compare(chosen, "left" if number % 4 == 0 else "right")
            wrong[family, name] = wrong.get((family, name), 0) + bad
            excused, rows, batches = excused + close, rows + len(chosen), batches + 1
    record_property(
        "batch invariance",
        f"{batches} batches, {rows} rows: {sum(wrong.values())} answered otherwise, "
        f"{excused} more with a score within 1e-5 of a threshold",
    )
    assert batches == BATCHES
    assert {cell: count for cell, count in wrong.items() if count} == {}


def test_a_wrong_row_index_is_caught(pools, monkeypatch):
    """Negative control: dropping the wrong one of the rows must show."""
    pool = pools["bert"]
    pool.prepare(POLICIES["entropy"])
    correct = pool.model.compact

    def wrong(state, rows, columns, padded):
        return correct(state, rows if rows is None else np.maximum(rows - 1, 0), columns, padded)

    monkeypatch.setattr(pool.model, "compact", wrong, raising=False)
    bad = sum(pool.compare(np.arange(start, start + 24), "right")[0] for start in range(0, 72, 24))
    assert bad > 0


def test_every_criterion_is_among_the_policies():
    assert {policy.criterion for policy in POLICIES.values()} == set(CRITERIA)
