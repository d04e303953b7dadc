"""Fitting the phrases of exit 0 to what the last exit answers."""

import copy

import datasets
import numpy as np
import pytest
import torch

from tiny import all_logits, random_rows, tiny_classifier, tiny_model, tiny_tokenizer
from transformers_badge import BadgeForSequenceClassification, convert_classifier, fit_lexical_exit, teach_exits
from transformers_badge.training import phrases
from transformers_badge.training.fine_tune import fit
from transformers_badge.training.phrases import fit_phrases


def make_rows(count=600, seed=0, labels=None):
    ids = [row.tolist() for row in random_rows(np.random.default_rng(seed).integers(4, 12, count).tolist(), seed)]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    if labels is not None:
        columns["labels"] = np.random.default_rng(seed).integers(0, labels, count)
    return datasets.Dataset.from_dict(columns)


def make_model(**fields):
    """A model whose n-grams say nothing yet."""
    model = tiny_model("bert", **{"lexical_exit": True, "lexical_filters": 32, "lexical_buckets": 512, **fields})
    for weight in (model.exits[0].weight, model.exits[0].phrases.weight):
        weight.zero_()
    return model


def silent(rows, labels=3):
    """Rows of which the n-grams say nothing."""
    return rows.add_column("lexical_logits", [[0.0] * (2 * labels)] * len(rows))


def distance(model, rows):
    """How far what exit 0 says is from what the last exit says."""
    logits = all_logits(model, rows)
    return float((logits[:, 0].softmax(-1) - logits[:, -1].softmax(-1)).abs().mean())


def test_exit_0_comes_to_answer_new_rows_as_the_last_exit_does():
    model, new = make_model(), make_rows(200, seed=1)
    before, far = copy.deepcopy(model.state_dict()), distance(model, new)
    random_state = torch.random.get_rng_state()
    model.train()
    fit_phrases(model, tiny_tokenizer(), silent(make_rows(1200)), show_progress=False)
    assert model.training, "as it was"
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert distance(model, new) < 0.8 * far
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"exits.0.phrases.{name}" for name in ("vectors", "filters", "weight")}
    phrases_ = model.exits[0].phrases
    assert not phrases_.vectors[-1].any()
    assert (phrases_.vectors[:-1, -1] == 1).all()


def test_where_there_is_nothing_to_learn_they_say_nothing():
    model, rows = make_model(), silent(make_rows(400))
    noise = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32) * 3
    found = fit_phrases(model, tiny_tokenizer(), rows, answers=noise, show_progress=False)
    assert not model.exits[0].phrases.weight.any()
    assert not np.asarray(found["lexical_logits"]).any()
    # Negative control: with answers that words explain they do.
    told = np.array([[3.0 * (ids.count(50) > 0), 0.0, 0.0] for ids in rows["input_ids"]], np.float32)
    fit_phrases(model, tiny_tokenizer(), rows, answers=told, show_progress=False)
    assert model.exits[0].phrases.weight.any()


def test_what_the_ngrams_say_they_need_not_say_again():
    rows = make_rows(1000)
    told = np.array([[4.0 * (ids.count(50) > 0), 0.0, 0.0] for ids in rows["input_ids"]], np.float32)
    sizes = []
    for lexical in (np.zeros_like(told), told):
        model = make_model()
        known = rows.add_column("lexical_logits", list(lexical))
        fit_phrases(model, tiny_tokenizer(), known, answers=told, show_progress=False)
        sizes.append(float(model.exits[0].phrases.weight.norm()))
    assert sizes[1] < 0.5 * sizes[0]


