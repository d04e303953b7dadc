"""Fitting exit 0."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import check_grad, minimize
from scipy.special import softmax

from tiny import VOCABULARY, pad, tiny_config
from transformers_badge import BadgeForSequenceClassification, fit_lexical_exit
from transformers_badge.inference.explain import explain_lexical_exit
from transformers_badge.training import lexical, lexical_solver


TOKENIZER = SimpleNamespace(all_special_ids=[0, 1, 2, 3], unk_token_id=0)
GOOD, BAD = range(10, 20), range(20, 30)  # tokens that speak for one class or the other; the others say nothing


def make_rows(count=400, seed=0, labels=2):
    """Rows of 12 random tokens, with one telling word each."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(30, VOCABULARY, (count, 12))
    answers = generator.integers(0, labels, count)
    ids[np.arange(count), generator.integers(0, 12, count)] = 10 * (answers + 1) + generator.integers(0, 10, count)
    return datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": answers.tolist()})


def make_model(**fields):
    torch.manual_seed(0)
    fields = {"num_labels": 2, "lexical_exit": True, "lexical_buckets": 5000, "lexical_filters": 0, **fields}
    return BadgeForSequenceClassification(tiny_config("bert", **fields)).eval()


def says(model, rows):
    with torch.no_grad():
        return model(**pad([torch.tensor(row) for row in rows["input_ids"]])).exit_logits[:, 0].numpy()


def test_it_learns_which_words_tell_and_is_not_overconfident():
    model = make_model()
    rows = fit_lexical_exit(model, TOKENIZER, make_rows(), show_progress=False)
    new = make_rows(1000, seed=1)
    logits, labels = says(model, new), np.array(new["labels"])
    right = logits.argmax(axis=1) == labels
    assert right.mean() > 0.9
    assert softmax(logits, axis=1).max(axis=1).mean() < right.mean() + 0.03
    assert rows["input_ids"][:] == make_rows()["input_ids"][:]
    # What it says of its own rows is what it would say of new ones, and not what it says now.
    unseen, seen = np.array(rows["lexical_logits"]), says(model, rows)
    answers = np.array(rows["labels"])
    assert abs((unseen.argmax(axis=1) == answers).mean() - right.mean()) < 0.05
    assert np.abs(seen).mean() > np.abs(unseen).mean()


def test_where_words_say_nothing_it_answers_all_rows_nearly_alike():
    model, rows = make_model(), make_rows()
    labels = (np.random.default_rng(5).random(len(rows)) < 0.3).astype(int)
    fit_lexical_exit(model, TOKENIZER, rows.remove_columns("labels"), labels, show_progress=False)
    probabilities = softmax(says(model, make_rows(100, seed=1)), axis=1)
    assert abs(probabilities[:, 1].mean() - labels.mean()) < 0.05
    assert probabilities[:, 1].std() < 0.1


def test_words_that_were_never_seen_are_known_by_their_embeddings():
    model = make_model(encoder={"initializer_range": 0.02})
    direction = torch.randn(32)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[list(GOOD)] += 0.1 * direction
        table[list(BAD)] -= 0.1 * direction
    rows = make_rows(600)
    unseen = {15, 16, 17, 18, 19, 25, 26, 27, 28, 29}
    known = rows.filter(lambda row: not unseen & set(row["input_ids"]))
    fit_lexical_exit(model, TOKENIZER, known, show_progress=False)
    alone = datasets.Dataset.from_dict({"input_ids": [[token] for token in sorted(unseen)]})
    assert says(model, alone).argmax(axis=1).tolist() == [0] * 5 + [1] * 5
    # Negative control: without the embeddings nothing is known of them.
    with torch.no_grad():
        table.copy_(torch.randn_like(table))
    fit_lexical_exit(model, TOKENIZER, known, show_progress=False)
    assert np.abs(np.diff(says(model, alone), axis=1)).mean() < 0.5


def test_soft_answers_of_a_teacher_are_learned():
    model, rows = make_model(), make_rows()
    share = np.where(np.array(rows["labels"]) == 1, 0.8, 0.3)
    targets = np.stack([1 - share, share], axis=1)
    fit_lexical_exit(model, TOKENIZER, rows.remove_columns("labels"), targets, show_progress=False)
    new = make_rows(500, seed=1)
    probabilities = softmax(says(model, new), axis=1)[:, 1]
    assert np.abs(probabilities - np.where(np.array(new["labels"]) == 1, 0.8, 0.3)).mean() < 0.1


