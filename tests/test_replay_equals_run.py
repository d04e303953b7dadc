"""A replay of a policy on an exit table and a run of the model take the same exits: what calibration rests on.

For every criterion and both combinators 10,000 rows are run once, in random order, in batches of many sizes, padded on
either side, and compared with a replay on a table that was made in other batches. Thresholds stand in the middle of a
gap between scores, so that the float rounding of another batch cannot decide; that they do is asserted.
"""

from functools import cache

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from tiny import pad, random_rows, tiny_model
from transformers_badge import ExitPolicy
from transformers_badge.calibration.fitting import fit_rule, fit_temperatures
from transformers_badge.calibration.replay import answers, at_exits, replay, score_exits, take_exits
from transformers_badge.inference.exit_logits import FILTERS_COST, LEXICAL_COST, make_exit_table
from transformers_badge.model.criteria_badge import COMBINATORS, CRITERIA


ROUNDING = 1e-5  # no score may be closer than this to a threshold

# A model: family, rows, fields of its config.
MODELS = {
    "bert": ("bert", 10_000, {}),
    "bert, multi-label": ("bert", 1_000, {"problem_type": "multi_label_classification"}),
    "modernbert": ("modernbert", 1_000, {}),
    "roberta, exit 0": ("roberta", 1_000, {"lexical_exit": True, "exit_layers": [0, 1, 2, 4]}),
    "bert, 4 exits, 5 blocks": ("bert", 1_000, {"exit_layers": [1, 2, 4, 5], "encoder": {"num_hidden_layers": 5}}),
}
# A policy: what it is made of, and something about it that makes it another.
POLICIES = {
    "entropy": ({}, {"quantile": 0.6}),
    "max_probability": ({}, {"quantile": 0.6}),
    "margin": ({}, {"quantile": 0.6}),
    "dge": ({"window": 3}, {"window": 2}),
    "patience": ({}, {"patience": 2, "threshold": 0.5}),
    "pcee": ({}, {"patience": 1}),
    "f_pabee": ({"patience": 1}, {"patience": 2}),
    "f_pabee_averaged": ({}, {"patience": 1}),
    "beem": ({}, {"quantile": 0.6}),
    "voting": ({"threshold": 0.93}, {"threshold": 1.2}),
    "fixed_depth": ({}, {"quantile": 0.6}),
    "learned": ({"rule": "fitted", "per_exit": True, "quantile": 0.65}, {"quantile": 0.4}),
    "all_of": ({"parts": ["entropy", "learned"]}, {"threshold": 0.7}),
    "any_of": ({"parts": ["patience", "max_probability"]}, {"threshold": 0.0}),
    "temperature": ({"criterion": "margin", "temperature": "fitted", "quantile": 0.25}, {"temperature": None}),
    "closed exit": ({"criterion": "beem", "per_exit": True, "closed": 1}, {"closed": 2}),
}


class WordTokenizer:
    """The least that a table needs of a tokenizer; a text is its token ids."""

    model_max_length = 12

    def __call__(self, texts, truncation, max_length):
        assert truncation
        ids = [[int(word) for word in text.split()][:max_length] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}

    def pad(self, batch, return_tensors):
        assert return_tensors == "pt"
        return BatchEncoding(pad([torch.tensor(ids) for ids in batch["input_ids"]]))


