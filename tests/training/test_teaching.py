"""Exits that are taught by the last one, after a fine-tuning."""

import copy

import datasets
import numpy as np
import pytest
import torch

from tiny import all_logits, random_rows, tiny_model, tiny_tokenizer
from transformers_badge import fit_lexical_exit, teach_exits
from transformers_badge.training import fine_tune
from transformers_badge.training.answers import as_answers, last_logits
from transformers_badge.training.fine_tune import fit
from transformers_badge.training.recipes import TEACHING, applied
from transformers_badge.training.teaching import teaching_rows


def labelled(count=60, seed=0, labels=3):
    rng = np.random.default_rng(seed)
    ids = [row.tolist() for row in random_rows(rng.integers(4, 20, count).tolist(), seed)]
    masks = [[1] * len(row) for row in ids]
    columns = {"input_ids": ids, "attention_mask": masks, "labels": rng.integers(0, labels, count)}
    return datasets.Dataset.from_dict({"text": ["as it was"] * count, **columns})


def distance(logits):
    """How far every inner exit is from what the last one says."""
    probabilities = logits.softmax(dim=-1)
    return (probabilities[:, :-1] - probabilities[:, -1:]).abs().mean(dim=(0, 2))


@pytest.fixture
def model():
    """A model whose last exit is sure of some rows; its inner exits know nothing of it."""
    model = tiny_model("bert", exit_dropout=0.5)
    with torch.no_grad():
        model.exits[-1].classifier.weight.mul_(20)
    return model


@pytest.fixture
def lexical():
    """The same with an exit 0 that has not been fitted."""
    model = tiny_model("bert", lexical_exit=True, lexical_buckets=512, lexical_filters=0)
    with torch.no_grad():
        model.exits[0].weight.zero_()
        model.exits[-1].classifier.weight.mul_(20)
    return model


@pytest.fixture
def before_each_stage(monkeypatch):
    """A function that has another called with the rows of every stage of `fit`, before the stage runs."""
    run_stage = fine_tune.run_stage

    def call(note):
        def noted(stage, model, tokenizer, rows, *arguments, **settings):
            note(rows)
            return run_stage(stage, model, tokenizer, rows, *arguments, **settings)

        monkeypatch.setattr(fine_tune, "run_stage", noted)

    return call


@pytest.mark.parametrize("fill_up_to", [30, 100])
def test_exits_see_the_same_rows_with_phrases_and_without(fill_up_to):
    rows = labelled(60)
    whole_numbers = datasets.List(datasets.Value("int32"))  # as tokenizers may have them
    rows = rows.cast_column("input_ids", whole_numbers).cast_column("attention_mask", whole_numbers)
    found = []
    for filters in (0, 8):
        model = tiny_model("bert", lexical_exit=True, lexical_buckets=512, lexical_filters=filters)
        found.append(teaching_rows(model, tiny_tokenizer(), rows, fill_up_to, seed=3))
    without, with_phrases = found
    assert with_phrases.for_exits["input_ids"] == without.for_exits["input_ids"]
    assert len(without.all) == max(60, fill_up_to)
    assert len(with_phrases.all) == len(with_phrases.folds) == 3 * fill_up_to
    texts = [tuple(ids) for ids in with_phrases.all["input_ids"]]
    assert len(set(texts)) > 0.9 * len(texts), "no text is made twice"


def test_the_inner_exits_come_to_answer_as_the_last_which_stays_as_it_is(model):
    rows, others = labelled(), labelled(seed=1)
    before = copy.deepcopy(model.state_dict())
    far = distance(all_logits(model, others))
    taught = teach_exits(model, tiny_tokenizer(), rows.with_format("torch"), fill_up_to=300, epochs=4)
    assert not model.training
    assert (distance(all_logits(model, others)) < 0.7 * far).all()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"exits", "bypasses"}
    assert not any(name.startswith("exits.3.") for name in changed)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.exit_gradient == 1.0
    assert len(taught) == 300
    assert taught.column_names == ["input_ids", "attention_mask"]
    assert taught.select(range(60))["input_ids"] == rows["input_ids"]


def test_to_rows_that_are_many_nothing_is_added(lexical):
    rows = labelled()
    kept = teaching_rows(tiny_model("bert"), tiny_tokenizer(), rows, fill_up_to=60).for_exits
    assert kept.to_dict() == rows.remove_columns("labels").to_dict()
    fitted = fit_lexical_exit(lexical, tiny_tokenizer(), rows)
    before = copy.deepcopy(lexical.state_dict())
    for given in (fitted, rows):  # what exit 0 says of them is known, or is found out
        kept = teaching_rows(lexical, tiny_tokenizer(), given, fill_up_to=60).for_exits
        assert kept.to_dict() == fitted.remove_columns("labels").to_dict()
        assert all(torch.equal(value, before[name]) for name, value in lexical.state_dict().items())


def test_the_last_exit_teaches_without_dropout(model):
    def twice():
        model.train()
        with torch.no_grad():
            return [model(torch.tensor([list(range(4, 14))])).exit_logits[0] for _ in range(2)]

    with applied(TEACHING, model):
        one, other = twice()
        assert torch.equal(one[-1], other[-1])
        assert not torch.equal(one[:-1], other[:-1])  # those that learn have it
    one, other = twice()
    assert not torch.equal(one[-1], other[-1])  # and so has the last when it learns


