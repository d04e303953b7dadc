"""Fitting exit 0, once before the fine-tuning: what is counted, and which penalty is chosen. See `lexical_solver`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import sparse

from transformers_badge.model.loss_badge import infer_problem_type
from transformers_badge.model.ngrams_badge import ngram_buckets
from transformers_badge.model.rows_badge import pad_rows
from transformers_badge.training.fine_tune import special_ids
from transformers_badge.training.lexical_solver import Problem, Solution, answer_loss, shorter, solve


Array = np.ndarray[Any, np.dtype[Any]]

MOST_ROWS = 1_000_000  # that are fitted to, drawn at random: memory is bounded
FOLDS = 5
SEARCHED_ROWS = 20_000  # at most, that penalty and scale are chosen on: more would hardly choose others
# Penalties of the squared weights, from strict to bold; the first is a constant answer, for where words say nothing.
PENALTIES = (float("inf"), 3.0, 1.0, 0.3, 0.1, 0.03)
SCALES = (0.03, 0.06)  # s, how much the embeddings speak for their words
_CHUNK = 1024  # rows that are hashed at a time


def fit_lexical_exit(
    model: Any,
    tokenizer: Any,
    rows: Any,
    targets: Any | None = None,
    *,
    folds: Any | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> Any:
    """Fit the lexical exit of a model to tokenized rows; the rest of the model stays as it is.

    How much it may rely on single words is chosen on rows held out, for overconfidence at exit 0 is what hurts. Where
    words say nothing, the exit learns to answer all rows nearly alike.

    Args:
        model: a `BadgeForSequenceClassification` with `lexical_exit=True`.
        tokenizer: the tokenizer of its encoder; its special tokens will be left out.
        rows: a `datasets.Dataset` with `input_ids`, not padded.
        targets: (rows,) class indices or values, or (rows, labels) probabilities or values. Default: the `labels` of
            the rows. With `folds` there may be fewer than rows: the rows behind are answered, and not fitted to.
        folds: (rows,), whole numbers from 0 to 4; the rows of a fold are held out together. Default: at random, but
            equal rows together, as `text_folds` has it.
        seed: of the folds.

    Returns:
        The rows with one more column, `lexical_logits`: what an exit fitted to the other rows says of each. `forward`
        takes it, and what is trained on these rows learns how far the exit is to be trusted on new ones. Trained on
        rows without it, exits learn as if there were no exit 0, which `teach_exits` lets in afterwards: better exits.

    Raises:
        ValueError: the model has no lexical exit, fewer different rows than folds, or targets that do not fit.

    Example:
        >>> model = BadgeForSequenceClassification.from_encoder("google-bert/bert-base-uncased", lexical_exit=True)
        >>> fit_lexical_exit(model, tokenizer, rows)
        >>> Trainer(model=model, train_dataset=rows, processing_class=tokenizer, ...).train()
        >>> teach_exits(model, tokenizer, rows)
    """
    import torch
    from tqdm.auto import tqdm

    if not model.config.lexical_exit:
        raise ValueError("The model has no lexical exit: make it with lexical_exit=True.")
    if targets is None:
        if "labels" not in rows.column_names:
            raise ValueError("The rows have no labels: give targets, or rows with labels.")
        targets = rows["labels"]
    kind, goals = _goals(model, targets, len(rows) if folds is None else min(len(targets), len(rows)))
    center, spread = np.zeros(goals.shape[1]), np.ones(goals.shape[1])
    if kind == "regression":  # penalties are for values of the size of logits
        center, spread = goals.mean(axis=0), np.maximum(goals.std(axis=0), 1e-12)
    model.config.lexical_ignored_ids = special_ids(tokenizer)

    order = np.random.default_rng(seed).permutation(len(goals))
    fitted_to, others = np.sort(order[:MOST_ROWS]), np.sort(order[MOST_ROWS:])
    behind = np.arange(len(goals), len(rows))
    folds_behind = np.asarray(folds)[behind] if behind.size else behind
    input_ids = rows["input_ids"] if len(fitted_to) == len(rows) else rows.select(fitted_to)["input_ids"]
    folds = text_folds(input_ids, seed) if folds is None else np.asarray(folds)[fitted_to]
    if not np.array_equal(np.unique(folds), np.arange(FOLDS)):
        raise ValueError(
            f"The lexical exit needs at least {FOLDS} different rows to be fitted, got {len(np.unique(folds))}."
        )
    with tqdm(total=len(fitted_to) + len(behind), desc="n-grams", unit="row", disable=not show_progress) as bar:
        counted = count_ngrams(input_ids, model.config, bar.update)
        if behind.size:
            ngrams_behind = count_ngrams(rows.select(behind)["input_ids"], model.config, bar.update).ngrams
    mixing, embeddings = _embeddings(model, counted)
    used = np.flatnonzero(counted.occurrences)
    known = used[np.diff(mixing.indptr)[used] > 0]
    ngrams = counted.ngrams[:, used]
    groups = group_rare(ngrams, counted.occurrences[used])
    goals = (goals[fitted_to] - center) / spread
    problem = Problem(
        counts=ngrams @ groups,
        sizes=groups.getnnz(axis=0),
        meant=shorter([counted.ngrams[:, known], mixing[known] @ embeddings]),
        targets=goals,
        kind=kind,
    )

    def table(solution: Solution) -> Array:
        """One weight per bucket and label."""
        weights = np.asarray(mixing @ (embeddings @ solution.meanings.astype(np.float32)), dtype=np.float64)
        weights[used] += groups @ solution.words
        return weights

    logits = np.zeros((len(rows), goals.shape[1]))
    fits = len(SCALES) * len(PENALTIES) + FOLDS + 1
    with tqdm(total=fits, desc="exit 0", unit="fit", disable=not show_progress) as bar:
        searched = np.sort(np.random.default_rng(seed).permutation(len(folds))[:SEARCHED_ROWS])
        rest, held_out = (problem.select(searched[part]) for part in (folds[searched] != 0, folds[searched] == 0))
        scale, penalty, chosen = _best(rest, held_out, bar.update)
        problem = replace(problem, scale=scale)
        for fold in range(FOLDS):
            rest, held_out = (problem.select(np.flatnonzero(part)) for part in (folds != fold, folds == fold))
            # The search left the first fold out as well, and so has solved this already if it saw all other rows.
            solution = chosen if fold == 0 and len(searched) == len(folds) else solve(rest, penalty)
            logits[fitted_to[folds == fold]] = solution.answers(held_out) * spread + center
            here = np.flatnonzero(folds_behind == fold)
            if here.size:
                logits[behind[here]] = (ngrams_behind[here] @ table(solution) + solution.bias) * spread + center
            bar.update(1)
        solution = solve(problem, penalty)
        bar.update(1)

    lexical = model.exits[0]
    with torch.no_grad():
        lexical.weight.copy_(torch.from_numpy(table(solution) * spread))
        lexical.bias.copy_(torch.from_numpy(solution.bias * spread + center))
        if lexical.phrases is not None:
            lexical.phrases.weight.zero_()  # what they said went with other words
        if others.size:  # it was not fitted to these: what it says now is what it would say
            answered = [
                lexical(torch.from_numpy(ids).to(model.device), torch.from_numpy(mask).to(model.device)).float().cpu()
                for ids, mask in _padded(rows.select(others)["input_ids"])
            ]
            logits[others] = torch.cat(answered)[:, : model.num_labels].numpy()
    logits = np.pad(logits, ((0, 0), (0, model.config.lexical_columns - model.num_labels)))
    if "lexical_logits" in rows.column_names:
        rows = rows.remove_columns("lexical_logits")
    return rows.add_column("lexical_logits", list(logits.astype(np.float32)))


def text_folds(input_ids: Any, seed: int) -> Array:
    """A fold for every row, (rows,); rows of the same text share one, or none of them would be held out."""
    texts: dict[tuple[int, ...], int] = {}
    text = np.array([texts.setdefault(tuple(row), len(texts)) for row in input_ids])
    return np.asarray((np.random.default_rng(seed).permutation(len(texts)) % FOLDS)[text])


def _goals(model: Any, targets: Any, rows: int) -> tuple[str, Array]:
    """The problem type, and what the exit is to say, (rows, labels)."""
    targets, labels = np.asarray(targets), model.num_labels
    kind = infer_problem_type(model.config.problem_type, labels, None)
    if model.config.problem_type is None and labels > 1 and targets.ndim == 2 and targets.shape[1] == labels:
        # As in transformers: rows that do not sum to 1 can only be several labels.
        several = not np.allclose(targets.sum(axis=1), 1, atol=1e-3)
        kind = "multi_label_classification" if several else kind
    if kind == "single_label_classification" and targets.ndim == 1:
        if targets.dtype.kind not in "iu" or targets.size == 0 or targets.min() < 0 or targets.max() >= labels:
            raise ValueError(f"labels must be whole numbers in [0, {labels}).")
        targets = np.eye(labels)[targets]
    elif kind == "regression" and targets.ndim == 1:
        targets = targets[:, None]
    targets = targets.astype(np.float64)
    if targets.shape != (rows, labels):
        raise ValueError(f"targets must have the shape ({rows}, {labels}), got {targets.shape}.")
    if not np.isfinite(targets).all() or (kind != "regression" and (targets.min() < 0 or targets.max() > 1)):
        raise ValueError("targets must be finite, and probabilities between 0 and 1 where they are not values.")
    return kind, targets


@dataclass(frozen=True)
class Counted:
    """What is to be known of token ids.

    Args:
        ngrams: (rows, buckets), sparse; see `Problem.counts`.
        occurrences: (buckets,), how often an n-gram is hashed there.
        tokens: (buckets, vocabulary), sparse: how often that is a single token, and which.
    """

    ngrams: Any
    occurrences: Array
    tokens: Any


def _padded(input_ids: Any) -> Iterator[tuple[Any, Any]]:
    """Token ids, a list of lists, in batches: ids and mask, (rows, tokens)."""
    for start in range(0, len(input_ids), _CHUNK):
        inputs, mask = pad_rows([{"input_ids": row} for row in input_ids[start : start + _CHUNK]], padding_id=0)
        yield inputs["input_ids"], mask


def count_ngrams(input_ids: Any, config: Any, on_rows: Callable[[int], Any] = lambda rows: None) -> Counted:
    """Hash token ids, a list of lists."""
    buckets, vocabulary = config.lexical_buckets, config.get_text_config().vocab_size
    found, numbers = [], []
    tokens = sparse.csr_matrix((buckets, vocabulary))
    for ids, mask in _padded(input_ids):
        at = ngram_buckets(ids, mask, config.ignored_ids, config.lexical_ngrams, buckets)
        found.append(at[at > 0].astype(np.int32))
        numbers.append((at > 0).sum(axis=1))
        alone = at[:, : ids.shape[1]]  # single tokens come first
        single = alone[alone > 0], ids[alone > 0]
        tokens += sparse.csr_matrix((np.ones(len(single[0])), single), shape=tokens.shape)
        on_rows(len(ids))
    number, columns = np.concatenate(numbers), np.concatenate(found)
    data = np.repeat(1 / np.sqrt(np.maximum(number, 1)), number)
    ngrams = sparse.csr_matrix((data, columns, np.concatenate([[0], np.cumsum(number)])), shape=(len(number), buckets))
    ngrams.sum_duplicates()
    return Counted(ngrams, np.bincount(columns, minlength=buckets), tokens)


def group_rare(ngrams: Any, occurrences: Array) -> Any:
    """The n-grams that occur once, in one row, as one: a matrix (n-grams, groups), sparse, with columns of length 1.

    Nothing tells them apart: they have the same ratio R and get the same weight. With `ngrams @ groups` in place of
    n-grams there are half as many weights to find, or fewer, and `groups @` these are the very weights of all.

    Args:
        ngrams: (rows, n-grams), sparse.
        occurrences: (n-grams,), at least 1.
    """
    columns = ngrams.tocsc()
    once = occurrences == 1
    group = np.empty(len(once), dtype=np.int64)
    group[~once] = np.arange((~once).sum())
    rows = columns.indices[columns.indptr[:-1][once]]
    group[once] = (~once).sum() + np.unique(rows, return_inverse=True)[1]
    length = np.sqrt(np.bincount(group))[group]
    return sparse.csr_matrix((1 / length, (np.arange(len(group)), group)))


def _embeddings(model: Any, counted: Counted) -> tuple[Any, Array]:
    """How much of which token's embedding stands at a bucket, (buckets, tokens) sparse; and these (tokens, hidden).

    A bucket that several n-grams share has as much of a token as occurs of it there. Tokens that do not occur stand
    where nothing else does: through these the exit knows words that it was not fitted to.
    """
    buckets, vocabulary = counted.tokens.shape
    table = model.get_input_embeddings().weight.detach().float().cpu().numpy()[:vocabulary]
    table = table - table.mean(axis=0)
    table /= max(float(table.std()), 1e-12)
    ignored = model.config.ignored_ids
    token = np.arange(len(table))[:, None]
    # A token by itself, and as the second text of a pair.
    texts = np.concatenate([token, np.full_like(token, ignored[0]), token], axis=1) if ignored else token
    places = ngram_buckets(texts, None, ignored, 1, buckets)[:, ::2]
    weights = counted.tokens
    for segment in range(places.shape[1]):
        known = np.flatnonzero(places[:, segment])
        unseen = sparse.csr_matrix((np.full(len(known), 0.01), (places[known, segment], known)), shape=weights.shape)
        if segment == 0 or unseen.multiply(counted.tokens).nnz:
            weights = weights + unseen
    total = np.maximum(np.asarray(weights.sum(axis=1)).ravel(), counted.occurrences)
    mixing = sparse.diags(1 / np.maximum(total, 1e-12)) @ weights
    return mixing.tocsr().astype(np.float32), table


def _best(rest: Problem, held_out: Problem, on_fit: Callable[[int], Any]) -> tuple[float, float, Solution]:
    """The scale and the penalty whose solution says the rows held out best, and that solution."""
    best: tuple[float, float, float, Solution] | None = None
    for scale in SCALES:
        before, least = None, np.inf
        for number, penalty in enumerate(PENALTIES):
            solution = solve(replace(rest, scale=scale), penalty, before)
            before = None if np.isinf(penalty) else solution
            loss = float(answer_loss(solution.answers(held_out), held_out)[0]) / len(held_out.targets)
            if best is None or loss < best[0]:
                best = loss, scale, penalty, solution
            if loss > least:  # bolder ones are worse still, and take longest
                on_fit(len(PENALTIES) - number)
                break
            least = loss
            on_fit(1)
    assert best is not None
    return best[1:]