def test_what_is_said_of_a_row_was_learnt_from_others():
    rng, folds = np.random.default_rng(0), np.arange(1000) % 5
    ids = (4 + rng.integers(0, 40, (1000, 8))).tolist()
    has_60, apart = rng.random(1000) < 0.5, np.isin(folds, (1, 2))
    for row, second in zip(ids, has_60, strict=True):
        row[3] = 60 if second else 50
    # The first word tells the first label everywhere; the second tells the second label, but in two folds the first.
    told = np.eye(3, dtype=np.float32)[(has_60 & ~apart).astype(int)] * 4
    ngrams = rng.normal(size=(1000, 3)).astype(np.float32) * 0.1
    rows, model = datasets.Dataset.from_dict({"input_ids": ids}), make_model()
    given = rows.add_column("lexical_logits", list(ngrams))
    found = fit_phrases(model, tiny_tokenizer(), given, folds, told, show_progress=False)
    assert found["input_ids"] == rows["input_ids"]
    words, phrases_ = np.split(np.asarray(found["lexical_logits"]), 2, axis=1)
    assert np.allclose(words, ngrams), "as they were"
    with torch.no_grad():
        kept = np.concatenate([model.exits[0](torch.tensor([row]), None).numpy() for row in ids])[:, 3:]

    def margin(logits):
        mine = has_60 & apart
        return float((logits[mine, 0] - logits[mine, 1]).mean())

    assert margin(phrases_) < -0.5, "what other folds say, and not these"
    assert margin(kept) > margin(phrases_) + 0.5, "negative control: what is kept has learnt from these too"
    # But not from fold 0: of its rows it says what it would say of new ones.
    assert np.allclose(phrases_[folds == 0], kept[folds == 0], atol=1e-5)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_problems_are_learnt_too(problem):
    model, new = make_model(problem_type=problem), make_rows(200, seed=1)
    with torch.no_grad():
        model.exits[-1].classifier.weight.mul_(100 if problem == "regression" else 1)  # values are of any size
    rows = make_rows(1200)
    fit_phrases(model, tiny_tokenizer(), silent(rows), show_progress=False)
    logits = all_logits(model, new)
    said, last = logits[:, 0].flatten(), logits[:, -1].flatten()
    assert np.corrcoef(said, last)[0, 1] > 0.5


def test_it_is_the_same_each_time_and_another_with_another_seed():
    said = []
    for seed in (0, 0, 1):
        model = make_model()
        fit_phrases(model, tiny_tokenizer(), silent(make_rows(200)), seed=seed, show_progress=False)
        said.append(model.exits[0].phrases.filters)
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])


def test_rows_beyond_what_is_of_use_are_left_alone(monkeypatch):
    monkeypatch.setattr(phrases, "MOST_ROWS", 50)
    seen, ask = [], phrases.last_logits

    def counted(model, tokenizer, rows, show_progress):
        seen.append(len(rows))
        return ask(model, tokenizer, rows, show_progress)

    monkeypatch.setattr(phrases, "last_logits", counted)
    model, rows = make_model(), make_rows(400)
    found = fit_phrases(model, tiny_tokenizer(), silent(rows), show_progress=False)
    assert seen == [100], "50 to learn from, and 50 to weigh by"
    said = all_logits(model, rows)[:, 0].numpy()
    same = np.isclose(np.asarray(found["lexical_logits"])[:, 3:], said, atol=1e-5).all(axis=1)
    assert same.sum() >= 350, "of those left alone, and those it was weighed by, what it says of new ones"


def test_without_filters_there_is_nothing_to_do():
    for fields in ({"lexical_filters": 0}, {"lexical_exit": False}):
        model = tiny_model("bert", **{"lexical_exit": True, **fields})
        before = copy.deepcopy(model.state_dict())
        rows = make_rows(20)
        assert fit_phrases(model, tiny_tokenizer(), rows, show_progress=False) is rows
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_words_make_them_silent():
    model = tiny_model("bert", lexical_exit=True, lexical_buckets=512)
    assert model.exits[0].phrases.weight.any()
    fit_lexical_exit(model, tiny_tokenizer(), make_rows(100, labels=3), show_progress=False)
    assert not model.exits[0].phrases.weight.any()


def test_a_recipe_and_teaching_fit_them_to_more_rows_than_exits_see(tmp_path, monkeypatch):
    seen, learn = [], phrases._learn

    def counted(data, rows, *more):
        seen.append(len(rows))
        return learn(data, rows, *more)

    monkeypatch.setattr(phrases, "_learn", counted)
    rows, model = make_rows(60, labels=3), make_model()
    trainer = fit(model, tiny_tokenizer(), rows, None, tmp_path, epochs=1, batch_size=16, fill_up_to=100)
    assert len(trainer.train_dataset) == 100
    before = model.exits[0].phrases.filters.clone()
    assert before.any()
    taught = teach_exits(model, tiny_tokenizer(), rows, fill_up_to=100, epochs=1, seed=1)
    assert len(taught) == 100
    assert not torch.equal(model.exits[0].phrases.filters, before)
    assert len(seen) == 6
    assert all(200 < count < 300 for count in seen[::3]), "of 300, without those of one fold"
    assert all(120 < count < 240 for count in [*seen[1:3], *seen[4:6]]), "and without those of two"


def test_a_converted_classifier_has_them_too(tmp_path):
    source = tmp_path / "source"
    tiny_classifier("bert").save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in rng.integers(4, 100, 8)) for _ in range(300)]
    settings = {"lexical_exit": True, "lexical_filters": 8, "fill_up_to": 300, "max_disagreement": 0.3, "epochs": 1}
    convert_classifier(source, texts, tmp_path / "badge", **settings)
    model = BadgeForSequenceClassification.from_pretrained(tmp_path / "badge")
    assert model.exits[0].phrases.filters.any()