@cache
def rows_and_table(name):
    """A model, rows of 1 to 12 tokens and their exit table."""
    family, count, fields = MODELS[name]
    model = tiny_model(family, **fields)
    rows = random_rows(np.random.default_rng(0).integers(1, 13, count + count // 20).tolist(), seed=3)
    texts = [" ".join(map(str, row.tolist())) for row in rows]
    table = make_exit_table(model, WordTokenizer(), [texts], batch_size=100)
    # A class that leads by next to nothing may lose to another in another batch: such a row proves nothing.
    logits = np.sort(table.exit_logits, axis=-1)
    lead = np.abs(logits) if "multi" in table.problem_type else logits[..., 1:] - logits[..., :-1]
    kept = np.flatnonzero((lead > 10 * ROUNDING).all(axis=(1, 2)))[:count]
    assert len(kept) == count
    return model, [rows[i] for i in kept], table.select(kept)


def gap(scores, quantile):
    """The middle of the widest gap between neighbouring scores that parts them about at a quantile."""
    values, counts = np.unique(scores[np.isfinite(scores)], return_counts=True)
    below = counts.cumsum()[:-1] / counts.sum()
    away = np.abs(below - quantile)
    near = np.flatnonzero(away <= max(0.1, away.min()))
    best = near[np.argmax(np.diff(values)[near])]
    return float(values[best : best + 2].mean())


def make_policy(table, name, **changes):
    """A policy of POLICIES, fitted to a table, with its thresholds in gaps between the table's scores."""
    fields = {"criterion": name, **POLICIES[name][0], **changes}
    for field, fit in (("rule", fit_rule), ("temperature", fit_temperatures)):
        if fields.get(field) == "fitted":
            fields[field] = fit(table.select(slice(0, None, 2)))
    if "parts" in fields:
        parts = [make_policy(table, part) for part in fields.pop("parts")]
        return ExitPolicy(**{"threshold": 1.0, **fields, "parts": parts})
    quantile, per_exit, closed = fields.pop("quantile", 0.35), fields.pop("per_exit", False), fields.pop("closed", None)
    if "threshold" in fields:
        return ExitPolicy(**fields)
    scores = score_exits(table, ExitPolicy(**fields))[:, :-1]
    if not per_exit:
        return ExitPolicy(**fields, threshold=gap(scores, quantile))
    each = [None if index == closed else gap(column, quantile) for index, column in enumerate(scores.T)]
    return ExitPolicy(**fields, threshold=[*each, None])


def too_close(table, policy):
    """Rows that have a score within rounding of a threshold."""
    if policy.parts:
        assert policy.threshold == 1, "else nothing keeps the shares apart"
        return sum(too_close(table, part) for part in policy.parts)
    scores = score_exits(table, policy)[:, :-1]
    limits = [np.nan if limit is None else limit for limit in policy.thresholds(scores.shape[1] + 1)[:-1]]
    return int((np.abs(scores - limits) <= ROUNDING).any(axis=1).sum())


def batches_of(count, seed):
    """All rows in random order: mostly large batches, and some of 1 and of 7."""
    generator = np.random.default_rng(seed)
    order, sizes = generator.permutation(count), [1] * 8 + [7] * 8 + [61]
    while (left := count - sum(sizes)) > 0:
        sizes.append(min(256, left))
    return np.split(order, np.cumsum(generator.permutation(sizes))[:-1])


def run(model, rows, policy, seed):
    """Exit layers and logits of a real run, in the order of the rows."""
    layers, logits = np.zeros(len(rows), dtype=int), np.full((len(rows), model.num_labels), np.nan)
    for number, chosen in enumerate(batches_of(len(rows), seed)):
        batch = pad([rows[i] for i in chosen], "left" if number % 3 == 0 else "right", extra=number % 2)
        output = model.early_exit_predict(**batch, policy=policy)
        layers[chosen], logits[chosen] = output.exit_layer.numpy(), output.logits.numpy()
    return layers, logits


def check(model_name, policy_name):
    """At which layers a run leaves, and for which rows a replay takes another exit or has another label."""
    model, rows, table = rows_and_table(model_name)
    policy = make_policy(table, policy_name)
    assert too_close(table, policy) == 0
    taken = replay(table, policy)
    assert (taken < len(table.exit_layers) - 1).any(), "rows have to leave early for this test to mean anything"
    assert policy_name == "fixed_depth" or len(set(taken.tolist())) > 1
    layers, logits = run(model, rows, policy, seed=0)
    predicted = logits > 0 if "multi" in table.problem_type else logits.argmax(axis=-1)
    otherwise = predicted != at_exits(answers(table), taken)
    assert np.allclose(logits, at_exits(table.exit_logits, taken), atol=1e-4)
    return layers, np.array(table.exit_layers)[taken] != layers, otherwise


@pytest.mark.parametrize("name", POLICIES)
def test_a_replay_takes_the_exits_of_a_run_on_10_000_rows(name):
    layers, other_exit, other_label = check("bert", name)
    assert len(layers) == 10_000
    assert other_exit.sum() == 0
    assert other_label.sum() == 0
    # Negative control: a policy that differs a little does not pass for this one.
    _, _, table = rows_and_table("bert")
    changed = make_policy(table, name, **POLICIES[name][1])
    assert (np.array(table.exit_layers)[replay(table, changed)] != layers).sum() > 100


@pytest.mark.parametrize("model_name", [name for name in MODELS if name != "bert"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_replay_takes_the_exits_of_a_run_of_other_models(name, model_name):
    _, other_exit, other_label = check(model_name, name)
    assert other_exit.sum() == 0
    assert other_label.sum() == 0


def test_a_wrong_score_at_one_exit_is_caught():
    """Negative control: a replay that reads an exit late takes other exits than the run."""
    model, rows, table = rows_and_table("bert, 4 exits, 5 blocks")
    policy = make_policy(table, "entropy")
    layers, _ = run(model, rows, policy, seed=1)
    scores = score_exits(table, policy)
    assert np.array_equal(np.array(table.exit_layers)[take_exits(scores, policy.thresholds(4))], layers)
    late = take_exits(np.roll(scores, 1, axis=1), policy.thresholds(4))
    assert (np.array(table.exit_layers)[late] != layers).sum() > 100


@pytest.mark.parametrize(
    ("criterion", "threshold"),
    [("patience", 0), ("voting", 1), ("voting", 2**0.5 / 2), ("fixed_depth", 0.5), ("pcee", np.inf), ("dge", np.inf)],
)
def test_a_threshold_that_is_met_exactly_is_met_by_both(criterion, threshold):
    model, rows, table = rows_and_table("bert, 4 exits, 5 blocks")
    policy = ExitPolicy(criterion=criterion, threshold=threshold)
    scores, taken = score_exits(table, policy), replay(table, policy)
    assert np.isinf(threshold) or (at_exits(scores, taken) == threshold).any()
    assert (taken < 3).any()
    assert run(model, rows, policy, seed=3)[0].tolist() == np.array(table.exit_layers)[taken].tolist()


def test_without_a_threshold_both_run_to_the_end():
    model, rows, table = rows_and_table("bert, 4 exits, 5 blocks")
    layers, logits = run(model, rows, ExitPolicy(), seed=2)
    assert replay(table, ExitPolicy()).tolist() == [3] * len(rows)
    assert layers.tolist() == [5] * len(rows)
    assert np.allclose(logits, table.exit_logits[:, -1], atol=1e-4)


def test_exit_0_costs_its_share_and_its_logits_can_be_given():
    model, rows, table = rows_and_table("roberta, exit 0")
    assert table.exit_layers == (0, 1, 2, 4)
    assert np.allclose(table.costs, np.array([0, 1, 2, 4]) + LEXICAL_COST + FILTERS_COST)
    texts = [" ".join(map(str, row.tolist())) for row in rows[:50]]
    given = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    other = make_exit_table(model, WordTokenizer(), [texts], lexical_logits=given, batch_size=7)
    assert np.allclose(other.exit_logits[:, 0], given[:, :3] + given[:, 3:])
    with torch.no_grad():
        said = np.concatenate([model.exits[0](row[None], None).numpy() for row in rows[:50]])
    words, phrases = (given - said)[:, None, :3], (given - said)[:, None, 3:]
    gates = np.array([exit_.lexical_gate.weight.item() for exit_ in model.exits[1:]])[:, None]
    moved = gates * np.concatenate([words + phrases] * 2 + [words], axis=1)
    assert np.allclose(other.exit_logits[:, 1:] - table.exit_logits[:50, 1:], moved, atol=1e-4)


def test_every_criterion_and_combinator_is_among_the_policies():
    assert {fields.get("criterion", name) for name, (fields, _) in POLICIES.items()} == {*CRITERIA, *COMBINATORS}