def test_several_labels_and_values():
    rows = make_rows(labels=3)
    answers = np.array(rows["labels"])
    several = make_model(num_labels=3, problem_type="multi_label_classification")
    targets = np.stack([answers == 0, answers != 1, answers == 2], axis=1).astype(float)
    fit_lexical_exit(several, TOKENIZER, rows.remove_columns("labels"), targets, show_progress=False)
    new = make_rows(500, seed=1, labels=3)
    answers = np.array(new["labels"])
    expected = np.stack([answers == 0, answers != 1, answers == 2], axis=1)
    assert ((says(several, new) > 0) == expected).mean() > 0.9

    value = make_model(num_labels=1, problem_type="regression")
    rows = make_rows()
    fit_lexical_exit(value, TOKENIZER, rows, np.array(rows["labels"]) * 40.0 - 5, show_progress=False)
    new = make_rows(500, seed=1)
    error = says(value, new)[:, 0] - (np.array(new["labels"]) * 40.0 - 5)
    assert error.std() < 12, "a constant would be off by 20"


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "regression"])
def test_gradient_and_curvature_of_the_loss_are_right(kind):
    generator = np.random.default_rng(0)
    targets = generator.dirichlet([1, 1, 1], 5)
    problem = lexical_solver.Problem(None, np.empty(0), [], targets, kind)
    start = generator.normal(size=15)
    error = check_grad(
        lambda z: lexical_solver.answer_loss(z.reshape(5, 3), problem)[0],
        lambda z: lexical_solver.answer_loss(z.reshape(5, 3), problem)[1].ravel(),
        start,
    )
    assert error < 1e-5
    logits, change = start.reshape(5, 3), generator.normal(size=(5, 3))
    gradient = [lexical_solver.answer_loss(logits + sign * 1e-5 * change, problem)[1] for sign in (1, -1)]
    bent = lexical_solver._bend(lexical_solver._predict(logits, problem), change, problem)
    assert np.allclose(bent, (gradient[0] - gradient[1]) / 2e-5, atol=1e-8)


def small_problem(targets, kind="single_label_classification"):
    generator = np.random.default_rng(0)
    counts = sparse.csr_matrix(generator.random((60, 30)) * (generator.random((60, 30)) < 0.2))
    embeddings = generator.normal(size=(4, 5)).astype(np.float32)
    known, sizes = counts[:, [0, 3, 7, 9]], np.ones(30)
    return lexical_solver.Problem(counts, sizes, [known, embeddings], targets, kind, 0.5)


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "regression"])
def test_the_solver_finds_what_another_finds(monkeypatch, kind):
    problem = small_problem(np.random.default_rng(1).dirichlet([1, 1, 1], 60), kind)

    def other(penalty):
        objective = lexical_solver.Objective(problem, penalty)
        options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000}
        return objective.solution(
            minimize(objective.loss, np.zeros(objective.size), jac=True, method="L-BFGS-B", options=options).x
        )

    usual = lexical_solver.solve(problem, 0.3).answers(problem)
    monkeypatch.setattr(lexical_solver, "_TOLERANCE", 1e-6)
    exact = lexical_solver.solve(problem, 0.3).answers(problem)
    assert np.allclose(exact, other(0.3).answers(problem), atol=1e-4)
    assert not np.allclose(exact, other(0.31).answers(problem), atol=1e-4)
    assert np.allclose(usual, exact, atol=0.01)


def test_where_the_slope_is_none_from_the_start_the_constant_is_the_answer():
    balanced = small_problem(np.eye(2)[np.arange(60) % 2])
    assert np.array_equal(lexical_solver.solve(balanced, np.inf).answers(balanced), np.zeros((60, 2)))


