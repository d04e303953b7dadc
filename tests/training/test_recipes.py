"""The training recipes: what each does to the gradients of parameters, and that each learns."""

import copy

import pytest
import torch
from transformers import TrainingArguments

from tiny import pad, random_rows, tiny_model
from transformers_badge.model.loss_badge import exit_losses
from transformers_badge.training.fine_tune import parameter_groups
from transformers_badge.training.recipes import (
    RECIPES,
    TEACHING,
    ExitTrainer,
    Stage,
    applied,
    distillation_losses,
    get_recipe,
)


BATCH = {**pad(random_rows([9, 4, 12, 7])), "labels": torch.tensor([0, 1, 2, 1])}
SINGLE = "single_label_classification"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """For the output folder that a Trainer makes."""
    monkeypatch.chdir(tmp_path)


def stage_trainer(model, stage, **arguments):
    return ExitTrainer(
        model=model, args=TrainingArguments("unused", report_to=[], use_cpu=True), stage=stage, **arguments
    )


def gradients(model, stage, step=0, batch=BATCH, **arguments):
    """Gradients of all parameters in one step of a stage; what gets none, or zeros, is left out."""
    model = copy.deepcopy(model)
    with applied(stage, model):
        trainer = stage_trainer(model, stage, **arguments)
        trainer.state.global_step = step
        trainer.compute_loss(model, dict(batch)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: gradient for name, gradient in found.items() if gradient.abs().max() > 1e-12}


def gradients_by_exit(model, batch=BATCH):
    """Gradients that the weighted loss of each exit alone sends through the whole model."""
    found = []
    for index in range(len(model.exit_layers)):
        single = copy.deepcopy(model)
        logits = single(**batch).exit_logits
        (exit_losses(logits, batch["labels"], SINGLE)[index] * single.config.loss_weights[index]).backward()
        found.append({name: parameter.grad for name, parameter in single.named_parameters()})
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], atol=1e-6, rtol=1e-4) for k in one)


def block_of(name):
    """The block that an encoder parameter belongs to; 0: embeddings."""
    return int(name.split("layer.")[1].split(".")[0]) + 1 if "layer." in name else 0


def test_joint_is_the_loss_of_forward(family):
    model = tiny_model(family)
    (stage,) = RECIPES["joint"]
    reference = copy.deepcopy(model)
    reference(**BATCH).loss.backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-12}
    assert same(gradients(model, stage), expected)


@pytest.mark.parametrize("recipe", ["two_stage", "mixed"])
def test_first_the_encoder_and_the_last_exit_learn(recipe, bert):
    first = gradients(bert, RECIPES[recipe][0])
    assert {name.split(".")[0] for name in first} == {"encoder", "exits"}
    assert {name.split(".")[1] for name in first if name.startswith("exits")} == {"3"}


def test_then_two_stage_trains_the_other_exits_alone(bert):
    second = gradients(bert, RECIPES["two_stage"][1])
    assert second.keys() == {n for n, _ in bert.named_parameters() if not n.startswith(("encoder.", "exits.3."))}


def test_then_mixed_trains_everything(bert):
    assert same(gradients(bert, RECIPES["mixed"][1]), gradients(bert, Stage()))


def test_alternating_trains_the_last_exit_on_even_steps_and_all_on_odd_ones(bert):
    (stage,) = RECIPES["alternating"]
    for step in (0, 2):
        assert same(gradients(bert, stage, step), gradients(bert, Stage("last")))
    for step in (1, 3):
        assert same(gradients(bert, stage, step), gradients(bert, Stage()))
    assert not same(gradients(bert, Stage("last")), gradients(bert, Stage()))


def test_self_distilled_teaches_inner_exits_by_the_last_and_not_the_other_way_round(bert):
    (stage,) = RECIPES["self_distilled"]
    found, joint = gradients(bert, stage, temperature=3.0), gradients(bert, Stage())
    assert all(torch.allclose(found[n], joint[n], atol=1e-7) for n in found if n.startswith("exits.3."))
    reference = copy.deepcopy(bert)
    logits = reference(**BATCH).exit_logits
    labelled = exit_losses(logits, BATCH["labels"], SINGLE)
    taught = distillation_losses(logits, SINGLE, 3.0)
    weights = bert.config.loss_weights
    (sum(weights[i] * (labelled[i] + taught[i]) / 2 for i in range(3)) + weights[3] * labelled[3]).backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters() if name in found}
    assert same(found, expected)
    assert not same(found, joint)


@pytest.mark.parametrize("exit_layers", [[1, 2, 3, 4], [2, 4]])
def test_rescaled_gives_a_block_the_mean_of_the_gradients_of_the_exits_behind_it(exit_layers):
    model = tiny_model("bert", exit_layers=exit_layers, bypass_size=0)
    (stage,) = RECIPES["rescaled"]
    found, single = gradients(model, stage), gradients_by_exit(model)
    for name, gradient in found.items():
        if name.startswith("exits."):
            expected = single[int(name.split(".")[1])][name]  # an exit's own parameters keep their gradient
        else:
            behind = [i for i, layer in enumerate(exit_layers) if layer >= max(1, block_of(name))]
            expected = sum(single[i][name] for i in behind if single[i][name] is not None) / len(behind)
        assert torch.allclose(gradient, expected, atol=1e-6, rtol=1e-3), name
    joint = gradients(model, Stage())
    assert not torch.allclose(
        found["encoder.embeddings.LayerNorm.weight"], joint["encoder.embeddings.LayerNorm.weight"]
    )