def test_exit_0_stays_and_says_of_made_up_rows_what_it_would_say_of_new_ones(lexical):
    tokenizer = tiny_tokenizer()
    rows = fit_lexical_exit(lexical, tokenizer, labelled(200))
    before = copy.deepcopy(lexical.state_dict())
    full_depth = all_logits(lexical, labelled(20, seed=1))[:, -1]
    taught = teach_exits(lexical, tokenizer, rows, fill_up_to=400, epochs=1)
    assert all(
        torch.equal(lexical.exits[0].state_dict()[name], before[f"exits.0.{name}"]) for name in ("weight", "bias")
    )
    assert torch.equal(all_logits(lexical, labelled(20, seed=1))[:, -1], full_depth)
    held_out = torch.tensor(taught["lexical_logits"])
    assert torch.allclose(held_out[:200], torch.tensor(rows["lexical_logits"]), atol=1e-5)
    # Of the made-up rows it would say more, for it was fitted to their pieces.
    now = all_logits(lexical, taught)[200:, 0]
    assert held_out[200:].std() < 0.9 * now.std()


def test_exit_0_is_fitted_before_the_fine_tuning_and_comes_in_after_it(lexical, tmp_path, before_each_stage):
    rows, others, seen = labelled(200), labelled(20, seed=1), []

    def note(stage_rows):
        assert lexical.exits[0].fitted
        gates = [exit_.lexical_gate.weight.item() for exit_ in lexical.exits[1:]]
        seen.append((stage_rows.column_names, gates, all_logits(lexical, others)))

    before_each_stage(note)
    fit(lexical, tiny_tokenizer(), rows, None, tmp_path, epochs=1, batch_size=16, fill_up_to=400)
    (first, before, _), (then, after, untaught) = seen
    assert "lexical_logits" not in first
    assert "lexical_logits" in then
    assert before == after == [1.0] * 4  # the fine-tuning was without exit 0
    # Nor does the teaching move the gates: of these rows the encoder knows more than it will of others.
    assert [exit_.lexical_gate.weight.item() for exit_ in lexical.exits[1:]] == [1.0] * 4
    taught = all_logits(lexical, others)
    assert torch.equal(taught[:, -1], untaught[:, -1])
    assert torch.equal(taught[:, 0], untaught[:, 0])


@pytest.mark.parametrize(("recipe", "words"), [("taught", [False, True]), ("joint", [True])])
def test_where_nothing_is_taught_words_are_learnt_from_the_first(lexical, tmp_path, before_each_stage, recipe, words):
    given = []
    before_each_stage(lambda rows: given.append("lexical_logits" in rows.column_names))
    for rows in (labelled(), fit_lexical_exit(lexical, tiny_tokenizer(), labelled())):
        given.clear()
        fit(lexical, tiny_tokenizer(), rows, None, tmp_path, recipe=recipe, epochs=1, batch_size=16, fill_up_to=100)
        assert given == words


def test_an_exit_0_that_was_not_fitted_is_named(lexical):
    with pytest.raises(ValueError, match="Exit 0 has not been fitted: call fit_lexical_exit"):
        teach_exits(lexical, tiny_tokenizer(), labelled())


def test_a_recipe_teaches_after_the_fine_tuning(lexical, tmp_path):
    rows = labelled()
    trainer = fit(lexical, tiny_tokenizer(), rows, rows, tmp_path, epochs=1, batch_size=16, fill_up_to=100)
    assert len(trainer.train_dataset) == 100
    assert trainer.train_dataset.select(range(60))["input_ids"] == rows["input_ids"]
    assert "test_accuracy_exit_4" in trainer.predict(trainer.eval_dataset).metrics


@pytest.mark.parametrize("fields", [{"exit_layers": [4]}, {"exit_loss_weights": [0, 0, 0, 1]}], ids=str)
def test_where_no_inner_exit_is_to_learn_nothing_is_taught(tmp_path, fields):
    trainer = fit(tiny_model("bert", **fields), tiny_tokenizer(), labelled(), None, tmp_path, epochs=1)
    assert len(trainer.train_dataset) == 60


def test_what_cannot_be_taught_is_named():
    with pytest.raises(ValueError, match=r"no exit to teach: exit_layers=\[4\]"):
        teach_exits(tiny_model("bert", exit_layers=[4]), tiny_tokenizer(), labelled())
    with pytest.raises(ValueError, match="epochs must be above 0, got 0"):
        teach_exits(tiny_model("bert"), tiny_tokenizer(), labelled(), epochs=0)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_answers_are_those_of_the_last_exit(problem):
    model, rows = tiny_model("bert", problem_type=problem), labelled(20)
    logits = all_logits(model, rows)[:, -1]
    expected = {"single_label_classification": logits.softmax(-1), "multi_label_classification": logits.sigmoid()}
    answers = as_answers(last_logits(model, tiny_tokenizer(), rows), problem)
    assert np.allclose(answers, expected.get(problem, logits).numpy(), atol=1e-5)