@pytest.mark.parametrize("soft", [False, True])
def test_two_classes_are_solved_as_one_question_with_the_same_answers(monkeypatch, soft):
    monkeypatch.setattr(lexical_solver, "_TOLERANCE", 1e-14)
    share = np.random.default_rng(1).random(60)
    share = share if soft else share.round()
    problem = small_problem(np.stack([1 - share, share], axis=1))
    solve = lexical_solver.solve
    quick, continued, other = solve(problem, 0.3), solve(problem, 0.3, solve(problem, 1.0)), solve(problem, 0.5)
    monkeypatch.setattr(lexical_solver, "_is_one_question", lambda problem: False)
    plain = solve(problem, 0.3)
    for found in (quick, continued):
        for part in ("words", "meanings", "bias"):
            assert np.allclose(getattr(found, part), getattr(plain, part), atol=1e-4), part
    assert not np.allclose(other.words, plain.words, atol=1e-2)  # another penalty would show


def test_targets_that_share_no_row_between_them_are_two_questions():
    assert lexical_solver._is_one_question(small_problem(np.full((60, 2), 0.5)))
    assert not lexical_solver._is_one_question(small_problem(np.full((60, 2), 0.9)))


def test_rare_ngrams_in_groups_get_the_very_weights_of_all(monkeypatch):
    monkeypatch.setattr(lexical_solver, "_TOLERANCE", 1e-14)
    generator = np.random.default_rng(0)
    times = generator.integers(1, 3, (40, 600)) * (generator.random((40, 600)) < 0.01)
    times = times[:, times.any(axis=0)]
    counts, occurrences = sparse.csr_matrix(times * generator.random((40, 1))), times.sum(axis=0)
    known, embeddings = counts[:, [0, 3, 7]], generator.normal(size=(3, 5)).astype(np.float32)
    targets = np.eye(3)[generator.integers(0, 3, 40)]

    def solve(groups):
        problem = lexical_solver.Problem(
            counts @ groups, groups.getnnz(axis=0), [known, embeddings], targets, "single_label_classification"
        )
        found = lexical_solver.solve(problem.select(np.arange(30)), 0.3)  # of some rows, as in a fold
        return groups @ found.words, found.meanings, found.bias, found.answers(problem)

    grouped, alone = lexical.group_rare(counts, occurrences), sparse.identity(times.shape[1], format="csr")
    assert grouped.shape[1] < 0.8 * times.shape[1]
    for quick, plain in zip(solve(grouped), solve(alone), strict=True):
        assert np.allclose(quick, plain, atol=1e-4)
    twice = lexical.group_rare(counts, np.ones_like(occurrences))  # were all taken for rare, they would differ
    assert not np.allclose(solve(twice)[0], solve(alone)[0], atol=1e-2)


def test_of_many_rows_some_choose_and_all_are_fitted_to(monkeypatch):
    monkeypatch.setattr(lexical, "SEARCHED_ROWS", 150)
    sizes, correct = [], lexical.solve

    def watched(problem, *arguments):
        if problem.kind == "single_label_classification":  # not as the one question that it becomes
            sizes.append(len(problem.targets))
        return correct(problem, *arguments)

    monkeypatch.setattr(lexical, "solve", watched)
    model = make_model()
    rows = fit_lexical_exit(model, TOKENIZER, make_rows(600), show_progress=False)
    assert max(sizes[: -lexical.FOLDS - 1]) <= 150
    assert sizes[-lexical.FOLDS - 1 :] == [480] * lexical.FOLDS + [600]
    new = make_rows(500, seed=1)
    right = (says(model, new).argmax(axis=1) == np.array(new["labels"])).mean()
    assert right > 0.9
    unseen = np.array(rows["lexical_logits"]).argmax(axis=1) == np.array(rows["labels"])
    assert abs(unseen.mean() - right) < 0.05


def test_more_rows_than_are_fitted_to_are_all_answered(monkeypatch):
    monkeypatch.setattr(lexical, "MOST_ROWS", 300)
    rows = fit_lexical_exit(make_model(), TOKENIZER, make_rows(), show_progress=False)
    logits = np.array(rows["lexical_logits"])
    assert logits.shape == (400, 2)
    assert (logits.argmax(axis=1) == np.array(rows["labels"])).mean() > 0.8


def test_copies_of_a_row_do_not_tell_on_each_other():
    generator = np.random.default_rng(0)
    rows = make_rows(200)
    answers = generator.integers(0, 2, 200)  # nothing to be learned, only to be remembered
    twice = datasets.concatenate_datasets([rows, rows]).remove_columns("labels")
    targets = np.tile(answers, 2)
    logits = np.array(fit_lexical_exit(make_model(), TOKENIZER, twice, targets, show_progress=False)["lexical_logits"])
    assert (logits.argmax(axis=1) == targets).mean() < 0.65