@pytest.mark.parametrize("exit_layers", [[1, 2, 3, 4], [2, 4]])
@pytest.mark.parametrize("reads", ["pooled", "block_output", "block_input"])
def test_separated_gives_a_block_the_gradient_of_the_next_exit_alone(exit_layers, reads):
    model = tiny_model("bert", exit_layers=exit_layers, bypass_reads=reads)
    (stage,) = RECIPES["separated"]
    found, single = gradients(model, stage), gradients_by_exit(model)
    for name, gradient in found.items():
        if name.startswith("exits."):
            index = int(name.split(".")[1])
        else:
            block = block_of(name)
            if name.startswith("bypasses."):
                block = model.bypass_layers[int(name.split(".")[1])]
            index = next(i for i, layer in enumerate(exit_layers) if layer >= block)
        assert torch.allclose(gradient, single[index][name], atol=1e-6, rtol=1e-3), name
    joint = gradients(model, Stage())
    assert not torch.allclose(
        found["encoder.embeddings.LayerNorm.weight"], joint["encoder.embeddings.LayerNorm.weight"]
    )


def test_a_conversion_needs_no_labels_and_trains_the_inner_exits_alone(bert):
    unlabelled = {name: value for name, value in BATCH.items() if name != "labels"}
    found = gradients(bert, TEACHING, batch=unlabelled)
    assert found.keys() == {n for n, _ in bert.named_parameters() if not n.startswith(("encoder.", "exits.3."))}
    with pytest.raises(ValueError, match="The rows have no labels"):
        gradients(bert, Stage(), batch=unlabelled)


@pytest.mark.parametrize("problem", [SINGLE, "multi_label_classification", "regression"])
def test_distillation_is_least_where_an_exit_answers_as_the_last(problem):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 3, generator=generator)
    logits[:, 1] = logits[:, 3]
    losses = distillation_losses(logits, problem, temperature=2.0)
    assert losses.shape == (3,)
    assert losses[1] < min(losses[0], losses[2])
    asked = logits.clone().requires_grad_()
    distillation_losses(asked, problem, 2.0).sum().backward()
    assert asked.grad[:, 1].abs().max() < 1e-6
    assert asked.grad[:, 3].abs().max() == 0  # the last exit is the teacher
    assert asked.grad[:, 0].abs().max() > 1e-3


def test_distillation_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [0.0, 2.0]]])
    taught = torch.softmax(torch.tensor([0.0, 1.0]), 0)  # at temperature 2
    assert distillation_losses(logits, SINGLE, 2.0).item() == pytest.approx(
        4 * (taught * torch.log(torch.tensor(2.0))).sum().item()
    )


def test_a_stage_leaves_the_model_as_it_was(bert):
    bert.exits[0].classifier.bias.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in bert.named_parameters()}
    with applied(TEACHING, bert):
        assert bert.config.exit_gradient == 0
        assert not any(parameter.requires_grad for parameter in bert.encoder.parameters())
    assert bert.config.exit_gradient == 1.0
    assert {name: parameter.requires_grad for name, parameter in bert.named_parameters()} == before


def test_bad_recipes_and_weights_are_named(bert):
    with pytest.raises(ValueError, match="no recipe 'magic'; there are taught, joint, two_stage, mixed, alternating"):
        get_recipe("magic")
    bert.config.exit_loss_weights = [0, 0, 0, 1]
    with pytest.raises(ValueError, match="gives no weight to the exits that learn"):
        gradients(bert, Stage("inner"))


def test_the_pretrained_head_of_a_converted_classifier_learns_at_the_encoders_rate(tmp_path):
    from tiny import tiny_classifier
    from transformers_badge import BadgeForSequenceClassification

    tiny_classifier("bert").save_pretrained(tmp_path)
    model = BadgeForSequenceClassification.from_classifier(tmp_path, exit_gradient=1.0)
    pretrained, fresh = parameter_groups(model, 1e-5, 1e-3)
    assert any(parameter is model.exits[-1].classifier.weight for parameter in pretrained["params"])
    assert any(parameter is model.exits[0].classifier.weight for parameter in fresh["params"])
    assert (pretrained["lr"], fresh["lr"]) == (1e-5, 1e-3)


def test_the_gates_of_exit_0_learn_fastest():
    from tiny import tiny_model

    model = tiny_model("bert", lexical_exit=True)
    *_, fresh, gates = parameter_groups(model, 1e-5, 1e-3)
    assert {id(gate) for gate in gates["params"]} == {id(exit_.lexical_gate.weight) for exit_ in model.exits[1:]}
    assert (fresh["lr"], gates["lr"]) == (1e-3, 1e-2)
    assert any(parameter is model.exits[1].classifier.weight for parameter in fresh["params"])
