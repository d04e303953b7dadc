"""Losses against hand computations, and what the exits' gradients do to the encoder."""

import copy
import math

import pytest
import torch

from tiny import pad, random_rows, tiny_model
from transformers_badge.model.loss_badge import exit_losses, weighted_loss


BATCH = pad(random_rows([9, 4, 12]))
LABELS = torch.tensor([0, 2, 1])


def test_single_label_loss_by_hand():
    logits = torch.tensor([[[2.0, 0.0], [1.0, 1.0]], [[0.0, 3.0], [-1.0, 1.0]]])  # (rows, exits, labels)
    labels = torch.tensor([0, 0])

    def cross_entropy(row):
        return math.log(sum(math.exp(x) for x in row)) - row[0]

    first = (cross_entropy([2.0, 0.0]) + cross_entropy([0.0, 3.0])) / 2
    second = (cross_entropy([1.0, 1.0]) + cross_entropy([-1.0, 1.0])) / 2
    losses = exit_losses(logits, labels, "single_label_classification")
    assert losses.tolist() == pytest.approx([first, second])
    assert weighted_loss(losses, [1 / 3, 2 / 3]).item() == pytest.approx(first / 3 + 2 * second / 3)


def test_label_smoothing_by_hand():
    logits, labels, e = torch.tensor([[[2.0, 0.0]]]), torch.tensor([0]), 0.2
    right, wrong = [-math.log(math.exp(x) / (math.exp(2) + 1)) for x in (2.0, 0.0)]
    smoothed = exit_losses(logits, labels, "single_label_classification", e)
    assert smoothed.item() == pytest.approx((1 - e / 2) * right + e / 2 * wrong)
    # of two independent answers, yes and no
    multi = exit_losses(torch.tensor([[[2.0]]]), torch.tensor([[1.0]]), "multi_label_classification", e)
    yes = 1 / (1 + math.exp(-2))
    assert multi.item() == pytest.approx(-(1 - e / 2) * math.log(yes) - e / 2 * math.log(1 - yes))


def test_multi_label_and_regression_by_hand():
    logits = torch.tensor([[[1.0, -2.0]]])
    labels = torch.tensor([[1.0, 0.0]])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 2
    assert exit_losses(logits, labels, "multi_label_classification").item() == pytest.approx(expected)
    assert exit_losses(logits, labels, "regression").item() == pytest.approx((0 + 4) / 2)


def test_forward_weighs_the_exits_by_depth(model):
    output = model(**BATCH, labels=LABELS)
    each = [torch.nn.functional.cross_entropy(output.exit_logits[:, i], LABELS) for i in range(4)]
    assert torch.allclose(output.loss, sum((i + 1) * loss for i, loss in enumerate(each)) / 10)
    assert output.exit_logits.shape == (3, 4, 3)
    assert torch.equal(output.exit_logits[:, -1], output.logits)


@pytest.mark.parametrize(
    ("fields", "labels", "problem_type"),
    [
        ({}, torch.tensor([0, 2, 1]), "single_label_classification"),
        ({}, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]]), "multi_label_classification"),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0]), "regression"),
    ],
)
def test_the_labels_settle_an_open_problem_type(fields, labels, problem_type):
    model = tiny_model("bert", **fields)
    assert model.config.problem_type is None
    assert model(**BATCH, labels=labels).loss.isfinite()
    assert model.config.problem_type == problem_type


def trained_a_step(model, weight_decay=0.1):
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=weight_decay)
    model(**BATCH, labels=LABELS).loss.backward()
    optimizer.step()
    return model


def test_exit_gradient_zero_leaves_the_encoder_bit_for_bit(family):
    model = tiny_model(family, exit_gradient=0.0)
    before = copy.deepcopy(model.state_dict())
    after = trained_a_step(model).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if name.startswith("encoder.")} == set()
    heads = {name for name, _ in model.named_parameters() if not name.startswith("encoder.")}
    assert changed == heads  # bypasses and exits all learn


def test_exit_gradient_one_does_change_the_encoder(family):
    """Negative control of the test above."""
    model = tiny_model(family, exit_gradient=1.0)
    before, after = model.state_dict(), trained_a_step(model).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("encoder."))


@pytest.mark.parametrize("bypass_size", [0, 4])
def test_exit_gradient_scales_what_reaches_the_encoder_and_nothing_else(family, bypass_size):
    gradients = {}
    for scale in (1.0, 0.25):
        model = tiny_model(family, bypass_size=bypass_size)
        model.config.exit_gradient = scale
        model(**BATCH, labels=LABELS).loss.backward()
        gradients[scale] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients[1.0].items():
        factor = 0.25 if name.startswith("encoder.") else 1.0
        assert torch.allclose(gradients[0.25][name], factor * gradient, atol=1e-7, rtol=1e-3), name