@pytest.mark.parametrize("kind", ["single_label_classification", "regression"])
def test_rows_without_targets_are_answered_by_what_was_fitted_to_other_folds(kind):
    rows = make_rows().remove_columns("labels")
    targets = np.array(make_rows()["labels"])
    targets = targets if kind == "single_label_classification" else 3 + targets[:, None] * [1.0, -2.0]
    folds = lexical.text_folds(rows["input_ids"], 0)
    alone, model = make_model(problem_type=kind), make_model(problem_type=kind)
    expected = np.array(fit_lexical_exit(alone, TOKENIZER, rows, targets, show_progress=False)["lexical_logits"])
    # Copies of the rows, in their folds and then in others.
    more = datasets.concatenate_datasets([rows, rows, rows])
    folds = np.concatenate([folds, folds, (folds + 1) % lexical.FOLDS])
    fitted = fit_lexical_exit(model, TOKENIZER, more, targets, folds=folds, show_progress=False)
    _, same_fold, other_fold = logits = np.array(fitted["lexical_logits"]).reshape(3, 400, 2)
    assert np.array_equal(logits[0], expected)
    assert np.allclose(same_fold, expected, atol=1e-4)
    assert np.abs(other_fold - expected).max() > 0.1
    assert torch.equal(model.exits[0].weight, alone.exits[0].weight)


def test_it_is_the_same_every_time():
    first, second = make_model(), make_model()
    logits = [
        fit_lexical_exit(m, TOKENIZER, make_rows(), show_progress=False)["lexical_logits"][:] for m in (first, second)
    ]
    assert logits[0] == logits[1]
    assert torch.equal(first.exits[0].weight, second.exits[0].weight)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([0] * 399 + [2], r"whole numbers in \[0, 2\)"),
        ([0.5] * 400, r"whole numbers in \[0, 2\)"),
        (np.zeros((400, 3)), r"shape \(400, 2\), got \(400, 3\)"),
        (np.full((400, 2), np.nan), "finite"),
    ],
)
def test_bad_targets_are_a_plain_error(targets, message):
    with pytest.raises(ValueError, match=message):
        fit_lexical_exit(
            make_model(problem_type="single_label_classification"), TOKENIZER, make_rows(), targets, show_progress=False
        )


def test_what_cannot_be_fitted_is_a_plain_error():
    with pytest.raises(ValueError, match="lexical_exit=True"):
        fit_lexical_exit(make_model(lexical_exit=False), TOKENIZER, make_rows())
    with pytest.raises(ValueError, match="at least 5"):
        fit_lexical_exit(make_model(), TOKENIZER, make_rows().select(range(4)))
    with pytest.raises(ValueError, match="no labels"):
        fit_lexical_exit(make_model(), TOKENIZER, make_rows().remove_columns("labels"))


class NumberTokenizer:
    """A text is its token ids."""

    model_max_length = 100

    def __call__(self, *columns, truncation, max_length, return_tensors):
        ids = [2, *(int(word) for column in columns for word in [*column[0].split(), 3])]
        return {"input_ids": torch.tensor([ids])}

    def decode(self, ids):
        return " ".join(map(str, ids.tolist()))


def test_an_explanation_names_the_words_that_decided():
    model = make_model()
    fit_lexical_exit(model, TOKENIZER, make_rows(), show_progress=False)
    texts = ["50 60 12 70", "12 50 24 25", ("40 50", "60 14")]
    good, _, pair = explain_lexical_exit(model, NumberTokenizer(), texts, top=4)
    assert good[0][0] == "12"
    assert all(weight > 0 for _, weight in good + pair)
    assert [weight for _, weight in good] == sorted((weight for _, weight in good), reverse=True)
    # All n-grams together and the constant are the whole answer.
    everything = explain_lexical_exit(model, NumberTokenizer(), texts[:1], top=100)[0]
    logits = model.exits[0](torch.tensor([[2, 50, 60, 12, 70, 3]]), None)[0] - model.exits[0].bias
    assert sum(weight for _, weight in everything) >= float(logits.max() - logits.min()) - 1e-4
    with pytest.raises(ValueError, match="lexical_exit=True"):
        explain_lexical_exit(make_model(lexical_exit=False), NumberTokenizer(), ["50"])
